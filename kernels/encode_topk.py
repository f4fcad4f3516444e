"""Encoder matmul with an exact top-k in its epilogue: no [N, F] tensor exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, S the sampling stride.

1. `_sample_kernel` computes every S-th activation (one of each S neighbours, picked by a hash).
2. `_threshold_kernel` takes a row's r-th largest sample as threshold. r is such that the k largest
   activations reach it but for one row in 1e8, whatever the values are: only ranks matter, since
   equal values are ranked by index.
3. `_filter_kernel` is the whole matmul; its epilogue appends every group of 8 neighbouring latents
   that holds an activation at or above its row's threshold, on the fp32 accumulators, to a short
   list a row.
4. `_select_kernel` finds the exact k of that list. Where fewer than k of a list reach the
threshold,
   or the list overflowed, the row is done anew by streaming over all latents: the result is exact
   in every case.

Activations are compared as the int32 bits of their fp32 value: those order non-negative floats, put
NaN above +inf and negative ones, which ReLU makes zero, below.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import encode_blocked

_GROUP = 8
_SCRATCH_BYTES = 56 << 20
_MISS_CHANCE = 1e-8
_OVERFLOW_CHANCE = 1e-7


class Plan(NamedTuple):
    """Sizes of one call; a function of shapes alone, so that every rank makes the same."""

    stride: int
    rank: int
    capacity: int  # groups a row's list holds
    block_rows: int
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 4
    sample_n: int = 128
    programs_a_unit: int = 1  # persistent programs a multiprocessor
    sample_warps: int = 4
    threshold_warps: int = 4
    piece: int = 1024
    select_warps: int = 2

    @property
    def keys(self) -> int:
        """Entries that reach the threshold, for which a row's selection has room."""
        return max(256, self.capacity)


def _poisson_below(mean: float, r: int) -> float:
    """P(Poisson(mean) < r)."""
    return sum(math.exp(j * math.log(mean) - mean - math.lgamma(j + 1)) for j in range(r))


