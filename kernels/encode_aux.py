"""The encoder's second list: each token's best pre-activations among a mask of latents (dead ones).

Legend: N tokens, D d_in, F d_sae (of this shard), M latents in the mask, k_aux entries a token.

How many latents the mask holds is known on the device alone, so the work is laid out for all F in
chunks of latents and blocks of rows that fit the scratch memory. Of each block of rows
`_multiply_kernel` computes the first chunk's pre-activations with gathered weights, as integers
that order like them; `_merge_kernel`, or encode_best.py's on Hopper, finds the best k_aux;
`_rest_kernel` does the same for all further chunks, which most masks do not have, in one launch.
Lists are in ascending order of their latents, of which ties keep the lowest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .encode_best import best_kernel, best_sizes
from .shapes import cdiv, next_power_of_2, num_programs, num_stages

_SCRATCH_BYTES = 48 << 20
_MIN_ROWS = 128
_MAX_CHUNK = 16384
# Rows of one piece of work in the rest kernel.
_ROWS = 16


@triton.jit
def _list_kernel(
    mask_ptr, list_ptr, count_ptr, counters_ptr, F, num_counters,
    BLOCK: tl.constexpr, BEFORE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """list[i] = the i-th latent in the mask; count = how many there are; counters = 0.

    Each program counts what lies before its block by itself: a mask is small.
    """
    start = tl.program_id(0) * BLOCK
    before = tl.zeros([BEFORE], tl.int32)
    for first in range(0, start, BEFORE):
        f = first + tl.arange(0, BEFORE)
        before += tl.load(mask_ptr + f, mask=f < start, other=0).to(tl.int32)
    f = start + tl.arange(0, BLOCK)
    there = tl.load(mask_ptr + f, mask=f < F, other=0).to(tl.int32)
    through = tl.sum(before, 0) + tl.cumsum(there, 0)
    tl.store(list_ptr + through - 1, f, mask=there != 0)
    if start + BLOCK >= F:
        tl.store(count_ptr, tl.max(through, 0))
    if start == 0:
        for first in range(0, num_counters, COUNTERS):
            i = first + tl.arange(0, COUNTERS)
            tl.store(counters_ptr + i, tl.zeros([COUNTERS], tl.int32), mask=i < num_counters)


@triton.jit
def _ordered(v):
    """int32 that orders float32 values, one NaN above +inf and one zero; never the least int32."""
    bits = tl.where(v != v, 0x7FC00000, (v + 0.0).to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(key):
    """The float32 value that `_ordered` made an integer."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _multiply_tile(
    x_desc, w_ptr, bias_ptr, list_ptr, count, keys_ptr, N, D, first, CHUNK, m0, j0,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """keys[n, j] = x[n] @ W[list[first + j]] + bias[list[first + j]] of a tile, ordered; the least
    int32 past the mask's end."""
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
    out = keys_ptr + rows[:, None] * CHUNK + j[None, :]
    keys = tl.where((first + j < count)[None, :], _ordered(acc), -2147483648)
    tl.store(out, keys, mask=(rows < N)[:, None] & (j < CHUNK)[None, :])


