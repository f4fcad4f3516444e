"""Two ranks never take different designs of the encoder, whatever each measured."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks


def test_all_ranks_take_what_the_first_found(tmp_path: Path) -> None:
    script = Path(__file__).with_name("choice_worker.py")
    assert run_ranks(script, 2, tmp_path) == ["tiles", "tiles"]
