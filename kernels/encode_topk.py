"""Encoder matmul with an exact top-k in its epilogue: no [N, F] tensor exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, S the sampling stride.

1. `_sample_kernel` computes one pre-activation of each S neighbours, picked by a hash.
2. `_threshold_kernel` takes a row's r-th largest sample as its threshold. r is such that the k
   largest activations lie above it but for one row in 1e9, whatever the values are: only ranks
   matter, since equal values are ranked by index.
3. `_filter_kernel` (on Hopper encode_hopper's) is the whole matmul; its epilogue appends the few
   accumulators above the row's limit, with their latents, to a short list a row.
4. `_redo_kernel` looks for rows whose list came out shorter than k or longer than its room, and
   makes their lists anew by streaming over all latents: the result is exact in every case.
5. `_select_kernel` finds the exact k of a list and sorts them.

Activations are compared as the int32 bits of non-negative floats, NaN as the largest int. A list's
entry is one int64: the pre-activation's bits, then the latent.
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

_SCRATCH_BYTES = 56 << 20
# Chance that a row's k largest are not all above its threshold; such a row takes the slow path.
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
    num_stages: int = 3


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
    row_bytes = 8 * capacity + 4 * (F // stride) + 16
    blocks = triton.cdiv(N * row_bytes, _SCRATCH_BYTES)
    block_rows = max(128, triton.cdiv(triton.cdiv(N, blocks), 128) * 128)
    if block_rows * row_bytes > _SCRATCH_BYTES + (4 << 20):
        block_rows = max(128, block_rows - 128)
    return Plan(stride, rank, capacity, min(block_rows, triton.cdiv(N, 16) * 16))


@triton.jit
def _sampled_latent(j, STRIDE: tl.constexpr):
    """Latent of the j-th sample: one of the STRIDE from j * STRIDE on, scattered so that no pattern
    of W meets it.
    """
    h = j.to(tl.uint32) * 0x9E3779B1
    return j * STRIDE + ((h >> 16) % STRIDE).to(tl.int32)


@triton.jit
def _activation_bits(bits):
    """ReLU on a float's bits, with every NaN as the largest int."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, 0x7FFFFFFF, tl.maximum(bits, 0))


@triton.jit
def _kth_bits(bits, k, slack):
    """(a value, how many of the bits reach it): at least k do, and at most k + slack unless ties
    allow no better. Negative bits stand for nothing.
    """
    lo = tl.zeros([], tl.int32)
    hi = tl.max(bits, 0)
    count = tl.sum((bits >= 0).to(tl.int32), 0)
    while (lo < hi) & (count > k + slack):
        mid = lo + ((hi - lo) >> 1) + ((hi - lo) & 1)
        c = tl.sum((bits >= mid).to(tl.int32), 0)
        enough = c >= k
        lo = tl.where(enough, mid, lo)
        count = tl.where(enough, c, count)
        hi = tl.where(enough, hi, mid - 1)
    return lo, count


@triton.jit
def _last_tied(bits, latents, lo, k, F):
    """The latent up to which values equal to lo make k together with those above it."""
    need = k - tl.sum((bits > lo).to(tl.int32), 0)
    tied = bits == lo
    begin = tl.zeros([], tl.int32)
    end = tl.zeros([], tl.int32) + F - 1
    while begin < end:
        mid = (begin + end) // 2
        enough = tl.sum((tied & (latents <= mid)).to(tl.int32), 0) >= need
        end = tl.where(enough, mid, end)
        begin = tl.where(enough, begin, mid + 1)
    return begin


@triton.jit
def _sample_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, N, D, num_samples,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    latents = _sampled_latent(tl.minimum(cols, num_samples - 1), STRIDE)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D + depth[None, :]
    w_ptrs = w_ptr + latents.to(tl.int64)[:, None] * D + depth[None, :]
    # Summed in the order of the filter: in a row of equal activations every sample must tie.
    bias = tl.load(bias_ptr + latents) + 0.0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
    for start in range(0, D, BLOCK_K):
        inside = (start + depth)[None, :] < D
        a = tl.load(x_ptrs + start, mask=inside, other=0.0)
        b = tl.load(w_ptrs + start, mask=inside, other=0.0)
        acc = tl.dot(a, b.T, acc)
    out = out_ptr + rows.to(tl.int64)[:, None] * num_samples + cols[None, :]
    tl.store(out, acc, mask=(rows < N)[:, None] & (cols < num_samples)[None, :])