@triton.jit
def _multiply_kernel(
    x_desc, w_ptr, bias_ptr, list_ptr, count_ptr, keys_ptr, N, D, CHUNK,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first chunk's tile of a program, where the mask holds so many latents."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    count = tl.load(count_ptr)
    num_m = tl.cdiv(N, BLOCK_M)
    j0 = tl.program_id(0) // num_m * BLOCK_N
    if j0 < count:
        _multiply_tile(
            x_desc, w_ptr, bias_ptr, list_ptr, count, keys_ptr, N, D, 0, CHUNK,
            tl.program_id(0) % num_m * BLOCK_M, j0, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _between(lo, hi):
    """Their mean, rounded up, without overflow."""
    return (lo | hi) - ((lo ^ hi) >> 1)


@triton.jit
def _below(halves, probe):
    """How many halved keys are less than `probe`: by the sign of a difference, which cannot
    overflow; it takes fewer instructions than a comparison."""
    return -tl.sum((halves - probe) >> 31, 0)


@triton.jit
def _reach(row_keys, old, size, probe, MERGES: tl.constexpr, PIECE: tl.constexpr):
    """How many keys of a row are at least `probe`."""
    hits = tl.zeros([PIECE], tl.int32)
    for start in range(0, size, PIECE):
        at = start + tl.arange(0, PIECE)
        hits += (tl.load(row_keys + at, mask=at < size, other=-2147483648) >= probe).to(tl.int32)
    n = tl.sum(hits, 0)
    if MERGES:
        n += tl.sum((old >= probe).to(tl.int32), 0)
    return n


@triton.jit
def _places(keeps):
    """Of each entry that is kept how many are before it, and how many there are; in groups of four,
    which a thread adds up by itself."""
    SIZE: tl.constexpr = keeps.shape[0]
    fours = keeps.to(tl.int32).reshape(SIZE // 4, 4)
    each = tl.sum(fours, 1)
    before = tl.cumsum(each, 0) - each
    return (before[:, None] + tl.cumsum(fours, 1) - 1).reshape(SIZE), tl.sum(each, 0)


@triton.jit
def _append(keys, latent, kth, has_room, room, written, values_row, indices_row):
    """Appends the entries over `kth`, and those that equal it, to a row's list; of those only the
    first `room` unless it `has_room` for all. Returns its new length and the room left."""
    keeps = keys >= kth
    if not has_room:
        ties = keys == kth
        keeps = (keys > kth) | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))
        room = tl.maximum(room - tl.sum(ties.to(tl.int32), 0), 0)
    at, kept = _places(keeps)
    at += written
    # Every thread has read what lies where entries go.
    tl.debug_barrier()
    value = _unordered(keys)
    # -inf marks the places that the mask leaves empty, at latent 0.
    tl.store(values_row + at, value, mask=keeps)
    tl.store(indices_row + at, tl.where(value == float("-inf"), 0, latent), mask=keeps)
    return written + kept, room


@triton.jit
def _merge_row(
    row, count, keys_ptr, list_ptr, values_ptr, indices_ptr, first, CHUNK, k,
    MERGES: tl.constexpr, BLOCK: tl.constexpr, MORE: tl.constexpr, K_POW2: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """A row's best k of a chunk of at most BLOCK + MORE latents and, where it MERGES, of its list
    so far.

    NONE, the least int32, stands for no entry.
    """
    NONE: tl.constexpr = -2147483648
    total = tl.minimum(count - first, CHUNK)
    # Keys past the end of the last tile's latents are NONE; a multiple of 16 lets loads be wide.
    size = tl.cdiv(total, 16) * 16
    row_keys = keys_ptr + row * CHUNK
    j = tl.arange(0, BLOCK)
    a = tl.load(row_keys + j, mask=j < size, other=NONE) >> 1
    hi = tl.max(a, 0)
    if MORE:
        j = BLOCK + tl.arange(0, MORE)
        b = tl.load(row_keys + j, mask=j < size, other=NONE) >> 1
        hi = tl.maximum(hi, tl.max(b, 0))
    i = tl.arange(0, K_POW2)
    values_row = values_ptr + row * k
    indices_row = indices_ptr + row * k
    old = i
    if MERGES:
        # Places after the list's end hold no entry; there is one only where it is full.
        held = tl.minimum(first, k)
        value = tl.load(values_row + i, mask=i < held, other=0.0)
        old = tl.where(i < held, _ordered(value), NONE)
        total += held
        hi = tl.maximum(hi, tl.max(old >> 1, 0))
    # The halved key that at least k entries reach and fewer than k exceed, or exactly k reach;
    # where there are fewer than k, one that all reach.
    lo = tl.full([], NONE // 2, tl.int32)
    at_lo = total
    over_hi = tl.zeros([], tl.int32)
    step = tl.zeros([], tl.int32)
    # Within four octaves of the maximum at first.
    probe = tl.maximum(hi, NONE // 2 + (1 << 25)) - (1 << 24)
    while (lo < hi) & (at_lo > k):
        n = BLOCK - _below(a, probe)
        if MORE:
            n += MORE - _below(b, probe)
        if MERGES:
            n += K_POW2 - _below(old >> 1, probe)
        if n >= k:
            lo = probe
            at_lo = n
        else:
            hi = probe - 1
            over_hi = n
        step += 1
        probe = _between(lo, hi)
        if (hi - lo < 1 << 23) & (step % 6 != 0):
            # In a narrow range values lie evenly, as a rule: in proportion to their numbers.
            part = ((at_lo - k).to(tl.float32) + 0.5) / (at_lo - over_hi + 1).to(tl.float32)
            ahead = ((hi - lo).to(tl.float32) * part).to(tl.int32)
            probe = tl.minimum(lo + tl.maximum(ahead, 1), hi)
    # The same of whole keys. Rarely more than k reach it.
    kth = tl.maximum(lo * 2, NONE + 1)
    room = tl.zeros([], tl.int32)
    if at_lo > k:
        above = _reach(row_keys, old, size, kth + 1, MERGES, PIECE)
        if above >= k:
            kth += 1
            above = _reach(row_keys, old, size, kth + 1, MERGES, PIECE)
        room = k - above
    written = tl.zeros([], tl.int32)
    if MERGES:
        old_latent = tl.load(indices_row + i, mask=i < k, other=0)
        written, room = _append(
            old, old_latent, kth, at_lo <= k, room, written, values_row, indices_row
        )  # fmt: skip
    # Anew from memory in pieces, which takes fewer registers than all at once.
    for start in range(0, size, PIECE):
        at = start + tl.arange(0, PIECE)
        piece = tl.load(row_keys + at, mask=at < size, other=NONE)
        latent = tl.load(list_ptr + first + at)
        written, room = _append(
            piece, latent, kth, at_lo <= k, room, written, values_row, indices_row
        )  # fmt: skip
    empty = (i >= written) & (i < k)
    tl.store(values_row + i, float("-inf"), mask=empty)
    tl.store(indices_row + i, 0, mask=empty)


@triton.jit
def _merge_kernel(
    keys_ptr, list_ptr, count_ptr, values_ptr, indices_ptr, CHUNK, k,
    BLOCK: tl.constexpr, MORE: tl.constexpr, K_POW2: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A row's list of the first chunk."""
    _merge_row(
        tl.program_id(0).to(tl.int64), tl.load(count_ptr), keys_ptr, list_ptr, values_ptr,
        indices_ptr, 0, CHUNK, k, False, BLOCK, MORE, K_POW2, PIECE,
    )  # fmt: skip


@triton.jit
def _wait(counter_ptr, least):
    """Until a counter is at least so high; what was written before it rose can then be read."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < least:
        pass
    tl.debug_barrier()


@triton.jit
def _signal(counter_ptr):
    """Raises a counter, after all that this program wrote."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _rest_kernel(
    x_desc, w_ptr, bias_ptr, list_ptr, count_ptr, keys_ptr, values_ptr, indices_ptr, counters_ptr,
    N, D, CHUNK, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, MORE: tl.constexpr, K_POW2: tl.constexpr, PIECE: tl.constexpr,
    ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All chunks after the first, if there are any.

    Programs draw pieces of work, tiles of a chunk and then groups of its rows, from one counter; a
    piece waits for pieces drawn before it alone, so whatever programs run, none waits for ever.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    count = tl.load(count_ptr)
    num_m = tl.cdiv(N, BLOCK_M)
    merged_ptr = counters_ptr + 1
    multiplied_ptr = merged_ptr + num_m
    GROUPS: tl.constexpr = BLOCK_M // ROWS
    base = 0
    tiles = 0
    merges = 0
    ticket = 0
    if count > CHUNK:
        ticket = tl.atomic_add(counters_ptr, 1)
    for first in range(CHUNK, count, CHUNK):
        num_n = tl.cdiv(tl.minimum(count - first, CHUNK), BLOCK_N)
        while ticket < base + num_m * num_n:
            m = (ticket - base) % num_m
            # The keys of the chunk before are read.
            _wait(merged_ptr + m, merges)
            _multiply_tile(
                x_desc, w_ptr, bias_ptr, list_ptr, count, keys_ptr, N, D, first, CHUNK,
                m * BLOCK_M, (ticket - base) // num_m * BLOCK_N, BLOCK_M, BLOCK_N, BLOCK_K,
                PRECISION,
            )  # fmt: skip
            _signal(multiplied_ptr + m)
            ticket = tl.atomic_add(counters_ptr, 1)
        base += num_m * num_n
        tiles += num_n
        while ticket < base + num_m * GROUPS:
            m = (ticket - base) % num_m
            start = m * BLOCK_M + (ticket - base) // num_m * ROWS
            _wait(multiplied_ptr + m, tiles)
            for row in range(start, tl.minimum(start + ROWS, N)):
                _merge_row(
                    tl.zeros([], tl.int64) + row, count, keys_ptr, list_ptr, values_ptr,
                    indices_ptr, first, CHUNK, k, True, BLOCK, MORE, K_POW2, PIECE,
                )  # fmt: skip
            _signal(merged_ptr + m)
            ticket = tl.atomic_add(counters_ptr, 1)
        base += num_m * GROUPS
        merges += GROUPS


def _chunk(F: int, k: int, most: int) -> int:
    """Latents at a time: an eighth of all, which a run that resorts to the second list rarely
    exceeds, from 2048 to `most`; at least k where there are so many; a multiple of 16."""
    chunk = max(min(most, max(2048, cdiv(cdiv(F, 8), 128) * 128), F), min(F, k))
    return cdiv(chunk, 16) * 16


def masked_topk(
    x: Tensor,  # [N, D] bf16, fp16 or fp32, contiguous from a 16-byte boundary on
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    mask: Tensor,  # [F] bool
    k: int,
    max_chunk: int = _MAX_CHUNK,
    block: tuple[int, int, int] = (128, 128, 64),
    by_warps: bool = False,
) -> tuple[Tensor, Tensor]:  # [N, k] float32, [N, k] int32
    """The second list of `reference.topk_encode_aux`, in ascending order of latents. On Hopper
    `by_warps` takes encode_best.py for the first chunk, where it has room."""
    (N, D), F, device = x.shape, W_enc.shape[0], x.device
    values = torch.empty(N, k, dtype=torch.float32, device=device)
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    chunk = _chunk(F, k, max_chunk)
    # It is loaded in whole pieces, of which nothing past the mask's latents is used.
    latents = torch.empty(F + chunk + 512 * 16, dtype=torch.int32, device=device)
    rows = min(N, max(_MIN_ROWS, _SCRATCH_BYTES // (4 * chunk) // 128 * 128))
    keys = torch.empty(rows, chunk, dtype=torch.int32, device=device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    m, n, d = block
    stages = num_stages(device, (m + n) * d * x.element_size(), most=3)
    # A chunk of 3072 is a block of 2048 and one of 1024: a power of two would hold a third more.
    pow2 = next_power_of_2(chunk + 1) // 2
    more = next_power_of_2(max(chunk - pow2, 16)) if chunk > pow2 else 0
    # At least four: places in a list are counted in fours.
    sizes = {"BLOCK": pow2, "MORE": more, "K_POW2": max(4, next_power_of_2(k))}
    # Up to 96 entries a thread, so that a row of few takes one warp, which waits for no other.
    warps = min(16, next_power_of_2(cdiv(pow2 + more, 3072)))
    best = best_sizes(chunk, k) if by_warps else None
    # Programs may be there before the kernel before has ended, for which they wait: 2 us a launch.
    early = {"launch_pdl": True} if by_warps else {}
    # A multiple of four, so that every block's counters are as aligned as the first's.
    each = cdiv(1 + 2 * cdiv(rows, m), 4) * 4
    counters = torch.empty(cdiv(N, rows), each, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    _list_kernel[(cdiv(F, 2048),)](
        mask.view(torch.uint8), latents, count, counters, F, counters.numel(), 2048, 16384, 256
    )
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        x_desc = TensorDescriptor.from_tensor(part, [m, d])
        _multiply_kernel[(cdiv(size, m) * cdiv(chunk, n),)](
            x_desc, W_enc, b_enc, latents, count, keys, size, D, chunk, m, n, d, precision,
            EARLY=by_warps, num_warps=4, num_stages=stages, **early,
        )  # fmt: skip
        if best is not None:
            best_kernel[(size,)](
                keys, latents, count, values[start:], indices[start:], chunk, k, **best, **early
            )
        else:
            _merge_kernel[(size,)](
                keys, latents, count, values[start:], indices[start:], chunk, k, **sizes,
                PIECE=512 * warps, num_warps=warps,
            )  # fmt: skip
        if chunk < F:
            _rest_kernel[(2 * num_programs(device),)](
                x_desc, W_enc, b_enc, latents, count, keys, values[start:], indices[start:],
                counters[start // rows], size, D, chunk, k, m, n, d, precision, **sizes,
                PIECE=4096, ROWS=min(_ROWS, m), EARLY=by_warps, num_warps=8,
                num_stages=stages, **early,
            )  # fmt: skip
    return values, indices
