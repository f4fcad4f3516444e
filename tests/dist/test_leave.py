"""A process that has nothing left to do waits for the others, and for its own threads."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.dist.ranks import run_ranks
from tests.tiny_model import config_data, write_config


def test_no_process_ends_before_the_first_or_its_own_threads(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", config_data(tmp_path))
    first, second = run_ranks("tests.dist.leave_worker", 2, tmp_path / "ranks", str(config))
    assert second["left"] >= first["written"]
    if sys.platform == "linux":
        assert first["up"] > 0
    assert first["left_up"] == second["left_up"] == 0
