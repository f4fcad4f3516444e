"""Exact selection of a row's k largest activations by a warp or two: from the Hopper filter's
lists, or from pre-activations and their groups' largest (encode_tiles.py).

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

What encode_select.py and encode_rows.py do with all warps of a larger program takes one warp here,
or two where rows are few, which are a program: a sum over a warp is one instruction, and of two
warps one works where the other waits. It is PTX (encode_pick_ptx.py), as Triton has no way to say
what a lane holds. A row whose lists overflowed, or lack some, is done anew by encode_select.py's
functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_groups_ptx import groups_ptx
from .encode_lists_ptx import lists_ptx
from .encode_select import best_keys, keep_largest, key_of, relu_bits, stream_row


@triton.jit
def address_of(pointer, threads):
    return threads.to(tl.int64) + pointer.to(tl.int64)


@triton.jit
def pick_kernel(
    x_ptr, w_ptr, bias_ptr, count_ptr, lists_ptr, pitch, keys_ptr, codes_ptr, told_ptr, tail_ptr,
    maxima_ptr, values_ptr, indices_ptr, F, D, k, whole, padded, LISTS: tl.constexpr,
    CAPACITY: tl.constexpr, RECORDS: tl.constexpr, HELD: tl.constexpr, SIZE: tl.constexpr,
    KEYS: tl.constexpr, K_POW2: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_KEYS: tl.constexpr, NUM_KEYS_POW2: tl.constexpr, LISTS_POW2: tl.constexpr,
    OTHERS: tl.constexpr, GROUPS: tl.constexpr, MAXIMA_PITCH: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A row's list from those of the filter, whose keys and codes are zeros again then, as far as
    they were not, and with OTHERS the lengths of lists, which not all are written each time; also
    of rows that fill the last block, up to `padded`. With GROUPS rows from there on are the tail's,
    selected from their pre-activations and the largest of each RUN of them."""
    row = tl.program_id(0)
    tl.extra.cuda.gdc_wait()  # the filter has ended: programs may be there before
    has_codes = tl.load(codes_ptr + row * NUM_KEYS, mask=row < padded, other=0)
    threads = tl.zeros((32 * WARPS,), tl.int32)
    if GROUPS > 0:
        status = tl.inline_asm_elementwise(
            lists_ptx(LISTS, CAPACITY, RECORDS, HELD, SIZE, WARPS, GROUPS, MAXIMA_PITCH),
            "=&r,r,r,r,r,r,l,l,l,l,r,l,l",
            [
                threads + row, threads + F, threads + k, threads + pitch * 8, threads + whole,
                address_of(lists_ptr, threads), address_of(count_ptr, threads),
                address_of(values_ptr, threads), address_of(indices_ptr, threads),
                threads + padded, address_of(tail_ptr, threads), address_of(maxima_ptr, threads),
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        status = tl.inline_asm_elementwise(
            lists_ptx(LISTS, CAPACITY, RECORDS, HELD, SIZE, WARPS), "=&r,r,r,r,r,r,l,l,l,l",
            [
                threads + row, threads + F, threads + k, threads + pitch * 8, threads + whole,
                address_of(lists_ptr, threads), address_of(count_ptr, threads),
                address_of(values_ptr, threads), address_of(indices_ptr, threads),
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()  # all have read what is cleared here
    key = tl.arange(0, NUM_KEYS_POW2)
    none = tl.zeros((NUM_KEYS_POW2,), tl.int32)
    for done in range(row, padded, tl.num_programs(0)):
        tl.store(told_ptr + done * 4 + tl.arange(0, 4), tl.zeros((4,), tl.int32))
        tl.store(keys_ptr + done * NUM_KEYS + key, none, mask=key < NUM_KEYS)
        if done > row:
            has_codes = tl.load(codes_ptr + done * NUM_KEYS)
            tl.debug_barrier()  # before another warp clears it
        # All of a row's are written, or none.
        if has_codes < 0:
            tl.store(codes_ptr + done * NUM_KEYS + key, none, mask=key < NUM_KEYS)
    if OTHERS:
        length = tl.arange(0, 4 * LISTS_POW2)
        empty = tl.zeros((4 * LISTS_POW2,), tl.int32)
        for done in range(row, padded, tl.num_programs(0)):
            tl.store(count_ptr + done * (4 * LISTS) + length, empty, mask=length < 4 * LISTS)
    if tl.min(status, 0) < 0:
        at = row.to(tl.int64)
        row_keys = lists_ptr + at * pitch
        stream_row(x_ptr + at * D, w_ptr, bias_ptr, row_keys, F, D, k, KEYS, CHUNK, BLOCK_K)
        best_keys(row_keys, values_ptr + at * k, indices_ptr + at * k, k, k, K_POW2)


@triton.jit
def pick_groups_kernel(
    pre_ptr,  # [N, pre_pitch] float32
    maxima_ptr,  # [N, MAXIMA_PITCH] int32: bits of the largest of each GROUP
    pre_pitch,
    keys_ptr,  # [N, KEYS] int64, scratch
    values_ptr,
    indices_ptr,
    F,
    k,
    GROUPS: tl.constexpr,
    MAXIMA_PITCH: tl.constexpr,
    ROOM: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    K_POW2: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A row's list from its pre-activations."""
    row = tl.program_id(0)
    threads = tl.zeros((32 * WARPS,), tl.int32)
    status = tl.inline_asm_elementwise(
        groups_ptx(GROUPS, MAXIMA_PITCH, ROOM, SIZE, WARPS), "=&r,r,r,r,r,l,l,l,l",
        [
            threads + row, threads + F, threads + k, threads + pre_pitch * 4,
            address_of(pre_ptr, threads), address_of(maxima_ptr, threads),
            address_of(values_ptr, threads), address_of(indices_ptr, threads),
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if tl.min(status, 0) < 0:
        # A group's largest was of a column that is no latent: NaN, where x is not finite.
        at = row.to(tl.int64)
        row_keys = keys_ptr + at * KEYS
        _all_of_row(pre_ptr + at * pre_pitch, row_keys, F, k, KEYS)
        best_keys(row_keys, values_ptr + at * k, indices_ptr + at * k, k, k, K_POW2)


@triton.jit
def _all_of_row(pre_row, row_keys, F, k, KEYS: tl.constexpr):
    """Leaves the k largest of all of a row's pre-activations at the front of its keys."""
    HALF: tl.constexpr = KEYS // 2
    slots = tl.arange(0, KEYS)
    count = tl.zeros([], tl.int32)
    for f0 in range(0, F, HALF):
        f = f0 + tl.arange(0, HALF)
        bits = relu_bits(tl.load(pre_row + f, mask=f < F, other=0.0))
        tl.store(row_keys + count + tl.arange(0, HALF), tl.where(f < F, key_of(bits, f), -1))
        tl.debug_barrier()
        held = tl.load(row_keys + slots, mask=slots < count + HALF, other=-1)
        count = keep_largest(row_keys, held, k)
