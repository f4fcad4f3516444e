"""Which latents have stopped firing: counters in tokens, kept on the device, and the list of dead
ones that AuxK and ghost gradients train.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.collectives import all_gather, all_reduce_
from ..parallel.mesh import Mesh

# The host reads the number of dead latents this often; a constant, so that a run does not depend
# on how it logs.
CHECK_EVERY_STEPS = 100
# cuBLAS took six times as long for a product over 13107 latents as over the next multiple of 64.
_MULTIPLE = 64
# Another list's length makes another graph, as long to capture as 25 steps or, where kernels are
# compiled for it, 700. Products over so few take 2% of a step more than over 64 (640 take 5.5%:
# 0.670 for 0.635 ms at N=4096 D=576 F=16384 on an H200).
_FEW = 256


class DeadLatents:
    """Tokens since each latent of this shard last fired, over all replicas, and the dead ones.

    The list is made every CHECK_EVERY_STEPS steps and stays as it is in between, so that shapes
    and captured graphs do too; a listed latent that fires again is left out at once, by `bias`.
    `rows` [M] int64 are the listed rows, padded with 0 to the same M on all shards; `slots` [F]
    int32 is each latent's place among them or -1; `num_listed` counts them over all shards. M
    stays, too, while numbers go up and down a little, or to none: see `_has_room`. It follows from
    the numbers that were, so a checkpoint keeps it.
    """

    def __init__(
        self, d_sae_local: int, dead_after_tokens: int, mesh: Mesh, device: torch.device
    ) -> None:
        self.tokens_since_fired = torch.zeros(d_sae_local, dtype=torch.int64, device=device)
        self.dead_after_tokens = dead_after_tokens
        self.mesh = mesh
        self.slots = torch.full((d_sae_local,), -1, dtype=torch.int32, device=device)
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self._padding = torch.empty(0, dtype=torch.bool, device=device)
        self.num_listed = 0
        self.generation = 0  # of the list's memory, which a captured graph reads

    @torch.no_grad()
    def update_(
        self,
        top_acts: Tensor,  # [N, k], or [C] of a flat list
        top_idx: Tensor,  # as top_acts, int32
        batch_tokens: int,
    ) -> None:
        """Counts a batch of batch_tokens (all replicas'): latents with a positive activation
        restart at zero.
        """
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.int32)
        fired.scatter_reduce_(
            0, top_idx.flatten().long(), (top_acts > 0).flatten().to(torch.int32), reduce="amax"
        )
        all_reduce_(fired, self.mesh.replica_group, self.mesh.num_replicas, dist.ReduceOp.MAX)
        self.tokens_since_fired.add_(batch_tokens).masked_fill_(fired.bool(), 0)

    def mask(self, early: int = 0) -> Tensor:
        """[d_sae_local] bool: latents silent for more than dead_after_tokens, less early."""
        return self.tokens_since_fired > self.dead_after_tokens - early

    def count(self) -> Tensor:
        """Dead latents over all shards, a scalar on the device. Collective over the shard group."""
        dead = self.mask().sum()
        all_reduce_(dead, self.mesh.shard_group, self.mesh.num_shards)
        return dead

    @property
    def any_listed(self) -> bool:
        """Whether a latent of any shard is listed."""
        return self.num_listed > 0

    def listed(self) -> Tensor:
        """[d_sae_local] bool, for checkpoints."""
        return self.slots >= 0

    def refresh(self, step: int, tokens_seen: int) -> None:
        """Lists the dead latents anew every CHECK_EVERY_STEPS steps (a host sync, and none before
        a latent can be dead). Collective over the shard group.
        """
        if step % CHECK_EVERY_STEPS == 0:
            if tokens_seen > self.dead_after_tokens:
                self.list_(self.mask())
            elif self.any_listed:
                self.list_(torch.zeros_like(self.mask()))

    @torch.no_grad()
    def list_(self, dead: Tensor) -> None:
        """Lists the latents of a mask [d_sae_local] bool. A host sync; collective over the shard
        group.
        """
        mine = dead.sum().reshape(1)
        counts = all_gather(mine, self.mesh.shard_group, self.mesh.num_shards).flatten().tolist()
        self.num_listed = sum(counts)
        if not self._has_room(max(counts)):
            self.make_room(padded(max(counts)))
        rows = dead.nonzero().squeeze(1)
        self.rows.zero_()[: len(rows)] = rows
        self._padding.fill_(True)[: len(rows)] = False
        self.slots.fill_(-1)
        self.slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)

    def _has_room(self, number: int) -> bool:
        """Whether the list's memory does for a number of latents: it is enough, and small or not
        a third more than is needed.
        """
        there = len(self.rows)
        return number <= there and (there <= _FEW or 4 * padded(number) >= 3 * there or not number)

    def make_room(self, capacity: int) -> None:
        """Gives the list memory for a number of latents, empty."""
        self.rows = self.rows.new_zeros(capacity)
        self._padding = torch.ones_like(self.rows, dtype=torch.bool)
        self.generation += 1

    def bias(self, b_enc: Tensor) -> Tensor:
        """[M]: the listed latents' b_enc, -inf for those that have fired since and for padding."""
        return b_enc[self.rows].masked_fill(self.left_out(), -torch.inf)

    def left_out(self) -> Tensor:
        """[M] bool: the listed latents that have fired since, and padding."""
        return self._padding | ~self.mask()[self.rows]


def padded(count: int) -> int:
    """Rows that a list has room for: coarse, at most a sixteenth too many, so that lists of about
    one length share a captured graph.
    """
    step = max(_MULTIPLE, 1 << max(0, count.bit_length() - 5))
    return -(-max(count, 1) // step) * step


def mean_of_living(
    rows: Tensor,  # [d_sae_local]
    mask: Tensor,  # [d_sae_local] bool, the dead ones
    mesh: Mesh,
) -> Tensor:  # scalar
    """The mean over all latents that mask leaves out, 0 where there are none. Collective over the
    shards.
    """
    living = ~mask
    sums = torch.stack([rows[living].sum(), living.sum().to(rows.dtype)])
    all_reduce_(sums, mesh.shard_group, mesh.num_shards)
    return sums[0] / sums[1].clamp_min(1)
