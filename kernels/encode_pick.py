"""Exact selection of a row's k largest activations by one warp: from the Hopper filter's lists, or
from pre-activations and their groups' largest (encode_tiles.py).

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

What encode_select.py and encode_rows.py do with all of a program's warps takes one warp here, four
rows a program: nothing waits at a barrier, and a sum over a row is one instruction. It is PTX
(encode_pick_ptx.py), as Triton has no way to let each warp go its own. Keys are gathered until
there is no more room for them, cut back to the k largest or a few more, and so on; what is left is
sorted. A row whose lists overflowed, or lack some, is done anew by encode_select.py's functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_pick_ptx import groups_ptx, lists_ptx
from .encode_select import best_keys, keep_largest, key_of, relu_bits, stream_row

# Rows of a program, a warp each.
ROWS = 4
# Groups that a row may have: a lane holds a 32nd of their largest.
MAX_GROUPS = 2048


@triton.jit
def _address(pointer, threads):
    return threads.to(tl.int64) + pointer.to(tl.int64)


@triton.jit
def pick_kernel(
    x_ptr, w_ptr, bias_ptr, count_ptr, lists_ptr, pitch, values_ptr, indices_ptr, status_ptr, N, F,
    D, k, LISTS: tl.constexpr, CAPACITY: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr,
    KEYS: tl.constexpr, K_POW2: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Lists of ROWS rows, a warp each, from those of the filter."""
    first = tl.program_id(0) * ROWS
    threads = tl.zeros((32 * ROWS,), tl.int32)
    status = tl.inline_asm_elementwise(
        lists_ptx(LISTS, CAPACITY, ROOM, SIZE), "=&r,r,r,r,r,r,l,l,l,l,l",
        [
            threads + first, threads + N, threads + F, threads + k, threads + pitch * 8,
            _address(lists_ptr, threads), _address(values_ptr, threads),
            _address(indices_ptr, threads), _address(status_ptr, threads),
            _address(count_ptr, threads),
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if tl.min(status, 0) < 0:
        for i in range(ROWS):
            row = (first + i).to(tl.int64)
            if tl.load(status_ptr + row, mask=row < N, other=0) < 0:
                row_keys = lists_ptr + row * pitch
                stream_row(
                    x_ptr + row * D, w_ptr, bias_ptr, row_keys, F, D, k, KEYS, CHUNK, BLOCK_K
                )
                best_keys(row_keys, values_ptr + row * k, indices_ptr + row * k, k, k, K_POW2)


@triton.jit
def pick_groups_kernel(
    pre_ptr,  # [N, pre_pitch] float32
    maxima_ptr,  # [N, MAXIMA_PITCH] int32: bits of the largest of each GROUP, overwritten
    pre_pitch, keys_ptr, pitch, values_ptr, indices_ptr, status_ptr, N, F, k,
    GROUPS: tl.constexpr, MAXIMA_PITCH: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr,
    KEYS: tl.constexpr, K_POW2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Lists of ROWS rows, a warp each, from pre-activations."""
    first = tl.program_id(0) * ROWS
    threads = tl.zeros((32 * ROWS,), tl.int32)
    status = tl.inline_asm_elementwise(
        groups_ptx(GROUPS, MAXIMA_PITCH, ROOM, SIZE), "=&r,r,r,r,r,r,l,l,l,l,l,l,r",
        [
            threads + first, threads + N, threads + F, threads + k, threads + pitch * 8,
            _address(keys_ptr, threads), _address(values_ptr, threads),
            _address(indices_ptr, threads), _address(status_ptr, threads),
            _address(pre_ptr, threads), _address(maxima_ptr, threads), threads + pre_pitch * 4,
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if tl.min(status, 0) < 0:
        # A group's largest was of a column that is no latent: NaN, where x is not finite.
        for i in range(ROWS):
            row = (first + i).to(tl.int64)
            if tl.load(status_ptr + row, mask=row < N, other=0) < 0:
                row_keys = keys_ptr + row * pitch
                _all_of_row(pre_ptr + row * pre_pitch, row_keys, F, k, KEYS)
                best_keys(row_keys, values_ptr + row * k, indices_ptr + row * k, k, k, K_POW2)


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
