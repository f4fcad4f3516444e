"""Encoder matmul with an exact top-k in its epilogue: no [N, F] tensor exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, S the sampling stride.

1. `_sample_kernel` computes every S-th activation (one of each S neighbours, picked by a hash).
2. `_threshold_kernel` takes a row's r-th largest sample as threshold. r is such that the k largest activations lie above
   it but for one row in 1e9, whatever the values are: only ranks matter, since equal values are ranked by index.
3. `_filter_kernel` is the whole matmul; its epilogue appends the few activations at or above the row's threshold, on the
   fp32 accumulators, to a short list a row.
4. `_select_kernel` finds the exact k of that list. A row whose list came out shorter than k or longer than its room
   (found by its counter) is done anew by streaming over all latents: the result is exact in every case.

A candidate is one int64 that sorts as (activation, lowest index first): the activation's fp32 bits, which order
non-negative floats and put NaN above +inf, then the index counted down.
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

_SCRATCH_BYTES = 40 << 20
# Chance that a row's k largest are not all above its threshold; such a row takes the slow exact path.
_MISS_CHANCE = 1e-9


class Plan(NamedTuple):
    """Sizes of one call; a function of shapes alone, so that every rank makes the same."""

    stride: int
    rank: int
    capacity: int
    block_rows: int
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 4
    scan: bool = False
    subtiles: int = 4


def _poisson_rank(mean: float) -> int:
    """Smallest r with P(Poisson(mean) >= r) < _MISS_CHANCE."""
    term, below, r = math.exp(-mean), 0.0, 0
    while 1.0 - below > _MISS_CHANCE and (term > 1e-12 or r <= mean):
        below += term
        r += 1
        term *= mean / r
    return r


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, F: int, k: int) -> Plan | None:
    """The fused path's sizes, or None where k is too large a part of F for sampling to pay."""
    stride = 32 if F >= 49152 else 16
    rank = _poisson_rank(k / stride)
    expected = stride * rank
    if D % 8 or F < 1024 or expected > F // 4:
        return None
    room = expected + 6 * stride * math.sqrt(rank) + 256
    capacity = max(256, 2 * triton.next_power_of_2(k), triton.next_power_of_2(math.ceil(room)))
    if capacity > 8192:
        return None
    row_bytes = 8 * capacity + 4 * triton.cdiv(F, stride) + 16
    blocks = triton.cdiv(N * row_bytes, _SCRATCH_BYTES)
    block_rows = max(128, triton.cdiv(triton.cdiv(N, blocks), 128) * 128)
    return Plan(stride, rank, capacity, min(block_rows, triton.cdiv(N, 16) * 16))


@triton.jit
def _sampled_latent(j, STRIDE: tl.constexpr):
    """Latent of the j-th sample: one of the STRIDE from j * STRIDE on, scattered so that no pattern of W meets it."""
    h = j.to(tl.uint32) * 0x9E3779B1
    return j * STRIDE + ((h >> 16) % STRIDE).to(tl.int32)


@triton.jit
def _relu_keep_nan(v):
    return tl.where(v != v, float("nan"), tl.maximum(v, 0.0))


@triton.jit
def _pack(v, f):
    """(activation >= 0 or NaN, latent) as an int64 that sorts by activation, then lowest latent."""
    bits = tl.where(v != v, 0x7FC00000, (v + 0.0).to(tl.int32, bitcast=True))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - f).to(tl.int64)


@triton.jit
def _kth_key(keys, k, slack):
    """A key that at least k and at most k + slack of the distinct keys reach (negative keys are no keys)."""
    lo = tl.zeros([], tl.int64)
    hi = tl.max(keys, 0)
    count = tl.sum((keys >= 0).to(tl.int32), 0)
    while (lo < hi) & (count > k + slack):
        mid = lo + (hi - lo + 1) // 2
        c = tl.sum((keys >= mid).to(tl.int32), 0)
        enough = c >= k
        lo = tl.where(enough, mid, lo)
        count = tl.where(enough, c, count)
        hi = tl.where(enough, hi, mid - 1)
    return lo


@triton.jit
def _sample_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, N, D, num_samples,
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
    v = _relu_keep_nan(acc + tl.load(bias_ptr + latents)[None, :])
    out = out_ptr + rows.to(tl.int64)[:, None] * num_samples + cols[None, :]
    tl.store(out, v, mask=(rows < N)[:, None] & (cols < num_samples)[None, :])


