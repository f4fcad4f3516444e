"""Collectives, which do nothing on one rank; those that autograd passes through have gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh

# Its new name from torch 2.13 on, where the old one warns.
_all_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_gather(local: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """[...] on each of `size` ranks -> [size, ...], in the order of ranks."""
    if size == 1:
        return local.unsqueeze(0)
    out = local.new_empty((size, *local.shape))
    _all_gather_into(out.view(-1), local.contiguous().view(-1), group=group)
    return out


def all_reduce_(
    tensor: Tensor,
    group: dist.ProcessGroup | None,
    size: int,
    op: Any = dist.ReduceOp.SUM,
) -> None:
    """Reduces a tensor over a group in place."""
    if size > 1:
        dist.all_reduce(tensor, op=op, group=group)


def gather_batch_(batch: Tensor, mesh: Mesh) -> None:
    """Fills a replica's batch [N, D], in which this shard's N/P rows lie at their place, with the
    other shards' rows.

    On the batch group: it may run beside the collectives of a step.
    """
    if mesh.num_shards == 1:
        return
    assert mesh.batch_group is not None, "None would be the group of all processes"
    # As bytes: gloo lacks some types, and an all-gather moves bits whatever they mean.
    whole = batch.view(torch.uint8).view(-1)
    _all_gather_into(whole, whole.chunk(mesh.num_shards)[mesh.shard], group=mesh.batch_group)


class _SumForward(torch.autograd.Function):
    """All-reduce forward, identity backward: each rank's share of the loss is the whole loss
    (Megatron's g).
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: Mesh) -> Tensor:
        total = partial.clone()
        all_reduce_(total, mesh.shard_group, mesh.num_shards)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def sum_over_shards(partial: Tensor, mesh: Mesh) -> Tensor:
    """Sums each shard's part [N, D] of a reconstruction; the gradient of the sum is the gradient
    of every part.
    """
    if mesh.num_shards == 1:
        return partial
    out: Tensor = _SumForward.apply(partial, mesh)  # type: ignore[no-untyped-call]
    return out


class _SumBackward(torch.autograd.Function):
    """Identity forward, all-reduce backward, for a replicated parameter that feeds sharded work
    (Megatron's f).
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        all_reduce_(total, ctx.mesh.shard_group, ctx.mesh.num_shards)
        return total, None


def feed_shards(replicated: Tensor, mesh: Mesh) -> Tensor:
    """The tensor itself, its gradient summed over the shards that used it."""
    if mesh.num_shards == 1:
        return replicated
    out: Tensor = _SumBackward.apply(replicated, mesh)  # type: ignore[no-untyped-call]
    return out
