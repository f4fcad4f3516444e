"""The kernel of the fused encoder for Hopper (encode_first.py): what its warps do.

Legend: N tokens of this launch without its tail, D d_in, F d_sae (of this shard).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .encode_first_ptx import agree_ptx, constraints, filter_ptx, finish_ptx, name_ptx, start_ptx
from .encode_hopper import behind_from, load_tile, make_ring, multiply_tile, reinterpret


@gluon.jit
def _runs_of(tile, turn, whole, BLOCK_N: gl.constexpr):
    """First latent of a tile's first run of 8 neighbours, and how far its runs are apart: a whole
    tile takes one of each 32nd part of the latents, the last one what these leave, at most
    BLOCK_N."""
    rest = turn == whole
    return gl.where(rest, whole * BLOCK_N, tile * 8), gl.where(rest, 8, whole * 8)


@gluon.jit
def _work_of(
    N, whole, regular, PARTS: gl.constexpr, OTHERS: gl.constexpr, FIRST: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """What a program does. A block of rows has PARTS programs of its own, which do its first
    `regular` tiles, each every PARTS-th. The tiles that these leave, if OTHERS, are done by the
    other programs, block after block; few tiles, which stay in the L2 cache.

    Returns which of the others it is, or a negative number; its first of the units that are left,
    or its block; its steps, and how many of these are but the sample's.
    """
    num_m = gl.cdiv(N, BLOCK_M)
    begin = gl.program_id(0) % num_m
    skip = FIRST - 1
    steps = gl.cdiv(regular - gl.program_id(0) // num_m, PARTS) + skip
    other = -1
    if OTHERS:
        other = gl.program_id(0) - num_m * PARTS
        if other >= 0:
            others = gl.num_programs(0) - num_m * PARTS
            left = num_m * (whole + 1 - regular)
            begin = other * left // gl.maximum(others, 1)
            steps = (other + 1) * left // gl.maximum(others, 1) - begin
            skip = 0
    return other, begin, steps, skip


@gluon.jit
def _unit_of(
    other, begin, step, skip, num_m, whole, regular, PARTS: gl.constexpr, OTHERS: gl.constexpr
):
    """A step's block of rows and its tile's turn: the sample's, from the second on, then all."""
    index = gl.where(step < skip, step + 1, step - skip)
    block = begin
    turn = gl.program_id(0) // num_m + PARTS * index
    if OTHERS:
        left = gl.maximum(whole + 1 - regular, 1)
        unit = begin + index
        block = gl.where(other < 0, begin, unit // left)
        turn = gl.where(other < 0, turn, regular + unit % left)
    return block, turn


@gluon.jit
def _produce(
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, tail_desc, a_bufs, b_bufs, bias_bufs,
    tail_bufs, full, empty, N, F, D, whole, spread, regular, PARTS: gl.constexpr,
    OTHERS: gl.constexpr, FIRST: gl.constexpr, TAIL: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads a program's tiles for `_consume`."""
    HALF: gl.constexpr = BLOCK_M // 2
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N + TAIL) * BLOCK_K * 2
    num_m = gl.cdiv(N, BLOCK_M)
    other, begin, steps, skip = _work_of(N, whole, regular, PARTS, OTHERS, FIRST, BLOCK_M)
    runs = reinterpret(b_bufs, b_bufs.dtype, [STAGES, 32, BLOCK_N // 32, BLOCK_K], w_desc.layout)
    bias_runs = reinterpret(bias_bufs, gl.float32, [STAGES, 32, BLOCK_N // 32], bias_desc.layout)
    stage = 0
    phase = 1
    slot = 0
    for step in range(0, steps):
        block, turn = _unit_of(other, begin, step, skip, num_m, whole, regular, PARTS, OTHERS)
        m0 = block * BLOCK_M
        tile = turn * spread % whole
        for d0 in range(0, D, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if d0 == 0:
                mbarrier.expect(bar, BYTES + BLOCK_N * 4)
                if turn < whole:
                    load_tile(bias_desc, [0, tile * 8], bar, bias_runs.index(slot))
                else:
                    load_tile(rest_bias_desc, [whole * BLOCK_N], bar, bias_bufs.index(slot))
            else:
                mbarrier.expect(bar, BYTES)
            load_tile(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
            load_tile(x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1))
            if turn < whole:
                load_tile(w_desc, [0, tile * 8, d0], bar, runs.index(stage))
            else:
                load_tile(rest_desc, [whole * BLOCK_N, d0], bar, b_bufs.index(stage))
            if TAIL > 0:
                load_tile(tail_desc, [N, d0], bar, tail_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        slot = (slot + 1) % STAGES


@gluon.jit
def _fetch(address, BYTES: gl.constexpr):
    """Brings memory to the L2 cache."""
    for start in gl.static_range(0, BYTES // 128, 128):
        line = start + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        gl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l",
            [address + gl.minimum(line, BYTES // 128 - 1).to(gl.int64) * 128],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _multiply_both(
    a_bufs, b_bufs, bias_buf, tail_bufs, full, empty, lead, bias_ptr, tail_ptr, maxima_ptr, stage,
    phase, odd, behind, rest, F, D, first, apart, quarter, WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LAYOUT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """`multiply_tile`, and a quarter of its latents by the tail's rows, which is written here, and
    the largest of each run's 8 neighbours."""
    QUARTER: gl.constexpr = BLOCK_N // 4
    ACROSS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    SMALL: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 4], [1, 0])
    at = quarter * QUARTER + gl.arange(0, QUARTER, layout=gl.SliceLayout(1, ACROSS))
    f = first + at // 8 * apart + at % 8
    bias = gl.load(bias_ptr + f, mask=f < F, other=0.0)
    tail = gl.zeros([QUARTER, TAIL], gl.float32, layout=ACROSS) + bias[:, None]
    acc, tail, stage, phase = multiply_tile(
        a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, odd, behind, D, WHICH, BLOCK_M,
        BLOCK_N, BLOCK_K, STAGES, LAYOUT, tail, tail_bufs, quarter, TAIL,
    )  # fmt: skip
    row = gl.arange(0, TAIL, layout=gl.SliceLayout(0, ACROSS))
    there = (row < rest)[None, :] & (f < F)[:, None]
    pitch = gl.cdiv(F, BLOCK_N) * BLOCK_N
    gl.store(tail_ptr + row[None, :] * pitch + f[:, None], tail, mask=there)
    bits = gl.where(there, gl.maximum(tail.to(gl.int32, bitcast=True), 0), 0)
    largest = gl.convert_layout(gl.max(bits.reshape([QUARTER // 8, 8, TAIL]), 1), SMALL)
    f = first + (quarter * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, SMALL))) * apart
    row = gl.arange(0, TAIL, layout=gl.SliceLayout(0, SMALL))
    at = row[None, :] * (pitch // 8) + (f // 8)[:, None]
    gl.store(maxima_ptr + at, largest, mask=(row < rest)[None, :] & (f < F)[:, None])
    return acc, stage, phase


@gluon.jit
def _consume(
    a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, keys_ptr, codes_ptr, told_ptr,
    count_ptr, lists_ptr, bias_ptr, tail_ptr, maxima_ptr, pitch, N, rest, F, D, whole, spread,
    regular, order, GROUP: gl.constexpr, PARTS: gl.constexpr, OTHERS: gl.constexpr,
    SHARES: gl.constexpr, FIRST: gl.constexpr, CELLS: gl.constexpr, CAPACITY: gl.constexpr,
    RECORDS: gl.constexpr, TOGETHER: gl.constexpr, TAIL: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each of a program's tiles: its products; of the sample the keys and the
    rows' thresholds; what passes, to lists."""
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    num_m = gl.cdiv(N, BLOCK_M)
    other, begin, steps, skip = _work_of(N, whole, regular, PARTS, OTHERS, FIRST, BLOCK_M)
    part = gl.where(other < 0, gl.program_id(0) // num_m, 0)
    zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
    behind = behind_from(D, BLOCK_K, LEAD)
    stage = 0
    phase = 0
    slot = 0  # of the tile's bias
    limits = zeros
    cursor = zeros
    cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    quad = (cols // 2 % 4)[None, :]
    # A row's keys, and their codes as far behind: of each first tile of each part, of each cell of
    # the four threads that share the row.
    KEYS: gl.constexpr = FIRST * PARTS * 4 * CELLS
    if other < 0:
        # Other kernels may have put them out of the L2 cache since they were written.
        own_row0 = begin * BLOCK_M + GROUP * HALF
        _fetch(keys_ptr.to(gl.int64) + own_row0 * (KEYS * 4), HALF * KEYS * 4)
        _fetch(told_ptr.to(gl.int64) + own_row0 * 16, HALF * 16)
    # The first row of whose threshold a warp sees to.
    mine = part + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT)) // 16 * PARTS
    further = zeros.to(gl.int64) + (codes_ptr.to(gl.int64) - keys_ptr.to(gl.int64))
    for step in range(0, steps):
        block, turn = _unit_of(other, begin, step, skip, num_m, whole, regular, PARTS, OTHERS)
        share = part
        if OTHERS:
            # The first of the others that comes to this block has a share behind its own programs'.
            others = gl.num_programs(0) - num_m * PARTS
            left = whole + 1 - regular
            before = ((block * left + 1) * others - 1) // gl.maximum(num_m * left, 1)
            share = gl.where(other < 0, part, PARTS + other - before)
        row0 = block * BLOCK_M + GROUP * HALF
        rows = row0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        row_keys = (keys_ptr.to(gl.int64) + rows * (KEYS * 4))[:, None]
        tile = turn * spread % whole
        first, apart = _runs_of(tile, turn, whole, BLOCK_N)
        if TAIL > 0:
            # Two tiles of each turn, others in each of a program's.
            half = (block + 2 * (turn // PARTS)) % num_m
            if half < 2:
                acc, stage, phase = _multiply_both(
                    a_bufs, b_bufs, bias_bufs.index(slot), tail_bufs, full, empty, lead, bias_ptr,
                    tail_ptr, maxima_ptr, stage, phase, step % 2, behind, rest, F, D, first, apart,
                    2 * half + GROUP, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, TAIL,
                )  # fmt: skip
            else:
                acc, _, stage, phase = multiply_tile(
                    a_bufs, b_bufs, bias_bufs.index(slot), full, empty, lead, stage, phase,
                    step % 2, behind, D, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0,
                    a_bufs, 0, 0,
                )  # fmt: skip
        else:
            acc, _, stage, phase = multiply_tile(
                a_bufs, b_bufs, bias_bufs.index(slot), full, empty, lead, stage, phase, step % 2,
                behind, D, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0, a_bufs, 0, 0,
            )  # fmt: skip
        slot = (slot + 1) % STAGES
        bits = acc.to(gl.int32, bitcast=True)
        latent = zeros + (first + cols % 8)[None, :]
        own = row_keys + (quad * 4 + part * (CELLS * 16))
        if (step < FIRST) & (other < 0):
            gl.inline_asm_elementwise(
                name_ptx(CELLS, FIRST > 1), constraints(32, "rrrll"),
                [bits, latent, zeros + apart, own + step * (PARTS * CELLS * 16), further],
                dtype=gl.int8, is_pure=False, pack=128,
            )  # fmt: skip
        if (step == skip) | ((other >= 0) & (turn == regular)):
            limits = gl.inline_asm_elementwise(
                agree_ptx(CELLS, PARTS, FIRST), constraints(128, "rrrrrlllrll"),
                [
                    bits, latent, zeros + apart, zeros + order,
                    # Of rows that are not there nothing passes.
                    zeros + gl.where(rows < N, 0, 0x7FFFFFFF)[:, None],
                    zeros + gl.where(other < 0, own, 0), further,
                    zeros + (told_ptr.to(gl.int64) + rows * 16)[:, None],
                    zeros + gl.where(other < 0, mine, HALF)[:, None],
                    zeros.to(gl.int64) + (keys_ptr.to(gl.int64) + row0 * (KEYS * 4)),
                    zeros.to(gl.int64) + (told_ptr.to(gl.int64) + row0 * 16),
                ],
                dtype=gl.int32, is_pure=False, pack=128,
            )  # fmt: skip
            cursor = gl.inline_asm_elementwise(
                start_ptx(SHARES, CAPACITY, RECORDS), constraints(128, "rrl"),
                [
                    zeros + (rows * pitch * 8)[:, None], zeros + (share * 4 + quad),
                    zeros.to(gl.int64) + lists_ptr.to(gl.int64),
                ],
                dtype=gl.int32, is_pure=False, pack=128,
            )  # fmt: skip
        if step >= skip:
            cursor = gl.inline_asm_elementwise(
                filter_ptx(SHARES, TOGETHER), constraints(128, "rrrrrrl"),
                [
                    bits, limits, cursor, latent, zeros + apart,
                    zeros + gl.where(turn < whole, tile, whole),
                    zeros.to(gl.int64) + lists_ptr.to(gl.int64),
                ],
                dtype=gl.int32, is_pure=False, pack=128,
            )  # fmt: skip
            if (step == steps - 1) | ((other >= 0) & (turn == whole)):
                gl.inline_asm_elementwise(
                    finish_ptx(SHARES, CAPACITY, RECORDS), constraints(32, "rrrl"),
                    [
                        cursor,
                        (rows * (4 * SHARES))[:, None] + (share * 4 + quad),
                        limits,
                        zeros.to(gl.int64) + count_ptr.to(gl.int64),
                    ],
                    dtype=gl.int8, is_pure=False, pack=128,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["rest"])
def filter_kernel(
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, tail_desc, keys_ptr, codes_ptr, told_ptr,
    count_ptr, lists_ptr, bias_ptr, tail_ptr, maxima_ptr, pitch, N, rest, F, D, whole, spread,
    regular, order, PARTS: gl.constexpr, OTHERS: gl.constexpr, SHARES: gl.constexpr,
    FIRST: gl.constexpr, CELLS: gl.constexpr, CAPACITY: gl.constexpr, RECORDS: gl.constexpr,
    TOGETHER: gl.constexpr, TAIL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """Lists of the activations of N rows, whole blocks or the last of all, that reach their rows'
    thresholds; pre-activations of `rest` rows after them, if TAIL."""
    a_bufs, b_bufs, bias_bufs, full, empty, lead = make_ring(
        x_desc, rest_desc, rest_bias_desc, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    tail_bufs = a_bufs
    if TAIL > 0:
        tail_bufs = gl.allocate_shared_memory(
            x_desc.dtype, [STAGES, TAIL, BLOCK_K], tail_desc.layout
        )
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, keys_ptr, codes_ptr,
                told_ptr, count_ptr, lists_ptr, bias_ptr, tail_ptr, maxima_ptr, pitch, N, rest, F,
                D, whole, spread, regular, order, 0, PARTS, OTHERS, SHARES, FIRST, CELLS, CAPACITY,
                RECORDS, TOGETHER, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, keys_ptr, codes_ptr,
                told_ptr, count_ptr, lists_ptr, bias_ptr, tail_ptr, maxima_ptr, pitch, N, rest, F,
                D, whole, spread, regular, order, 1, PARTS, OTHERS, SHARES, FIRST, CELLS, CAPACITY,
                RECORDS, TOGETHER, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
            )),
            (_produce, (
                x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, tail_desc, a_bufs, b_bufs,
                bias_bufs, tail_bufs, full, empty, N, F, D, whole, spread, regular, PARTS, OTHERS,
                FIRST, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip
