"""Exact selection of each row's k largest activations from a matrix of pre-activations, for few
tokens and for what the fused encoder does not take.

Legend: N tokens, F d_sae (of this shard), K k.

A row's latents fall into groups, of which the largest activation is kept; the k largest activations
lie in the k groups whose largest are largest (equal ones by their lowest latent), since each group
before one's own holds a larger activation. Those groups alone are read again. `_rows_kernel` finds
the largest itself, of every GROUPS-th latent; `_groups_kernel` has those of 64 neighbours from the
matmul (encode_tiles.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_plan import MAX_AGAIN, group_sizes
from .encode_select import best_keys, keep_largest, key_of, kth, relu_bits
from .shapes import cdiv, next_power_of_2


@triton.jit
def _bits(pre_row, bias_ptr, f, inside, HAS_BIAS: tl.constexpr):
    """int32 bits of relu(pre + bias), -1 outside."""
    v = tl.load(pre_row + f, mask=inside, other=0.0)
    if HAS_BIAS:
        v += tl.load(bias_ptr + f, mask=inside, other=0.0)
    return tl.where(inside, relu_bits(v), -1)


@triton.jit
def _best_of_groups(
    pre_row, bias_ptr, kept, tau, group, slots, row_keys, values_row, indices_row, F, k, STRIDE,
    STEP, STEPS_POW2: tl.constexpr, K_POW2: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Writes a row's list from the groups that are kept, of which there are from k to K_POW2 and
    whose k-th largest is tau: group g holds the latents g * STRIDE + i * STEP."""
    tl.store(slots + tl.cumsum(kept.to(tl.int32), 0) - 1, group, mask=kept)
    num_kept = tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    j = tl.arange(0, K_POW2)
    held = tl.load(slots + j, mask=j < num_kept, other=0)
    f = held[:, None] * STRIDE + tl.arange(0, STEPS_POW2)[None, :] * STEP
    bits = _bits(pre_row, bias_ptr, f, (j < num_kept)[:, None] & (f < F), HAS_BIAS)
    # The k best reach what k groups reach; hardly more do.
    keys = tl.where(bits >= tau, key_of(bits, f), -1).reshape(K_POW2 * STEPS_POW2)
    reach = (keys >= 0).to(tl.int32)
    num_reach = tl.sum(reach, 0)
    if num_reach <= 2 * K_POW2:
        tl.store(row_keys + tl.cumsum(reach, 0) - 1, keys, mask=reach != 0)
        tl.debug_barrier()
    else:
        num_reach = keep_largest(row_keys, keys, k)
    best_keys(row_keys, values_row, indices_row, k, num_reach, 2 * K_POW2)


