"""A folder that cannot be written is told before any work, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_sae_dist.config import ConfigError
from flash_sae_dist.folders import check_writable


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path: Path) -> None:
    check_writable("output", tmp_path)
    check_writable("output", tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_file_is_no_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output='.*': .*/file is a file; name a folder"):
        check_writable("output", tmp_path / "file" / below)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="such a folder is Linux's")
def test_where_nothing_may_be_made_is_told() -> None:
    """/proc takes no files, not even from root."""
    with pytest.raises(ConfigError, match=r"output='/proc/run' cannot be written: .*; name anoth"):
        check_writable("output", "/proc/run")
