"""The matmul of the encoder's kernels for Hopper: a warp feeds two warpgroups that go apart.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard).

One warp loads tiles with the copy engine into a ring of stages; each of two warpgroups multiplies
64 of the tile's 128 rows from the same stages. They wait for the ring, not for one another, so one
looks through its finished accumulators while the other keeps the tensor cores busy.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 gave them new names.
load_tile = getattr(tma, "asyncload_tile", None) or tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
# 8 stages of 32 columns were slower, a LEAD of 1 or 2 by 1% (docs/notes/encoder.md). With one of
# all STAGES group 0 would wait for a stage that group 1, which waits for it, has not given back;
# with two less than that it could be two tiles ahead, whose barrier tells but odd from even.
STAGES, LEAD = 4, 3


@gluon.jit
def produce(
    x_desc, w_desc, bias_desc, tail_desc, a_bufs, b_bufs, bias_bufs, tail_bufs, full, empty, N, F,
    D, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The warp that loads: x's, W_enc's and the bias's parts of each tile. Blocks of rows of one
    part of the latents follow one another, so that its weights come from the L2 cache. With TAIL
    the rows after the last whole block, up to that many, come with every tile."""
    num_m = gl.cdiv(N, BLOCK_M) if TAIL == 0 else N // BLOCK_M
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N + TAIL) * BLOCK_K * 2
    HALF: gl.constexpr = BLOCK_M // 2
    stage = 0
    phase = 1
    tile = 0
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        m0 = (unit % num_m) * BLOCK_M
        for f0 in range(unit // num_m * BLOCK_N, F, PARTS * BLOCK_N):
            for d0 in range(0, D, BLOCK_K):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                if d0 == 0:
                    mbarrier.expect(bar, BYTES + BLOCK_N * 4)
                    bias_buf = bias_bufs.index(tile % STAGES)
                    load_tile(bias_desc, [f0], bar, bias_buf)
                else:
                    mbarrier.expect(bar, BYTES)
                load_tile(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
                load_tile(x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1))
                load_tile(w_desc, [f0, d0], bar, b_bufs.index(stage))
                if TAIL > 0:
                    load_tile(tail_desc, [num_m * BLOCK_M, d0], bar, tail_bufs.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            tile += 1


@gluon.jit
def behind_from(D, BLOCK_K: gl.constexpr, LEAD: gl.constexpr):
    """Column from which on group 1 stays behind: a tile's last LEAD stages; none of shorter tiles,
    of which group 0 could be two ahead."""
    stages = gl.cdiv(D, BLOCK_K)
    return gl.where(stages > LEAD, (stages - LEAD) * BLOCK_K, -1)


@gluon.jit
def multiply_tile(
    a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, odd, behind, D,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr, tail, tail_bufs, quarter, TAIL: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a tile's rows, bias included, and the ring's stage and phase after it.
    Group 1 stays behind at the tile's end, from column `behind` on, until group 0 has all of its
    instructions on their way; `odd` is 1 at every second of a program's tiles.

    With TAIL `tail` [BLOCK_N / 4, TAIL] gains the products of a quarter of the tile's latents with
    the rows of `tail_bufs`.
    """
    HALF: gl.constexpr = BLOCK_M // 2
    gl.assume(D > 0)
    # The bias came with the tile's first stage.
    mbarrier.wait(full.index(stage), phase)
    bias = bias_buf.load(gl.SliceLayout(0, LAYOUT))
    # + 0: a pre-activation of -0 would have a negative number's bits.
    acc = gl.zeros([HALF, BLOCK_N], gl.float32, layout=LAYOUT) + bias[None, :]
    for d0 in range(0, D, BLOCK_K):
        if GROUP == 1:
            mbarrier.wait(lead.index(0), odd, pred=d0 == behind)
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            a_bufs.index(2 * stage + GROUP), b_bufs.index(stage).permute((1, 0)), acc,
            is_async=True,
        )  # fmt: skip
        if TAIL > 0:
            quarters = reinterpret(
                b_bufs, b_bufs.dtype, [4 * STAGES, BLOCK_N // 4, BLOCK_K], b_bufs.layout
            )
            tail = warpgroup_mma(
                quarters.index(4 * stage + quarter), tail_bufs.index(stage).permute((1, 0)), tail,
                is_async=True,
            )  # fmt: skip
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # The instructions of the step before are done with their stage.
        before = (stage + STAGES - 1) % STAGES
        mbarrier.arrive(empty.index(before), count=1, pred=d0 > 0)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if GROUP == 0:
        mbarrier.arrive(lead.index(0), count=1)
    if TAIL > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    return acc, tail, stage, phase


@gluon.jit
def make_ring(
    x_desc, w_desc, bias_desc, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory of STAGES tiles' parts, and the barriers that hand them on."""
    HALF: gl.constexpr = BLOCK_M // 2
    a_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, BLOCK_K], x_desc.layout)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    # One a stage: a tile has at least one step, so none is overwritten before it is read.
    bias_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], bias_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(lead.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return a_bufs, b_bufs, bias_bufs, full, empty, lead


@lru_cache(maxsize=32)
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), kinds[dtype])


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """What the copy engine asks for of a tensor that is read in blocks of this shape."""
    return TensorDescriptor.from_tensor(t, list(block), _layout(block, t.dtype))


def rows_descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """`descriptor` of a float32 tensor whose blocks' rows follow one another in shared memory."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(block))
    return TensorDescriptor.from_tensor(t, list(block), layout)
