"""Training on any P x R equals one-process training: selections, losses, ties, short rows, AuxK,
ghost gradients, clipping, micro-batches, normalized rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.dist.ranks import run_ranks

WORKER = "tests.dist.train_worker"
# Dead latents are listed every 25 steps there.
STEPS = 60
VARIANTS = ("auxk", "ghost", "clipped", "normalized")
# By number of processes what one launch trains: precision, engine, replicas and variant.
CASES = {
    1: (
        "float64-autograd-1-auxk",
        "float64-autograd-1-clipped",
        "float32-autograd-1-auxk",
        *(f"float64-fused-1-{variant}" for variant in VARIANTS),
    ),
    2: (
        "float64-autograd-1-auxk",
        "float64-autograd-2-clipped",
        "float32-fused-1-auxk",
        *(f"float64-fused-{replicas}-{v}" for replicas in (1, 2) for v in VARIANTS),
    ),
    4: (
        "float64-fused-1-auxk",
        "float64-autograd-2-auxk",
        "float64-fused-4-clipped",
        "float32-fused-1-auxk",
        *(f"float64-fused-2-{variant}" for variant in VARIANTS),
    ),
}
Runs = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All cases of a number of processes, by rank."""

    @functools.cache
    def launch(world: int) -> list[dict[str, Any]]:
        return run_ranks(WORKER, world, tmp_path_factory.mktemp("runs"), str(STEPS), *CASES[world])

    return launch


@pytest.fixture(scope="module")
def single(runs: Runs) -> dict[str, Any]:
    return runs(1)[0]


def assert_equal(run: dict[str, Any], want: dict[str, Any]) -> None:
    assert run["selected"].shape[0] == STEPS
    assert torch.equal(run["selected"], want["selected"])
    torch.testing.assert_close(run["losses"], want["losses"], rtol=1e-9, atol=1e-15)


def test_the_data_is_awkward(single: dict[str, Any]) -> None:
    run = single["float64-autograd-1-auxk"]
    assert run["short_rows"] > 100, "some rows must have fewer than k positive activations"
    for variant in VARIANTS:
        run = single[f"float64-fused-1-{variant}"]
        assert (run["losses"][:, 1] > 0).any(), "dead latents must have had work"
        assert run["losses"][-1, 0] < run["losses"][0, 0]
    # Of more than k_aux = 2 dead latents some are selected.
    assert single["float64-fused-1-ghost"]["listed"] > 2
    assert single["float64-fused-1-clipped"]["listed"] > 2


@pytest.mark.parametrize("variant", ["auxk", "clipped"])
def test_the_fused_engine_equals_autograd(single: dict[str, Any], variant: str) -> None:
    assert_equal(single[f"float64-fused-1-{variant}"], single[f"float64-autograd-1-{variant}"])


def test_clipping_binds(single: dict[str, Any]) -> None:
    clipped, free = (single[f"float64-fused-1-{v}"]["losses"] for v in ("clipped", "auxk"))
    assert not torch.allclose(clipped[:50], free[:50], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world in (2, 4) for case in CASES[world] if case.startswith("float64")],
)
def test_float64_equals_one_process(
    runs: Runs, single: dict[str, Any], world: int, case: str
) -> None:
    assert len(runs(world)) == world
    for rank in runs(world):
        assert_equal(rank[case], single[f"float64-fused-1-{case.rpartition('-')[2]}"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_float32_is_close_to_one_process(runs: Runs, single: dict[str, Any], world: int) -> None:
    want = single["float32-autograd-1-auxk"]["losses"][:, 0]
    for rank in runs(world):
        got = rank["float32-fused-1-auxk"]["losses"][:, 0]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
