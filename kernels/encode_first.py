"""The fused encoder for Hopper: a matmul whose programs agree on thresholds after a first tile.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard), K k.

1. PARTS programs share a block of 128 rows, each of which does every PARTS-th tile of latents. The
   first tile of each (or the first FIRST, where latents are many) is the sample: of the 64 columns
   of it that a thread has of a row, CELLS parts, the largest activations are written for all. A
   row's threshold is a value that the ORDER-th largest of these reaches, such that the k largest
   activations reach it but for one row in 1e8 (`encode_first_plan._order`). The programs wait for
   one another there, once, so that all of a launch have to be on the GPU at the same time (a
   cooperative launch, which cannot begin beside a kernel that holds multiprocessors). Programs on
   multiprocessors that blocks' own leave idle do the last tiles of all blocks, block after block.
2. Each thread appends what reaches the threshold to lists of its own, so nothing is atomic: pairs
   of neighbours, of which one at least does, and for each tile that has any a record of which. That
   is a comparison and a predicated store for each two of its 128 accumulators (rows r and r + 8 of
   the instruction's layout), on the fp32 sums; nothing goes through shared memory.
3. `encode_pick.pick_kernel` finds the exact k of a row's lists.

Tiles are no neighbours, of which all might be large where latents are sorted: a tile takes 8
neighbours out of each 32nd part of the latents, and tiles follow one another in scattered order.

The per-thread code is PTX (encode_first_ptx.py): Triton has no way to say what a thread holds.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .encode_first_plan import FirstPlan
from .encode_first_ptx import agree_ptx, constraints, filter_ptx, finish_ptx, name_ptx, start_ptx
from .encode_hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    LEAD,
    STAGES,
    behind_from,
    descriptor,
    load_tile,
    make_ring,
    multiply_tile,
    reinterpret,
    rows_descriptor,
)
from .encode_pick import pick_kernel
from .encode_zeros import Zeros
from .shapes import cdiv, next_power_of_2


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
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, a_bufs, b_bufs, bias_bufs, full, empty, N,
    F, D, whole, spread, regular, PARTS: gl.constexpr, OTHERS: gl.constexpr,
    FIRST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads a program's tiles for `_consume`."""
    HALF: gl.constexpr = BLOCK_M // 2
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
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2 + BLOCK_N * 4)
                if turn < whole:
                    load_tile(bias_desc, [0, tile * 8], bar, bias_runs.index(slot))
                else:
                    load_tile(rest_bias_desc, [whole * BLOCK_N], bar, bias_bufs.index(slot))
            else:
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            load_tile(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
            load_tile(x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1))
            if turn < whole:
                load_tile(w_desc, [0, tile * 8, d0], bar, runs.index(stage))
            else:
                load_tile(rest_desc, [whole * BLOCK_N, d0], bar, b_bufs.index(stage))
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
def _consume(
    a_bufs, b_bufs, bias_bufs, full, empty, lead, keys_ptr, codes_ptr, told_ptr, count_ptr,
    lists_ptr, pitch, N, F, D, whole, spread, regular, order, GROUP: gl.constexpr,
    PARTS: gl.constexpr, OTHERS: gl.constexpr, SHARES: gl.constexpr, FIRST: gl.constexpr,
    CELLS: gl.constexpr, CAPACITY: gl.constexpr, RECORDS: gl.constexpr, TOGETHER: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LEAD: gl.constexpr,
):  # fmt: skip
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
        acc, _, stage, phase = multiply_tile(
            a_bufs, b_bufs, bias_bufs.index(slot), full, empty, lead, stage, phase, step % 2,
            behind, D, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0, a_bufs, 0, 0,
        )  # fmt: skip
        slot = (slot + 1) % STAGES
        tile = turn * spread % whole
        first, apart = _runs_of(tile, turn, whole, BLOCK_N)
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


