"""The encoder's second list: each token's best pre-activations among a mask of latents (dead ones).

Legend: N tokens, D d_in, F d_sae (of this shard), M latents in the mask, k_aux entries a token.

How many latents the mask holds is known on the device alone, so the work is laid out for all F in
chunks of latents and blocks of rows that fit the scratch memory, and kernels of chunks past M end
at once. `_multiply_kernel` computes a chunk's pre-activations with gathered weights;
`_merge_kernel` finds the best k_aux of them and of the list so far. Lists are in ascending order of
their latents, of which ties keep the lowest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .shapes import cdiv, next_power_of_2, num_programs, num_stages

_SCRATCH_BYTES = 48 << 20
# A chunk's latents in one row of the merge: 32 a thread of 16 warps.
_MAX_CHUNK = 16384


@triton.jit
def _list_kernel(mask_ptr, through_ptr, list_ptr, F, BLOCK: tl.constexpr):
    """list[i] = the i-th latent in the mask, of which through[f] counts those up to f."""
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(mask_ptr + f, mask=f < F, other=0) != 0
    at = tl.load(through_ptr + f, mask=f < F, other=1) - 1
    tl.store(list_ptr + at, f, mask=there)


@triton.jit
def _multiply_kernel(
    x_desc, w_ptr, bias_ptr, list_ptr, count_ptr, out_ptr, N, D, first, CHUNK,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, j] = x[n] @ W[list[first + j]] + bias[list[first + j]], for the latents there are."""
    count = tl.load(count_ptr)
    num_m = tl.cdiv(N, BLOCK_M)
    num_tiles = num_m * tl.cdiv(tl.maximum(tl.minimum(count - first, CHUNK), 0), BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        m0 = (tile % num_m) * BLOCK_M
        j0 = (tile // num_m) * BLOCK_N
        rows = m0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        latents = tl.load(list_ptr + tl.minimum(first + j, count - 1))
        depth = tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + latents.to(tl.int64)[:, None] * D + depth[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias_ptr + latents)[None, :]
        for d0 in range(0, D, BLOCK_K):
            a = x_desc.load([m0, d0])
            b = tl.load(w_ptrs + d0, mask=(d0 + depth)[None, :] < D, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        out = out_ptr + rows[:, None] * CHUNK + j[None, :]
        tl.store(out, acc, mask=(rows < N)[:, None] & (j < CHUNK)[None, :])


@triton.jit
def _ordered(v):
    """int32 that orders float32 values, one NaN above +inf and one zero; never the least int32."""
    bits = tl.where(v != v, 0x7FC00000, (v + 0.0).to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _between(lo, hi):
    """Their mean, rounded up, without overflow."""
    return (lo | hi) - ((lo ^ hi) >> 1)


@triton.jit
def _merge_row(
    row, count, scratch_ptr, list_ptr, values_ptr, indices_ptr, first, CHUNK, k,
    MERGES: tl.constexpr, BLOCK: tl.constexpr, K_POW2: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A row's best k of a chunk and, where it MERGES, of its list so far.

    NONE, the least int32, stands for no entry.
    """
    NONE: tl.constexpr = -2147483648
    j = tl.arange(0, BLOCK)
    there = (j < CHUNK) & (first + j < count)
    v = tl.load(scratch_ptr + row * CHUNK + j, mask=there, other=0.0)
    new = tl.where(there, _ordered(v), NONE)
    i = tl.arange(0, K_POW2)
    # Places after the list's end hold no entry; there is one only where it is full.
    held = tl.minimum(first, k)
    if MERGES:
        old_value = tl.load(values_ptr + row * k + i, mask=i < held, other=0.0)
        old_latent = tl.load(indices_ptr + row * k + i, mask=i < held, other=0)
        old = tl.where(i < held, _ordered(old_value), NONE)
        tl.debug_barrier()
    total = tl.minimum(count - first, CHUNK)
    hi = tl.max(new, 0)
    if MERGES:
        total += held
        hi = tl.maximum(hi, tl.max(old, 0))
    # The value that at least k entries reach and fewer than k exceed.
    lo = tl.full([], NONE, tl.int32) + 1
    above = tl.zeros([], tl.int32)
    if total > k:
        at_lo = total
        probe = tl.maximum(hi, NONE + (1 << 26)) - (1 << 25)
        while (lo < hi) & (at_lo != k):
            n = tl.sum((new >= probe).to(tl.int32), 0)
            if MERGES:
                n += tl.sum((old >= probe).to(tl.int32), 0)
            if n >= k:
                lo = probe
                at_lo = n
            else:
                hi = probe - 1
            probe = _between(lo, hi)
        above = tl.sum((new > lo).to(tl.int32), 0)
        if MERGES:
            above += tl.sum((old > lo).to(tl.int32), 0)
    else:
        lo = tl.full([], NONE, tl.int32)
    room = k - above
    written = tl.zeros([], tl.int32)
    if MERGES:
        tie = (old == lo) & (i < held)
        rank = tl.cumsum(tie.to(tl.int32), 0)
        kept = (old > lo) | (tie & (rank <= room))
        at = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values_ptr + row * k + at, old_value, mask=kept)
        tl.store(indices_ptr + row * k + at, old_latent, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
        room -= tl.sum((kept & tie).to(tl.int32), 0)
    # Anew from the scratch memory, which costs fewer registers than to hold it.
    for start in range(0, tl.minimum(count - first, CHUNK), PIECE):
        at_j = start + tl.arange(0, PIECE)
        is_there = (at_j < CHUNK) & (first + at_j < count)
        value = tl.load(scratch_ptr + row * CHUNK + at_j, mask=is_there, other=0.0)
        bits = tl.where(is_there, _ordered(value), NONE)
        ties = (bits == lo) & is_there
        keeps = (bits > lo) | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))
        to = written + tl.cumsum(keeps.to(tl.int32), 0) - 1
        latent = tl.load(list_ptr + first + at_j, mask=keeps, other=0)
        # -inf marks the places that the mask leaves empty, at latent 0.
        value = tl.where(value != value, float("nan"), value + 0.0)
        latent = tl.where(value == float("-inf"), 0, latent)
        tl.store(values_ptr + row * k + to, value, mask=keeps)
        tl.store(indices_ptr + row * k + to, latent, mask=keeps)
        written += tl.sum(keeps.to(tl.int32), 0)
        room -= tl.sum((keeps & ties).to(tl.int32), 0)
    tl.store(values_ptr + row * k + i, float("-inf"), mask=(i >= written) & (i < k))
    tl.store(indices_ptr + row * k + i, 0, mask=(i >= written) & (i < k))


@triton.jit
def _merge_kernel(
    scratch_ptr, list_ptr, count_ptr, values_ptr, indices_ptr, first, CHUNK, k, N,
    MERGES: tl.constexpr, BLOCK: tl.constexpr, K_POW2: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`_merge_row` of every row, unless the chunk lies past the mask's end."""
    count = tl.load(count_ptr)
    if (first < count) | (not MERGES):
        for number in range(tl.program_id(0), N, tl.num_programs(0)):
            row = tl.zeros([], tl.int64) + number
            _merge_row(
                row, count, scratch_ptr, list_ptr, values_ptr, indices_ptr, first,
                CHUNK, k, MERGES, BLOCK, K_POW2, PIECE,
            )  # fmt: skip


def masked_topk(
    x: Tensor,  # [N, D] bf16, fp16 or fp32, contiguous from a 16-byte boundary on
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    mask: Tensor,  # [F] bool
    k: int,
    max_chunk: int = _MAX_CHUNK,
    block: tuple[int, int, int] = (128, 128, 64),
) -> tuple[Tensor, Tensor]:  # [N, k] float32, [N, k] int32
    """The second list of `reference.topk_encode_aux`, in ascending order of latents."""
    (N, D), F, device = x.shape, W_enc.shape[0], x.device
    values = torch.empty(N, k, dtype=torch.float32, device=device)
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    through = mask.cumsum(0, dtype=torch.int32)
    latents = torch.empty(F, dtype=torch.int32, device=device)
    _list_kernel[(cdiv(F, 1024),)](mask.view(torch.uint8), through, latents, F, 1024)
    count = through[-1:]
    # An eighth of the latents at a time: what a run that resorts to the second list rarely exceeds.
    chunk = min(max_chunk, max(2048, cdiv(cdiv(F, 8), 128) * 128), F)
    chunk = max(chunk, min(F, cdiv(k, 128) * 128))
    rows = min(N, max(128, _SCRATCH_BYTES // (4 * chunk) // 128 * 128))
    scratch = torch.empty(rows, chunk, dtype=torch.float32, device=device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    m, n, d = block
    pow2 = next_power_of_2(chunk)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        x_desc = TensorDescriptor.from_tensor(part, [m, d])
        for first in range(0, F, chunk):
            # Chunks past the first are mostly empty: few programs, which then end at once.
            tiles, few = cdiv(size, m) * cdiv(chunk, n), num_programs(device)
            _multiply_kernel[(min(tiles, 2 * few) if first else tiles,)](
                x_desc, W_enc, b_enc, latents, count, scratch, size, D, first, chunk, m, n, d,
                precision, num_warps=4,
                num_stages=num_stages(device, (m + n) * d * x.element_size(), most=3),
            )  # fmt: skip
            _merge_kernel[(min(size, 4 * few) if first else size,)](
                scratch, latents, count, values[start:], indices[start:], first, chunk, k, size,
                first > 0, pow2, next_power_of_2(k), min(1024, pow2),
                num_warps=min(16, max(1, pow2 // 1024)),
            )  # fmt: skip
    return values, indices