@triton.jit
def _threshold_kernel(
    samples_ptr, tau_ptr, last_ptr, count_ptr, num_samples, rank, F,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    v = tl.load(samples_ptr + row * num_samples + cols, mask=cols < num_samples, other=0.0)
    bits = tl.where(cols < num_samples, _activation_bits(v.to(tl.int32, bitcast=True)), -1)
    slack = rank // 8
    tau, found = _kth_bits(bits, rank, slack)
    # Latents up to this one pass at a value equal to tau.
    last = tl.zeros([], tl.int32) + F
    if found > rank + slack:
        last = _last_tied(bits, _sampled_latent(cols, STRIDE), tau, rank, F)
    tl.store(tau_ptr + row, tau)
    tl.store(last_ptr + row, last)
    tl.store(count_ptr + row, 0)


@triton.jit
def _append(acc, f0, rows, tau, last, F, count_ptr, list_ptr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr):
    """Appends those of a [BLOCK_M, WIDTH] piece from latent f0 on that pass their row's limit."""
    f = f0 + tl.arange(0, WIDTH)
    bits = tl.where(acc != acc, 0x7FFFFFFF, acc.to(tl.int32, bitcast=True))
    # As in encode_hopper: bits above the limit pass.
    inclusive = tl.where(tau == 0, -0x80000000, tau - 1)
    limit = tl.where(last >= f0, inclusive, tau)
    hit = (bits > limit[:, None]) & (f < F)[None, :]
    ones = hit.to(tl.int32)
    found = tl.sum(ones, 1)
    base = tl.atomic_add(count_ptr + rows, found, mask=found > 0, sem="relaxed")
    slot = base[:, None] + tl.cumsum(ones, 1) - 1
    entry = (bits.to(tl.int64) << 32) | f[None, :].to(tl.int64)
    at = list_ptr + rows.to(tl.int64)[:, None] * CAPACITY + slot
    tl.store(at, entry, mask=hit & (slot < CAPACITY))


@triton.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr, N, F, D,
    CAPACITY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // 4
    num_m = tl.cdiv(N, BLOCK_M)
    num_tiles = num_m * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS):
        # Row blocks run fastest: neighbours share a tile of W_enc, and x stays in L2.
        m0 = (tile % num_m) * BLOCK_M
        f0 = (tile // num_m) * BLOCK_N
        f = f0 + tl.arange(0, BLOCK_N)
        # A bias of -0 would give a pre-activation of -0, whose bits are a negative number's.
        bias = tl.load(bias_ptr + f, mask=f < F, other=0.0) + 0.0
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
        for step in range(tl.cdiv(D, BLOCK_K)):
            a = x_desc.load([m0, step * BLOCK_K])
            b = w_desc.load([f0, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        rows = m0 + tl.arange(0, BLOCK_M)
        tau = tl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFF)
        last = tl.load(last_ptr + rows, mask=rows < N, other=-1)
        h0, h1 = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, 2 * WIDTH)), (0, 2, 1)))
        p0, p1 = tl.split(tl.permute(tl.reshape(h0, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
        p2, p3 = tl.split(tl.permute(tl.reshape(h1, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
        _append(p0, f0, rows, tau, last, F, count_ptr, list_ptr, CAPACITY, WIDTH)
        _append(p1, f0 + WIDTH, rows, tau, last, F, count_ptr, list_ptr, CAPACITY, WIDTH)
        _append(p2, f0 + 2 * WIDTH, rows, tau, last, F, count_ptr, list_ptr, CAPACITY, WIDTH)
        _append(p3, f0 + 3 * WIDTH, rows, tau, last, F, count_ptr, list_ptr, CAPACITY, WIDTH)


@triton.jit
def _keep_largest(row_list, count, k, F, CAPACITY: tl.constexpr):
    """Moves the k best entries of a row's list to its front (all of them where it holds fewer)."""
    slots = tl.arange(0, CAPACITY)
    entries = tl.load(row_list + slots, mask=slots < count, other=0)
    latents = entries.to(tl.int32)
    bits = tl.where(slots < count, _activation_bits((entries >> 32).to(tl.int32)), -1)
    lo, found = _kth_bits(bits, k, 0)
    last = tl.zeros([], tl.int32) + F
    if found > k:
        last = _last_tied(bits, latents, lo, k, F)
    kept = (bits > lo) | ((bits == lo) & (latents <= last))
    at = tl.cumsum(kept.to(tl.int32), 0) - 1
    # Every thread has read its entries before any slot is overwritten.
    tl.debug_barrier()
    tl.store(row_list + at, (bits.to(tl.int64) << 32) | latents.to(tl.int64), mask=kept)
    tl.debug_barrier()


@triton.jit
def _redo_kernel(
    x_ptr, w_ptr, bias_ptr, count_ptr, list_ptr, F, D, k,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exact slow path: all activations of one row in chunks, the list cut back to k whenever
    it is full.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    if (count < k) | (count > CAPACITY):
        row_list = list_ptr + row * CAPACITY
        depth = tl.arange(0, BLOCK_K)
        count = tl.zeros([], tl.int32)
        for f0 in range(0, F, CHUNK):
            if count + CHUNK > CAPACITY:
                _keep_largest(row_list, count, k, F, CAPACITY)
                count = tl.minimum(count, k)
            f = f0 + tl.arange(0, CHUNK)
            w_rows = w_ptr + tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
            total = tl.load(bias_ptr + f, mask=f < F, other=0.0) + 0.0
            for d0 in range(0, D, BLOCK_K):
                inside = d0 + depth < D
                x = tl.load(x_ptr + row * D + d0 + depth, mask=inside, other=0.0).to(tl.float32)
                w = tl.load(w_rows + (d0 + depth)[None, :], mask=inside[None, :], other=0.0)
                total += tl.sum(w.to(tl.float32) * x[None, :], 1)
            entry = (total.to(tl.int32, bitcast=True).to(tl.int64) << 32) | f.to(tl.int64)
            tl.store(row_list + count + tl.arange(0, CHUNK), entry, mask=f < F)
            tl.debug_barrier()
            count += tl.minimum(CHUNK, F - f0)
        tl.store(count_ptr + row, count)


@triton.jit
def _select_kernel(
    count_ptr, list_ptr, values_ptr, indices_ptr, F, k,
    CAPACITY: tl.constexpr, K_POW2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_list = list_ptr + row * CAPACITY
    _keep_largest(row_list, tl.load(count_ptr + row), k, F, CAPACITY)
    j = tl.arange(0, K_POW2)
    entries = tl.load(row_list + j, mask=j < k, other=0)
    # Sorted by bits, then by latent counted down.
    keys = tl.where(j < k, entries ^ 0x7FFFFFFF, -1)
    entries = tl.sort(keys, descending=True) ^ 0x7FFFFFFF
    bits = (entries >> 32).to(tl.int32)
    tl.store(values_ptr + row * k + j, bits.to(tl.float32, bitcast=True), mask=j < k)
    tl.store(indices_ptr + row * k + j, entries.to(tl.int32), mask=j < k)


@lru_cache(maxsize=8)
def _device(device: torch.device) -> tuple[int, bool]:
    """(programs that run at once, whether encode_hopper serves the device)."""
    if device.type != "cuda":
        return 2, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor) == (9, 0)


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
    samples = torch.empty(rows, num_samples, dtype=torch.float32, device=x.device)
    lists = torch.empty(rows, plan.capacity, dtype=torch.int64, device=x.device)
    tau, last, count = torch.empty(3, rows, dtype=torch.int32, device=x.device).unbind()
    block = triton.next_power_of_2(num_samples)
    chunk = min(128, 1 << (plan.capacity - k).bit_length() - 1)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        grid = (triton.cdiv(size, 128), triton.cdiv(num_samples, 128))
        _sample_kernel[grid](
            part, W_enc, b_enc, samples, size, D, num_samples, plan.stride, 128, 128, 64,
            num_warps=8, num_stages=4,
        )  # fmt: skip
        _threshold_kernel[(size,)](
            samples, tau, last, count, num_samples, plan.rank, F, plan.stride, block,
            num_warps=max(1, min(8, block // 2048)),
        )  # fmt: skip
        _filter(part, W_enc, b_enc, tau, last, count, lists, plan)
        _redo_kernel[(size,)](
            part, W_enc, b_enc, count, lists, F, D, k, plan.capacity, chunk, 64, num_warps=8
        )
        _select_kernel[(size,)](
            count, lists, values[start:], indices[start:], F, k, plan.capacity,
            triton.next_power_of_2(k), num_warps=max(1, min(8, plan.capacity // 1024)),
        )  # fmt: skip
    return values, indices


def _filter(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, tau: Tensor, last: Tensor, count: Tensor,
    lists: Tensor, plan: Plan,
) -> None:  # fmt: skip
    programs, hopper = _device(x.device)
    if hopper:
        # Gluon has no interpreter: imported only where it can run.
        from . import encode_hopper

        encode_hopper.filter_rows(x, W_enc, b_enc, tau, last, count, lists, programs)
        return
    m, n, d = plan.block_m, plan.block_n, plan.block_k
    _filter_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [m, d]), TensorDescriptor.from_tensor(W_enc, [n, d]),
        b_enc, tau, last, count, lists, x.shape[0], W_enc.shape[0], x.shape[1], plan.capacity,
        m, n, d, programs, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


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
    """`reference.topk_encode_aux` on a GPU."""
    x, W_enc, b_enc = x.contiguous(), W_enc.contiguous(), b_enc.float().contiguous()
    return encode_blocked.topk_encode_aux(x, W_enc, b_enc, k, aux_mask, k_aux)
