"""Sharded training equals one-process training: selections, losses, ties, short rows, AuxK,
replicas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ranks import run_ranks

SCRIPT = Path(__file__).with_name("train_worker.py")
STEPS = 200


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single")
    return {
        precision: run_ranks(SCRIPT, 1, out / precision, precision, str(STEPS), "1", "96")[0]
        for precision in ("float64", "float32")
    }


def test_the_data_is_awkward(single: dict[str, Any]) -> None:
    run = single["float64"]
    assert run["short_rows"] > 100, "some rows must have fewer than k positive activations"
    assert (run["losses"][:, 1] > 0).any(), "AuxK must have had dead latents to work on"
    assert run["losses"][-1, 0] < run["losses"][0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_float64_equals_one_process(
    single: dict[str, Any], tmp_path: Path, world: int, replicas: int
) -> None:
    runs = run_ranks(SCRIPT, world, tmp_path, "float64", str(STEPS), str(replicas), "96")
    for run in runs:
        assert torch.equal(run["selected"], single["float64"]["selected"])
        torch.testing.assert_close(
            run["losses"], single["float64"]["losses"], rtol=1e-9, atol=1e-15
        )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_float32_is_close_to_one_process(
    single: dict[str, Any], tmp_path: Path, world: int
) -> None:
    runs = run_ranks(SCRIPT, world, tmp_path, "float32", str(STEPS), "1", "96")
    for run in runs:
        torch.testing.assert_close(
            run["losses"][:, 0], single["float32"]["losses"][:, 0], rtol=1e-3, atol=0
        )
