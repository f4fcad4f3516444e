"""The encoder for few tokens on Hopper GPUs: one matmul whose epilogue writes the pre-activations
and the largest of each 32 neighbours, then a selection that reads those and the best groups alone.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

The matmul is encode_hopper.py's: a warp feeds two warpgroups of 64 rows each. It is for as many
tokens as their pre-activations take 50 MiB, which mostly stay in the L2 cache; the fused encoder's
sample, thresholds and lists cost more there than writing does.
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
    descriptor,
    make_ring,
    multiply_tile,
    produce,
)
from .encode_plan import GROUP, group_sizes
from .shapes import cdiv, num_programs


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
def _consume(
    a_bufs, b_bufs, bias_bufs, full, empty, lead, out_ptr, maxima_ptr, N, D,
    WHICH: gl.constexpr, TILES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each tile, the first or the second."""
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PITCH: gl.constexpr = TILES * BLOCK_N
    num_m = gl.cdiv(N, BLOCK_M)
    zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
    # As in encode_hopper.py.
    ahead = gl.minimum(BLOCK_K * LEAD, (gl.cdiv(D, BLOCK_K) - 1) * BLOCK_K)
    starts = True
    stage = 0
    phase = 0
    slot = 0  # of the tile's bias
    for unit in range(gl.program_id(0), num_m * TILES, gl.num_programs(0)):
        m0 = (unit % num_m) * BLOCK_M + WHICH * HALF
        f0 = unit // num_m * BLOCK_N
        if m0 < N:
            acc, stage, phase = multiply_tile(
                a_bufs, b_bufs, bias_bufs.index(slot), full, empty, lead, stage, phase, starts,
                ahead, D, WHICH, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT,
            )  # fmt: skip
            starts = False
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


@gluon.jit
def _tiles_kernel(
    x_desc, w_desc, bias_desc, out_ptr, maxima_ptr, N, F, D,
    TILES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LEAD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of the pre-activations [N, TILES * BLOCK_N] and of their groups' maxima."""
    a_bufs, b_bufs, bias_bufs, full, empty, lead = make_ring(
        x_desc, w_desc, bias_desc, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, out_ptr, maxima_ptr, N, D, 0, TILES,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD, GROUP,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, out_ptr, maxima_ptr, N, D, 1, TILES,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD, GROUP,
            )),
            (produce, (
                x_desc, w_desc, bias_desc, a_bufs, b_bufs, bias_bufs, full, empty, N, F, D, TILES,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
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
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` for shapes that `encode_plan.tiles_fit` takes, on GPUs of compute
    capability 9.0."""
    (N, D), F = x.shape, W_enc.shape[0]
    tiles = cdiv(F, BLOCK_N)
    pre = torch.empty(N, tiles * BLOCK_N, dtype=torch.float32, device=x.device)
    maxima = torch.empty(N, tiles * BLOCK_N // GROUP, dtype=torch.int32, device=x.device)
    _tiles_kernel[(min(num_programs(x.device), cdiv(N, BLOCK_M) * tiles),)](
        descriptor(x, BLOCK_M // 2, BLOCK_K), descriptor(W_enc, BLOCK_N, BLOCK_K),
        descriptor(b_enc, BLOCK_N), pre, maxima, N, F, D, tiles, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        LEAD, GROUP, num_warps=4,
    )  # fmt: skip
    sizes = group_sizes(F, k, GROUP)
    assert sizes is not None
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    encode_rows.select_groups(pre, maxima, F, sizes, values, indices)
    return values, indices
