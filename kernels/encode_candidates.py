"""Kernels of the batch rule and the threshold rule: encode_flat.py has the picture.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, C slots of the list that is made.  A key is
an activation's bits and its latent (`encode_select.key_of`); a dense row is one whose lists
overflowed, or any where there are no lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_select import key_of, passing, relu_bits

# Numbers on the device: the range of bits that the last key to be kept lies in (when it is found,
# that key), how many of those in it are wanted, keys in the buffer, dense rows, whether all rows
# are, programs that are done, pairs, the limit, whether a round of counts is behind.
LO, HI, LEFT, KEYS, DENSE, ALL, DONE, PAIRS, TAU, STALE = map(tl.constexpr, range(10))
BINS = tl.constexpr(4096)
NAN = tl.constexpr(0x7FC00000)  # its bits, which are above all others
ROUND, COUNT, EMIT = map(tl.constexpr, range(3))


@triton.jit
def _is_last(state_ptr, programs):
    """Whether all other programs are done. What they wrote has to be read past the L1 cache."""
    tl.debug_barrier()
    last = tl.atomic_add(state_ptr + DONE, 1) == programs - 1
    if last:
        tl.store(state_ptr + DONE, 0)
    return last


@triton.jit
def _shift_of(lo, hi):
    """How far bits are shifted for the range to fit the bins."""
    shift = tl.zeros([], tl.int32)
    while ((hi - lo) >> shift) >= BINS:
        shift += 1
    return shift


@triton.jit
def _place(number):
    """Where a bin is: neighbours, which are much added to at one time, in different cache lines."""
    return (number & 127) * 32 + (number >> 7)


@triton.jit
def _count_bins(bits, there, lo, hi, shift, bins_ptr):
    """Adds what lies from lo to hi to the bins."""
    counted = there & (bits >= lo) & (bits <= hi)
    number = _place(tl.minimum((bits - lo) >> shift, BINS - 1))
    tl.atomic_add(bins_ptr + number, tl.full(bits.shape, 1, tl.int32), counted, sem="relaxed")


@triton.jit
def _find(bins_ptr, left):
    """Numbers of the bins and their counts, which are cleared; the bin that the last of `left` keys
    is in, -1 where there are fewer, and how many are above it."""
    number = tl.arange(0, BINS)
    place = bins_ptr + _place(number)
    counts = tl.load(place, cache_modifier=".cg")
    tl.store(place, tl.zeros([BINS], tl.int32))
    reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys of this bin or above
    found = tl.sum((reach >= left).to(tl.int32), 0) - 1
    return number, counts, found, tl.sum(tl.where(number > found, counts, 0), 0)


@triton.jit(do_not_specialize=["step", "rank", "total"])
def limit_kernel(
    pre_ptr,  # [N, S] float32
    bias_ptr,  # [F] float32, of which each step-th is a sample's
    limit_ptr,  # [N] int32
    bins_ptr,  # [4096] int32, zeros
    state_ptr, N, S, step, rank, total, GROUP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The limit that all rows share, below what the rank-th largest cell reaches, by 64 bins an
    octave from 2^-32 on."""
    lo = tl.full([], 95 << 23, tl.int32)
    rows = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = (rows < N)[:, None] & (cols < S)[None, :]
    at = rows.to(tl.int64)[:, None] * S + cols[None, :]
    bias = tl.load(bias_ptr + cols * step, mask=cols < S, other=0.0)
    bits = relu_bits(tl.load(pre_ptr + at, mask=there, other=0.0) + bias[None, :])
    _count_bins(tl.max(tl.where(there, bits, -1), 0), cols < S, lo, NAN, 17, bins_ptr)
    if _is_last(state_ptr, tl.num_programs(0) * tl.num_programs(1)):
        number, counts, found, _ = _find(bins_ptr, rank)
        # Zeros are no pairs.
        tau = tl.where(found < 0, 1, lo + (found << 17))
        largest = tl.max(tl.where(counts > 0, number, 0), 0)
        tl.store(state_ptr + LO, tau)
        tl.store(state_ptr + HI, lo + (largest << 17) + ((1 << 17) - 1))
        tl.store(state_ptr + LEFT, total)
        tl.store(state_ptr + TAU, tau)
        for start in range(0, N, 1024):
            row = start + tl.arange(0, 1024)
            tl.store(limit_ptr + row, tau - 1 + tl.zeros_like(row), mask=row < N)


