"""The encoder's matmul and filter for Hopper: a warp feeds two warpgroups that filter apart.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard).

One warp loads tiles with the copy engine into a ring of stages; each of two warpgroups multiplies
64 of the tile's 128 rows from the same stages. They wait for the ring, not for one another, so one
filters its finished accumulators while the other keeps the tensor cores busy.

A program keeps to one block of rows and every PARTS-th tile of latents, and each of its threads
appends to lists of its own, so nothing is atomic and nothing waits. The filter is PTX over a
thread's 128 accumulators (rows r and r + 8 of the instruction's layout): a comparison and a
predicated store each; nothing goes through shared memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton import constexpr_function
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
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
# A lead of 1 or 3 stages was no faster; 8 stages of 32 columns were slower (docs/performance.md).
STAGES, LEAD = 4, 2


@constexpr_function
def _start_ptx(parts: int, capacity: int) -> str:
    """PTX of 128 outputs and 2 operands for each of a thread's 128 accumulators: a cursor; byte
    offset of the list's first entry, address of the lists.

    Of a cursor elements 0 and 2 say where the next entry of rows r and r + 8 goes (the lower half
    of its address), elements 1 and 3 where a list is full; the others are never read nor written.
    """
    lines = [".reg .b32 low, high;", "mov.b64 {low, high}, $256;"]
    for half in (0, 1):
        lines += [
            f"add.u32 ${2 * half}, ${128 + 2 * half}, low;",
            f"add.u32 ${2 * half + 1}, ${2 * half}, {(capacity + 1) * 4 * parts * 8};",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _filter_ptx(parts: int) -> str:
    """PTX of 128 outputs and 5 operands as above: the new cursor; bits, limit, cursor, latent,
    address of the lists.

    The upper half of an address never changes (`encode_topk._scratch` sees to it), and a cursor is
    held back after each 8 accumulators of a row instead of each, so that up to OVERSHOOT entries
    fall behind a full list.
    """
    each = ["bits", "limit", "cursor", "latent", "lists"]
    first = {name: 128 + i * 128 for i, name in enumerate(each)}
    lines = [".reg .pred p;", ".reg .b32 f, low, high, c0, c1;", ".reg .b64 a;"]
    lines += [f"mov.b64 {{low, high}}, ${first['lists']};"]
    lines += [f"mov.b32 c{half}, ${first['cursor'] + 2 * half};" for half in (0, 1)]
    for pair in range(64):
        lines += [f"add.s32 f, ${first['latent']}, {(pair & 1) + 8 * (pair >> 1)};"]
        for half in (0, 1):
            bits = first["bits"] + 4 * (pair >> 1) + 2 * half + (pair & 1)
            lines += [
                f"setp.gt.s32 p, ${bits}, ${first['limit'] + 2 * half};",
                f"mov.b64 a, {{c{half}, high}};",
                f"@p st.global.v2.b32 [a], {{f, ${bits}}};",
                f"@p add.u32 c{half}, c{half}, {4 * parts * 8};",
            ]
            if pair % 8 == 7:
                lines += [f"min.u32 c{half}, c{half}, ${first['cursor'] + 2 * half + 1};"]
    for half in (0, 1):
        lines += [f"mov.b32 ${2 * half}, c{half};"]
        lines += [f"mov.b32 ${2 * half + 1}, ${first['cursor'] + 2 * half + 1};"]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _finish_ptx(parts: int, capacity: int) -> str:
    """PTX of 32 unused outputs and 3 operands as above: cursor, list numbers, address of the
    lengths to write. The length of a list that overflowed is capacity + 1."""
    lines = [".reg .b64 a;", ".reg .b32 n;"]
    for half in (0, 1):
        lines += [
            f"sub.u32 n, ${32 + 2 * half + 1}, ${32 + 2 * half};",
            f"div.u32 n, n, {4 * parts * 8};",
            f"sub.u32 n, {capacity + 1}, n;",
            f"mad.wide.u32 a, ${32 + 128 + 2 * half}, 4, ${32 + 256};",
            "st.global.b32 [a], n;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _constraints(outputs: int, operands: str) -> str:
    # Early clobber: outputs are written before all operands are read.
    return ",".join(["=&r"] * outputs + [c for c in operands for _ in range(128)])


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
                    _load(bias_desc, [f0], bar, bias_buf)
                else:
                    mbarrier.expect(bar, BYTES)
                _load(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
                _load(x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1))
                _load(w_desc, [f0, d0], bar, b_bufs.index(stage))
                if TAIL > 0:
                    _load(tail_desc, [num_m * BLOCK_M, d0], bar, tail_bufs.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            tile += 1


@gluon.jit
def multiply_tile(
    a_bufs, b_bufs, bias_buf, full, empty, lead, stage, phase, starts, ahead, D,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr, tail, tail_bufs, quarter, TAIL: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a tile's rows, bias included, and the ring's stage and phase after it.
    The first of a program's tiles is begun by group 1 when group 0 is ahead.

    With TAIL `tail` [BLOCK_N / 4, TAIL] gains the products of a quarter of the tile's latents with
    the rows of `tail_bufs`.
    """
    HALF: gl.constexpr = BLOCK_M // 2
    if GROUP == 1:  # noqa: SIM102 - known when compiled
        if starts:
            mbarrier.wait(lead.index(0), 0)
    # The bias came with the tile's first stage.
    mbarrier.wait(full.index(stage), phase)
    bias = bias_buf.load(gl.SliceLayout(0, LAYOUT))
    # + 0: a pre-activation of -0 would have a negative number's bits.
    acc = gl.zeros([HALF, BLOCK_N], gl.float32, layout=LAYOUT) + bias[None, :]
    for d0 in range(0, D, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            a_bufs.index(2 * stage + GROUP), b_bufs.index(stage).permute((1, 0)), acc,
            is_async=True,
        )  # fmt: skip
        if TAIL > 0:
            quarters = _reinterpret(
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
        if GROUP == 0:  # noqa: SIM102
            if starts & (d0 == ahead):
                mbarrier.arrive(lead.index(0), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if TAIL > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    return acc, tail, stage, phase


@gluon.jit
def _consume(
    a_bufs, b_bufs, bias_bufs, full, empty, lead, tau_ptr, last_ptr, count_ptr, lists_ptr, pitch, N,
    F, D, GROUP: gl.constexpr, PARTS: gl.constexpr, CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    num_m = gl.cdiv(N, BLOCK_M)
    zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
    # The first group runs ahead by LEAD stages, and about so stays: the groups' filters fall beside
    # each other's products, not beside each other.
    ahead = gl.minimum(BLOCK_K * LEAD, (gl.cdiv(D, BLOCK_K) - 1) * BLOCK_K)
    starts = True
    stage = 0
    phase = 0
    tile = 0
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        part = unit // num_m
        rows = (unit % num_m) * BLOCK_M + GROUP * HALF
        rows += gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        tau = gl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFF)
        last = gl.load(last_ptr + rows, mask=rows < N, other=-1)
        cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        number = part * 4 + cols // 2 % 4
        cursor = gl.inline_asm_elementwise(
            _start_ptx(PARTS, CAPACITY), _constraints(128, "rl"),
            [
                (rows * pitch * 8)[:, None] + (number * 8)[None, :],
                zeros.to(gl.int64) + lists_ptr.to(gl.int64),
            ],
            dtype=gl.int32, is_pure=False, pack=128,
        )  # fmt: skip
        for f0 in range(part * BLOCK_N, F, PARTS * BLOCK_N):
            cols = f0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
            acc, _, stage, phase = multiply_tile(
                a_bufs, b_bufs, bias_bufs.index(tile % STAGES), full, empty, lead, stage, phase,
                starts, ahead, D, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LAYOUT, 0, a_bufs, 0, 0,
            )  # fmt: skip
            tile += 1
            starts = False
            # As encode_topk._limit.
            inclusive = gl.where(tau == 0, -2147483648, tau - 1)
            limit = gl.where(last >= f0, inclusive, tau)
            cursor = gl.inline_asm_elementwise(
                _filter_ptx(PARTS), _constraints(128, "rrrrl"),
                [
                    acc.to(gl.int32, bitcast=True),
                    zeros + limit[:, None],
                    cursor,
                    zeros + cols[None, :],
                    zeros.to(gl.int64) + lists_ptr.to(gl.int64),
                ],
                dtype=gl.int32, is_pure=False, pack=128,
            )  # fmt: skip
        cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        number = part * 4 + cols // 2 % 4
        gl.inline_asm_elementwise(
            _finish_ptx(PARTS, CAPACITY), _constraints(32, "rrl"),
            [
                cursor,
                (rows * (4 * PARTS))[:, None] + number[None, :],
                zeros.to(gl.int64) + count_ptr.to(gl.int64),
            ],
            dtype=gl.int8, is_pure=False, pack=128,
        )  # fmt: skip


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


@gluon.jit
def _filter_kernel(
    x_desc, w_desc, bias_desc, tau_ptr, last_ptr, count_ptr, lists_ptr, pitch, N, F, D,
    PARTS: gl.constexpr, CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, bias_bufs, full, empty, lead = make_ring(
        x_desc, w_desc, bias_desc, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, tau_ptr, last_ptr, count_ptr,
                lists_ptr, pitch, N, F, D, 0, PARTS, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
                LEAD,
            )),
            (_consume, (
                a_bufs, b_bufs, bias_bufs, full, empty, lead, tau_ptr, last_ptr, count_ptr,
                lists_ptr, pitch, N, F, D, 1, PARTS, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
                LEAD,
            )),
            (produce, (
                x_desc, w_desc, bias_desc, x_desc, a_bufs, b_bufs, bias_bufs, a_bufs, full, empty,
                N, F, D, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, 0,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


@lru_cache(maxsize=32)
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), kinds[dtype])


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """What the copy engine asks for of a tensor that is read in blocks of this shape."""
    return TensorDescriptor.from_tensor(t, list(block), _layout(block, t.dtype))


def filter_rows(
    x: Tensor,  # [N, D] bf16 or fp16
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F] float32, from a 16-byte boundary on
    tau: Tensor,  # [N] int32
    last: Tensor,  # [N] int32
    count: Tensor,  # [N, 4 * parts] int32, filled
    lists: Tensor,  # [N, pitch] int64, filled: 4 * parts lists a row, entry by entry
    parts: int,
    capacity: int,
    num_programs: int,
) -> None:
    """What `encode_topk._filter_kernel` does, on a GPU of compute capability 9.0; up to OVERSHOOT
    entries more than `capacity` may be written to a list."""
    _filter_kernel[(num_programs,)](
        descriptor(x, BLOCK_M // 2, BLOCK_K), descriptor(W_enc, BLOCK_N, BLOCK_K),
        descriptor(b_enc, BLOCK_N), tau, last, count, lists, lists.stride(0), x.shape[0],
        W_enc.shape[0], x.shape[1], parts, capacity, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
        num_warps=4,
    )  # fmt: skip
