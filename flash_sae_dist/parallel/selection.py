"""The exact global top-k of candidates that lie on several shards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import reference
from .collectives import all_gather
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
        # Without a look from the host, which would wait for the device in every step.
        last_key = reference.sort_keys(all_values, all_ids).topk(k, dim=1).values[:, -1:]
        keep = reference.sort_keys(values.detach(), ids) >= last_key
    else:
        kept, cols = reference.select_topk(all_values, k)
        last, last_id = kept[:, -1:], all_ids.gather(1, cols[:, -1:])
        keep = (values > last) | ((values == last) & (ids <= last_id))
    # NaN sorts above everything: a NaN candidate is kept so that it reaches the loss.
    return keep | values.isnan()