@triton.jit(do_not_specialize=["capacity", "room", "first_row"])
def collect_kernel(
    limit_ptr,  # [N] int32
    count_ptr,  # [rows, LISTS] int32
    lists_ptr,  # [rows, pitch] int32
    keys_ptr,  # [room] int64
    spans_ptr,  # [2, N] int32: where a row's keys begin, their number or -1
    dense_ptr,  # [N] int32
    bins_ptr,  # [4096] int32, COUNTED only
    state_ptr, pitch, capacity, room, first_row, N, F, LISTS: tl.constexpr,
    LISTS_POW2: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Gathers a row's lists into the buffer of keys, which are the first to be counted in bins; or
    notes the row as a dense one."""
    at = tl.program_id(0).to(tl.int64)
    row, entries = first_row + at, lists_ptr + at * pitch
    which = tl.arange(0, LISTS_POW2)[None, :]
    counts = tl.load(count_ptr + at * LISTS + which, mask=which < LISTS, other=0)
    limit = tl.load(limit_ptr + row)
    longest = tl.max(counts)
    dense = longest > capacity
    longest = tl.where(dense, 0, longest)
    found = tl.zeros([], tl.int32)
    for start in range(0, longest, SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]
        _, _, _, one, two = passing(entries, slot, which, counts, limit, F, LISTS)
        found += tl.sum(one.to(tl.int32) + two.to(tl.int32))
    begin = tl.atomic_add(state_ptr + KEYS, found, sem="relaxed")
    dense = dense | (begin + found > room)
    tl.store(spans_ptr + row, begin)
    tl.store(spans_ptr + N + row, tl.where(dense, -1, found))
    if dense:
        tl.store(dense_ptr + tl.atomic_add(state_ptr + DENSE, 1, sem="relaxed"), row.to(tl.int32))
    lo = tl.load(state_ptr + LO)
    shift = _shift_of(lo, tl.load(state_ptr + HI))
    to = keys_ptr + begin
    for start in range(0, tl.where(dense, 0, longest), SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]
        first, second, latent, one, two = passing(entries, slot, which, counts, limit, F, LISTS)
        each = one.to(tl.int32) + two.to(tl.int32)
        column = tl.sum(each, 0)
        place = (tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(each, 0) - each
        tl.store(to + place, key_of(first, latent), mask=one)
        tl.store(to + place + one.to(tl.int32), key_of(second, latent + 1), mask=two)
        if COUNTED:
            _count_bins(first, one, lo, NAN, shift, bins_ptr)
            _count_bins(second, two, lo, NAN, shift, bins_ptr)
        to += tl.sum(column, 0)


@triton.jit
def _pick(state_ptr, bins_ptr, lo, hi, left, shift):
    """Narrows the range to the bin that the last key to be kept is in."""
    _, _, found, above = _find(bins_ptr, left)
    if found < 0:
        # All that is positive; or, where the limit hid some of these, anew without it.
        hidden = tl.load(state_ptr + TAU) > 1
        tl.store(state_ptr + ALL, tl.where(hidden, 1, 0))
        tl.store(state_ptr + LO, tl.where(hidden, 1, 0))
        tl.store(state_ptr + HI, tl.where(hidden, NAN, 0))
        tl.store(state_ptr + LEFT, tl.where(hidden, left, 0))
        tl.store(state_ptr + STALE, tl.where(hidden, 0, 1))
        tl.store(state_ptr + TAU, 1)
    else:
        begin = lo + (found << shift)
        # The last bin has all that is above, too.
        end = tl.where(found < BINS - 1, begin + ((1 << shift) - 1), hi)
        tl.store(state_ptr + LO, begin)
        tl.store(state_ptr + HI, tl.minimum(end, hi))
        tl.store(state_ptr + LEFT, left - above)
        tl.store(state_ptr + STALE, 1)


@triton.jit
def _sum_up(state_ptr, above_ptr, offsets_ptr, left, N, capacity, BLOCK: tl.constexpr):
    """How many equal keys each row takes, lowest rows first; where its pairs begin."""
    equal_ptr, take_ptr = above_ptr + N, above_ptr + 2 * N
    # All of an untrained SAE's pairs may be more than 32 bits count.
    passed = tl.zeros([], tl.int64)
    total = tl.zeros([], tl.int64)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        above = tl.load(above_ptr + row, mask=row < N, other=0, cache_modifier=".cg").to(tl.int64)
        equal = tl.load(equal_ptr + row, mask=row < N, other=0, cache_modifier=".cg").to(tl.int64)
        before = passed + tl.cumsum(equal, 0) - equal
        take = tl.maximum(tl.minimum(left - before, equal), 0)
        end = total + tl.cumsum(above + take, 0)
        tl.store(take_ptr + row, take.to(tl.int32), mask=row < N)
        tl.store(offsets_ptr + 1 + row, tl.minimum(end, capacity).to(tl.int32), mask=row < N)
        passed += tl.sum(equal, 0)
        total += tl.sum(above + take, 0)
    tl.store(offsets_ptr, tl.zeros([], tl.int32))
    tl.store(state_ptr + PAIRS, tl.minimum(total, 0x7FFFFFFF).to(tl.int32))
    tl.store(state_ptr + STALE, 1)


@triton.jit
def _store_pairs(
    tokens_ptr, latents_ptr, values_ptr, theta_ptr, theta_step, to, row, latent, bits, keep,
    capacity,
):  # fmt: skip
    """Pairs to their places in the list."""
    mask = keep & (to < capacity)
    value = bits.to(tl.float32, bitcast=True)
    value += tl.load(theta_ptr + latent * theta_step, mask=mask, other=0.0)
    tl.store(tokens_ptr + to, row.to(tl.int32) + tl.zeros_like(latent), mask=mask)
    tl.store(latents_ptr + to, latent, mask=mask)
    tl.store(values_ptr + to, value, mask=mask)


@triton.jit
def _unpack(keys_ptr, at, there):
    """Bits and latents of keys."""
    key = tl.load(keys_ptr + at, mask=there, other=0)
    return (key >> 32).to(tl.int32), 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _keyed_rows(
    first, keys_ptr, spans_ptr, above_ptr, offsets_ptr, tokens_ptr, latents_ptr, values_ptr,
    theta_ptr, bins_ptr, theta_step, lo, hi, shift, N, capacity, MODE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Rows whose candidates are keys, SLOTS of each at once."""
    row = first + tl.arange(0, ROWS)
    begin = tl.load(spans_ptr + row, mask=row < N, other=0)
    count = tl.load(spans_ptr + N + row, mask=row < N, other=-1)
    above = tl.zeros([ROWS], tl.int32)
    equal = tl.zeros([ROWS], tl.int32)
    if MODE == EMIT:
        here = count > 0
        take = tl.load(above_ptr + 2 * N + row, mask=here, other=0)
        chosen = tl.max((take < tl.load(above_ptr + N + row, mask=here, other=0)).to(tl.int32)) > 0
        above = tl.load(offsets_ptr + row, mask=here, other=0)
    for start in range(0, tl.max(count), SLOTS):
        slot = start + tl.arange(0, SLOTS)[None, :]
        there = slot < count[:, None]
        bits, latent = _unpack(keys_ptr, begin[:, None] + slot, there)
        if MODE == ROUND:
            _count_bins(bits, there, lo, hi, shift, bins_ptr)
        elif MODE == COUNT:
            above += tl.sum((there & (bits > lo)).to(tl.int32), 1)
            equal += tl.sum((there & (bits == lo)).to(tl.int32), 1)
        else:
            rank = tl.zeros([ROWS, SLOTS], tl.int32)
            if chosen:
                # Of equal ones those of the lowest latents.
                for other in range(0, tl.max(count)):
                    their_bits, theirs = _unpack(keys_ptr, begin + other, other < count)
                    theirs = tl.where((other < count) & (their_bits == lo), theirs, 0x7FFFFFFF)
                    rank += (theirs[:, None] < latent).to(tl.int32)
            keep = there & ((bits > lo) | ((bits == lo) & (rank < take[:, None])))
            to = above[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            _store_pairs(
                tokens_ptr, latents_ptr, values_ptr, theta_ptr, theta_step, to, row[:, None],
                latent, bits, keep, capacity,
            )  # fmt: skip
            above += tl.sum(keep.to(tl.int32), 1)
    if MODE == COUNT:
        tl.store(above_ptr + row, above, mask=count >= 0)
        tl.store(above_ptr + N + row, equal, mask=count >= 0)


@triton.jit
def _activations(
    x_ptr, w_ptr, bias_ptr, products_ptr, row, slot, live, f, F, D, given, keep,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of bits of dense rows' activations; products are read where they are given."""
    inside = live[:, None] & (f < F)[None, :]
    at = slot.to(tl.int64)[:, None] * F + f[None, :]
    acc = tl.zeros(at.shape, tl.float32)
    if GIVEN or given:
        acc = tl.load(products_ptr + at, mask=inside, other=0.0)
    else:
        d = tl.arange(0, BLOCK_K)
        x_rows = x_ptr + row.to(tl.int64)[:, None] * D
        w_rows = w_ptr + f.to(tl.int64)[None, :] * D
        for d0 in range(0, D, BLOCK_K):
            there = d0 + d < D
            mask = live[:, None] & there[None, :]
            a = tl.load(x_rows + (d0 + d)[None, :], mask=mask, other=0.0)
            mask = (f < F)[None, :] & there[:, None]
            b = tl.load(w_rows + (d0 + d)[:, None], mask=mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        tl.store(products_ptr + at, acc, mask=inside & keep)
    acc += tl.load(bias_ptr + f, mask=f < F, other=0.0)[None, :]
    return tl.where(inside, relu_bits(acc), -1)


@triton.jit
def _dense_rows(
    x_ptr, w_ptr, bias_ptr, products_ptr, dense_ptr, parts_ptr, above_ptr, offsets_ptr, tokens_ptr,
    latents_ptr, values_ptr, theta_ptr, bins_ptr, worker, workers, number, first_row, stored,
    theta_step, lo, hi, shift, stale, every, N, F, D, capacity, MODE: tl.constexpr,
    GIVEN: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dense rows, ROWS at once, one of SPANS parts of the latents after another."""
    groups = tl.cdiv(number, ROWS)
    width = tl.cdiv(tl.cdiv(F, COLS), SPANS) * COLS
    for unit in range(worker, groups * SPANS, workers):
        span = unit // groups
        slot = unit % groups * ROWS + tl.arange(0, ROWS)
        live = slot < number
        row = first_row + slot
        if not GIVEN:
            row = tl.where(every, slot, tl.load(dense_ptr + slot, mask=live & (not every), other=0))
        kept = (unit % groups + 1) * ROWS <= stored
        above = tl.zeros([ROWS], tl.int32)
        equal = tl.zeros([ROWS], tl.int32)
        to = tl.zeros([ROWS], tl.int32)
        take = tl.zeros([ROWS], tl.int32)
        parts = parts_ptr + row * (2 * SPANS)
        if MODE == EMIT:
            part = tl.arange(0, SPANS)[None, :]
            before = live[:, None] & (part < span)
            above = tl.sum(tl.load(parts[:, None] + part, mask=before, other=0), 1)
            equal = tl.sum(tl.load(parts[:, None] + SPANS + part, mask=before, other=0), 1)
            take = tl.load(above_ptr + 2 * N + row, mask=live, other=0)
            to = tl.load(offsets_ptr + row, mask=live, other=0)
        for f0 in range(span * width, tl.minimum(span * width + width, F), COLS):
            f = f0 + tl.arange(0, COLS)
            bits = _activations(
                x_ptr, w_ptr, bias_ptr, products_ptr, row, slot, live, f, F, D, kept & stale, kept,
                GIVEN, PRECISION, BLOCK_K,
            )  # fmt: skip
            if MODE == ROUND:
                _count_bins(bits, bits > 0, lo, hi, shift, bins_ptr)
            else:
                # Zeros are no pairs, and of many rows their number has more than 32 bits.
                same = ((bits == lo) & (bits > 0)).to(tl.int32)
                if MODE == EMIT:
                    rank = equal[:, None] + tl.cumsum(same, 1) - same
                    taken = (same > 0) & (rank < take[:, None])
                    keep = ((bits > lo) | taken).to(tl.int32)
                    place = (to + above + tl.minimum(equal, take))[:, None]
                    _store_pairs(
                        tokens_ptr, latents_ptr, values_ptr, theta_ptr, theta_step,
                        place + tl.cumsum(keep, 1) - keep, row[:, None],
                        f[None, :] + tl.zeros_like(keep), bits, keep > 0, capacity,
                    )  # fmt: skip
                above += tl.sum((bits > lo).to(tl.int32), 1)
                equal += tl.sum(same, 1)
        if MODE == COUNT:
            tl.store(parts + span, above, mask=live)
            tl.store(parts + SPANS + span, equal, mask=live)
            tl.atomic_add(above_ptr + row, above, mask=live, sem="relaxed")
            tl.atomic_add(above_ptr + N + row, equal, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["capacity", "keyed", "number", "first_row", "stored", "programs"])
def flat_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # [F] float32
    theta_ptr,  # [F] float32, or one
    keys_ptr,  # [room] int64
    spans_ptr,  # [2, N] int32
    dense_ptr,  # [N] int32
    products_ptr,  # [stored, F] float32, of dense rows
    parts_ptr,  # [N, 2, SPANS] int32: a dense row's counts
    above_ptr,  # [3, N] int32: keys above the last to be kept, equal ones, and how many it takes
    offsets_ptr,  # [N + 1] int32
    tokens_ptr,  # [C] int32
    latents_ptr,  # [C] int32
    values_ptr,  # [C] float32
    bins_ptr,  # [4096] int32, zeros
    state_ptr, theta_step, capacity,
    keyed,  # programs of rows that may have keys, TOKENS each
    number,  # GIVEN only: rows of this launch
    first_row, stored,
    programs,  # of all launches of a step
    N, F, D, MODE: tl.constexpr, GIVEN: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    SPANS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over all candidates: a round of counts, counts a row, or the pairs."""
    pid = tl.program_id(0)
    lo, hi = tl.load(state_ptr + LO), tl.load(state_ptr + HI)
    left, stale = tl.load(state_ptr + LEFT), tl.load(state_ptr + STALE) > 0
    every = tl.load(state_ptr + ALL) > 0
    if (MODE != ROUND) | (not stale) | (lo < hi):
        shift = _shift_of(lo, hi)
        hi = tl.where(stale, hi, NAN)
        if pid < keyed:
            if not every:
                _keyed_rows(
                    pid * TOKENS, keys_ptr, spans_ptr, above_ptr, offsets_ptr, tokens_ptr,
                    latents_ptr, values_ptr, theta_ptr, bins_ptr, theta_step, lo, hi, shift, N,
                    capacity, MODE, TOKENS, SLOTS,
                )  # fmt: skip
        else:
            if not GIVEN:
                number = tl.where(every, N, tl.load(state_ptr + DENSE))
            _dense_rows(
                x_ptr, w_ptr, bias_ptr, products_ptr, dense_ptr, parts_ptr, above_ptr, offsets_ptr,
                tokens_ptr, latents_ptr, values_ptr, theta_ptr, bins_ptr, pid - keyed,
                tl.num_programs(0) - keyed, number, first_row, stored, theta_step, lo, hi, shift,
                stale, every, N, F, D, capacity, MODE, GIVEN, SPANS, ROWS, COLS, BLOCK_K, PRECISION,
            )  # fmt: skip
        if MODE == EMIT:
            each = tl.cdiv(capacity, tl.num_programs(0))
            first = tl.maximum(tl.load(state_ptr + PAIRS), pid * each)
            for start in range(first, tl.minimum(pid * each + each, capacity), 128):
                slot = start + tl.arange(0, 128)
                inside = (slot < pid * each + each) & (slot < capacity)
                tl.store(tokens_ptr + slot, slot * 0, mask=inside)
                tl.store(latents_ptr + slot, slot * 0, mask=inside)
                tl.store(values_ptr + slot, slot * 0.0, mask=inside)
        elif _is_last(state_ptr, programs):
            if MODE == ROUND:
                _pick(state_ptr, bins_ptr, lo, hi, left, shift)
            else:
                _sum_up(state_ptr, above_ptr, offsets_ptr, left, N, capacity, 1024)
