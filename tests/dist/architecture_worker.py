"""Worker: trains an SAE of each case on however many ranks there are; returns losses and what
latents are active by the end.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_sae_dist.parallel.collectives import all_gather
from flash_sae_dist.parallel.mesh import make_mesh
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.metrics import PhaseTimer
from tests.dist.ranks import worker
from tests.test_architectures import BATCH, CPU, SPARSE, batch, started, training


def run(steps: str, *cases: str) -> dict[str, Any]:
    """By case, which is its name, engine and replicas, as `jumprelu-fused-2`; with `-dense` its
    steps begin as dense ones, as they do outside of tests.
    """
    return {case: train(int(steps), *case.split("-")) for case in cases}


def train(steps: int, case: str, engine: str, replicas: str, form: str = "") -> dict[str, Any]:
    """Losses of each step, thresholds and decoder rows of all shards."""
    density.SHARES["cpu"] = (0.4, 0.35) if form else SPARSE
    mesh = make_mesh(None, int(replicas), device=CPU)
    # The batch rule selects within a micro-batch: replicas cut other ones.
    by_batch = case in ("batch_topk", "matryoshka", "batch_topk_crosscoder")
    options: dict[str, Any] = {"grad_clip": 0.5, "micro_batches": 1 if by_batch else 2}
    like = training(case, engine, num_replicas=int(replicas), **options)
    t = started(like.sae.config, like.cfg, mesh)
    share = BATCH // mesh.num_replicas
    losses = []
    for step in range(steps):
        mine = batch(step)[mesh.replica * share : (mesh.replica + 1) * share]
        metrics = t.step(mine, PhaseTimer(CPU, enabled=False))
        losses.append([float(m) for m in metrics.scalars()])
    t.calibrate(lambda: [batch(100)[mesh.replica * share : (mesh.replica + 1) * share]])
    weights = t.final_weights()
    rows = {n: w for n, w in weights.items() if t.sae.roles[n] == "rows"}
    whole = {n: w for n, w in weights.items() if n not in rows}
    gathered = {
        n: all_gather(w, mesh.shard_group, mesh.num_shards).flatten(0, 1) for n, w in rows.items()
    }
    return {"losses": torch.tensor(losses, dtype=torch.float64), **gathered, **whole}


if __name__ == "__main__":
    worker(run)