@triton.jit
def _rows_kernel(
    pre_ptr,  # [N, F] float32
    bias_ptr,  # [F] float32
    slots_ptr,  # [N, K_POW2] int32, scratch
    keys_ptr,  # [N, 2 K_POW2] int64, scratch
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    F,
    k,
    GROUPS: tl.constexpr,
    STEPS_POW2: tl.constexpr,
    K_POW2: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A row's list: its groups' largest, the best of those groups, the best of their entries."""
    row = tl.program_id(0).to(tl.int64)
    pre_row = pre_ptr + row * F
    group = tl.arange(0, GROUPS)
    best = tl.full([GROUPS], -1, tl.int32)
    latent = tl.zeros([GROUPS], tl.int32)
    for first in tl.range(0, F, GROUPS, loop_unroll_factor=UNROLL):
        f = first + group
        bits = _bits(pre_row, bias_ptr, f, f < F, True)
        latent = tl.where(bits > best, f, latent)
        best = tl.maximum(best, bits)
    # More than k groups, as many as there is room for, take fewer steps to find.
    tau, last = kth(best, latent, k, K_POW2 - k)
    kept = (best > tau) | ((best == tau) & (latent <= last))
    _best_of_groups(
        pre_row, bias_ptr, kept, tau, group, slots_ptr + row * K_POW2, keys_ptr + row * 2 * K_POW2,
        values_ptr + row * k, indices_ptr + row * k, F, k, 1, GROUPS, STEPS_POW2, K_POW2, True,
    )  # fmt: skip


@triton.jit
def _groups_kernel(
    pre_ptr,  # [N, pitch] float32, bias included
    maxima_ptr,  # [N, num_groups] int32 bits of the largest, 0 where none is positive
    slots_ptr,  # [N, K_POW2] int32, scratch
    keys_ptr,  # [N, 2 K_POW2] int64, scratch
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    pitch,
    num_groups,
    F,
    k,
    GROUPS_POW2: tl.constexpr,
    SIZE: tl.constexpr,
    K_POW2: tl.constexpr,
):
    """A row's list from its groups' largest: the best groups, the best of their entries."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POW2)
    there = group * SIZE < F
    best = tl.load(maxima_ptr + row * num_groups + group, mask=there, other=-1)
    # One NaN, as relu_bits has it.
    best = tl.minimum(best, 0x7FC00000)
    tau, last = kth(best, group, k, K_POW2 - k)
    kept = (best > tau) | ((best == tau) & (group <= last))
    _best_of_groups(
        pre_ptr + row * pitch, pre_ptr, kept & there, tau, group, slots_ptr + row * K_POW2,
        keys_ptr + row * 2 * K_POW2, values_ptr + row * k, indices_ptr + row * k, F, k, SIZE, 1,
        SIZE, K_POW2, False,
    )  # fmt: skip


def sizes(F: int, k: int) -> dict[str, int] | None:
    """Sizes of the kernel, or None where a row's groups would be too large."""
    k_pow2 = next_power_of_2(k)
    # The fastest of eight on an H100, for a row of 16384 and one of 65536.
    choices = ((1024, 4, 2), (4096, 8, 1), (8192, 16, 1))
    for groups, warps, unroll in choices if F <= 16384 else choices[1:]:
        steps = next_power_of_2(cdiv(F, groups))
        if k <= groups and steps * k_pow2 <= MAX_AGAIN * warps // 16:
            return {
                "GROUPS": groups, "STEPS_POW2": steps, "K_POW2": k_pow2,
                "UNROLL": min(unroll, steps), "num_warps": warps,
            }  # fmt: skip
    return None


def select_rows(
    pre: Tensor,  # [N, F] float32, without bias, contiguous
    b_enc: Tensor,  # [F] float32
    values: Tensor,  # [N, k] float32, filled
    indices: Tensor,  # [N, k] int32, filled
    shape: dict[str, int],
) -> None:
    """The k largest of `relu(pre + b_enc)` of each row, descending, ties to the lowest latent; NaN
    above +inf."""
    (N, F), k = pre.shape, values.shape[1]
    slots = torch.empty(N, shape["K_POW2"], dtype=torch.int32, device=pre.device)
    keys = torch.empty(N, 2 * shape["K_POW2"], dtype=torch.int64, device=pre.device)
    _rows_kernel[(N,)](pre, b_enc, slots, keys, values, indices, F, k, **shape)


def select_groups(
    pre: Tensor,  # [N, at least F] float32, bias included, contiguous
    maxima: Tensor,  # [N, at least F / GROUP] int32, contiguous
    F: int,
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32, [N, k] int32
    """As `select_rows`, for F and k that `group_sizes` takes, from the bits of each GROUP
    neighbours' largest activation."""
    shape = group_sizes(F, k)
    assert shape is not None
    N = pre.shape[0]
    values = torch.empty(N, k, dtype=torch.float32, device=pre.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=pre.device)
    slots = torch.empty(N, shape["K_POW2"], dtype=torch.int32, device=pre.device)
    keys = torch.empty(N, 2 * shape["K_POW2"], dtype=torch.int64, device=pre.device)
    _groups_kernel[(N,)](
        pre, maxima, slots, keys, values, indices, pre.stride(0), maxima.stride(0), F, k, **shape
    )
    return values, indices
