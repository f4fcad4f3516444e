"""A threshold a latent for architectures that select over a batch, from rows that no training saw:
inference is then a matter of each token alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..activations.aligned import AlignedLoaders
from ..activations.loader import ActivationLoader
from ..activations.store import ActivationStore
from ..activations.stream import Rows
from ..config.base import sources_of
from ..config.train import TrainConfig
from ..models.base import Pairs
from ..models.batch_topk import BatchTopK
from ..parallel.collectives import all_reduce_
from ..parallel.mesh import Mesh

logger = logging.getLogger(__name__)
# Of the held-out rows; two passes of the encoder go over them.
MAX_ROWS = 1 << 15
# Nothing fires below: logarithms of thresholds stay finite.
_TINY = 1e-30


def _least(found: Pairs, num_latents: int, mesh: Mesh) -> Tensor:  # [F]
    """Each latent's least activation in a batch of all replicas; inf where it did not fire."""
    values = found.values.masked_fill(found.values <= 0, torch.inf)
    least = values.new_full((num_latents,), torch.inf)
    least.scatter_reduce_(0, found.latents.long(), values, "amin")
    all_reduce_(least, mesh.replica_group, mesh.num_replicas, dist.ReduceOp.MIN)
    return least


def _cut(least: Tensor, mesh: Mesh) -> Tensor:  # scalar
    """A batch's least activation, of all shards."""
    cut = least.amin()
    all_reduce_(cut, mesh.shard_group, mesh.num_shards, dist.ReduceOp.MIN)
    return cut.clamp(_TINY, 1 / _TINY)


@torch.no_grad()
def calibrate_(sae: BatchTopK, batches: Callable[[], Iterable[Tensor]]) -> bool:
    """Sets `sae.threshold` [d_sae_local] from two passes over the same batches [N/R, d_in], in the
    SAE's precision; False where they are none. Collective over the members.

    A latent's threshold is the geometric mean of what batches asked of all latents (their least
    activation) and of the least that it had itself where it fired; all are then multiplied by what
    lets k latents a token through on the mean: the least activation in units of thresholds that the
    batch rule takes. A latent that these rows leave silent has the batches' least activation.
    """
    mesh, count, ranks = sae.mesh, 0, sae.ranks()
    cuts = torch.zeros((), dtype=torch.float64, device=sae.b_dec.device)
    own, fired = (torch.zeros_like(sae.threshold, dtype=torch.float64) for _ in range(2))
    for x in batches():
        least = _least(sae.selected(x.to(sae.b_dec), ranks), sae.d_sae_local, mesh)
        cuts += _cut(least, mesh).log()
        active = least.isfinite()
        own += least.clamp(_TINY, 1 / _TINY).log() * active
        fired += active
        count += 1
    if not count:
        return False
    mean = cuts / count
    logs = torch.where(fired > 0, (mean + own / fired.clamp_min(1)) / 2, mean)
    # Thresholds are of pre-activations themselves, these logarithms of what they are ranked by.
    logs = logs if ranks is None else logs - ranks.double().log()
    per = (-logs).exp().to(sae.threshold.dtype)
    ratios = torch.zeros_like(cuts)
    for x in batches():
        found = sae.selected(x.to(sae.b_dec), per)
        ratios += _cut(_least(found, sae.d_sae_local, mesh), mesh).log()
    sae.threshold.copy_((logs + ratios / count).exp())
    return True


def held_out_batches(
    rows: Rows, hookpoint: str, cfg: TrainConfig, mesh: Mesh, device: torch.device
) -> Callable[[], Iterable[Tensor]] | None:
    """Batches of the rows that training left out, of the training's size, each replica its part;
    None where there are none (a stream has none that it could give).
    """
    if not isinstance(rows, ActivationStore) or not cfg.holdout:
        return None

    names = sources_of(hookpoint)

    def loader(name: str, num_steps: int) -> ActivationLoader:
        return ActivationLoader(
            rows,
            name,
            batch_tokens=cfg.batch_tokens,
            seed=cfg.seed,
            num_steps=num_steps,
            rank=mesh.replica,
            num_ranks=mesh.num_replicas,
            device=device,
            holdout=cfg.holdout,
            only_held_out=True,
        )

    try:
        held = loader(names[0], 1).order.rows
    except ValueError:
        return None
    num_steps = -(-min(held, MAX_ROWS) // cfg.batch_tokens)

    def batches() -> Iterable[Tensor]:
        with AlignedLoaders(lambda name: loader(name, num_steps), names) as found:
            for first, *others in found:
                yield torch.cat([first, *others], dim=1) if others else first

    return batches
