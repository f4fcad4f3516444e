"""Exact selections over shards: the global top-k of each shard's candidates, and each token's limit
where candidates are too many to gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.dispatch import implementation
from ..kernels.reference import Limits
from .collectives import all_gather, all_reduce_
from .mesh import Mesh


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
        # No host sync, which select_topk has.
        last_key = reference.sort_keys(all_values, all_ids).topk(k, dim=1).values[:, -1:]
        keep = reference.sort_keys(values.detach(), ids) >= last_key
    else:
        kept, cols = reference.select_topk(all_values, k)
        last, last_id = kept[:, -1:], all_ids.gather(1, cols[:, -1:])
        keep = (values > last) | ((values == last) & (ids <= last_id))
    # NaN sorts above everything: a NaN candidate is kept so that it reaches the loss.
    return keep | values.isnan()


def global_limits(
    pre: Tensor,  # [N, M_local] float32/64, this shard's candidates, without bias
    bias: Tensor,  # [M_local] float32/64
    k: int,
    mesh: Mesh,
) -> Limits:
    """Which of this shard's candidates `pre + bias` are among the k largest of each token over all
    shards: exact, ties to the lowest shard and column.

    A radix search over counts: each round counts the next 8 bits of the candidates' sort keys that
    are still undecided and adds them up, [N, 256] int32, whatever M is; no candidate is sent. All
    shards together must hold at least k. Collective over the shard group; no host sync.
    """
    dtype = torch.int64 if pre.dtype == torch.float64 else torch.int32
    counts_of, pick_ = (implementation(name, pre) for name in ("digit_counts", "pick_digits_"))
    prefix = torch.zeros(len(pre), dtype=dtype, device=pre.device)
    left = torch.full((len(pre),), k, dtype=torch.int32, device=pre.device)
    counts = mine = prefix
    for shift in range(torch.iinfo(dtype).bits - 8, -1, -8):
        mine = counts_of(pre, bias, prefix, shift)
        counts = mine.clone()
        all_reduce_(counts, mesh.shard_group, mesh.num_shards)
        pick_(counts, prefix, left)
    # Those that equal the limit are taken in the order of shards.
    equal = mine.gather(1, (prefix & 255).long()[:, None]).squeeze(1)
    before = all_gather(equal, mesh.shard_group, mesh.num_shards)[: mesh.shard].sum(dim=0)
    take = torch.minimum((left - before).clamp_min(0), equal).to(torch.int32)
    return Limits(prefix ^ torch.iinfo(dtype).min, take)
