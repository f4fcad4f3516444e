"""A process that has nothing left to do waits for the others before it ends."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks
from tests.tiny_model import config_data, write_config


def test_no_process_ends_before_the_first_has_written(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", config_data(tmp_path))
    script = Path(__file__).with_name("leave_worker.py")
    first, second = run_ranks(script, 2, tmp_path / "ranks", str(config))
    assert second["left"] >= first["written"]
