"""Progress on a terminal, in a log, and beside other processes' progress."""

from __future__ import annotations

import sys

import pytest

from flash_sae_dist.progress import progress_bar


def run(capsys: pytest.CaptureFixture[str], **options: bool) -> str:
    with progress_bar("work", 1000, "tokens", **{"enabled": True, **options}) as bar:
        for _ in range(10):
            bar.advance(100)
    return capsys.readouterr().err


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys).splitlines()
    assert len(lines) == 2, "the first part, and the end"
    assert lines[0].startswith("work:  10%, ")
    assert lines[1].startswith("work: 100%, ")
    assert all("tokens/s" in line and "left" in line for line in lines)


def test_only_one_process_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, enabled=False) == ""


def test_a_bar_on_a_terminal_lines_beside_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = run(capsys)
    assert "work" in bar
    assert "100%" in bar
    assert "tokens/s" in bar
    assert "\x1b" in bar, "drawn in place"
    assert "\x1b" not in run(capsys, shared=True)
