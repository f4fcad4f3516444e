"""Worker: trains an SAE of each case on however many ranks there are; returns losses and what
latents are active by the end.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flash_sae_dist.parallel.collectives import all_gather
from flash_sae_dist.parallel.mesh import Mesh, make_mesh
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests import test_transcoders
from tests.dist.ranks import worker
from tests.test_architectures import CPU, SPARSE, batch, started, training


def run(steps: str, *cases: str) -> dict[str, Any]:
    """By case, which is its name, with + an optimizer's, engine and replicas, as `jumprelu-fused-2`
    and `topk+muon-autograd-2`; with `-dense` its steps begin as dense ones, as they do outside of
    tests.
    """
    found = {}
    for case in cases:
        name, engine, replicas, *form = case.split("-")
        with patch.dict(density.SHARES, cpu=(0.4, 0.35) if form else SPARSE):
            found[case] = train(int(steps), name, engine, replicas)
    return found


def train(steps: int, case: str, engine: str, replicas: str) -> dict[str, Any]:
    """Losses of each step, thresholds and decoder rows of all shards."""
    mesh = make_mesh(None, int(replicas), device=CPU)
    case, _, optimizer = case.partition("+")
    # The batch rule selects within a micro-batch: replicas cut other ones.
    by_batch = case in ("batch_topk", "matryoshka", "batch_topk_crosscoder")
    options: dict[str, Any] = {"optimizer": optimizer or "adam"}
    options |= {"micro_batches": 1 if by_batch else 2}
    if optimizer != "signum":
        options["grad_clip"] = 0.5
    t = begun(case, engine, mesh, num_replicas=int(replicas), **options)

    def mine(step: int) -> list[Tensor]:
        """This replica's rows, of a transcoder those of both sides."""
        whole = (batch(step),) if t.target is None else test_transcoders.rows(step)
        share = len(whole[0]) // mesh.num_replicas
        return [side[mesh.replica * share : (mesh.replica + 1) * share] for side in whole]

    losses = []
    for step in range(steps):
        x, *y = mine(step)
        metrics = t.step(x, PhaseTimer(CPU, enabled=False), *y)
        fvus = t.engine.source_fvus
        losses.append([float(m) for m in (*metrics, *(() if fvus is None else fvus))])
    t.calibrate(lambda: [mine(100)[0]])
    weights = t.final_weights()
    rows = {n: w for n, w in weights.items() if t.sae.roles[n] == "rows"}
    whole = {n: w for n, w in weights.items() if n not in rows}
    gathered = {
        n: all_gather(w, mesh.shard_group, mesh.num_shards).flatten(0, 1) for n, w in rows.items()
    }
    return {"losses": torch.tensor(losses, dtype=torch.float64), **gathered, **whole}


def begun(case: str, engine: str, mesh: Mesh, **options: Any) -> SAETraining:
    """A training of a case, or a transcoder's with a skip connection."""
    name = case.removeprefix("transcoder_")
    if name == case:
        like = training(case, engine, **options)
        return started(like.sae.config, like.cfg, mesh)
    like = test_transcoders.training(name, True, engine, **options)
    widths = test_transcoders.D_IN, test_transcoders.D_OUT
    return SAETraining(like.sae.config, like.cfg, widths[0], mesh, CPU, d_out=widths[1])


if __name__ == "__main__":
    worker(run)
