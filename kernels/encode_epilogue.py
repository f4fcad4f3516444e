"""What the encoder for Hopper does with a finished tile of pre-activations: writes it, or appends
to lists what passes a limit.

Legend: rows are tokens, columns of a tile are latents.

A warpgroup holds a tile's half of [64, 256] float32 as the tensor core leaves it: of each 8
neighbouring columns (a run) thread q of four that share a row holds columns 2q and 2q + 1, a pair.
Splitting the columns in halves until runs are left, and a run into its pairs, moves nothing: each
step picks registers. So what follows is a few instructions a pair, without shuffles or atomics, and
each thread appends to a list of its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import encode_plan

# [64, 4]: a thread's rows r and r + 8, and its pair of each run.
PAIR_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)


# [64, 2]: of each run the two cells of 4 neighbours, which two threads hold both.
CELL_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 0], [0, 1], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 2],
    )
)
# Entries that are written between two looks at whether a list is full.
ROOM = gl.constexpr(encode_plan.ROOM)


@gluon.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    return tile.reshape([M, 2, N // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _pair(run):
    """The two columns of a run [64, 8] that each thread holds, [64, 4] each."""
    first, second = run.reshape([run.shape[0], 4, 2]).split()
    first = gl.convert_layout(first, PAIR_LAYOUT, assert_trivial=True)
    return first, gl.convert_layout(second, PAIR_LAYOUT, assert_trivial=True)


@gluon.jit
def _joined(first, second):
    """Two float32 as the 8 bytes that a store writes at once."""
    return gl.inline_asm_elementwise(
        "mov.b64 $0, {$1, $2};", "=l,r,r",
        [first.to(gl.int32, bitcast=True), second.to(gl.int32, bitcast=True)],
        dtype=gl.int64, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def write_tile(tile, pairs, cells, at, cell_at, there, RUN: gl.constexpr):
    """Writes a tile's pairs to `pairs` (of 8 bytes) at `at` [64, 4] + 4 * their run, and the bits
    of the largest of each 4 neighbours to `cells` at cell_at [64, 2] + 2 * their run, of rows that
    are `there` [64, 1]."""
    if tile.shape[1] > 8:
        left, right = _halves(tile)
        write_tile(left, pairs, cells, at, cell_at, there, RUN)
        write_tile(right, pairs, cells, at, cell_at, there, RUN + tile.shape[1] // 16)
    else:
        first, second = _pair(tile)
        gl.store(pairs + (at + RUN * 4), _joined(first, second), mask=there & (at >= 0))
        largest = gl.maximum(first.to(gl.int32, bitcast=True), second.to(gl.int32, bitcast=True))
        largest = gl.max(largest.reshape([largest.shape[0], 2, 2]), 2)
        largest = gl.convert_layout(largest, CELL_LAYOUT, assert_trivial=True)
        rows = gl.convert_layout(there, CELL_LAYOUT)
        gl.store(cells + (cell_at + RUN * 2), largest, mask=rows & (cell_at >= 0))


@gluon.jit
def _after(value, earlier):
    """`value`, known to the compiler only once `earlier` is: else it would compare all of a tile's
    pairs first, and keep the outcomes as bits that cost more to test than a comparison."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,l", [value, earlier], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def append_tile(tile, entry, brim, limit, latent, apart, RUN: gl.constexpr, LISTS: gl.constexpr):
    """Appends a tile's pairs of which one exceeds its row's limit; returns the lists' next entries,
    and the limits, which nothing exceeds where a list is full.

    entry, brim [64, 4]: addresses of each list's next entry of 12 bytes (a pair, its first latent),
    which stand LISTS apart, and of where less than ROOM are left. limit [64, 4] int32 bits.
    latent [64, 4]: a pair's first latent in run 0; apart: how far the latents of neighbouring runs
    are from one another.
    """
    if tile.shape[1] > 8:
        if tile.shape[1] == 8 * ROOM:
            limit = gl.where(entry.to(gl.int64) > brim, 0x7FFFFFFF, limit)
        left, right = _halves(tile)
        HALF: gl.constexpr = tile.shape[1] // 16
        entry, limit = append_tile(left, entry, brim, limit, latent, apart, RUN, LISTS)
        entry, limit = append_tile(right, entry, brim, limit, latent, apart, RUN + HALF, LISTS)
    else:
        first, second = _pair(tile)
        first = first.to(gl.int32, bitcast=True)
        second = second.to(gl.int32, bitcast=True)
        hit = _after(gl.maximum(first, second), entry.to(gl.int64)) > limit
        gl.store(entry, first, mask=hit)
        gl.store(entry + 1, second, mask=hit)
        gl.store(entry + 2, latent + RUN * apart, mask=hit)
        entry += gl.where(hit, 3 * LISTS, 0)
    return entry, limit
