"""Which latents have stopped firing: counters in tokens, kept on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import collectives
from ..parallel.mesh import Mesh

# The host reads the number of dead latents this often; a constant, so that a run does not depend
# on how it logs.
CHECK_EVERY_STEPS = 100


class DeadLatents:
    """Tokens since each latent of this shard last fired, over all replicas."""

    def __init__(
        self, d_sae_local: int, dead_after_tokens: int, mesh: Mesh, device: torch.device
    ) -> None:
        self.tokens_since_fired = torch.zeros(d_sae_local, dtype=torch.int64, device=device)
        self.dead_after_tokens = dead_after_tokens
        self.mesh = mesh
        self.any_dead = False

    @torch.no_grad()
    def update_(
        self,
        top_acts: Tensor,  # [N, k]
        top_idx: Tensor,  # [N, k] int32
        batch_tokens: int,
    ) -> None:
        """Counts a batch of batch_tokens (all replicas'): latents with a positive activation
        restart at zero.
        """
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.int32)
        fired.scatter_reduce_(
            0, top_idx.flatten().long(), (top_acts > 0).flatten().to(torch.int32), reduce="amax"
        )
        collectives.all_reduce_(
            fired, self.mesh.replica_group, self.mesh.num_replicas, dist.ReduceOp.MAX
        )
        self.tokens_since_fired.add_(batch_tokens).masked_fill_(fired.bool(), 0)

    def mask(self) -> Tensor:
        """[d_sae_local] bool: latents silent for more than dead_after_tokens."""
        return self.tokens_since_fired > self.dead_after_tokens

    def count(self) -> Tensor:
        """Dead latents over all shards, a scalar on the device. Collective over the shard group."""
        dead = self.mask().sum()
        collectives.all_reduce_(dead, self.mesh.shard_group, self.mesh.num_shards)
        return dead

    def refresh(self, step: int, tokens_seen: int) -> None:
        """Reads every CHECK_EVERY_STEPS steps whether any latent is dead (a host sync, and none
        before one can be).
        """
        if step % CHECK_EVERY_STEPS == 0:
            self.any_dead = tokens_seen > self.dead_after_tokens and bool(self.count() > 0)
