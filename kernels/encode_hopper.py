"""The encoder's matmul for Hopper: one warp feeds two warpgroups, which write what they multiply,
or filter it.

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

from .encode_epilogue import CELL_LAYOUT, PAIR_LAYOUT, ROOM, append_tile, write_tile
from .encode_plan import BLOCK_M, BLOCK_N, Plan, spread
from .shapes import cdiv, num_programs

# Triton 3.9 gave them new names.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

_ROW_BYTES = 128  # of a stage
# Stages that group 1 stays behind group 0 at each tile's end, so that one filters while the other
# multiplies. With one of all STAGES group 0 would wait for a stage that group 1, which waits for
# it, has not given back; with two less than that it could be two tiles ahead, whose barrier tells
# but odd from even.
STAGES, LEAD = 4, 3
_DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}  # fmt: skip


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's stage and phase after this one."""
    stage += 1
    return gl.where(stage == STAGES, 0, stage), gl.where(stage == STAGES, phase ^ 1, phase)


@gluon.jit
def _produce(
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, scale_desc, rest_scale_desc, a_bufs,
    b_bufs, bias_bufs, scale_bufs, full, empty, N, D, whole, spread, begin, end,
    PARTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: x's, W_enc's and the bias's parts of each tile. Blocks of rows of one
    part of the latents follow one another, so that its weights come from the L2 cache."""
    HALF: gl.constexpr = BLOCK_M // 2
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * (x_desc.dtype.primitive_bitwidth // 8)
    num_m = gl.cdiv(N, BLOCK_M)
    run_bufs = _reinterpret(b_bufs, b_bufs.dtype, [STAGES, BLOCK_N // 8, 8, BLOCK_K], w_desc.layout)
    bias_runs = _reinterpret(bias_bufs, gl.float32, [STAGES, BLOCK_N // 8, 8], bias_desc.layout)
    scale_runs = _reinterpret(scale_bufs, gl.float32, [STAGES, BLOCK_N // 8, 8], bias_desc.layout)
    VECTORS: gl.constexpr = BLOCK_N * (4 if scale_desc is None else 8)
    stage = 0
    phase = 1
    slot = 0
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        m0 = unit % num_m * BLOCK_M
        for position in range(begin + unit // num_m, end, PARTS):
            first = position * spread % whole * 8
            for d0 in range(0, D, BLOCK_K):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                if d0 == 0:
                    mbarrier.expect(bar, BYTES + VECTORS)
                    if position < whole:
                        load_tile(bias_desc, [0, first], bar, bias_runs.index(slot))
                    else:
                        load_tile(rest_bias_desc, [whole * BLOCK_N], bar, bias_bufs.index(slot))
                    if scale_desc is not None:
                        if position < whole:
                            load_tile(scale_desc, [0, first], bar, scale_runs.index(slot))
                        else:
                            at = [whole * BLOCK_N]
                            load_tile(rest_scale_desc, at, bar, scale_bufs.index(slot))
                else:
                    mbarrier.expect(bar, BYTES)
                load_tile(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
                load_tile(x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1))
                if position < whole:
                    load_tile(w_desc, [0, first, d0], bar, run_bufs.index(stage))
                else:
                    load_tile(rest_desc, [whole * BLOCK_N, d0], bar, b_bufs.index(stage))
                stage, phase = _next(stage, phase, STAGES)
            slot = (slot + 1) % STAGES


@gluon.jit
def _multiply(
    a_bufs, b_bufs, bias_buf, scale_buf, full, empty, lead, inverse, stage, phase, odd, D,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LEAD: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a tile's rows, bias included, and the ring's stage and phase after it.
    Group 1 stays behind at the tile's end until group 0 has all of its instructions on their way;
    `odd` is 1 at every second of a program's tiles."""
    gl.assume(D > 0)
    stages = gl.cdiv(D, BLOCK_K)
    # Of shorter tiles group 0 could be two ahead.
    behind = gl.where(stages > LEAD, (stages - LEAD) * BLOCK_K, -1)
    # The bias came with the tile's first stage.
    mbarrier.wait(full.index(stage), phase)
    bias = bias_buf.load(gl.SliceLayout(0, LAYOUT))
    # + 0: a pre-activation of -0 would have a negative number's bits.
    acc = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, layout=LAYOUT)
    if inverse is None:
        acc += bias[None, :]
    else:
        acc += bias[None, :] * inverse[:, None]
    for d0 in range(0, D, BLOCK_K):
        if GROUP == 1:
            mbarrier.wait(lead.index(0), odd, pred=d0 == behind)
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            a_bufs.index(2 * stage + GROUP), b_bufs.index(stage).permute((1, 0)), acc,
            is_async=True,
        )  # fmt: skip
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # The instructions of the step before are done with their stage.
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=d0 > 0)
        stage, phase = _next(stage, phase, STAGES)
    if GROUP == 0:
        mbarrier.arrive(lead.index(0), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if inverse is not None:
        # Before the stage is given back, with which the next scales may come.
        acc *= scale_buf.load(gl.SliceLayout(0, LAYOUT))[None, :]
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    return acc, stage, phase


@gluon.jit
def _consume(
    a_bufs, b_bufs, bias_bufs, scale_bufs, full, empty, lead, limit_ptr, out_ptr, count_ptr,
    inverse_ptr, pitch, capacity, N, D, whole, spread, begin, end,
    GROUP: gl.constexpr, PARTS: gl.constexpr, WRITE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each of a program's tiles; scaled as the portable filter's."""
    HALF: gl.constexpr = BLOCK_M // 2
    STEP: gl.constexpr = 256 // a_bufs.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, STEP])
    LISTS: gl.constexpr = 4 * PARTS
    num_m = gl.cdiv(N, BLOCK_M)
    quad = gl.arange(0, 4, layout=gl.SliceLayout(0, PAIR_LAYOUT))[None, :]
    stage = 0
    phase = 0
    slot = 0  # of the tile's bias
    odd = 0
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        part = unit // num_m
        row = unit % num_m * BLOCK_M + GROUP * HALF
        row += gl.arange(0, HALF, layout=gl.SliceLayout(1, PAIR_LAYOUT))[:, None]
        there = row < N
        inverse = None
        if inverse_ptr is not None:
            own = unit % num_m * BLOCK_M + GROUP * HALF
            own += gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
            inverse = gl.load(inverse_ptr + own, mask=own < N, other=1.0)
        if WRITE:
            pairs = out_ptr.to(gl.pointer_type(gl.int64), bitcast=True)
            at = row * (pitch // 2) + quad
            cell_row = unit % num_m * BLOCK_M + GROUP * HALF
            cell_row += gl.arange(0, HALF, layout=gl.SliceLayout(1, CELL_LAYOUT))[:, None]
            two = gl.arange(0, 2, layout=gl.SliceLayout(0, CELL_LAYOUT))[None, :]
            cell_at = cell_row * pitch + (end - begin) * BLOCK_N + two
        else:
            limit = gl.load(limit_ptr + row, mask=there, other=0x7FFFFFFF)
            zeros = gl.zeros([HALF, 4], gl.int32, layout=PAIR_LAYOUT)
            start = out_ptr + row * pitch + 3 * (part * 4 + quad) + zeros
            brim = (start + 3 * LISTS * (capacity - ROOM)).to(gl.int64)
            entry = start
            bound = limit + zeros
        for position in range(begin + part, end, PARTS):
            acc, stage, phase = _multiply(
                a_bufs, b_bufs, bias_bufs.index(slot), scale_bufs.index(slot), full, empty, lead,
                inverse, stage, phase, odd, D, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
                LAYOUT,
            )  # fmt: skip
            slot = (slot + 1) % STAGES
            odd ^= 1
            if WRITE:
                turn = position - begin
                write_tile(
                    acc, pairs, out_ptr, at + turn * (BLOCK_N // 2),
                    cell_at + turn * (BLOCK_N // 4), there, 0,
                )  # fmt: skip
            else:
                tile = position * spread % whole
                apart = gl.where(position < whole, whole * 8, 8)
                first = gl.where(position < whole, tile * 8, whole * BLOCK_N)
                latent = first + 2 * quad + zeros
                entry, bound = append_tile(acc, entry, brim, bound, latent, apart, 0, LISTS)
        if not WRITE:
            length = (entry.to(gl.int64) - start.to(gl.int64)).to(gl.int32) // (12 * LISTS)
            # Of some rows nothing is to pass from the start.
            length = gl.where((bound == 0x7FFFFFFF) & (limit != bound), capacity + 1, length)
            gl.store(count_ptr + row * LISTS + part * 4 + quad, length, mask=there & (quad >= 0))


@gluon.jit(do_not_specialize=["capacity", "spread", "begin", "end"])
def hopper_kernel(
    x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, scale_desc, rest_scale_desc, limit_ptr,
    out_ptr, count_ptr, inverse_ptr, pitch, capacity, N, D, whole, spread, begin, end,
    PARTS: gl.constexpr, WRITE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """Tiles of the positions from `begin` to `end`: their pre-activations (WRITE), or lists of
    those that pass their rows' limits."""
    HALF: gl.constexpr = BLOCK_M // 2
    a_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, BLOCK_K], x_desc.layout)
    b_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], rest_desc.layout)
    # One a stage: a tile has at least one step, so none is overwritten before it is read.
    bias_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], rest_bias_desc.layout)
    scale_bufs = bias_bufs
    if scale_desc is not None:
        scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], rest_bias_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(lead.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, scale_bufs, full, empty, lead, limit_ptr, out_ptr,
                count_ptr, inverse_ptr, pitch, capacity, N, D, whole, spread, begin,
                end, 0, PARTS, WRITE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, scale_bufs, full, empty, lead, limit_ptr, out_ptr,
                count_ptr, inverse_ptr, pitch, capacity, N, D, whole, spread, begin,
                end, 1, PARTS, WRITE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
            )),
            (_produce, (
                x_desc, w_desc, rest_desc, bias_desc, rest_bias_desc, scale_desc, rest_scale_desc,
                a_bufs, b_bufs, bias_bufs, scale_bufs, full, empty, N, D, whole, spread, begin, end,
                PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


@lru_cache(maxsize=32)
def _layout(block: tuple[int, ...], dtype: torch.dtype, swizzle: bool) -> gl.NVMMASharedLayout:
    if swizzle:
        return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(block))


def descriptor(t: Tensor, *block: int, swizzle: bool = True) -> TensorDescriptor:
    """What the copy engine asks for of a tensor that is read in blocks of this shape."""
    return TensorDescriptor.from_tensor(t, list(block), _layout(block, t.dtype, swizzle))


class HopperFilter:
    """The matmul of one call, for its blocks of rows one after another. See
    `encode_filter.PlainFilter`."""

    def __init__(
        self,
        W_enc: Tensor,  # [F, D] bf16, fp16 or e4m3
        b_enc: Tensor,  # [F] float32
        plan: Plan,
        scale: Tensor | None = None,  # [F] float32: see encode_fp8.py
    ) -> None:
        F, D = W_enc.shape
        self.inverse: Tensor | None = None  # [N] float32, where there is a scale
        self.block_k = block_k = _ROW_BYTES // W_enc.element_size()
        whole = plan.whole * BLOCK_N
        self.plan, self.F, self.D = plan, F, D
        vectors: list[TensorDescriptor | None] = [None] * 4
        for i, vector in enumerate((b_enc,) if scale is None else (b_enc, scale)):
            runs = vector[:whole].view(BLOCK_N // 8, -1)
            vectors[2 * i] = descriptor(runs, BLOCK_N // 8, 8, swizzle=False)
            vectors[2 * i + 1] = descriptor(vector, BLOCK_N)
        self.weights = (
            descriptor(W_enc[:whole].view(BLOCK_N // 8, -1, D), BLOCK_N // 8, 8, block_k),
            descriptor(W_enc, BLOCK_N, block_k),
            *vectors,
        )

    def write(self, x: Tensor, scratch: Tensor) -> None:
        """See `PlainFilter`."""
        self._launch(x, scratch, scratch, scratch, 0, self.plan.sample, write=True)

    def filter(self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor) -> None:
        """See `PlainFilter`."""
        end = self.plan.positions(self.F)
        self._launch(x, limit, scratch, count, self.plan.sample, end, write=False)

    def _launch(
        self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor, begin: int, end: int, *,
        write: bool,
    ) -> None:  # fmt: skip
        N, plan = x.shape[0], self.plan
        parts = plan.sample if write else plan.parts
        programs = min(num_programs(x.device), cdiv(N, BLOCK_M) * parts)
        hopper_kernel[(programs,)](
            descriptor(x, BLOCK_M // 2, self.block_k), *self.weights, limit, scratch, count,
            self.inverse, scratch.stride(0), plan.capacity, N, self.D, plan.whole,
            spread(plan.whole), begin, end, parts, write, BLOCK_M, BLOCK_N, self.block_k, STAGES,
            LEAD, num_warps=4,
        )  # fmt: skip
