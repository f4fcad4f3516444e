"""Exact selections over shards: the global top-k of each shard's candidates, each token's limit
where candidates are too many to gather, and the largest of a whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import reference
from ..kernels.dispatch import implementation
from ..kernels.reference import Limits, Pairs
from .collectives import all_gather, all_reduce_
from .mesh import Mesh

# Values of a flat list that are counted as one row: a program's work.
_ROW = 2048


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
    left = torch.full((len(pre),), k, dtype=torch.int32, device=pre.device)
    key, equal = _search(pre, bias, left, mesh.shard_group, mesh.num_shards)
    # Those that equal the limit are taken in the order of shards.
    before = all_gather(equal, mesh.shard_group, mesh.num_shards)[: mesh.shard].sum(dim=0)
    take = torch.minimum((left - before).clamp_min(0), equal).to(torch.int32)
    return Limits(key, take)


def _search(
    pre: Tensor,  # [N, M_local] float32/64
    bias: Tensor,  # [M_local]
    left: Tensor,  # [N], or [1] for all rows together, int32: how many are wanted
    group: dist.ProcessGroup | None,
    size: int,
) -> tuple[Tensor, Tensor]:  # [N] or [1] int32/64, [N] or [1] int32
    """The sort key of the last of the `left` largest over a group, and how many here equal it;
    those above it are taken off `left`.
    """
    dtype = torch.int64 if pre.dtype == torch.float64 else torch.int32
    counts_of, pick_ = (implementation(name, pre) for name in ("digit_counts", "pick_digits_"))
    prefix = torch.zeros(len(left), dtype=dtype, device=pre.device)
    mine = prefix
    for shift in range(torch.iinfo(dtype).bits - 8, -1, -8):
        mine = counts_of(pre, bias, prefix.expand(len(pre)).contiguous(), shift)
        if len(mine) != len(left):
            mine = mine.sum(dim=0, keepdim=True, dtype=torch.int32)
        counts = mine.clone()
        all_reduce_(counts, group, size)
        pick_(counts, prefix, left)
    equal = mine.gather(1, (prefix & 255).long()[:, None]).squeeze(1)
    return prefix ^ torch.iinfo(dtype).min, equal


def global_batch_mask(
    pairs: Pairs,  # this rank's candidates: of its tokens and latents the `total` largest
    total: int,
    mesh: Mesh,
) -> Tensor | None:  # [C] bool; None on one rank
    """Which of this rank's candidates are among the `total` largest over all tokens of all replicas
    and all their latents: exact, ties to the lowest (token, latent). NaN is always kept, so that it
    reaches the loss.

    A rank's candidates are the `total` largest of its own, or all of them: a replica may hold all.
    A radix search over counts as in `global_limits`, four all-reduces of 1 KiB (float64: eight),
    then one all-gather of 4 N bytes, whatever the number of candidates. All replicas must have the
    same number of tokens. Collective over the members; no host sync.
    """
    if mesh.members == 1:
        return None
    values = pairs.values.detach()
    # What fills it up is 0, the least that a value can be.
    rows = torch.nn.functional.pad(values, (0, -len(values) % _ROW)).view(-1, _ROW)
    left = torch.full((1,), total, dtype=torch.int32, device=values.device)
    limit, _ = _search(rows, torch.zeros_like(rows[0]), left, mesh.member_group, mesh.members)
    keys = reference.sort_key(values)
    equal = keys == limit
    # Equal ones by token: those of lower replicas, of lower tokens, of this token on lower shards.
    through = torch.nn.functional.pad(equal.cumsum(0), (1, 0))
    begins, ends = pairs.offsets[:-1].long(), pairs.offsets[1:].long()
    mine = (through[ends] - through[begins]).int()
    every = all_gather(mine, mesh.member_group, mesh.members)
    every = every.view(mesh.num_replicas, mesh.num_shards, -1).transpose(1, 2)
    before = (every.flatten().cumsum(0).view_as(every) - every)[mesh.replica, :, mesh.shard]
    take = torch.minimum((left - before).clamp_min(0), mine)
    taken = equal & _lowest(pairs, equal, take, mine)
    return (keys > limit) | taken | values.isnan()


def _lowest(
    pairs: Pairs,
    equal: Tensor,  # [C] bool
    take: Tensor,  # [N], how many of a token's equal ones
    of: Tensor,  # [N], how many it has
) -> Tensor:  # [C] bool, of the equal ones those taken
    """Each token's `take` lowest latents among equal ones. Of one token at most a part is taken,
    for they are taken token by token.
    """
    tokens = pairs.tokens.long()
    part = (take > 0) & (take < of)
    never = torch.iinfo(torch.int32).max
    theirs = torch.where(equal & part[tokens], pairs.latents, never).sort().values
    last = theirs[(torch.where(part, take, 0).sum() - 1).clamp_min(0).view(1)]
    return ((take == of)[tokens]) | (part[tokens] & (pairs.latents <= last))
