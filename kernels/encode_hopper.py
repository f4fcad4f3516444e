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

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
STAGES = 4


@constexpr_function
def _filter_ptx(parts: int, capacity: int) -> str:
    """PTX of 128 outputs and 6 operands for each of a thread's 128 accumulators: new lengths; bits,
    limit, lengths so far, byte offset of the list's first entry, latent, address of the lists.

    Element 0 speaks for row r, element 2 for row r + 8; the other lengths are never read nor
    written. A length past `capacity` goes on counting, and its entries fall on the last one.
    """
    each = ["bits", "limit", "length", "offset", "latent", "lists"]
    first = {name: 128 + i * 128 for i, name in enumerate(each)}
    lines = [".reg .pred p;", ".reg .b32 t, f, n0, n1;", ".reg .b64 a, b0, b1;"]
    for half in (0, 1):
        lines += [
            f"cvt.u64.u32 b{half}, ${first['offset'] + 2 * half};",
            f"add.s64 b{half}, b{half}, ${first['lists']};",
            f"mov.b32 n{half}, ${first['length'] + 2 * half};",
        ]
    for i in range(128):
        half = i >> 1 & 1
        lines += [
            f"setp.gt.s32 p, ${first['bits'] + i}, ${first['limit'] + 2 * half};",
            f"min.u32 t, n{half}, {capacity - 1};",
            f"mad.wide.u32 a, t, {4 * parts * 8}, b{half};",
            f"add.s32 f, ${first['latent']}, {(i & 1) + 8 * (i >> 2)};",
            f"@p st.global.v2.b32 [a], {{f, ${first['bits'] + i}}};",
            f"@p add.s32 n{half}, n{half}, 1;",
        ]
    lines += [f"mov.b32 ${2 * half}, n{half};" for half in (0, 1)]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _finish_ptx() -> str:
    """PTX of 32 unused outputs and 3 operands as above: lengths, list numbers, address of the
    lengths to write."""
    lines = [".reg .b64 a;"]
    for half in (0, 1):
        lines += [
            f"mad.wide.u32 a, ${32 + 128 + 2 * half}, 4, ${32 + 256};",
            f"st.global.b32 [a], ${32 + 2 * half};",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def _constraints(outputs: int, operands: str) -> str:
    return ",".join(["=r"] * outputs + [c for c in operands for _ in range(128)])


@gluon.jit
def _produce(
    x_desc, w_desc, a_bufs, b_bufs, full, empty, N, F, D,
    PARTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    num_m = gl.cdiv(N, BLOCK_M)
    HALF: gl.constexpr = BLOCK_M // 2
    stage = 0
    phase = 1
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        m0 = (unit % num_m) * BLOCK_M
        for f0 in range(unit // num_m * BLOCK_N, F, PARTS * BLOCK_N):
            for d0 in range(0, D, BLOCK_K):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                tma.async_copy_global_to_shared(x_desc, [m0, d0], bar, a_bufs.index(2 * stage))
                tma.async_copy_global_to_shared(
                    x_desc, [m0 + HALF, d0], bar, a_bufs.index(2 * stage + 1)
                )
                tma.async_copy_global_to_shared(w_desc, [f0, d0], bar, b_bufs.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _consume(
    a_bufs, b_bufs, full, empty, lead, bias_ptr, tau_ptr, last_ptr, count_ptr, lists_ptr, pitch, N,
    F, D, GROUP: gl.constexpr, PARTS: gl.constexpr, CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    num_m = gl.cdiv(N, BLOCK_M)
    zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
    # The first group runs ahead by all stages but one, and so stays: the groups' filters fall
    # beside each other's products, not beside each other.
    ahead = gl.minimum(BLOCK_K * (STAGES - 2), (gl.cdiv(D, BLOCK_K) - 1) * BLOCK_K)
    starts = True
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), num_m * PARTS, gl.num_programs(0)):
        part = unit // num_m
        rows = (unit % num_m) * BLOCK_M + GROUP * HALF
        rows += gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        tau = gl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFF)
        last = gl.load(last_ptr + rows, mask=rows < N, other=-1)
        length = zeros
        for f0 in range(part * BLOCK_N, F, PARTS * BLOCK_N):
            cols = f0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
            # + 0: a pre-activation of -0 would have a negative number's bits.
            acc = gl.zeros([HALF, BLOCK_N], gl.float32, layout=LAYOUT)
            acc += gl.load(bias_ptr + cols, mask=cols < F, other=float("-inf"))[None, :]
            if GROUP == 1:  # noqa: SIM102 - known when compiled
                if starts:
                    mbarrier.wait(lead.index(0), 0)
            for d0 in range(0, D, BLOCK_K):
                mbarrier.wait(full.index(stage), phase)
                acc = warpgroup_mma(
                    a_bufs.index(2 * stage + GROUP), b_bufs.index(stage).permute((1, 0)), acc,
                    is_async=True,
                )  # fmt: skip
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
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
            starts = False
            # As encode_topk._limit.
            inclusive = gl.where(tau == 0, -2147483648, tau - 1)
            limit = gl.where(last >= f0, inclusive, tau)
            number = part * 4 + cols // 2 % 4
            length = gl.inline_asm_elementwise(
                _filter_ptx(PARTS, CAPACITY), _constraints(128, "rrrrrl"),
                [
                    acc.to(gl.int32, bitcast=True),
                    zeros + limit[:, None],
                    length,
                    (rows * pitch * 8)[:, None] + (number * 8)[None, :],
                    zeros + cols[None, :],
                    zeros.to(gl.int64) + lists_ptr.to(gl.int64),
                ],
                dtype=gl.int32, is_pure=False, pack=128,
            )  # fmt: skip
        cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        number = part * 4 + cols // 2 % 4
        gl.inline_asm_elementwise(
            _finish_ptx(), _constraints(32, "rrl"),
            [
                length,
                (rows * (4 * PARTS))[:, None] + number[None, :],
                zeros.to(gl.int64) + count_ptr.to(gl.int64),
            ],
            dtype=gl.int8, is_pure=False, pack=128,
        )  # fmt: skip


@gluon.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, lists_ptr, pitch, N, F, D,
    PARTS: gl.constexpr, CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    a_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, BLOCK_K], x_desc.layout)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
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
                a_bufs, b_bufs, full, empty, lead, bias_ptr, tau_ptr, last_ptr, count_ptr,
                lists_ptr, pitch, N, F, D, 0, PARTS, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_consume, (
                a_bufs, b_bufs, full, empty, lead, bias_ptr, tau_ptr, last_ptr, count_ptr,
                lists_ptr, pitch, N, F, D, 1, PARTS, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
            (_produce, (
                x_desc, w_desc, a_bufs, b_bufs, full, empty, N, F, D,
                PARTS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


@lru_cache(maxsize=8)
def _layout(block_rows: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([block_rows, BLOCK_K], kind)


def _descriptor(rows: Tensor, block_rows: int) -> TensorDescriptor:
    layout = _layout(block_rows, rows.dtype)
    return TensorDescriptor.from_tensor(rows, [block_rows, BLOCK_K], layout)


def filter_rows(
    x: Tensor,  # [N, D] bf16 or fp16
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F] float32
    tau: Tensor,  # [N] int32
    last: Tensor,  # [N] int32
    count: Tensor,  # [N, 4 * parts] int32, filled
    lists: Tensor,  # [N, pitch] int64, filled: 4 * parts lists of `capacity` a row, entry by entry
    parts: int,
    capacity: int,
    num_programs: int,
) -> None:
    """What `encode_topk._filter_kernel` does, on a GPU of compute capability 9.0."""
    _filter_kernel[(num_programs,)](
        _descriptor(x, BLOCK_M // 2), _descriptor(W_enc, BLOCK_N), b_enc, tau, last, count, lists,
        lists.stride(0), x.shape[0], W_enc.shape[0], x.shape[1], parts, capacity, BLOCK_M, BLOCK_N,
        BLOCK_K, STAGES, num_warps=4,
    )  # fmt: skip
