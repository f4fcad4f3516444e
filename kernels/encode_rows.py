"""Encoder by a library matmul in blocks of rows, and the exact selection of each row's k largest
from what it writes: for few tokens, float32, odd widths, k near F.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

Each block holds at most 56 MiB of pre-activations and what their selection takes, or one row, whose
own are more from 4M latents on; no host sync.
Each SIZE neighbours of a row are a group, of which the largest activation is found. The k largest
activations lie in the k groups whose largest are largest (of equal ones the first), since each
group before one's own holds a larger activation or an equal one of a lower latent. Those groups
alone are read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_select import best_keys, key_of, kth, near, reaches, relu_bits
from .reference_encode import sort_keys
from .shapes import cdiv, next_power_of_2

_BLOCK_BYTES = 56 << 20
_INDEX_BITS = 0x7FFFFFFF
# Of e4m3 rows that are products' operands at once.
_DECODED_ELEMENTS = 1 << 22
# Of one pre-activation: float32 values, their bits, and an int64 key.
_BYTES_EACH = 4 + 4 + 8
# Entries of the groups that are read again, of one row.
_MAX_AGAIN = 16384


class GroupSizes(NamedTuple):
    """Sizes of the selection of a row's best groups."""

    size: int  # neighbours a group
    groups_pow2: int
    k_pow2: int
    step: int  # groups whose largest are found at once
    num_warps: int


