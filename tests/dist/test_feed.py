"""Shards get the whole of their replica's batches, whatever else they tell one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.feed_worker import COUNT, batch
from tests.dist.ranks import run_ranks
from tests.dist.test_gpu import two_gpus


def whole_batches(tmp_path: Path, world: int, replicas: int, left_after: int) -> None:
    """Each rank saw its replica's rows of the first batches, and then of all."""
    ranks = run_ranks("tests.dist.feed_worker", world, tmp_path, str(replicas), str(left_after))
    for rank in ranks:
        parts = [batch(i, torch.bfloat16).chunk(replicas)[rank["replica"]] for i in range(COUNT)]
        assert torch.equal(rank["seen"], torch.stack(parts[:left_after] + parts))


@pytest.mark.parametrize(("world", "replicas", "left_after"), [(2, 1, 0), (2, 2, 5), (4, 2, 49)])
def test_every_shard_gets_the_whole_batch(
    tmp_path: Path, world: int, replicas: int, left_after: int
) -> None:
    whole_batches(tmp_path, world, replicas, left_after)


@pytest.mark.gpu
def test_two_ranks_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda:0")
    whole_batches(tmp_path, 2, 1, 5)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("left_after", [0, 1, 5])
def test_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_after: int) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda")
    monkeypatch.setenv("WORKER_BACKEND", "nccl")
    whole_batches(tmp_path, 2, 1, left_after)
