"""Exact selection of each row's k largest activations from a matrix of pre-activations, for few
tokens and for what the fused encoder does not take.

Legend: N tokens, F d_sae (of this shard), K k.

Each SIZE neighbours of a row are a group, of which the largest activation is found, here or by the
matmul (encode_tiles.py). The k largest activations lie in the k groups whose largest are largest
(of equal ones the first), since each group before one's own holds a larger activation or an equal
one of a lower latent. Those groups alone are read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_plan import GroupSizes
from .encode_select import best_keys, keep_largest, key_of, kth, relu_bits
from .shapes import cdiv


@triton.jit
def _bits(pre_row, bias_ptr, f, inside, HAS_BIAS: tl.constexpr):
    """int32 bits of relu(pre + bias), -1 outside."""
    # What is read once makes room for what is not read yet: 32 to 25 us for 50 MiB on an H100.
    v = tl.load(pre_row + f, mask=inside, other=0.0, eviction_policy="evict_first")
    if HAS_BIAS:
        v += tl.load(bias_ptr + f, mask=inside, other=0.0)
    return tl.where(inside, relu_bits(v), -1)


@triton.jit
def _groups_kernel(
    pre_ptr,  # [N, pitch] float32
    bias_ptr,  # [F] float32, FIND only; else it is in pre
    maxima_ptr,  # [N, num_groups] int32 bits of the largest, not below 0; FIND: scratch
    slots_ptr,  # [N, K_POW2] int32, scratch
    keys_ptr,  # [N, 2 K_POW2] int64, scratch
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    pitch,
    num_groups,
    F,
    k,
    FIND: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    SIZE: tl.constexpr,
    K_POW2: tl.constexpr,
):
    """A row's list: its groups' largest, the best of the groups, the best of their entries."""
    row = tl.program_id(0).to(tl.int64)
    pre_row = pre_ptr + row * pitch
    maxima_row = maxima_ptr + row * num_groups
    if FIND:
        for first in range(0, num_groups, STEP):
            g = first + tl.arange(0, STEP)
            f = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            bits = _bits(pre_row, bias_ptr, f, f < F, FIND)
            tl.store(maxima_row + g, tl.max(bits, 1), mask=g < num_groups)
        tl.debug_barrier()
    group = tl.arange(0, GROUPS_POW2)
    best = tl.load(maxima_row + group, mask=group * SIZE < F, other=-1)
    # One NaN, as relu_bits has it.
    best = tl.minimum(best, 0x7FC00000)
    if (FIND == 0) & (F % SIZE != 0):
        # The matmul's largest of the last group has columns in it that are not there: NaN, where x
        # is not finite.
        f = F // SIZE * SIZE + tl.arange(0, SIZE)
        whole = tl.max(_bits(pre_row, bias_ptr, f, f < F, False), 0)
        best = tl.where(group == F // SIZE, whole, best)
    # More than k groups, as many as there is room for, take fewer steps to find.
    tau, last = kth(best, group, k, K_POW2 - k)
    kept = (best > tau) | ((best == tau) & (group <= last))
    slots = slots_ptr + row * K_POW2
    tl.store(slots + tl.cumsum(kept.to(tl.int32), 0) - 1, group, mask=kept)
    num_kept = tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    j = tl.arange(0, K_POW2)
    held = tl.load(slots + j, mask=j < num_kept, other=0)
    f = held[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    bits = _bits(pre_row, bias_ptr, f, (j < num_kept)[:, None] & (f < F), FIND)
    # The k best reach what k groups reach; hardly more do.
    keys = tl.where(bits >= tau, key_of(bits, f), -1).reshape(K_POW2 * SIZE)
    reach = (keys >= 0).to(tl.int32)
    num_reach = tl.sum(reach, 0)
    row_keys = keys_ptr + row * 2 * K_POW2
    if num_reach <= 2 * K_POW2:
        tl.store(row_keys + tl.cumsum(reach, 0) - 1, keys, mask=reach != 0)
        tl.debug_barrier()
    else:
        num_reach = keep_largest(row_keys, keys, k)
    values_row, indices_row = values_ptr + row * k, indices_ptr + row * k
    best_keys(row_keys, values_row, indices_row, k, num_reach, 2 * K_POW2)


def select_groups(
    pre: Tensor,  # [N, at least F] float32, contiguous
    maxima: Tensor,  # [N, at least F / size] int32, contiguous
    F: int,
    sizes: GroupSizes,
    values: Tensor,  # [N, k] float32, filled
    indices: Tensor,  # [N, k] int32, filled
    b_enc: Tensor | None = None,  # [F] float32
) -> None:
    """The k largest of `relu(pre)` of each row, descending, ties to the lowest latent; NaN above
    +inf. `maxima` holds the bits of each group's largest; with b_enc, which is added to pre, it is
    scratch."""
    (N, k), find = values.shape, b_enc is not None
    slots = torch.empty(N, sizes.k_pow2, dtype=torch.int32, device=pre.device)
    keys = torch.empty(N, 2 * sizes.k_pow2, dtype=torch.int64, device=pre.device)
    _groups_kernel[(N,)](
        pre, pre if b_enc is None else b_enc, maxima, slots, keys, values, indices, pre.stride(0),
        maxima.stride(0), F, k, FIND=find, STEP=sizes.step, GROUPS_POW2=sizes.groups_pow2,
        SIZE=sizes.size, K_POW2=sizes.k_pow2, num_warps=sizes.num_warps,
    )  # fmt: skip


def select_rows(
    pre: Tensor,  # [N, F] float32, without bias, contiguous
    b_enc: Tensor,  # [F] float32
    sizes: GroupSizes,
    values: Tensor,  # [N, k] float32, filled
    indices: Tensor,  # [N, k] int32, filled
) -> None:
    """`select_groups` of `relu(pre + b_enc)` where nothing is known of the groups."""
    N, F = pre.shape
    maxima = torch.empty(N, cdiv(F, sizes.size), dtype=torch.int32, device=pre.device)
    select_groups(pre, maxima, F, sizes, values, indices, b_enc)
