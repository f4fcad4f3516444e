"""Selections of the encoder: a row's limit from its sample, and the exact k largest of its keys and
lists; of their parts also those of whole rows (encode_rows.py).

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  Activations are compared as the int32 bits
of their fp32 value: those order non-negative floats, put NaN above +inf and negative ones, which
ReLU makes zero, below.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu_bits(v):
    """int32 bits of relu(v), NaN kept: as one NaN, whose bits are above those of +inf, where it is
    the positive one that a GPU's arithmetic makes."""
    return relu_of(v.to(tl.int32, bitcast=True))


@triton.jit
def relu_of(bits):
    return tl.minimum(tl.maximum(bits, 0), 0x7FC00000)


@triton.jit
def _reaching(bits, limit):
    """How many of the entries are at least a limit."""
    return tl.sum((bits >= limit).to(tl.int32))


@triton.jit
def kth(bits, latent, k, slack, low=0):
    """(value bits, last latent) that at least k and at most k + slack of the entries reach, and how
    many do.

    An entry reaches them with a larger value, or an equal one and a latent up to `last`. Entries
    below `low`, a number of at least 0, do not count; where there are fewer than k, all others
    reach.
    """
    hi = tl.max(bits)
    lo = low
    count = _reaching(bits, lo)
    while (lo < hi) & (count > k + slack):
        mid = lo + (hi - lo + 1) // 2
        c = _reaching(bits, mid)
        if c >= k:
            lo = mid
            count = c
        else:
            hi = mid - 1
    last = tl.full([], 0x7FFFFFFF, tl.int32)
    if count > k + slack:
        # More than enough equal values: the lowest latents of them.
        first = tl.zeros([], tl.int32)
        need = k - _reaching(bits, lo + 1)
        last -= 1
        while first < last:
            mid = first + (last - first) // 2
            if tl.sum(((bits == lo) & (latent <= mid)).to(tl.int32)) >= need:
                last = mid
            else:
                first = mid + 1
        count = k
    return lo, last, count


@triton.jit
def near(bits, k):
    """A limit to begin with: two octaves under the largest of the bits if k of them reach that, as
    most often, else 0."""
    limit = tl.maximum(tl.max(bits) - (2 << 23), 0)
    return tl.where(tl.sum((bits >= limit).to(tl.int32)) >= k, limit, 0)


