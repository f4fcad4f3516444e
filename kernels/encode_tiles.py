"""The encoder for few tokens on Hopper GPUs: one matmul whose epilogue writes the pre-activations
and the largest of each 32 neighbours, then a selection that reads those and the best groups alone.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

The matmul is encode_hopper.py's: a warp feeds two warpgroups of 64 rows each. Few tokens after the
last whole block of 128 are no block of their own: for each tile of latents two programs multiply
them beside their own rows, a half of the latents each, with the weights that they hold for these
anyway. There the latents are the instruction's rows, of which it takes no fewer than 64, and the
tokens its columns, of which it takes as few as 8. The design is for as many
tokens as their pre-activations and keys take 63 MiB, which mostly stay in the L2 cache. For two
blocks of tokens at most it is taken first: there the fused encoder's thresholds and lists cost more
than writing does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import encode_rows
from .encode_hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    LEAD,
    STAGES,
    behind_from,
    descriptor,
    make_ring,
    multiply_tile,
    produce,
)
from .encode_pick import pick_groups_kernel
from .encode_plan import (
    GROUP,
    MAX_GROUPS,
    group_sizes,
    groups_room,
    most_keys,
    sort_size,
    tail_rows,
)
from .shapes import cdiv, next_power_of_2, num_programs


@constexpr_function
def _write_ptx() -> str:
    """PTX of 32 unused outputs and 5 operands of 128 registers each: a thread's accumulators of
    rows r and r + 8; the offset in bytes of its first column in either row of the pre-activations,
    negative where there is no such row; that of the row's first group in the maxima; addresses of
    both.

    A group's 32 columns are 8 of each of four neighbouring threads; thread t of them writes the
    largest of the groups 2 t and 2 t + 1.
    """
    acc, row, group, out, maxima = (32 + 128 * i for i in range(5))
    lines = [
        ".reg .pred p, q;", ".reg .b64 a, o;", ".reg .b32 lane, m, t, first, second;",
        "mov.u32 lane, %laneid;", "and.b32 lane, lane, 3;",
    ]  # fmt: skip
    for half in (0, 2):
        lines += [f"setp.ge.s32 p, ${row + half}, 0;"]
        lines += [f"cvt.u64.u32 o, ${row + half};", f"add.u64 a, ${out}, o;"]
        for j in range(32):
            at = acc + 4 * j + half
            lines += [f"@p st.global.v2.b32 [a + {32 * j}], {{${at}, ${at + 1}}};"]
        lines += ["mov.b32 first, 0;", "mov.b32 second, 0;"]
        for g in range(8):
            lines += ["mov.b32 m, 0;"]
            for j in range(4 * g, 4 * g + 4):
                at = acc + 4 * j + half
                lines += [f"max.s32 m, m, ${at};", f"max.s32 m, m, ${at + 1};"]
            for lanes in (1, 2):
                lines += [f"shfl.sync.bfly.b32 t, m, {lanes}, 31, -1;", "max.s32 m, m, t;"]
            mine = "second" if g % 2 else "first"
            lines += [f"setp.eq.u32 q, lane, {g // 2};", f"selp.b32 {mine}, m, {mine}, q;"]
        lines += [
            f"cvt.u64.u32 o, ${group + half};", f"add.u64 a, ${maxima}, o;",
            "cvt.u64.u32 o, lane;", "shl.b64 o, o, 3;", "add.u64 a, a, o;",
            "@p st.global.v2.b32 [a], {first, second};",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _constraints() -> str:
    return ",".join(["=&r"] * 32 + [c for c in "rrrll" for _ in range(128)])


@gluon.jit
def _tail_half(unit, num_m):
    """Which half of its latents a tile multiplies with the tail's rows, too: 0, 1, or neither."""
    # Two tiles of each block of latents, others in each round of the programs, so that a program
    # that keeps to one block of rows is not always the one.
    turn = 2 * (unit // num_m * num_m // gl.num_programs(0))
    return (unit + turn) % num_m


@gluon.jit
def _multiply_both(
    a_bufs, b_bufs, bias_buf, tail_bufs, full, empty, lead, bias_ptr, out_ptr, maxima_ptr, stage,
    phase, odd, behind, N, F, D, f0, quarter, WHICH: gl.constexpr, TILES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, LAYOUT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """`multiply_tile`, and a quarter of its latents by the tail's rows, which is written here."""
    QUARTER: gl.constexpr = BLOCK_N // 4
    PITCH: gl.constexpr = TILES * BLOCK_N
    ACROSS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    SMALL: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [1, 4], [1, 0])
    f = f0 + quarter * QUARTER + gl.arange(0, QUARTER, layout=gl.SliceLayout(1, ACROSS))
    bias = gl.load(bias_ptr + f, mask=f < F, other=0.0)
    tail = gl.zeros([QUARTER, TAIL], gl.float32, layout=ACROSS) + bias[:, None]
    acc, tail, stage, phase = multiply_tile(
        a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, odd, behind, D, WHICH, BLOCK_M,
        BLOCK_N, BLOCK_K, STAGES, LAYOUT, tail, tail_bufs, quarter, TAIL,
    )  # fmt: skip
    m0 = N // BLOCK_M * BLOCK_M
    row = m0 + gl.arange(0, TAIL, layout=gl.SliceLayout(0, ACROSS))
    gl.store(out_ptr + row[None, :] * PITCH + f[:, None], tail, mask=(row < N)[None, :])
    bits = gl.maximum(tail.to(gl.int32, bitcast=True), 0)
    largest = gl.max(bits.reshape([QUARTER // GROUP, GROUP, TAIL]), 1)
    largest = gl.convert_layout(largest, SMALL)
    row = m0 + gl.arange(0, TAIL, layout=gl.SliceLayout(0, SMALL))
    group = f0 // GROUP + quarter * (QUARTER // GROUP)
    group += gl.arange(0, QUARTER // GROUP, layout=gl.SliceLayout(1, SMALL))
    at = row[None, :] * (PITCH // GROUP) + group[:, None]
    gl.store(maxima_ptr + at, largest, mask=(row < N)[None, :])
    return acc, stage, phase


@gluon.jit
def _consume(
    a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, bias_ptr, out_ptr, maxima_ptr, N, F, D,
    WHICH: gl.constexpr, TILES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr, GROUP: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each tile, the first or the second."""
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PITCH: gl.constexpr = TILES * BLOCK_N
    num_m = gl.cdiv(N, BLOCK_M) if TAIL == 0 else N // BLOCK_M
    zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
    behind = behind_from(D, BLOCK_K, LEAD)
    odd = 0
    stage = 0
    phase = 0
    slot = 0  # of the tile's bias
    for unit in range(gl.program_id(0), num_m * TILES, gl.num_programs(0)):
        m0 = (unit % num_m) * BLOCK_M + WHICH * HALF
        f0 = unit // num_m * BLOCK_N
        if m0 < N:
            bias_buf = bias_bufs.index(slot)
            if TAIL > 0:
                half = _tail_half(unit, num_m)
                if half < 2:
                    acc, stage, phase = _multiply_both(
                        a_bufs, b_bufs, bias_buf, tail_bufs, full, empty, lead, bias_ptr, out_ptr,
                        maxima_ptr, stage, phase, odd, behind, N, F, D, f0, 2 * half + WHICH,
                        WHICH, TILES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, LAYOUT, TAIL,
                    )  # fmt: skip
                else:
                    acc, _, stage, phase = multiply_tile(
                        a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, odd, behind, D,
                        WHICH, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0, a_bufs, 0, 0,
                    )  # fmt: skip
            else:
                acc, _, stage, phase = multiply_tile(
                    a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, odd, behind, D,
                    WHICH, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0, a_bufs, 0, 0,
                )  # fmt: skip
            rows = m0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
            cols = f0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
            row = gl.where(rows < N, rows * PITCH * 4, -0x80000000)
            gl.inline_asm_elementwise(
                _write_ptx(), _constraints(),
                [
                    acc.to(gl.int32, bitcast=True),
                    row[:, None] + (cols * 4)[None, :],
                    zeros + (rows * (PITCH // GROUP * 4) + f0 // GROUP * 4)[:, None],
                    zeros.to(gl.int64) + out_ptr.to(gl.int64),
                    zeros.to(gl.int64) + maxima_ptr.to(gl.int64),
                ],
                dtype=gl.int8, is_pure=False, pack=128,
            )  # fmt: skip
        else:
            # Rows that do not exist: the stages go back unread.
            for _ in range(0, D, BLOCK_K):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        slot = (slot + 1) % STAGES
        odd ^= 1


@gluon.jit
def _tiles_kernel(
    x_desc, w_desc, bias_desc, tail_desc, bias_ptr, out_ptr, maxima_ptr, N, F, D,
    TILES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LEAD: gl.constexpr, GROUP: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Tiles of the pre-activations [N, TILES * BLOCK_N] and of their groups' maxima."""
    a_bufs, b_bufs, bias_bufs, full, empty, lead = make_ring(
        x_desc, w_desc, bias_desc, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    if TAIL > 0:
        tail_bufs = gl.allocate_shared_memory(
            x_desc.dtype, [STAGES, TAIL, BLOCK_K], tail_desc.layout
        )
    else:
        tail_bufs = a_bufs
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, bias_ptr, out_ptr,
                maxima_ptr, N, F, D, 0, TILES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD, GROUP, TAIL,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, lead, bias_ptr, out_ptr,
                maxima_ptr, N, F, D, 1, TILES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD, GROUP, TAIL,
            )),
            (produce, (
                x_desc, w_desc, bias_desc, tail_desc, a_bufs, b_bufs, bias_bufs, tail_bufs, full,
                empty, N, F, D, TILES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TAIL,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def topk_encode(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    tail: int | None = None,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` for shapes that `encode_plan.tiles_fit` takes, on GPUs of compute
    capability 9.0. `tail` is `encode_plan.tail_rows`' unless given: 0, or room for the tokens after
    the last whole block, 16 or 32."""
    (N, D), F = x.shape, W_enc.shape[0]
    tiles = cdiv(F, BLOCK_N)
    pre = torch.empty(N, tiles * BLOCK_N, dtype=torch.float32, device=x.device)
    maxima = torch.empty(N, tiles * BLOCK_N // GROUP, dtype=torch.int32, device=x.device)
    programs = num_programs(x.device)
    tail = tail_rows(N, F, programs) if tail is None else tail
    _tiles_kernel[(min(programs, tiles * (N // BLOCK_M if tail else cdiv(N, BLOCK_M))),)](
        descriptor(x, BLOCK_M // 2, BLOCK_K), descriptor(W_enc, BLOCK_N, BLOCK_K),
        descriptor(b_enc, BLOCK_N), descriptor(x, tail or BLOCK_M // 2, BLOCK_K), b_enc, pre,
        maxima, N, F, D, tiles, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD, GROUP, tail, num_warps=4,
    )  # fmt: skip
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    # Few rows are a warp or two a multiprocessor, which wait most of the time.
    if cdiv(F, GROUP) > MAX_GROUPS or N <= 256:
        sizes = group_sizes(F, k, GROUP)
        assert sizes is not None
        encode_rows.select_groups(pre, maxima, F, sizes, values, indices)
        return values, indices
    warps = 2 if k > 32 else 1  # which sort 32 keys each at least
    room, num_keys = groups_room(k, warps), most_keys(k)
    keys = torch.empty(N, num_keys, dtype=torch.int64, device=x.device)
    pick_groups_kernel[(N,)](
        pre, maxima, pre.stride(0), keys, values, indices, F, k, cdiv(F, GROUP), maxima.stride(0),
        room, sort_size(k), num_keys, next_power_of_2(k), warps, num_warps=warps,
    )  # fmt: skip
    return values, indices
