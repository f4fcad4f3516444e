"""Triton kernels around the dense products over dead latents, which AuxK and ghost gradients train.

Legend: N tokens, D d_in, M listed dead latents (their rows compacted and padded), k k_aux.

With k_aux = D/2, a sixth to a third of the [N, M] block is active, so five products of 2NMD flops
beat gathers of N * k_aux rows. The products are the library's; the kernels here stand between them:
`pre` -> `select_dead` -> `acts @ W_dec` -> `aux_rows` -> `rows @ W_dec.T` -> `mask_dead_grad`.
Where latents are sharded, `digit_counts` and `pick_digits` find each token's limit over all shards,
eight bits a round, from counts alone.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_dead import TAKE_ALL, Limits
from .shapes import cdiv, next_power_of_2

# Values of a row that one program holds in registers; longer rows are read again at each count.
_MAX_BLOCK = 16384
# sort_key(-inf), the least key of a number.
_LEAST = tl.constexpr(-2139095041)
_TAKE_ALL = tl.constexpr(TAKE_ALL)


@triton.jit
def _sort_key(value):
    """int32 that orders as the float32, both zeros alike, one NaN above +inf: with its sign, or as
    the largest integer, it would leave the range that `_search` halves.
    """
    bits = tl.where(value != value, 0x7FC00000, (value + 0.0).to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key):
    """The float32 of a sort key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(pre_ptr, bias_ptr, row, cols, M):
    """Sort keys of a token's pre-activations with their bias; beyond M those of -inf."""
    inside = cols < M
    pre = tl.load(pre_ptr + row * M + cols, mask=inside, other=0.0).to(tl.float32)
    return _sort_key(pre + tl.load(bias_ptr + cols, mask=inside, other=float("-inf")))


