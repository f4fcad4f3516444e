"""Worker: trains SAEs on awkward data, on however many ranks there are, and returns all that they
selected.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.models import dead_latents
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel import collectives
from flash_sae_dist.parallel.mesh import Mesh, make_mesh
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.dist.ranks import worker

D_IN, D_SAE, K, BATCH = 16, 64, 6, 48
# Of a step in milliseconds the usual hundred are long to wait for.
LISTED_EVERY = 25
# "cuda" is each rank's own GPU.
DEVICE = torch.device(os.environ.get("TRAIN_WORKER_DEVICE", "cpu"))
if str(DEVICE) == "cuda":
    DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    """Mixtures of few directions, with repeated rows, a row at the median and a heavy tail."""
    g = torch.Generator().manual_seed(step)
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    codes = torch.rand(BATCH, 24, generator=g) * (torch.rand(BATCH, 24, generator=g) < 0.1)
    x = codes @ directions + 0.01 * torch.randn(BATCH, D_IN, generator=g)
    x[1] = x[0]
    x[2] = 0
    x[3] *= 100
    return x.to(DEVICE, dtype)


def global_selection(training: SAETraining, x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """[N, d_sae] bool: which latents of all shards are active."""
    top = training.sae.encode(x)
    local = torch.zeros(x.shape[0], training.sae.d_sae_local, dtype=torch.int32, device=x.device)
    local.scatter_reduce_(1, top.latents.long(), (top.values > 0).int(), reduce="amax")
    parts = collectives.all_gather(local, mesh.shard_group, mesh.num_shards)
    return parts.permute(1, 0, 2).flatten(1).bool()


def run(steps: str, *cases: str) -> dict[str, Any]:
    """By case, which is its precision, engine, replicas and variant, as `float64-fused-1-auxk`."""
    if DEVICE.type == "cpu":
        dead_latents.CHECK_EVERY_STEPS = LISTED_EVERY
    return {case: train(int(steps), *case.split("-")) for case in cases}


VARIANTS: dict[str, dict[str, Any]] = {
    "auxk": {},
    "ghost": {"dead_latents": "ghost", "k_aux": 2},
    "clipped": {
        **{"grad_clip": 0.05, "micro_batches": 3, "k_aux": 2},
        "encoder_scale": "least_squares",
    },
    "normalized": {"normalize": "unit_mean_square"},
}


def train(steps: int, precision: str, kind: str, replicas: str, variant: str) -> dict[str, Any]:
    """One SAE whose latents are dead after two batches without firing."""
    mesh = make_mesh(None, int(replicas), device=DEVICE)
    cfg = ENGINES[kind](
        num_tokens=steps * BATCH,
        batch_tokens=BATCH,
        lr=3e-3,
        warmup_steps=10,
        precision=precision,
        engine=kind,
        num_replicas=int(replicas),
        dead_after_tokens=2 * BATCH,
        seed=3,
        **VARIANTS[variant],
    )
    training = SAETraining(TopKConfig(k=K, d_sae=D_SAE), cfg, D_IN, mesh, DEVICE)
    with torch.no_grad():
        # Each latent has a twin on the other half of the shards, and negative biases leave rows
        # short of k. Every fourth latent starts so low that it is soon dead, yet fires for the
        # heavy row's direction.
        training.sae.b_enc.fill_(-0.2)
        training.sae.b_enc[::4] = -1.2
        whole = collectives.all_gather(training.sae.W_enc.data, mesh.shard_group, mesh.num_shards)
        whole = whole.flatten(0, 1)
        whole[D_SAE // 2 :] = whole[: D_SAE // 2]
        start = training.sae.first_latent
        training.sae.W_enc.copy_(whole[start : start + training.sae.d_sae_local])
        training.sae.W_dec.copy_(training.sae.W_enc)
    losses, selected, short, listed = [], [], 0, 0
    per_replica = BATCH // mesh.num_replicas
    for step in range(steps):
        x = batch(step, training.master_dtype)
        mine = x[mesh.replica * per_replica : (mesh.replica + 1) * per_replica]
        if step == 0:
            # As the step itself will do, so that its selection is among those compared.
            training.init_b_dec(mine)
        active = global_selection(training, x, mesh)
        selected.append(active)
        short += int((active.sum(1) < K).sum())
        metrics = training.step(mine, PhaseTimer(DEVICE, enabled=False))
        losses.append([float(m) for m in metrics])
        listed = max(listed, training.dead.num_listed)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "selected": torch.stack(selected).cpu(),
        "short_rows": short,
        "listed": listed,
    }


if __name__ == "__main__":
    worker(run)
