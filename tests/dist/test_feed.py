"""Shards get the whole of their replica's batches, whatever else they tell one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.launch.bench_load import make_store
from tests.dist.feed_worker import BATCH, COUNT, PRELOADS, batch
from tests.dist.ranks import run_ranks
from tests.dist.test_gpu import two_gpus


def whole_batches(tmp_path: Path, world: int, replicas: int, left_after: int) -> None:
    """Each rank saw its replica's rows of the first batches, and then of all."""
    arguments = ("run", str(replicas), str(left_after))
    ranks = run_ranks("tests.dist.feed_worker", world, tmp_path, *arguments)
    for rank in ranks:
        parts = [batch(i, torch.bfloat16).chunk(replicas)[rank["replica"]] for i in range(COUNT)]
        assert torch.equal(rank["seen"], torch.stack(parts[:left_after] + parts))


@pytest.mark.parametrize(("world", "replicas", "left_after"), [(2, 1, 0), (2, 2, 5), (4, 2, 49)])
def test_every_shard_gets_the_whole_batch(
    tmp_path: Path, world: int, replicas: int, left_after: int
) -> None:
    whole_batches(tmp_path, world, replicas, left_after)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(str(tmp_path_factory.mktemp("feed") / "s.zarr"), 5000, 16)


def whole_loads(tmp_path: Path, store: ActivationStore, world: int, replicas: int) -> None:
    """Ranks that read a store together get the batches of one that reads alone."""
    with ActivationLoader(
        store, "rows", batch_tokens=BATCH, seed=0, num_steps=COUNT, holdout=0.1
    ) as alone:
        whole = torch.stack(list(alone))
    assert len(alone.left_out.rows)
    arguments = ("load", store.path, str(replicas))
    for rank in run_ranks("tests.dist.feed_worker", world, tmp_path, *arguments):
        want = whole.chunk(replicas, dim=1)[rank["replica"]]
        for preload in PRELOADS:
            assert torch.equal(rank[preload], want), preload


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 3), (4, 2)])
def test_ranks_share_a_stores_batches(
    tmp_path: Path, store: ActivationStore, world: int, replicas: int
) -> None:
    whole_loads(tmp_path, store, world, replicas)


@pytest.mark.gpu
@two_gpus
def test_two_gpus_share_a_stores_batches(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda")
    monkeypatch.setenv("WORKER_BACKEND", "nccl")
    whole_loads(tmp_path, store, 2, 1)


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
