"""Writes are atomic; a folder that cannot be written is refused before any work."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from flash_sae_dist import files
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.files import check_writable, replacing, write_text


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


def test_a_write_has_the_umasks_mode_and_leaves_one_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a/x.json", "1")
        write_text(tmp_path / "a/x.json", "2")
    finally:
        os.umask(before)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]
    assert (tmp_path / "a/x.json").read_text() == "2"
    assert (tmp_path / "a/x.json").stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")

    def fill_the_disk() -> None:
        with replacing(tmp_path / "x") as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_an_owner_goes_on_beating_though_a_store_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an object store's records, whose errors are UserErrors."""
    monkeypatch.setattr(files, "_BEAT_S", 0.05)
    beats = []

    class Record:
        def read(self) -> None:
            return None

        def create(self, record: dict[str, Any]) -> None:
            del record

        def write(self, record: dict[str, Any]) -> None:
            beats.append(record)
            raise UserError("it does not answer")

        def remove(self) -> None:
            raise UserError("it does not answer")

    with files.owned(Record(), "s3://bucket/x"):
        time.sleep(0.5)
    assert len(beats) > 2
