"""Worker: selects the largest of whole batches and trains on flat lists, on P x R processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.kernels import ops
from flash_sae_dist.kernels.reference import Pairs
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.parallel.collectives import all_gather
from flash_sae_dist.parallel.mesh import Mesh, make_mesh
from flash_sae_dist.parallel.selection import global_batch_mask
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.batchtopk import Batch, BatchConfig, Jump, JumpConfig
from tests.dist.ranks import worker

N, F, D = 8, 16, 12
CPU = torch.device("cpu")
CONFIGS: dict[str, SAEConfig] = {
    "batch": BatchConfig(d_sae=4 * F, k=5),
    "jump": JumpConfig(d_sae=4 * F, limit=0.3, capacity=4 * F),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"grad_clip": 0.05},
    "split": {"grad_clip": 0.05, "micro_batches": 2},
}


def cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, int]]:
    """Pre-activations [N, F] of all shards and tokens, and k."""
    gen = torch.Generator().manual_seed(1)
    levels = torch.randint(-2, 3, (N, F), generator=gen)
    found = {f"ties-{k}": (levels, k) for k in (1, 2, 5, F)}
    found["equal"] = (torch.ones(N, F), 3)
    found["equal-in-part"] = (torch.ones(N, F), 1)
    found["zero"] = (torch.zeros(N, F), 3)
    found["few"] = ((levels == 2) & (torch.arange(F) % 5 == 0), 3)
    one = -torch.ones(N, F)
    one[5] = torch.arange(F) + 1.0
    found["one-token"] = (one, 2)
    found["one-shard"] = (torch.where(torch.arange(F) < 4, levels + 3, -1), 2)
    found["random"] = (torch.randn(N, F, generator=gen), 3)
    found["inf"] = (torch.where(levels == 2, torch.inf, levels.float()), 2)
    found["nan"] = (torch.where(torch.arange(N * F).view(N, F) == 77, torch.nan, levels), 2)
    return {name: (pre.to(dtype), k) for name, (pre, k) in found.items()}


def whole(local: Tensor, mesh: Mesh) -> Tensor:
    """[n, f] of each member -> [N, F]."""
    every = all_gather(local, mesh.member_group, mesh.members)
    shape = (mesh.num_replicas, mesh.num_shards, *local.shape)
    return every.view(shape).transpose(1, 2).reshape(-1, mesh.num_shards * local.shape[1])


def dense(pairs: Pairs, width: int) -> Tensor:
    """A list as the activations [n, width]."""
    out = torch.zeros(len(pairs.offsets) - 1, width, dtype=pairs.values.dtype)
    return out.index_put_((pairs.tokens.long(), pairs.latents.long()), pairs.values, True)


def _joined(lists: list[Pairs]) -> Pairs:
    """The lists of one token each as one list, unused slots at the end."""
    used = [slice(int(one.num_pairs)) for one in lists]
    tokens = [torch.full((part.stop,), n, dtype=torch.int32) for n, part in enumerate(used)]
    latents = [one.latents[part] for one, part in zip(lists, used, strict=True)]
    values = [one.values[part] for one, part in zip(lists, used, strict=True)]
    unused = sum(len(one.values) for one in lists) - sum(map(len, values))
    joined = (torch.nn.functional.pad(torch.cat(t), (0, unused)) for t in (tokens, latents, values))
    counts = torch.tensor([0, *map(len, values)], dtype=torch.int32)
    return Pairs(*joined, counts.cumsum(0, dtype=torch.int32))


def select(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
    """By case the activations [N, F] that are left."""
    found = {}
    n, f = N // mesh.num_replicas, F // mesh.num_shards
    rows = slice(mesh.replica * n, (mesh.replica + 1) * n)
    cols = slice(mesh.shard * f, (mesh.shard + 1) * f)
    zero = torch.zeros(f, dtype=dtype)
    for name, (pre, k) in cases(dtype).items():
        mine, offered = pre[rows, cols], min(k * mesh.num_replicas, f)
        if mine.isfinite().all() or mesh.members == 1:
            pairs = ops.batch_topk_encode(
                torch.eye(n, dtype=dtype), mine.T.contiguous(), zero, offered
            )
        else:
            # By the bias, one token after another: a product would spread what is not finite.
            x, W = torch.zeros(1, 1, dtype=dtype), torch.zeros(f, 1, dtype=dtype)
            pairs = _joined([ops.batch_topk_encode(x, W, row, f) for row in mine])
        keep = global_batch_mask(pairs, N * k, mesh)
        if keep is not None:
            pairs = pairs._replace(values=torch.where(keep, pairs.values, 0))
        found[name] = whole(dense(pairs, f), mesh)
    return found


def train(mesh: Mesh, engine: str, rule: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """A short training's metrics and, put together, its decoder."""
    batch = 32
    cfg = ENGINES[engine](
        num_tokens=10**4, batch_tokens=batch, lr=1e-2, warmup_steps=0, engine=engine,
        precision="float64", dead_after_tokens=10 * batch, num_replicas=mesh.num_replicas,
        **options,
    )  # fmt: skip
    training = SAETraining(CONFIGS[rule], cfg, D, mesh, CPU)
    with torch.no_grad():
        training.sae.b_enc[::4] = -2.0
    gen = torch.Generator().manual_seed(7)
    basis = torch.randn(24, D, generator=gen, dtype=torch.float64)
    metrics = []
    for _ in range(10):
        codes = torch.rand(batch, 24, generator=gen, dtype=torch.float64) ** 6
        x = (codes * torch.rand(batch, 1, generator=gen) * 3) @ basis
        mine = x.chunk(mesh.num_replicas)[mesh.replica]
        metrics.append(torch.stack(training.step(mine, PhaseTimer(CPU, enabled=False))))
    W_dec = all_gather(training.sae.W_dec.detach(), mesh.shard_group, mesh.num_shards)
    return {"metrics": torch.stack(metrics), "W_dec": W_dec.flatten(0, 1)}


def run(*replicas: str) -> dict[str, Any]:
    """By replicas."""
    ARCHITECTURES.update(batch=Batch, jump=Jump)
    found: dict[str, Any] = {}
    for count in replicas:
        mesh = make_mesh(None, int(count), device=CPU)
        found[count] = {str(t): select(mesh, t) for t in (torch.float64, torch.float32)}
        # A micro-batch of replicas has other tokens than one process's: its largest are others.
        for engine, rule, options in (
            ("fused", "batch", "clipped"), ("fused", "jump", "split"),
            ("autograd", "batch", "plain"),
        ):  # fmt: skip
            found[count][f"{engine}-{rule}"] = train(mesh, engine, rule, OPTIONS[options])
    return found


if __name__ == "__main__":
    worker(run)