@triton.jit
def _count(first, pre_ptr, bias_ptr, row, M, least, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Keys of a row that are at least `least`; `first` are those of its first chunk."""
    found = tl.sum((first >= least).to(tl.int32), 0)
    for chunk in range(1, CHUNKS):
        keys = _load_keys(pre_ptr, bias_ptr, row, chunk * BLOCK + tl.arange(0, BLOCK), M)
        found += tl.sum((keys >= least).to(tl.int32), 0)
    return found


@triton.jit
def _packed(keys, one, two, three, four):
    """How many of a chunk's keys reach each of four ascending values, 16 bits a count."""
    low = (keys >= one).to(tl.int32) + ((keys >= two).to(tl.int32) << 16)
    high = (keys >= three).to(tl.int32) + ((keys >= four).to(tl.int32) << 16)
    return tl.sum(low.to(tl.int64) + (high.to(tl.int64) << 32), 0)


@triton.jit
def _count_four(
    first, pre_ptr, bias_ptr, row, M, one, two, three, four,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Keys of a row that reach each of four ascending values, in one pass and a sum a chunk."""
    n1 = tl.zeros([], tl.int32)
    n2, n3, n4 = n1, n1, n1
    keys = first
    for chunk in range(CHUNKS):
        packed = _packed(keys, one, two, three, four)
        n1 += (packed & 0xFFFF).to(tl.int32)
        n2 += ((packed >> 16) & 0xFFFF).to(tl.int32)
        n3 += ((packed >> 32) & 0xFFFF).to(tl.int32)
        n4 += (packed >> 48).to(tl.int32)
        # Behind the last chunk there is nothing to load.
        keys = _load_keys(pre_ptr, bias_ptr, row, (chunk + 1) * BLOCK + tl.arange(0, BLOCK), M)
    return n1, n2, n3, n4


@triton.jit
def _between(low, low_count, high, high_count, key, count, k):
    """The bracket low .. high after `count` keys were found to reach `key`."""
    inside = (key > low) & (key < high)
    reached = inside & (count >= k)
    missed = inside & (count < k)
    low_count = tl.where(reached, count, low_count)
    high_count = tl.where(missed, count, high_count)
    return tl.where(reached, key, low), low_count, tl.where(missed, key, high), high_count


@triton.jit
def _search(
    first, pre_ptr, bias_ptr, row, M, k, quantile, margin,
    RELU: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A limit such that k keys are above it, or reach it and are taken in order; see Limits.

    The limit lies between low, which at least k keys reach, and high, which fewer do. A pass counts
    what reaches four values about where the limit is expected, the outer ones two standard
    deviations of that from it: first by a normal distribution with the first chunk's mean and
    deviation, then by interpolating the counts. So n keys left become about sqrt(n), and normal
    data take three or four passes whatever M and k are. Every fourth pass splits the range of keys
    in five, so that any data end within 64. It ends early where exactly k keys reach low.
    """
    finite = (first > _LEAST) & (first < 0x7F800000)
    low = tl.full([], _LEAST, tl.int32)
    low_count = tl.full([], 1, tl.int32) * M
    if RELU:
        # What is not positive adds nothing: if no more than k are, all are taken.
        positive = _count(first, pre_ptr, bias_ptr, row, M, 1, BLOCK, CHUNKS)
        low = tl.full([], 1, tl.int32)
        low_count = tl.maximum(positive, k)
    number = tl.maximum(tl.sum(finite.to(tl.float32), 0), 1.0)
    values = tl.where(finite, _value_of(first), 0.0)
    mean = tl.sum(values, 0) / number
    deviation = tl.sqrt(tl.maximum(tl.sum(values * values, 0) / number - mean * mean, 0.0))
    center = mean + quantile * deviation
    step = margin * deviation
    outer, inner = 2.0 * step, 0.6 * step
    high = tl.full([], 0x7FFFFFFF, tl.int32)
    high_count = tl.full([], 0, tl.int32)
    least, most = low_count.to(tl.float32) * 0.0 - 3.0e38, low_count.to(tl.float32) * 0.0 + 3.0e38
    turn = tl.full([], 0, tl.int32)
    while (low_count != k) & (high > low + 1):
        split = (turn & 3) == 3
        fifth = (high >> 3) - (low >> 3) + 1
        fifth = tl.where(split, fifth + (fifth >> 1), 0)
        one = tl.where(split, low + fifth, _sort_key(tl.maximum(center - outer, least)))
        two = tl.where(split, low + 2 * fifth, _sort_key(tl.maximum(center - inner, least)))
        three = tl.where(split, high - 2 * fifth, _sort_key(tl.minimum(center + inner, most)))
        four = tl.where(split, high - fifth, _sort_key(tl.minimum(center + outer, most)))
        one = tl.minimum(tl.maximum(one, low + 1), high - 1)
        two = tl.minimum(tl.maximum(two, one), high - 1)
        three = tl.minimum(tl.maximum(three, two), high - 1)
        four = tl.minimum(tl.maximum(four, three), high - 1)
        n1, n2, n3, n4 = _count_four(
            first, pre_ptr, bias_ptr, row, M, one, two, three, four, BLOCK, CHUNKS
        )
        low, low_count, high, high_count = _between(low, low_count, high, high_count, one, n1, k)
        low, low_count, high, high_count = _between(low, low_count, high, high_count, two, n2, k)
        low, low_count, high, high_count = _between(low, low_count, high, high_count, three, n3, k)
        low, low_count, high, high_count = _between(low, low_count, high, high_count, four, n4, k)
        turn += 1
        # Where nothing was counted yet, a bound that usual data do not pass.
        bottom = tl.where(low == _LEAST, mean - 8.0 * deviation, _value_of(low))
        top = tl.where(high_count == 0, mean + 8.0 * deviation, _value_of(high))
        bottom, top = tl.maximum(bottom, -3.0e38), tl.minimum(top, 3.0e38)
        width = tl.maximum(top - bottom, 0.0)
        span = tl.maximum((low_count - high_count).to(tl.float32), 1.0)
        center = bottom + width * (((low_count - k).to(tl.float32) + 0.5) / span)
        outer = width * (0.8 / tl.sqrt(span))
        inner = width * (0.25 / tl.sqrt(span))
    return low, low_count


@triton.jit
def _select_kernel(
    pre_ptr,  # [N, M] float32
    bias_ptr,  # [M] float32
    keys_ptr,  # [N] int32, GIVEN only
    take_ptr,  # [N] int32, GIVEN only
    out_ptr,  # [N, M]
    M, k, quantile, margin, SEARCH: tl.constexpr, GIVEN: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = _load_keys(pre_ptr, bias_ptr, row, tl.arange(0, BLOCK), M)
    limit = tl.full([], _LEAST, tl.int32)
    take = tl.full([], _TAKE_ALL, tl.int32)
    if GIVEN:
        limit = tl.load(keys_ptr + row)
        take = tl.load(take_ptr + row)
    if SEARCH:
        limit, reached = _search(
            first, pre_ptr, bias_ptr, row, M, k, quantile, margin, RELU, BLOCK, CHUNKS
        )
        if reached > k:
            above = _count(first, pre_ptr, bias_ptr, row, M, limit + 1, BLOCK, CHUNKS)
            take = k - above
    seen = tl.full([], 0, tl.int32)
    for chunk in range(0, CHUNKS):
        cols = chunk * BLOCK + tl.arange(0, BLOCK)
        keys = first
        if CHUNKS > 1:
            keys = _load_keys(pre_ptr, bias_ptr, row, cols, M)
        keep = keys >= limit
        equal = keys == limit
        here = tl.sum(equal.to(tl.int32), 0)
        if here > take - seen:
            rank = seen + tl.cumsum(equal.to(tl.int32), 0)
            keep = keep & ((keys > limit) | (rank <= take))
        seen += here
        value = _value_of(keys)
        if RELU:
            act = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            act = tl.exp(tl.minimum(value, 30.0, propagate_nan=tl.PropagateNan.ALL))
        act = tl.where(keep, act, 0.0)
        tl.store(out_ptr + row * M + cols, act.to(out_ptr.dtype.element_ty), mask=cols < M)


@triton.jit
def _digits_kernel(
    pre_ptr,  # [N, M] float32
    bias_ptr,  # [M] float32
    prefix_ptr,  # [N] int32
    out_ptr,  # [N, 256] int32
    M, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    prefix = tl.load(prefix_ptr + row)
    counts = tl.zeros([256], tl.int32)
    for start in range(0, M, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        keys = _load_keys(pre_ptr, bias_ptr, row, cols, M)
        # Unsigned order: the sign's bit is turned over.
        keys = (keys ^ -2147483648).to(tl.uint32, bitcast=True)
        counted = cols < M
        if SHIFT < 24:
            counted = counted & ((keys >> (SHIFT + 8)).to(tl.int32) == prefix)
        counts += tl.histogram(((keys >> SHIFT) & 255).to(tl.int32), 256, mask=counted)
    tl.store(out_ptr + row * 256 + tl.arange(0, 256), counts)


@triton.jit
def _pick_kernel(
    counts_ptr,  # [N, 256] int32
    prefix_ptr,  # [N] int32, changed
    left_ptr,  # [N] int32, changed
):
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(counts_ptr + row * 256 + tl.arange(0, 256))
    left = tl.load(left_ptr + row)
    reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys of this digit or above
    digit = tl.maximum(tl.sum((reach >= left).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), 0)
    tl.store(left_ptr + row, left - above)
    tl.store(prefix_ptr + row, (tl.load(prefix_ptr + row) << 8) | digit)


@triton.jit
def _rows_kernel(
    residual_ptr,  # [N, D]
    recon_ptr,  # [N, D]
    scale_ptr,  # scalar float32
    out_ptr,  # [N, D]
    loss_ptr,  # [N] float32
    D, GHOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    at = row * D + cols
    e = tl.load(residual_ptr + at, mask=cols < D, other=0.0).to(tl.float32)
    recon = tl.load(recon_ptr + at, mask=cols < D, other=0.0).to(tl.float32)
    if GHOST:
        factor = tl.sqrt(tl.sum(e * e, 0)) / (1e-6 + 2 * tl.sqrt(tl.sum(recon * recon, 0)))
        diff = recon * factor + e
        ratio = e * e / (diff * diff + 1e-6)
        loss = tl.sum(diff * diff * ratio, 0)
        out = ratio * factor * diff
    else:
        out = recon + e
        loss = tl.sum(out * out, 0)
    tl.store(loss_ptr + row, loss)
    out *= tl.load(scale_ptr)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _mask_kernel(
    grad_ptr,  # [N, M], changed
    acts_ptr,  # [N, M]
    sums_ptr,  # [cdiv(N, TURNS * ROWS), M] float32
    N, M, GHOST: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0) * TURNS + turn).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (cols < M)[None, :]
        at = row[:, None] * M + cols[None, :]
        act = tl.load(acts_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = grad * act if GHOST else tl.where(act != 0, grad, 0.0)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        total += grad
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * M + cols, tl.sum(total, 0), mask=cols < M)


def select_dead(
    pre: Tensor,  # [N, M] float32
    bias: Tensor,  # [M] float32
    k: int | None,
    ghost: bool,
    dtype: torch.dtype,
    limits: Limits | None = None,
) -> Tensor:  # [N, M] in dtype
    """`reference.select_dead`."""
    N, M = pre.shape
    out = pre.new_empty((N, M), dtype=dtype)
    if N == 0 or M == 0:
        return out
    search = limits is None and k is not None and k < M
    quantile, margin = _normal_quantile(k, M) if search and k is not None else (0.0, 0.0)
    block = min(_MAX_BLOCK, max(16, next_power_of_2(M)))
    keys, take = (pre, pre) if limits is None else limits
    _select_kernel[(N,)](
        pre, bias, keys, take, out, M, k or 0, quantile, margin,
        SEARCH=search, GIVEN=limits is not None, RELU=not ghost,
        BLOCK=block, CHUNKS=cdiv(M, block), num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """Warps of a program, by its keys: 4096 x 8192 keys take 173 us by 4 and 208 by 8, where
    4096 x 2560 take 108 by 2 and 81 by 4 (an H200).
    """
    return 4 if block == 8192 else max(1, min(16, block // 1024))


def _normal_quantile(k: int, M: int) -> tuple[float, float]:
    """Deviations above the mean that k of M normal values exceed, and how far samples stray."""
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - k / M)
    return quantile, k**0.5 / (M * normal.pdf(quantile))


def digit_counts(
    pre: Tensor,  # [N, M] float32
    bias: Tensor,  # [M] float32
    prefix: Tensor,  # [N] int32
    shift: int,
) -> Tensor:  # [N, 256] int32
    """`reference.digit_counts`."""
    N, M = pre.shape
    out = torch.zeros((N, 256), dtype=torch.int32, device=pre.device)
    if N and M:
        block = min(2048, max(256, next_power_of_2(M)))
        _digits_kernel[(N,)](pre, bias, prefix, out, M, SHIFT=shift, BLOCK=block, num_warps=4)
    return out


def pick_digits_(
    counts: Tensor,  # [N, 256] int32
    prefix: Tensor,  # [N] int32
    left: Tensor,  # [N] int32
) -> None:
    """`reference.pick_digits_`."""
    if len(counts):
        _pick_kernel[(len(counts),)](counts, prefix, left, num_warps=1)


def aux_rows(
    residual: Tensor,  # [N, D]
    recon: Tensor,  # [N, D] float32
    scale: Tensor,  # scalar float32
    ghost: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [N, D] in dtype, [N] float32
    """`reference.aux_rows` in one pass."""
    N, D = recon.shape
    out = recon.new_empty((N, D), dtype=dtype)
    loss = recon.new_empty(N, dtype=torch.float32)
    if N:
        block = max(16, next_power_of_2(D))
        _rows_kernel[(N,)](
            residual, recon, scale, out, loss, D, GHOST=ghost, BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out, loss


def mask_dead_grad_(
    grad: Tensor,  # [N, M]
    acts: Tensor,  # [N, M]
    ghost: bool,
) -> Tensor:  # [any, M] float32
    """`reference.mask_dead_grad_` in one pass."""
    N, M = grad.shape
    turns, rows, block = 16, 4, 256
    sums = grad.new_empty((cdiv(N, turns * rows), M), dtype=torch.float32)
    if N and M:
        grid = (len(sums), cdiv(M, block))
        _mask_kernel[grid](
            grad, acts, sums, N, M, GHOST=ghost, TURNS=turns, ROWS=rows, BLOCK=block, num_warps=4
        )
    return sums