def group_sizes(F: int, k: int) -> GroupSizes | None:
    """Sizes for F latents; None where too many groups would be looked at or read again."""
    fit = [s for s in (256, 128, 64, 32) if F / s > 8192] + [32, 16, 8, 4, 2, 1]
    size = next((s for s in fit if cdiv(F, s) >= min(2 * k, F)), 1)
    groups, k_pow2 = cdiv(F, size), next_power_of_2(k)
    if groups < min(2 * k, F) or groups > 16384 or k_pow2 * size > _MAX_AGAIN:
        return None
    groups_pow2 = next_power_of_2(groups)
    # The fastest of 1, 2, 4 and 8 on an H100 for 512 groups and k = 20, and for 2048 and k = 64.
    warps = max(4, min(16, max(groups_pow2 // 1024, k_pow2 * size // 1024)))
    step = min(groups_pow2, max(1, 1024 * warps // size))
    return GroupSizes(size, groups_pow2, k_pow2, step, warps)


@triton.jit
def _bits(pre_row, bias_ptr, f, inside):
    """int32 bits of relu(pre + bias), -1 outside."""
    # What is read once makes room for what is not read yet: 32 to 25 us for 50 MiB on an H100.
    v = tl.load(pre_row + f, mask=inside, other=0.0, eviction_policy="evict_first")
    v += tl.load(bias_ptr + f, mask=inside, other=0.0)
    return tl.where(inside, relu_bits(v), -1)


@triton.jit
def _groups_kernel(
    pre_ptr,  # [N, pitch] float32
    bias_ptr,  # [F] float32
    maxima_ptr,  # [N, num_groups] int32, scratch
    slots_ptr,  # [N, K_POW2] int32, scratch
    keys_ptr,  # [N, 2 K_POW2] int64, scratch
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    pitch,
    num_groups,
    F,
    k,
    STEP: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    SIZE: tl.constexpr,
    K_POW2: tl.constexpr,
):
    """A row's list: its groups' largest, the best of the groups, the best of their entries."""
    row = tl.program_id(0).to(tl.int64)
    pre_row = pre_ptr + row * pitch
    maxima_row = maxima_ptr + row * num_groups
    for first in range(0, num_groups, STEP):
        g = first + tl.arange(0, STEP)
        f = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        bits = _bits(pre_row, bias_ptr, f, f < F)
        tl.store(maxima_row + g, tl.max(bits, 1), mask=g < num_groups)
    tl.debug_barrier()
    group = tl.arange(0, GROUPS_POW2)
    best = tl.load(maxima_row + group, mask=group * SIZE < F, other=-1)
    # More than k groups, as many as there is room for, take fewer steps to find.
    tau, last, _ = kth(best, group, k, K_POW2 - k, near(best, k))
    kept = (best > tau) | ((best == tau) & (group <= last))
    slots = slots_ptr + row * K_POW2
    tl.store(slots + tl.cumsum(kept.to(tl.int32), 0) - 1, group, mask=kept)
    num_kept = tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    j = tl.arange(0, K_POW2)
    held = tl.load(slots + j, mask=j < num_kept, other=0)
    f = held[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    bits = _bits(pre_row, bias_ptr, f, (j < num_kept)[:, None] & (f < F))
    # The k best reach what k groups reach; hardly more do.
    keys = tl.where(bits >= tau, key_of(bits, f), -1).reshape(K_POW2 * SIZE)
    reach = (keys >= 0).to(tl.int32)
    num_reach = tl.sum(reach, 0)
    row_keys = keys_ptr + row * 2 * K_POW2
    if num_reach > 2 * K_POW2:
        # Many equal ones.
        limit, last, num_reach = kth(bits, f, k, 0, tau)
        keys = tl.where(reaches(bits, f, limit, last).reshape(K_POW2 * SIZE), keys, -1)
        reach = (keys >= 0).to(tl.int32)
    tl.store(row_keys + tl.cumsum(reach, 0) - 1, keys, mask=reach != 0)
    tl.debug_barrier()
    values_row, indices_row = values_ptr + row * k, indices_ptr + row * k
    best_keys(row_keys, values_row, indices_row, k, num_reach, 2 * K_POW2)


def select_rows(
    pre: Tensor,  # [N, F] float32, without bias, contiguous
    b_enc: Tensor,  # [F] float32
    sizes: GroupSizes,
    values: Tensor,  # [N, k] float32, filled
    indices: Tensor,  # [N, k] int32, filled
) -> None:
    """The k largest of `relu(pre + b_enc)` of each row, descending, ties to the lowest latent; NaN
    above +inf."""
    (N, k), F = values.shape, pre.shape[1]
    maxima = torch.empty(N, cdiv(F, sizes.size), dtype=torch.int32, device=pre.device)
    slots = torch.empty(N, sizes.k_pow2, dtype=torch.int32, device=pre.device)
    keys = torch.empty(N, 2 * sizes.k_pow2, dtype=torch.int64, device=pre.device)
    _groups_kernel[(N,)](
        pre, b_enc, maxima, slots, keys, values, indices, pre.stride(0), maxima.stride(0), F, k,
        STEP=sizes.step, GROUPS_POW2=sizes.groups_pow2, SIZE=sizes.size, K_POW2=sizes.k_pow2,
        num_warps=sizes.num_warps,
    )  # fmt: skip


def _products(x: Tensor, W_enc: Tensor, scale: Tensor | None = None) -> Tensor:
    if scale is not None:
        pre = torch.empty(len(x), len(W_enc), dtype=torch.float32, device=x.device)
        step = max(1, _DECODED_ELEMENTS // x.shape[1])
        for at in range(0, len(W_enc), step):
            part = slice(at, at + step)
            pre[:, part] = _products(x, W_enc[part].to(x.dtype)) * scale[part]
        return pre
    if x.dtype == torch.float32:
        return x @ W_enc.T
    return torch.mm(x, W_enc.T, out_dtype=torch.float32)


def _select(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 values, ties to the lowest column, NaN above +inf."""
    keys = sort_keys(values, torch.arange(values.shape[1], device=values.device))
    top = keys.topk(k, dim=1).values
    high = (top >> 32).to(torch.int32)
    picked = torch.where(high < 0, high ^ _INDEX_BITS, high).view(torch.float32)
    return picked, (_INDEX_BITS - (top & 0xFFFFFFFF)).to(torch.int32)


def _row_bytes(F: int, sizes: GroupSizes | None) -> int:
    """Bytes that a row takes: pre-activations, groups' largest, slots and keys."""
    if sizes is None:
        return _BYTES_EACH * F
    return 4 * F + 4 * cdiv(F, sizes.size) + (4 + 2 * 8) * sizes.k_pow2


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.topk_encode`, rows in blocks; b_enc is float32, and so a scale of e4m3 rows."""
    values = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    sizes = group_sizes(W_enc.shape[0], k)
    rows = max(1, _BLOCK_BYTES // _row_bytes(W_enc.shape[0], sizes))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        pre = _products(x[part], W_enc, scale)
        if sizes:
            select_rows(pre, b_enc, sizes, values[part], indices[part])
        else:
            values[part], indices[part] = _select(pre.add_(b_enc).relu_(), k)
    return values, indices
