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
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """One process: the plain step in both precisions, the fused one in float64."""
    out = tmp_path_factory.mktemp("single")
    kinds = [("float64", "plain"), ("float32", "plain"), ("float64", "fused")]
    return {
        (precision, kind): run_ranks(SCRIPT, 1, out / precision / kind, *args(precision, kind))[0]
        for precision, kind in kinds
    }


def args(precision: str, kind: str, replicas: int = 1) -> tuple[str, ...]:
    """The worker's arguments: latents are dead after two batches without firing."""
    return precision, str(STEPS), str(replicas), "96", kind


def assert_equal(run: dict[str, Any], want: dict[str, Any]) -> None:
    assert run["selected"].shape[0] == STEPS
    assert torch.equal(run["selected"], want["selected"])
    torch.testing.assert_close(run["losses"], want["losses"], rtol=1e-9, atol=1e-15)


def test_the_data_is_awkward(single: dict[tuple[str, str], Any]) -> None:
    run = single["float64", "plain"]
    assert run["short_rows"] > 100, "some rows must have fewer than k positive activations"
    assert (run["losses"][:, 1] > 0).any(), "AuxK must have had dead latents to work on"
    assert run["losses"][-1, 0] < run["losses"][0, 0]


def test_the_fused_step_equals_the_plain_one(single: dict[tuple[str, str], Any]) -> None:
    assert_equal(single["float64", "fused"], single["float64", "plain"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "replicas", "kind"),
    [(2, 1, "fused"), (4, 1, "fused"), (2, 1, "plain"), (2, 2, "plain"), (4, 2, "plain")],
)
def test_float64_equals_one_process(
    single: dict[tuple[str, str], Any], tmp_path: Path, world: int, replicas: int, kind: str
) -> None:
    for run in run_ranks(SCRIPT, world, tmp_path, *args("float64", kind, replicas)):
        assert_equal(run, single["float64", "plain"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_float32_is_close_to_one_process(
    single: dict[tuple[str, str], Any], tmp_path: Path, world: int
) -> None:
    want = single["float32", "plain"]["losses"][:, 0]
    for run in run_ranks(SCRIPT, world, tmp_path, *args("float32", "fused")):
        torch.testing.assert_close(run["losses"][:, 0], want, rtol=1e-3, atol=0)