def _rank(mean: float) -> int:
    """Smallest r with P(Poisson(mean) >= r) < _MISS_CHANCE."""
    r = max(1, math.ceil(mean))
    while 1.0 - _poisson_below(mean, r) > _MISS_CHANCE:
        r += 1
    return r


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, F: int, k: int) -> Plan | None:
    """The fused path's sizes, or None where k is too large a part of F for sampling to pay.

    The sparsest sample whose threshold lets no more groups through than a list of 16 k holds.
    """
    capacity = max(256, triton.next_power_of_2(16 * k))
    if D % 8 or F < 2048 or capacity > 4096 or 8 * capacity > F:
        return None
    for stride in (32, 24, 20, 16, 12, 10, 8, 6, 4):
        rank = _rank(k / stride)
        if _poisson_below(capacity / stride, rank) < _OVERFLOW_CHANCE:
            break
    else:
        return None
    row_bytes = (4 * _GROUP + 4) * capacity + 4 * (F // stride) + 16
    blocks = triton.cdiv(N * row_bytes, _SCRATCH_BYTES)
    block_rows = max(128, triton.cdiv(triton.cdiv(N, blocks), 128) * 128)
    return Plan(stride, rank, capacity, block_rows)


@triton.jit
def _sampled_latent(j, STRIDE: tl.constexpr):
    """Latent of the j-th sample: one of the STRIDE from j * STRIDE on, scattered so that no pattern
    of W meets it."""
    h = j.to(tl.uint32) * 0x9E3779B1
    return j * STRIDE + ((h >> 16) % STRIDE).to(tl.int32)


@triton.jit
def _relu_bits(v):
    """int32 bits of relu(v), NaN kept."""
    bits = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
    return tl.maximum(bits, 0)


@triton.jit
def _kth(bits, latent, k, slack):
    """(value bits, last latent) that at least k and at most k + slack of the entries reach.

    An entry reaches them with a larger value, or an equal one and a latent up to `last`. Entries
    below 0 do not count; where there are fewer than k, all reach.
    """
    hi = tl.max(bits, 0)
    count = tl.sum((bits >= 0).to(tl.int32), 0)
    lo = tl.zeros([], tl.int32)
    # Most searches end within two octaves of the maximum: try there before halving the whole range.
    near = tl.maximum(hi - (2 << 23), 0)
    c = tl.sum((bits >= near).to(tl.int32), 0)
    if c >= k:
        lo = near
        count = c
    while (lo < hi) & (count > k + slack):
        mid = lo + (hi - lo + 1) // 2
        c = tl.sum((bits >= mid).to(tl.int32), 0)
        if c >= k:
            lo = mid
            count = c
        else:
            hi = mid - 1
    last = tl.full([], 0x7FFFFFFF, tl.int32)
    if count > k + slack:
        # More than enough equal values: the lowest latents of them.
        first = tl.zeros([], tl.int32)
        need = k - tl.sum((bits > lo).to(tl.int32), 0)
        last = tl.max(tl.where(bits >= 0, latent, 0), 0)
        while first < last:
            mid = first + (last - first) // 2
            if tl.sum(((bits == lo) & (latent <= mid)).to(tl.int32), 0) >= need:
                last = mid
            else:
                first = mid + 1
    return lo, last


@triton.jit
def _sample_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, N, D, num_samples, pitch,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    latents = _sampled_latent(tl.minimum(cols, num_samples - 1), STRIDE)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D + depth[None, :]
    w_ptrs = w_ptr + latents.to(tl.int64)[:, None] * D + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = (start + depth)[None, :] < D
        a = tl.load(x_ptrs + start, mask=inside, other=0.0)
        b = tl.load(w_ptrs + start, mask=inside, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    v = acc + tl.load(bias_ptr + latents)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(out, v, mask=(rows < N)[:, None] & (cols < num_samples)[None, :])


@triton.jit
def _threshold_kernel(
    samples_ptr, tau_ptr, last_ptr, count_ptr, num_samples, pitch, rank,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    v = tl.load(samples_ptr + row * pitch + cols, mask=cols < num_samples, other=0.0)
    bits = tl.where(cols < num_samples, _relu_bits(v), -1)
    tau, last = _kth(bits, _sampled_latent(cols, STRIDE), rank, rank // 8)
    tl.store(tau_ptr + row, tau)
    tl.store(last_ptr + row, last)
    tl.store(count_ptr + row, 0)


@triton.jit
def _append(
    acc, f0, rows, N, F, limit, bias_ptr, count_ptr, groups_ptr, values_ptr,
    CAPACITY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Appends the groups of a [BLOCK_M, WIDTH] tile from latent f0 on that reach their limit."""
    f = f0 + tl.arange(0, WIDTH)
    v = acc + tl.load(bias_ptr + f, mask=f < F, other=float("-inf"))[None, :]
    grouped = tl.reshape(v, (acc.shape[0], WIDTH // 8, 8))
    peak = tl.max(grouped.to(tl.int32, bitcast=True), 2)
    group = f0 // 8 + tl.arange(0, WIDTH // 8)
    hit = (peak >= limit[:, None]) & (rows < N)[:, None] & (group * 8 < F)[None, :]
    ones = hit.to(tl.int32)
    # An atomic a group, where there are few: 1.1x over a prefix sum a row (docs/performance.md).
    slot = tl.atomic_add(count_ptr + rows[:, None] + 0 * ones, 1, mask=hit, sem="relaxed")
    fits = hit & (slot < CAPACITY)
    at = rows.to(tl.int64)[:, None] * CAPACITY + slot
    tl.store(groups_ptr + at, group[None, :] + 0 * slot, mask=fits)
    where = values_ptr + at[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(where, grouped, mask=fits[:, :, None] & (tl.arange(0, 8) < 8)[None, None, :])


@triton.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, groups_ptr, values_ptr, N, F, D,
    CAPACITY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(N, BLOCK_M)
    num_tiles = num_m * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS):
        # Row blocks run fastest: neighbours share a tile of W_enc, and x stays in L2.
        m0 = (tile % num_m) * BLOCK_M
        f0 = (tile // num_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(D, BLOCK_K)):
            a = x_desc.load([m0, step * BLOCK_K])
            b = w_desc.load([f0, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BLOCK_M)
        tau = tl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFE)
        last = tl.load(last_ptr + rows, mask=rows < N, other=-1)
        # Equal values pass up to latent `last`, coarsely: in the whole tile that holds it. Where
        # zeros pass, so do the negative values that ReLU makes zeros.
        equal = tl.where(tau == 0, -2147483648, tau)
        limit = tl.where(last >= f0, equal, tau + 1)
        _append(acc, f0, rows, N, F, limit, bias_ptr, count_ptr, groups_ptr, values_ptr,
                CAPACITY, BLOCK_N)  # fmt: skip


@triton.jit
def _key(bits, latent):
    """(relu'd bits, latent) as an int64 that sorts by activation, then lowest latent."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def _cut(row_keys, count, k, CAPACITY: tl.constexpr):
    """Moves the k largest of a row's first `count` keys to its front (all where it holds fewer)."""
    slots = tl.arange(0, CAPACITY)
    keys = tl.load(row_keys + slots, mask=slots < count, other=-1)
    bits = (keys >> 32).to(tl.int32)
    latent = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    tau, last = _kth(bits, latent, k, 0)
    kept = (bits > tau) | ((bits == tau) & (latent <= last))
    at = tl.cumsum(kept.to(tl.int32), 0) - 1
    # Every thread has read its keys before any slot is overwritten.
    tl.debug_barrier()
    tl.store(row_keys + at, keys, mask=kept)
    tl.debug_barrier()


@triton.jit
def _stream_row(
    x_row, w_ptr, bias_ptr, row_keys, F, D, k,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exact slow path: all activations of one row in chunks, cut back to k whenever full."""
    depth = tl.arange(0, BLOCK_K)
    count = tl.zeros([], tl.int32)
    for f0 in range(0, F, CHUNK):
        if count + CHUNK > CAPACITY:
            _cut(row_keys, count, k, CAPACITY)
            count = tl.minimum(count, k)
        f = f0 + tl.arange(0, CHUNK)
        w_rows = w_ptr + tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
        total = tl.zeros((CHUNK,), tl.float32)
        for d0 in range(0, D, BLOCK_K):
            inside = d0 + depth < D
            x = tl.load(x_row + d0 + depth, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_rows + (d0 + depth)[None, :], mask=inside[None, :], other=0.0)
            total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        v = total + tl.load(bias_ptr + f, mask=f < F, other=0.0)
        keys = tl.where(f < F, _key(_relu_bits(v), f), -1)
        tl.store(row_keys + count + tl.arange(0, CHUNK), keys)
        tl.debug_barrier()
        count += CHUNK
    _cut(row_keys, count, k, CAPACITY)


@triton.jit
def _select_kernel(
    x_ptr, w_ptr, bias_ptr, tau_ptr, last_ptr, count_ptr, groups_ptr, list_ptr, keys_ptr, pitch,
    values_ptr, indices_ptr, F, D, k,
    CAPACITY: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, K_POW2: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    tau = tl.load(tau_ptr + row)
    last = tl.load(last_ptr + row)
    row_keys = keys_ptr + row * pitch
    found = tl.zeros([], tl.int32)
    if count <= CAPACITY:
        # As many entries as there are, in pieces: a list is a third full.
        for start in range(0, 8 * count, PIECE):
            entry = start + tl.arange(0, PIECE)
            there = entry < 8 * count
            v = tl.load(list_ptr + row * (8 * CAPACITY) + entry, mask=there, other=0.0)
            group = tl.load(groups_ptr + row * CAPACITY + entry // 8, mask=there, other=0)
            latent = group * 8 + entry % 8
            bits = _relu_bits(v)
            # A neighbour in a group that does not reach the threshold tells nothing about what
            # other latents there are.
            reach = (bits > tau) | ((bits == tau) & (latent <= last))
            reach = reach & there & (latent < F)
            at = found + tl.cumsum(reach.to(tl.int32), 0) - 1
            tl.store(row_keys + at, _key(bits, latent), mask=reach & (at < KEYS))
            found += tl.sum(reach.to(tl.int32), 0)
    tl.debug_barrier()
    if (found >= k) & (found <= KEYS):
        _cut(row_keys, found, k, KEYS)
    else:
        _stream_row(x_ptr + row * D, w_ptr, bias_ptr, row_keys, F, D, k, KEYS, CHUNK, BLOCK_K)
    j = tl.arange(0, K_POW2)
    keys = tl.sort(tl.load(row_keys + j, mask=j < k, other=-1), descending=True)
    value = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(values_ptr + row * k + j, value, mask=j < k)
    tl.store(indices_ptr + row * k + j, 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32), mask=j < k)


@lru_cache(maxsize=8)
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_topk(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    plan: Plan,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The fused path with the sizes of a plan."""
    N, D = x.shape
    F = W_enc.shape[0]
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    num_samples = F // plan.stride
    rows = min(N, plan.block_rows)
    # The samples' room serves the selection for its keys.
    pitch = triton.cdiv(max(num_samples, 2 * plan.keys), 2)
    keys = torch.empty(rows, pitch, dtype=torch.int64, device=x.device)
    samples = keys.view(torch.float32)
    lists = torch.empty(rows, plan.capacity * _GROUP, dtype=torch.float32, device=x.device)
    groups = torch.empty(rows, plan.capacity, dtype=torch.int32, device=x.device)
    tau, last, count = torch.empty(3, rows, dtype=torch.int32, device=x.device).unbind()
    # 16-bit inputs are exact in the tensor cores' fp32 sums whatever is named here.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    m, n, d = plan.block_m, plan.block_n, plan.block_k
    w_desc = TensorDescriptor.from_tensor(W_enc, [n, d])
    programs = plan.programs_a_unit * _num_programs(x.device)
    block = triton.next_power_of_2(num_samples)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        _sample_kernel[(triton.cdiv(size, m), triton.cdiv(num_samples, plan.sample_n))](
            part, W_enc, b_enc, samples, size, D, num_samples,
            2 * pitch, plan.stride, m, plan.sample_n, d, precision,
            num_warps=plan.sample_warps, num_stages=3,
        )  # fmt: skip
        _threshold_kernel[(size,)](
            samples, tau, last, count, num_samples, 2 * pitch, plan.rank, plan.stride, block,
            num_warps=plan.threshold_warps,
        )  # fmt: skip
        _filter_kernel[(programs,)](
            TensorDescriptor.from_tensor(part, [m, d]), w_desc, b_enc, tau, last, count, groups,
            lists, size, F, D, plan.capacity, m, n, d, programs, precision,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
        _select_kernel[(size,)](
            part, W_enc, b_enc, tau, last, count, groups, lists, keys, pitch, values[start:],
            indices[start:], F, D, k, plan.capacity, plan.keys, plan.piece,
            triton.next_power_of_2(k), 128, 64, num_warps=plan.select_warps,
        )  # fmt: skip
    return values, indices


def _aligned(t: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on, which the copy engine asks for."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` on a GPU: fused where sampling pays, else in blocks of rows."""
    x, W_enc, b_enc = _aligned(x), _aligned(W_enc), b_enc.float().contiguous()
    plan = make_plan(x.shape[0], x.shape[1], W_enc.shape[0], k) if x.shape[0] else None
    if plan is None or x.dtype == torch.float32:
        return encode_blocked.topk_encode(x, W_enc, b_enc, k)
    return fused_topk(x, W_enc, b_enc, k, plan)


def topk_encode_aux(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    k: int,
    aux_mask: Tensor,  # [F] bool
    k_aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.topk_encode_aux` on a GPU: the main list fused, the second in blocks of rows."""
    values, indices = topk_encode(x, W_enc, b_enc, k)
    aux = encode_blocked.masked_topk(x.contiguous(), W_enc, b_enc.float(), aux_mask, k_aux)
    return values, indices, *aux