@gluon.jit
def _filter_kernel(
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, keys_ptr, codes_ptr, told_ptr, count_ptr,
    lists_ptr, pitch, N, F, D, whole, spread, regular, order, PARTS: gl.constexpr,
    OTHERS: gl.constexpr, SHARES: gl.constexpr, FIRST: gl.constexpr, CELLS: gl.constexpr,
    CAPACITY: gl.constexpr, RECORDS: gl.constexpr, TOGETHER: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, bias_bufs, full, empty, lead = make_ring(
        x_desc, rest_desc, rest_bias_desc, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, keys_ptr, codes_ptr, told_ptr,
                count_ptr, lists_ptr, pitch, N, F, D, whole, spread, regular, order, 0, PARTS,
                OTHERS, SHARES, FIRST, CELLS, CAPACITY, RECORDS, TOGETHER, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES, LEAD,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, keys_ptr, codes_ptr, told_ptr,
                count_ptr, lists_ptr, pitch, N, F, D, whole, spread, regular, order, 1, PARTS,
                OTHERS, SHARES, FIRST, CELLS, CAPACITY, RECORDS, TOGETHER, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES, LEAD,
            )),
            (_produce, (
                x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, a_bufs, b_bufs, bias_bufs,
                full, empty, N, F, D, whole, spread, regular, PARTS, OTHERS, FIRST, BLOCK_M,
                BLOCK_N, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


@lru_cache(maxsize=256)
def _spread(whole: int) -> int:
    """A number prime to `whole` whose first multiples lie evenly in it, however many they are: near
    its golden section."""
    spread = max(1, round(whole * (math.sqrt(5) - 1) / 2))
    while math.gcd(spread, whole) > 1:
        spread += 1
    return spread


_zeros = Zeros()


def _aligned(b_enc: Tensor) -> Tensor:
    """The copy engine reads from multiples of 16 bytes."""
    return b_enc if b_enc.data_ptr() % 16 == 0 else b_enc.clone()


class _Filter:
    """The filter of one call, for its blocks of rows one after another."""

    def __init__(
        self,
        W_enc: Tensor,  # [F, D] bf16 or fp16
        b_enc: Tensor,  # [F] float32
        plan: FirstPlan,
    ) -> None:
        F = W_enc.shape[0]
        self.W_enc, self.b_enc, self.plan = W_enc, _aligned(b_enc), plan
        # Whole tiles; at least one latent is left, so that the runs of a tile are seldom apart by
        # a power of two, as a dictionary's own pattern may be.
        self.whole = (F - 1) // BLOCK_N
        # Keys, and their codes; of each list how many pairs and records it has, and its row's
        # limits, which are written each time unless there are other programs.
        num_keys, num_lists = plan.block_rows * plan.keys_per_row, plan.block_rows * plan.lists(F)
        more = 4 * num_lists if plan.others else 0
        sizes = [2 * num_keys, 4 * plan.block_rows, more]
        self.zeros, self.may_stay = _zeros.take(sum(sizes), W_enc.device)
        keys, self.told, count = self.zeros[: sum(sizes)].split(sizes)
        self.keys = keys.view(2, num_keys)
        if plan.others:
            self.count = count
        else:
            self.count = torch.empty(4 * num_lists, dtype=torch.int32, device=W_enc.device)

    def __call__(
        self,
        x: Tensor,  # [N, D], up to plan.block_rows
        lists: Tensor,  # [N, pitch] int64, filled: lists of pairs, then of records
    ) -> None:
        """Up to OVERSHOOT pairs more than the plan's capacity may be written to a list."""
        N, D = x.shape
        F, plan = self.W_enc.shape[0], self.plan
        runs = self.W_enc[: self.whole * BLOCK_N].view(32, -1, D)
        bias = self.b_enc[: self.whole * BLOCK_N].view(32, -1)
        num_m = cdiv(N, BLOCK_M)
        others = plan.others if num_m * BLOCK_M == plan.block_rows else 0
        regular = plan.regular if others else self.whole + 1
        _filter_kernel[(num_m * plan.parts + others,)](
            descriptor(x, BLOCK_M // 2, BLOCK_K), descriptor(runs, 32, BLOCK_N // 32, BLOCK_K),
            descriptor(self.W_enc, BLOCK_N, BLOCK_K), rows_descriptor(bias, 32, BLOCK_N // 32),
            descriptor(self.b_enc, BLOCK_N), *self.keys, self.told, self.count, lists,
            lists.stride(0), N, F, D, self.whole, _spread(self.whole), regular, plan.order,
            plan.parts, plan.others > 0, plan.shares(F), plan.first, plan.cells, plan.capacity,
            plan.records(F), plan.together, BLOCK_M, BLOCK_N,
            BLOCK_K, STAGES, LEAD, num_warps=4, launch_cooperative_grid=True,
        )  # fmt: skip


def _scratch(rows: int, pitch: int, device: torch.device) -> Tensor:  # [rows, pitch] int64
    """Memory whose addresses have one upper half, which the Hopper filter holds apart: it adds to
    the lower one alone."""
    held = []  # so that another call gets other memory
    while True:
        scratch = torch.empty(rows, pitch, dtype=torch.int64, device=device)
        first = scratch.data_ptr()
        if first >> 32 == (first + scratch.nbytes - 1) >> 32:
            return scratch
        held.append(scratch)


def topk_encode(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    plan: FirstPlan,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The fused path for GPUs of compute capability 9.0, with the sizes of a plan."""
    (N, D), F = x.shape, W_enc.shape[0]
    rows = min(cdiv(N, 128) * 128, plan.block_rows)
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    scratch = _scratch(rows, plan.pitch(F), x.device)
    filter_rows, lists = _Filter(W_enc, b_enc, plan), plan.lists(F)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        filter_rows(part, scratch)
        pick_kernel[(size,)](
            part, W_enc, b_enc, filter_rows.count, scratch, scratch.stride(0), *filter_rows.keys,
            filter_rows.told, values[start:], indices[start:], F, D, k, filter_rows.whole,
            cdiv(size, BLOCK_M) * BLOCK_M, lists, plan.capacity, plan.records(F), plan.held,
            plan.size, plan.keys, next_power_of_2(k), min(32, plan.keys // 2), 64,
            plan.keys_per_row, next_power_of_2(plan.keys_per_row), next_power_of_2(lists),
            plan.others > 0, plan.warps, num_warps=plan.warps,
            maxnreg=128 if plan.warps == 1 else 64,
        )  # fmt: skip
    _zeros.give(filter_rows.zeros, filter_rows.may_stay)
    return values, indices
