"""Collectives with gradients; each is the identity on one rank and returns what it made, waited
for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError
from ..kernels import reference
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


def raise_together(error: ConfigError | None) -> None:
    """Raises what any process met on all of them: a mistake that one process alone can find ends
    the others with the same sentence, not with a broken connection. Collective over all processes.
    """
    told = from_all(None if error is None else str(error))
    if sentences := [sentence for sentence in told if sentence]:
        raise error or ConfigError(sentences[0])


def from_all(found: Any) -> list[Any]:
    """What each process has, by rank. Collective over all processes."""
    told: list[Any] = [found]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, found)
    return told


def first_checks(check: Callable[[], None]) -> None:
    """Lets the first process check something; the ConfigError that it meets is raised on all.
    Collective over all processes.
    """
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            check()
        except ConfigError as e:
            error = e
    raise_together(error)


def from_lead(found: Any, mesh: Mesh) -> Any:
    """A Python object that the lead of a mesh's members has, on all of them. Collective over the
    members.
    """
    if mesh.members == 1:
        return found
    told: list[Any] = [None] * mesh.members
    dist.all_gather_object(told, found, group=mesh.member_group)
    return told[0]


def gather_batch(x_local: Tensor, mesh: Mesh) -> Tensor:
    """Rows [N/P, D] that each shard of a replica read -> the replica's batch [N, D]."""
    if mesh.num_shards == 1:
        return x_local
    # As bytes: gloo lacks some types, and an all-gather moves bits whatever they mean.
    gathered = all_gather(x_local.view(torch.uint8), mesh.shard_group, mesh.num_shards)
    return gathered.flatten(0, 1).view(x_local.dtype)


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


def global_topk_mask(
    values: Tensor,  # [N, k_local] this shard's candidates, descending, ties by ascending index
    indices: Tensor,  # [N, k_local] int32, rows of this shard
    k: int,
    first_latent: int,
    mesh: Mesh,
) -> Tensor | None:  # [N, k_local] bool; None on one shard
    """Which of this shard's candidates are among the k largest over all shards: exact, ties to the
    lowest index.

    One all-gather of values and indices packed into one buffer: N * k_local * 8 bytes a rank for
    float32, whatever d_sae is.
    """
    if mesh.num_shards == 1:
        return None
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    ids = indices.to(bits) + first_latent
    packed = torch.stack([values.detach().contiguous().view(bits), ids])
    gathered = all_gather(packed, mesh.shard_group, mesh.num_shards)
    # [P, 2, N, k] -> [N, P*k]: shards in order keep equal values in ascending index order.
    everyone = gathered.permute(1, 2, 0, 3).flatten(2)
    all_values, all_ids = everyone[0].contiguous().view(values.dtype), everyone[1]
    if values.dtype == torch.float32:
        # Without a look from the host, which would wait for the device in every step.
        last_key = reference.sort_keys(all_values, all_ids).topk(k, dim=1).values[:, -1:]
        keep = reference.sort_keys(values.detach(), ids) >= last_key
    else:
        kept, cols = reference.select_topk(all_values, k)
        last, last_id = kept[:, -1:], all_ids.gather(1, cols[:, -1:])
        keep = (values > last) | ((values == last) & (ids <= last_id))
    # NaN sorts above everything: a NaN candidate is kept so that it reaches the loss.
    return keep | values.isnan()
