"""Worker: reads batches through a feed while the step's own collectives run, and leaves early."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from flash_sae_dist.activations.feed import BatchFeed
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.train import Preload
from flash_sae_dist.parallel import collectives
from flash_sae_dist.parallel.mesh import make_mesh
from tests.dist.ranks import worker

BATCH, WIDTH, COUNT = 48, 10, 50
PRELOADS: tuple[Preload, ...] = ("none", "host", "device")
# "cuda" is each rank's own GPU.
DEVICE = torch.device(os.environ.get("TRAIN_WORKER_DEVICE", "cpu"))
if str(DEVICE) == "cuda":
    DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, WIDTH, generator=g).to(dtype)


class Source:
    """This rank's rows of each batch."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self.rows, self.made = rows, 0
        self.shapes, self.dtype = [(rows[0].shape[0], WIDTH)], rows[0].dtype

    def fill_(self, out: torch.Tensor) -> None:
        out.copy_(self.rows[self.made], non_blocking=True)
        self.made += 1


def run(replicas: str, left_after: str) -> dict[str, Any]:
    """What a feed that is left after some batches gave, and one that is read to its end."""
    mesh = make_mesh(None, int(replicas), device=DEVICE)
    rows = [batch(i, torch.bfloat16).chunk(mesh.members)[mesh.member] for i in range(COUNT)]
    if DEVICE.type == "cuda":
        rows = [part.pin_memory() for part in rows]
    work = torch.ones(1 if DEVICE.type == "cpu" else 2048, 2048, device=DEVICE)
    seen = []
    for count in (int(left_after), COUNT):
        with BatchFeed(Source(rows), COUNT, mesh, DEVICE) as feed:
            for number, (x,) in enumerate(feed):
                if number == count:
                    break
                if mesh.shard == number % mesh.num_shards:
                    for _ in range(8):
                        work = (work @ work.T @ work).clamp(0, 1)
                collectives.all_reduce_(work, mesh.shard_group, mesh.num_shards)
                seen.append(x.clone())
                x.fill_(torch.nan)
    return {"seen": torch.stack(seen).cpu(), "replica": mesh.replica}


def load(path: str, replicas: str) -> dict[str, Any]:
    """All batches of a store, as a replica's shards get them, wherever rows are kept."""
    mesh = make_mesh(None, int(replicas), device=DEVICE)
    store, found = ActivationStore.open(path), dict[str, Any](replica=mesh.replica)
    for preload in PRELOADS:
        source = ActivationLoader(
            store, "rows", batch_tokens=BATCH, seed=0, num_steps=COUNT, rank=mesh.member,
            num_ranks=mesh.members, device=DEVICE, holdout=0.1, preload=preload,
        )  # fmt: skip
        with source, BatchFeed(source, COUNT, mesh, DEVICE) as feed:
            found[preload] = torch.stack([x.clone() for (x,) in feed]).cpu()
    return found


def either(what: str, *arguments: str) -> dict[str, Any]:
    """Runs one of the two."""
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"run": run, "load": load}
    return kinds[what](*arguments)


if __name__ == "__main__":
    worker(either)