@triton.jit
def _places(keeps):
    """A number from 0 on for each entry of a tile that is kept, column after column: within one a
    thread counts alone."""
    each = keeps.to(tl.int32)
    column = tl.sum(each, 0)
    return (tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(each, 0) - 1


@triton.jit
def reaches(bits, latent, tau, last):
    return (bits > tau) | ((bits == tau) & (latent <= last))


@triton.jit
def key_of(bits, latent):
    """(relu'd bits, latent) as an int64 that sorts by activation, then lowest latent."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def keep_largest(row_keys, num_keys, k, SORT: tl.constexpr, KEYS: tl.constexpr):
    """Brings the k to SORT largest of a row's keys (all where there are fewer) to their front, and
    returns how many these are. KEYS of them are held at a time."""
    slot = tl.arange(0, KEYS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    kept = tl.zeros([], tl.int32)
    at = tl.zeros([], tl.int32)
    while at < num_keys:
        # Those that were kept, and the next.
        place = tl.where(slot < kept, slot, at + slot - kept)
        keys = tl.load(row_keys + place, mask=place < num_keys, other=-1)
        at += KEYS - kept
        bits = (keys >> 32).to(tl.int32)
        latent = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        tau, last, _ = kth(bits, latent, k, SORT - k, near(bits, k))
        keeps = reaches(bits, latent, tau, last) & (keys >= 0)
        # Every thread has read its keys before any is overwritten.
        tl.debug_barrier()
        tl.store(row_keys + _places(keeps), keys, mask=keeps)
        tl.debug_barrier()
        kept = tl.sum(keeps.to(tl.int32))
    return kept


@triton.jit
def best_keys(row_keys, values_row, indices_row, k, num_keys, POW2: tl.constexpr):
    """Writes a row's list from the k best of its num_keys keys, at least k and at most POW2, in
    order."""
    j = tl.arange(0, POW2)
    keys = tl.sort(tl.load(row_keys + j, mask=j < num_keys, other=-1), descending=True)
    value = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(values_row + j, value, mask=j < k)
    tl.store(indices_row + j, 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32), mask=j < k)


@triton.jit
def stream_row(
    x_row, w_ptr, bias_ptr, scale_ptr, row_keys, F, D, k,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exact slow path: all activations of one row in chunks, cut back to k whenever full.
    Returns how many keys are left."""
    depth = tl.arange(0, BLOCK_K)
    count = tl.zeros([], tl.int32)
    for f0 in range(0, F, CHUNK):
        if count + CHUNK > KEYS:
            count = keep_largest(row_keys, count, k, k, KEYS)
        f = f0 + tl.arange(0, CHUNK)
        w_rows = w_ptr + tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
        total = tl.zeros((CHUNK,), tl.float32)
        for d0 in range(0, D, BLOCK_K):
            inside = d0 + depth < D
            x = tl.load(x_row + d0 + depth, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_rows + (d0 + depth)[None, :], mask=inside[None, :], other=0.0)
            total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        if scale_ptr is not None:
            total *= tl.load(scale_ptr + f, mask=f < F, other=1.0)
        v = total + tl.load(bias_ptr + f, mask=f < F, other=0.0)
        keys = tl.where(f < F, key_of(relu_bits(v), f), -1)
        tl.store(row_keys + count + tl.arange(0, CHUNK), keys)
        tl.debug_barrier()
        count += CHUNK
    return keep_largest(row_keys, count, k, k, KEYS)


@triton.jit(do_not_specialize=["spread", "rank", "slack", "most"])
def limit_kernel(
    sample_ptr,  # [N, pitch] int32: bits of the sample, then of its cells' largest
    limit_ptr,  # [N] int32
    keys_ptr,  # [N, most] int64
    num_keys_ptr,  # [N] int32
    pitch, whole, spread, rank, slack, most, SAMPLE: tl.constexpr, SAMPLE_POW2: tl.constexpr,
    KEPT_POW2: tl.constexpr, TILE: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """A row's limit, below what the rank-th largest reaches of the largest activations of its
    sample's cells, CELL neighbours each. That many of the sample pass it at least, and hardly more,
    since few cells hold two. Cells that pass, at most rank + slack, are kept as keys; where more
    do, equal ones, nothing is to pass, so that the row is computed anew. Zeros are no candidates,
    since most activations of a trained SAE are: where fewer than rank are positive, all pass."""
    CELLS: tl.constexpr = TILE // CELL
    row = tl.program_id(0).to(tl.int64)
    sample_row = sample_ptr + row * pitch
    row_keys = keys_ptr + row * most
    turn = tl.arange(0, SAMPLE_POW2)[:, None]
    cell = tl.arange(0, CELLS)[None, :]
    there = turn < SAMPLE
    largest = tl.load(sample_row + SAMPLE * TILE + turn * CELLS + cell, mask=there, other=-1)
    largest = tl.where(there, relu_of(largest), -1)
    tau, last, _ = kth(largest, turn, rank, slack, tl.maximum(near(largest, rank), 1))
    limit = tl.where(last == 0x7FFFFFFF, tau - 1, 0x7FFFFFFF)
    keeps = largest > limit
    count = tl.sum(keeps.to(tl.int32))
    # First the numbers of the cells that are kept, where their keys will be; then their keys.
    kept_ptr = row_keys.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(kept_ptr + _places(keeps), turn * CELLS + cell, mask=keeps)
    tl.debug_barrier()
    j = tl.arange(0, KEPT_POW2)
    kept = tl.load(kept_ptr + j, mask=j < count, other=0)
    tl.debug_barrier()
    # A tile has 8 neighbours of each part of the latents.
    first = kept // CELLS * spread % whole * 8
    first += kept % CELLS * CELL // 8 * (whole * 8) + kept % CELLS * CELL % 8
    within = tl.arange(0, CELL)
    here = (j < count)[:, None] & (within >= 0)[None, :]
    bits = tl.load(sample_row + (kept * CELL)[:, None] + within[None, :], mask=here, other=0)
    key = key_of(relu_of(bits), first[:, None] + within[None, :])
    tl.store(row_keys + (j * CELL)[:, None] + within[None, :], key, mask=here)
    tl.store(num_keys_ptr + row, CELL * count)
    tl.store(limit_ptr + row, limit)


@triton.jit
def passing(entries, slot, which, counts, limit, F, LISTS: tl.constexpr):
    """Entries `slot` of a row's lists `which`: bits of both of each pair, its first latent, and
    whether either passes the limit."""
    there = (which < LISTS) & (slot < counts)
    # Entry s of list l is at s * LISTS + l.
    entry = entries + (slot * LISTS + which) * 3
    first = relu_of(tl.load(entry, mask=there, other=0))
    second = relu_of(tl.load(entry + 1, mask=there, other=0))
    latent = tl.load(entry + 2, mask=there, other=0)
    # What the last tile has behind the last latent is no activation.
    one = there & (latent < F) & (first > limit)
    two = there & (latent + 1 < F) & (second > limit)
    return first, second, latent, one, two


@triton.jit
def _fill_with_zeros(row_keys, found, k, POW2: tl.constexpr):
    """Appends zeros of the lowest latents to a row's keys, which are all of its positive
    activations, until there are k."""
    # Of the first k latents at least k - found are not among the keys.
    latent = tl.arange(0, POW2)
    free = latent < k
    for at in range(0, found):
        free = free & (latent != 0x7FFFFFFF - (tl.load(row_keys + at) & 0x7FFFFFFF).to(tl.int32))
    to = found + tl.cumsum(free.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(row_keys + to, key_of(latent * 0, latent), mask=free & (to < k))
    tl.debug_barrier()
    return k


@triton.jit(do_not_specialize=["sample_keys", "capacity", "k"])
def select_kernel(
    limit_ptr,  # [N] int32
    sample_ptr,  # [N, sample_keys] int64
    num_sample_ptr,  # [N] int32
    count_ptr,  # [N, LISTS] int32
    lists_ptr,  # [N, pitch] int32
    short_ptr,  # [N] int32
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    pitch, sample_keys, capacity, F, k, LISTS: tl.constexpr, LISTS_POW2: tl.constexpr,
    SAMPLE_POW2: tl.constexpr, SLOTS: tl.constexpr, SORT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A row's k largest of its keys and lists; or, where these overflowed or hold too few, a mark
    in `short`."""
    row = tl.program_id(0).to(tl.int64)
    entries = lists_ptr + row * pitch
    which = tl.arange(0, LISTS_POW2)[None, :]
    counts = tl.load(count_ptr + row * LISTS + which, mask=which < LISTS, other=0)
    longest = tl.max(counts)
    limit = tl.load(limit_ptr + row)
    short = longest > capacity
    # The keys take the place of the entries that have been read.
    row_keys = entries.to(tl.pointer_type(tl.int64), bitcast=True)
    found = tl.zeros([], tl.int32)
    for start in range(0, tl.where(short, 0, longest), SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]
        first, second, latent, one, two = passing(entries, slot, which, counts, limit, F, LISTS)
        each = one.to(tl.int32) + two.to(tl.int32)
        column = tl.sum(each, 0)
        total = tl.sum(column, 0)
        # Where the keys do not fit, the row is left to be computed anew.
        room = tl.minimum(pitch - 2 * sample_keys, 3 * LISTS * (start + SLOTS))
        short = short | (2 * (found + total) > room)
        # Column after column, within which a thread counts alone.
        to = found + (tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(each, 0) - each
        found += total
        tl.debug_barrier()
        tl.store(row_keys + to, key_of(first, latent), mask=one & (not short))
        to += one.to(tl.int32)
        tl.store(row_keys + to, key_of(second, latent + 1), mask=two & (not short))
        tl.debug_barrier()
    num_sample = tl.load(num_sample_ptr + row)
    j = tl.arange(0, SAMPLE_POW2)
    sample = tl.load(sample_ptr + row * sample_keys + j, mask=j < num_sample, other=-1)
    # A cell's others may be below the limit, where not all of the row's activations are here.
    keeps = ((sample >> 32).to(tl.int32) > limit) & (sample >= 0) & (not short)
    to = found + tl.cumsum(keeps.to(tl.int32), 0) - 1
    tl.store(row_keys + to, sample, mask=keeps)
    found += tl.sum(keeps.to(tl.int32), 0)
    tl.debug_barrier()
    found = keep_largest(row_keys, tl.where(short, 0, found), k, SORT, KEYS)
    if (found < k) & (limit == 0) & (not short):
        found = _fill_with_zeros(row_keys, found, k, SORT)
    tl.store(short_ptr + row, (found < k).to(tl.int32))
    best_keys(row_keys, values_ptr + row * k, indices_ptr + row * k, k, found, SORT)


@triton.jit
def mend_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # [F] float32
    scale_ptr,  # [F] float32 of e4m3 rows, or None
    short_ptr,  # [N] int32
    scratch_ptr,  # [N, pitch] int32
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    pitch, N, F, D, k, ROWS: tl.constexpr, SORT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes the rows that are marked as short anew, as one in a hundred million is: they read
    all of W_enc."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    marks = tl.load(short_ptr + rows, mask=rows < N, other=0)
    if tl.max(marks, 0) > 0:
        for i in range(0, ROWS):
            row = first + i
            if tl.load(short_ptr + row, mask=row < N, other=0) > 0:
                row_keys = (scratch_ptr + row * pitch).to(tl.pointer_type(tl.int64), bitcast=True)
                x_row = x_ptr + row * D
                stream_row(
                    x_row, w_ptr, bias_ptr, scale_ptr, row_keys, F, D, k, 2 * SORT, CHUNK, BLOCK_K
                )  # fmt: skip
                best_keys(row_keys, values_ptr + row * k, indices_ptr + row * k, k, k, SORT)
