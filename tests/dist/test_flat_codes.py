"""The largest of a whole batch over shards and replicas, and training on flat lists, equal one
process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.dist.flat_worker import F, N, cases
from tests.dist.ranks import run_ranks

WORKER = "tests.dist.flat_worker"
REPLICAS = {1: ("1",), 2: ("1", "2"), 4: ("1", "2", "4")}
PLACES = [(world, replicas) for world, several in REPLICAS.items() for replicas in several]
Runs = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each number of processes found, by rank."""

    @functools.cache
    def launch(world: int) -> list[dict[str, Any]]:
        return run_ranks(WORKER, world, tmp_path_factory.mktemp("flat"), *REPLICAS[world])

    return launch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("world", "replicas"), PLACES)
def test_the_batch_rule_is_exact_over_shards_and_replicas(
    runs: Runs, world: int, replicas: str, dtype: torch.dtype
) -> None:
    for name, (pre, k) in cases(dtype).items():
        if world == 1 and not pre.isfinite().all():
            continue  # tested where the encoder is
        acts = pre.relu()
        # A stable sort puts equal ones in the order of (token, latent), and NaN first.
        best = acts.flatten().sort(descending=True, stable=True).indices[: N * k]
        want = torch.zeros(N * F, dtype=dtype)
        want[best] = acts.flatten()[best]
        for rank in runs(world):
            got = rank[replicas][str(dtype)][name].flatten()
            assert got.equal(want) or (
                name == "nan" and torch.allclose(got, want, 0, 0, equal_nan=True)
            ), name


@pytest.mark.slow
@pytest.mark.parametrize(("world", "replicas"), PLACES[1:])
def test_training_equals_one_process(runs: Runs, world: int, replicas: str) -> None:
    for case in ("fused-batch", "fused-jump", "autograd-batch"):
        want = runs(1)[0]["1"][case]
        assert want["metrics"][-1, 0] < want["metrics"][0, 0]
        for rank in runs(world):
            got = rank[replicas][case]
            torch.testing.assert_close(got["metrics"], want["metrics"], rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(got["W_dec"], want["W_dec"], rtol=1e-6, atol=1e-9)
