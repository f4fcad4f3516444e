"""Resampling of dead latents: they start anew from inputs that the SAE reconstructs badly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.dead_latents import DeadLatents, mean_of_living
from ..parallel import collectives
from .engines.base import Engine

# Anthropic's: low enough that a new latent does not disturb the others at once.
_ENCODER_SCALE = 0.2


@torch.no_grad()
def resample_(
    engine: Engine,
    dead: DeadLatents,
    x: Tensor,  # [N, d_in], the replica's batch
    seed: int,
    unit: float = 1.0,
) -> int:
    """Gives every dead latent the direction of a badly reconstructed input; returns how many.

    Anthropic, "Towards Monosemanticity" (2023): inputs are drawn with probability proportional to
    the square of their squared error; the decoder row is the centred input at unit norm, the
    encoder row the same direction at 0.2 of the living rows' mean norm, the bias zero, and Adam's
    moments of those rows are zero. Reads the host; called once a `dead_after_tokens`. The draw is a
    function of (seed, batch): the same on every shard count. Collective over the members.
    """
    sae, mesh = engine.sae, engine.sae.mesh
    # Calls are a window apart, to a batch: what has not fired since the last one is dead.
    mask = dead.mask(early=len(x) * mesh.num_replicas)
    counts = collectives.all_gather(mask.sum().view(1), mesh.shard_group, mesh.num_shards).view(-1)
    total = int(counts.sum())
    if total == 0:
        return 0
    x = x.to(sae.b_dec.dtype)
    # Replicas hold different batches: all take the first replica's, so that they stay equal.
    x = collectives.all_gather(x, mesh.replica_group, mesh.num_replicas)[0]
    # Per unit: the draw does not depend on the data's scale.
    # Rows are as the engine gets them: `forward` would standardise a crosscoder's again.
    errors = (x - sae.decode(sae.encode_rows(x), x)).div(unit).square().sum(dim=1).double()
    # Where a batch is selected from together, equal tokens of replicas fare differently.
    errors = collectives.all_gather(errors, mesh.replica_group, mesh.num_replicas)[0].cpu()
    if not bool(errors.isfinite().all()):
        # Training is past help and says so at the next logged step.
        return 0
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(
        errors.square() + 1e-30, total, replacement=total > len(x), generator=generator
    )
    before = int(counts[: mesh.shard].sum())
    mine = chosen[before : before + int(counts[mesh.shard])].to(x.device)
    directions = torch.nn.functional.normalize(x[mine] - sae.b_dec, dim=1)
    sae.W_dec[mask] = directions
    norm = mean_of_living(sae.W_enc.norm(dim=1), mask, mesh)
    sae.W_enc[mask] = directions * (_ENCODER_SCALE * norm)
    sae.restart_(mask)
    engine.forget_(mask)
    engine.refresh_()
    dead.tokens_since_fired.masked_fill_(mask, 0)
    return total
