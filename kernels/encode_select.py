"""Exact selection of a row's k largest activations from its short lists, for the fused encoder; of
its parts also from whole rows (encode_rows.py).

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  Activations are compared as the int32 bits
of their fp32 value: those order non-negative floats, put NaN above +inf and negative ones, which
ReLU makes zero, below.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu_bits(v):
    """int32 bits of relu(v), NaN kept."""
    bits = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
    return tl.maximum(bits, 0)


@triton.jit
def kth(bits, latent, k, slack):
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
def key_of(bits, latent):
    """(relu'd bits, latent) as an int64 that sorts by activation, then lowest latent."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def keep_largest(row_keys, keys, k):
    """Writes the k largest of some keys to the front of a row's (all where there are fewer); keys
    below 0 are none. Returns how many it wrote."""
    bits = (keys >> 32).to(tl.int32)
    latent = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    tau, last = kth(bits, latent, k, 0)
    kept = (bits > tau) | ((bits == tau) & (latent <= last))
    at = tl.cumsum(kept.to(tl.int32), 0) - 1
    # Every thread has read its keys before any is overwritten.
    tl.debug_barrier()
    tl.store(row_keys + at, keys, mask=kept)
    tl.debug_barrier()
    return tl.sum(kept.to(tl.int32), 0)


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
    x_row, w_ptr, bias_ptr, row_keys, F, D, k,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exact slow path: all activations of one row in chunks, cut back to k whenever full."""
    depth = tl.arange(0, BLOCK_K)
    count = tl.zeros([], tl.int32)
    slots = tl.arange(0, KEYS)
    for f0 in range(0, F, CHUNK):
        if count + CHUNK > KEYS:
            held = tl.load(row_keys + slots, mask=slots < count, other=-1)
            count = keep_largest(row_keys, held, k)
        f = f0 + tl.arange(0, CHUNK)
        w_rows = w_ptr + tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
        total = tl.zeros((CHUNK,), tl.float32)
        for d0 in range(0, D, BLOCK_K):
            inside = d0 + depth < D
            x = tl.load(x_row + d0 + depth, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_rows + (d0 + depth)[None, :], mask=inside[None, :], other=0.0)
            total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        v = total + tl.load(bias_ptr + f, mask=f < F, other=0.0)
        keys = tl.where(f < F, key_of(relu_bits(v), f), -1)
        tl.store(row_keys + count + tl.arange(0, CHUNK), keys)
        tl.debug_barrier()
        count += CHUNK
    keep_largest(row_keys, tl.load(row_keys + slots, mask=slots < count, other=-1), k)


@triton.jit
def _read_lists(
    row_lists, row_counts, F, k, num_lists, longest,
    LISTS_POW2: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Turns a row's lists into keys at the front of the same memory, cut back to k whenever full.

    Returns how many; keys below 0 among them are none. Entry s of list l is at s * num_lists + l,
    so that no key is written past the entries read.
    """
    HALF: tl.constexpr = KEYS // 2
    slots = tl.arange(0, KEYS)
    place = tl.arange(0, HALF)
    which = place % LISTS_POW2
    counts = tl.load(row_counts + which, mask=which < num_lists, other=0)
    found = tl.zeros([], tl.int32)
    for first in range(0, longest, HALF // LISTS_POW2):
        slot = first + place // LISTS_POW2
        there = slot < counts
        entry = tl.load(row_lists + slot * num_lists + which, mask=there, other=0)
        at = tl.cumsum(there.to(tl.int32), 0)
        total = tl.sum(there.to(tl.int32), 0)
        if found + total > KEYS:
            found = keep_largest(
                row_lists, tl.load(row_lists + slots, mask=slots < found, other=-1), k
            )
        latent = (entry & 0x7FFFFFFF).to(tl.int32)
        bits = relu_bits((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        key = tl.where(latent < F, key_of(bits, latent), -1)
        # Every thread has read its entries before any is overwritten.
        tl.debug_barrier()
        tl.store(row_lists + found + at - 1, key, mask=there)
        tl.debug_barrier()
        found += total
    return keep_largest(row_lists, tl.load(row_lists + slots, mask=slots < found, other=-1), k)


@triton.jit
def select_kernel(
    x_ptr, w_ptr, bias_ptr, count_ptr, lists_ptr, pitch, num_lists, values_ptr, indices_ptr, F, D,
    k, CAPACITY: tl.constexpr, LISTS_POW2: tl.constexpr, KEYS: tl.constexpr,
    K_POW2: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_keys = lists_ptr + row * pitch
    row_counts = count_ptr + row * num_lists
    each = tl.arange(0, LISTS_POW2)
    counts = tl.load(row_counts + each, mask=each < num_lists, other=0)
    found = tl.zeros([], tl.int32)
    longest = tl.max(counts, 0)
    if longest <= CAPACITY:
        found = _read_lists(row_keys, row_counts, F, k, num_lists, longest, LISTS_POW2, KEYS)
    if found < k:
        stream_row(x_ptr + row * D, w_ptr, bias_ptr, row_keys, F, D, k, KEYS, CHUNK, BLOCK_K)
    best_keys(row_keys, values_ptr + row * k, indices_ptr + row * k, k, k, K_POW2)