@triton.jit
def _threshold_kernel(
    samples_ptr, tau_ptr, last_ptr, count_ptr, num_samples, rank,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    v = tl.load(samples_ptr + row * num_samples + cols, mask=cols < num_samples, other=0.0)
    keys = tl.where(cols < num_samples, _pack(v, _sampled_latent(cols, STRIDE)), -1)
    key = _kth_key(keys, rank, rank // 8)
    tl.store(tau_ptr + row, (key >> 32).to(tl.int32))
    # Latents up to this one pass at a value equal to tau; -1 where the key lies between two values.
    low = (key & 0xFFFFFFFF).to(tl.int64)
    tl.store(last_ptr + row, tl.where(low > 0x7FFFFFFF, -1, 0x7FFFFFFF - low).to(tl.int32))
    tl.store(count_ptr + row, 0)


@triton.jit
def _append(
    acc, bias, f0, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Appends the activations of a [BLOCK_M, WIDTH] piece from latent f0 on that reach their row's threshold."""
    f = f0 + tl.arange(0, WIDTH)
    v = _relu_keep_nan(acc + bias[None, :])
    # Equal values pass up to latent `last`: one comparison a value, coarse within the piece that holds `last`.
    limit = tl.where(last >= f0, tau, tau + 1).to(tl.float32, bitcast=True)
    hit = ((v < limit[:, None]) == 0) & (rows < N)[:, None] & (f < F)[None, :]
    if SCAN:
        ones = hit.to(tl.int32)
        found = tl.sum(ones, 1)
        base = tl.atomic_add(count_ptr + rows, found, mask=found > 0, sem="relaxed")
        slot = base[:, None] + tl.cumsum(ones, 1) - 1
    else:
        counters = count_ptr + rows[:, None] + tl.zeros((1, WIDTH), tl.int32)
        slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
    keys = _pack(v, f[None, :])
    at = list_ptr + rows.to(tl.int64)[:, None] * CAPACITY + slot
    tl.store(at, keys, mask=hit & (slot < CAPACITY))


@triton.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr, N, F, D,
    CAPACITY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, SUBTILES: tl.constexpr, SCAN: tl.constexpr,
    PRECISION: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(N, BLOCK_M)
    num_tiles = num_m * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        # Row blocks run fastest: neighbours share a tile of W_enc, and x stays in L2.
        m0 = (tile % num_m) * BLOCK_M
        f0 = (tile // num_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(D, BLOCK_K)):
            a = x_desc.load([m0, step * BLOCK_K])
            b = w_desc.load([f0, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BLOCK_M)
        tau = tl.load(tau_ptr + rows, mask=rows < N, other=0x7F7FFFFF)
        last = tl.load(last_ptr + rows, mask=rows < N, other=-1)
        WIDTH: tl.constexpr = BLOCK_N // SUBTILES
        offsets = tl.arange(0, WIDTH)
        if SUBTILES == 1:
            bias = tl.load(bias_ptr + f0 + offsets, mask=f0 + offsets < F, other=0.0)
            _append(
                acc, bias, f0, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN
            )
        elif SUBTILES == 2:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1))
            p0, p1 = tl.split(halves)
            b0 = tl.load(bias_ptr + f0 + offsets, mask=f0 + offsets < F, other=0.0)
            _append(p0, b0, f0, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)
            f1 = f0 + WIDTH
            b1 = tl.load(bias_ptr + f1 + offsets, mask=f1 + offsets < F, other=0.0)
            _append(p1, b1, f1, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)
        else:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, 2 * WIDTH)), (0, 2, 1))
            h0, h1 = tl.split(halves)
            p0, p1 = tl.split(tl.permute(tl.reshape(h0, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
            p2, p3 = tl.split(tl.permute(tl.reshape(h1, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
            b0 = tl.load(bias_ptr + f0 + offsets, mask=f0 + offsets < F, other=0.0)
            _append(p0, b0, f0, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)
            f1 = f0 + WIDTH
            b1 = tl.load(bias_ptr + f1 + offsets, mask=f1 + offsets < F, other=0.0)
            _append(p1, b1, f1, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)
            f2 = f1 + WIDTH
            b2 = tl.load(bias_ptr + f2 + offsets, mask=f2 + offsets < F, other=0.0)
            _append(p2, b2, f2, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)
            f3 = f2 + WIDTH
            b3 = tl.load(bias_ptr + f3 + offsets, mask=f3 + offsets < F, other=0.0)
            _append(p3, b3, f3, rows, N, F, tau, last, count_ptr, list_ptr, CAPACITY, WIDTH, SCAN)


@triton.jit
def _keep_largest(row_list, count, k, CAPACITY: tl.constexpr):
    """Moves the k largest keys of a row's list to its front (all of them where it holds fewer)."""
    slots = tl.arange(0, CAPACITY)
    keys = tl.load(row_list + slots, mask=slots < count, other=-1)
    kept = keys >= _kth_key(keys, k, 0)
    kept = kept & (keys >= 0)
    at = tl.cumsum(kept.to(tl.int32), 0) - 1
    # Every thread has read its keys before any slot is overwritten.
    tl.debug_barrier()
    tl.store(row_list + at, keys, mask=kept)
    tl.debug_barrier()


@triton.jit
def _stream_row(
    x_row, w_ptr, bias_ptr, row_list, F, D, k,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exact slow path: all activations of one row in chunks, the list cut back to k whenever it is full."""
    depth = tl.arange(0, BLOCK_K)
    count = tl.zeros([], tl.int32)
    for f0 in range(0, F, CHUNK):
        if count + CHUNK > CAPACITY:
            _keep_largest(row_list, count, k, CAPACITY)
            count = tl.minimum(count, k)
        f = f0 + tl.arange(0, CHUNK)
        w_rows = w_ptr + tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
        total = tl.zeros((CHUNK,), tl.float32)
        for d0 in range(0, D, BLOCK_K):
            inside = d0 + depth < D
            x = tl.load(x_row + d0 + depth, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_rows + (d0 + depth)[None, :], mask=inside[None, :], other=0.0)
            total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        v = _relu_keep_nan(total + tl.load(bias_ptr + f, mask=f < F, other=0.0))
        keys = tl.where(f < F, _pack(v, f), -1)
        tl.store(row_list + count + tl.arange(0, CHUNK), keys)
        tl.debug_barrier()
        count += CHUNK
    return count


@triton.jit
def _select_kernel(
    x_ptr, w_ptr, bias_ptr, count_ptr, list_ptr, values_ptr, indices_ptr, F, D, k,
    CAPACITY: tl.constexpr, K_POW2: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_list = list_ptr + row * CAPACITY
    count = tl.load(count_ptr + row)
    if (count < k) | (count > CAPACITY):
        count = _stream_row(
            x_ptr + row * D, w_ptr, bias_ptr, row_list, F, D, k, CAPACITY, CHUNK, BLOCK_K
        )
    _keep_largest(row_list, count, k, CAPACITY)
    j = tl.arange(0, K_POW2)
    keys = tl.load(row_list + j, mask=j < k, other=-1)
    keys = tl.sort(keys, descending=True)
    bits = (keys >> 32).to(tl.int32)
    latents = 0x7FFFFFFF - (keys & 0xFFFFFFFF).to(tl.int32)
    tl.store(values_ptr + row * k + j, bits.to(tl.float32, bitcast=True), mask=j < k)
    tl.store(indices_ptr + row * k + j, latents, mask=j < k)


@lru_cache(maxsize=8)
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    # fp32 inputs keep fp32 accuracy; 16-bit ones are exact in the tensor cores' fp32 sums.
    return "ieee" if dtype == torch.float32 else "tf32"


def fused_topk(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    plan: Plan,
    *,
    flatten: bool = True,
    specialize: bool = False,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The fused path with the sizes of a plan."""
    N, D = x.shape
    F = W_enc.shape[0]
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    num_samples = F // plan.stride
    rows = min(N, plan.block_rows)
    samples = torch.empty(rows, num_samples, dtype=torch.float32, device=x.device)
    lists = torch.empty(rows, plan.capacity, dtype=torch.int64, device=x.device)
    tau, last, count = torch.empty(3, rows, dtype=torch.int32, device=x.device).unbind()
    precision = _precision(x.dtype)
    m, n, d = plan.block_m, plan.block_n, plan.block_k
    w_desc = TensorDescriptor.from_tensor(W_enc, [n, d])
    programs = _num_programs(x.device)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        grid = (triton.cdiv(size, m), triton.cdiv(num_samples, n))
        _sample_kernel[grid](
            part, W_enc, b_enc, samples, size, D, num_samples, plan.stride, m, n, d, precision,
            num_warps=plan.num_warps, num_stages=min(3, plan.num_stages),
        )  # fmt: skip
        block = triton.next_power_of_2(num_samples)
        _threshold_kernel[(size,)](
            samples, tau, last, count, num_samples, plan.rank, plan.stride, block,
            num_warps=max(1, min(8, block // 2048)),
        )  # fmt: skip
        _filter_kernel[(programs,)](
            TensorDescriptor.from_tensor(part, [m, d]), w_desc, b_enc, tau, last, count, lists,
            size, F, D, plan.capacity, m, n, d, programs, plan.subtiles, plan.scan, precision,
            flatten, specialize, num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
        _select_kernel[(size,)](
            part, W_enc, b_enc, count, lists, values[start:], indices[start:], F, D, k,
            plan.capacity, triton.next_power_of_2(k), min(128, 1 << (plan.capacity - k).bit_length() - 1), 64,
            num_warps=max(1, min(8, plan.capacity // 512)),
        )  # fmt: skip
    return values, indices


def topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` on a GPU: fused where sampling pays, else in blocks of rows."""
    x, W_enc, b_enc = x.contiguous(), W_enc.contiguous(), b_enc.float().contiguous()
    plan = make_plan(x.shape[0], x.shape[1], W_enc.shape[0], k)
    if plan is None or x.dtype == torch.float32 or x.shape[0] == 0:
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
    """`reference.topk_encode_aux` on a GPU."""
    x, W_enc, b_enc = x.contiguous(), W_enc.contiguous(), b_enc.float().contiguous()
    return encode_blocked.topk_encode_aux(x, W_enc, b_enc, k, aux_mask, k_aux)
