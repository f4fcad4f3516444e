"""Files that another host sees earlier."""

from __future__ import annotations

import logging
import time

import pytest

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.parallel import agree


def test_a_file_that_comes_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    errors = [FileNotFoundError(2, "No such file", "a.json"), ConfigError("store: not there")]

    def look() -> str:
        if errors:
            raise errors.pop()
        return "seen"

    with caplog.at_level(logging.WARNING):
        assert agree.patiently(look, seconds=1) == "seen"
    assert len(caplog.records) == 1, "said once"
    assert "a shared file system may lag" in caplog.text


def test_what_never_comes_is_told_in_time() -> None:
    def look() -> None:
        raise ConfigError("store: not there")

    for seconds in (0.0, 0.3):
        began = time.monotonic()
        with pytest.raises(ConfigError, match="not there"):
            agree.patiently(look, seconds)
        assert seconds <= time.monotonic() - began < seconds + 1


def test_alone_a_mistake_is_told_at_once() -> None:
    calls = []

    def look() -> None:
        calls.append(1)
        raise ConfigError("store: not there")

    with pytest.raises(ConfigError, match="not there"):
        agree.after_first(look)
    assert calls == [1]
