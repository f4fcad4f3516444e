"""Two ranks never take different designs of the encoder, and none waits for one that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("case", "want"),
    [
        ("found", ["tiles", "tiles"]),
        ("no memory", ["fused", "fused"]),
        ("fails", ["a mistake", "fused"]),
    ],
)
def test_all_ranks_take_what_the_first_found(tmp_path: Path, case: str, want: list[str]) -> None:
    assert run_ranks("tests.dist.choice_worker", 2, tmp_path, case) == want
