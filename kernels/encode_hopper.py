"""The encoder's matmul and filter for Hopper: a producer warp feeds two warpgroups that filter apart.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard).

One warp loads tiles with the copy engine into a ring of stages; each of two warpgroups multiplies
64 of the tile's 128 rows from the same stages. They wait for the ring, not for one another, so one
filters its finished accumulators while the other keeps the tensor cores busy.
The filter is PTX over a thread's 128 accumulators (rows r and r + 8 of the wgmma layout): count the
hits, reserve slots with one atomic a row, store. A hit is one predicated store, a miss costs two
comparisons; nothing goes through shared memory.
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

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
STAGES = 4
_PER_THREAD = 128


def _filter_ptx() -> str:
    """PTX of 32 unused outputs and 6 operands for each of a thread's 128 accumulators: bits, limit,
    row, byte offset of its list, column, addresses of counters and lists.

    Element 0 speaks for row r, element 2 for row r + 8.
    """
    each = ("bits", "limit", "row", "list", "column", "counters", "lists")
    first = {name: _PER_THREAD // 4 + i * _PER_THREAD for i, name in enumerate(each)}
    lines = [".reg .pred p, some0, some1;", ".reg .b32 t, l0, l1, n0, n1, s0, s1;", ".reg .b64 a;"]
    for half in (0, 1):
        lines += [f"mov.b32 n{half}, 0;", f"mov.b32 s{half}, 0;"]
    for i in range(_PER_THREAD):
        half = i >> 1 & 1
        lines += [
            f"setp.gt.s32 p, ${first['bits'] + i}, ${first['limit'] + 2 * half};",
            f"@p add.s32 n{half}, n{half}, 1;",
        ]
    for half in (0, 1):
        lines += [
            f"setp.ne.s32 some{half}, n{half}, 0;",
            f"mul.wide.u32 a, ${first['row'] + 2 * half}, 4;",
            f"add.s64 a, a, ${first['counters']};",
            f"@some{half} atom.global.relaxed.gpu.add.u32 s{half}, [a], n{half};",
        ]
    for half in (0, 1):
        # A row that is out of room stores nothing more; its counter tells.
        lines += [
            f"add.s32 t, s{half}, n{half};",
            f"setp.le.s32 some{half}, t, ROOM;",
            f"selp.b32 l{half}, ${first['limit'] + 2 * half}, 0x7FFFFFFF, some{half};",
            f"shl.b32 s{half}, s{half}, 3;",
            f"add.s32 s{half}, s{half}, ${first['list'] + 2 * half};",
        ]
    for i in range(_PER_THREAD):
        half = i >> 1 & 1
        value = f"${first['bits'] + i}"
        lines += [
            f"setp.gt.s32 p, {value}, l{half};",
            f"add.s32 t, ${first['column']}, {(i & 1) + 8 * (i >> 2)};",
            f"cvt.u64.u32 a, s{half};",
            f"add.s64 a, a, ${first['lists']};",
            f"@p st.global.v2.b32 [a], {{t, {value}}};",
            f"@p add.s32 s{half}, s{half}, 8;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@lru_cache(maxsize=16)
def _ptx(capacity: int) -> gl.constexpr:
    return gl.constexpr(_filter_ptx().replace("ROOM", str(capacity)))


_FILTER_CONSTRAINTS = gl.constexpr(
    ",".join(["=r"] * (_PER_THREAD // 4) + [c for c in "rrrrrll" for _ in range(_PER_THREAD)])
)


@gluon.jit
def _origin(tile, num_m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First row and latent of a tile. Rows run fastest: neighbours share a tile of W_enc."""
    return (tile % num_m) * BLOCK_M, (tile // num_m) * BLOCK_N


@gluon.jit
def _produce(
    x_desc, w_desc, a_bufs, b_bufs, full, empty, N, F, D,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    num_m = gl.cdiv(N, BLOCK_M)
    HALF: gl.constexpr = BLOCK_M // 2
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_m * gl.cdiv(F, BLOCK_N), gl.num_programs(0)):
        m0, f0 = _origin(tile, num_m, BLOCK_M, BLOCK_N)
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
    a_bufs, b_bufs, full, empty, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr, N, F, D,
    GROUP: gl.constexpr, CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PTX: gl.constexpr, CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    num_m = gl.cdiv(N, BLOCK_M)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_m * gl.cdiv(F, BLOCK_N), gl.num_programs(0)):
        m0, f0 = _origin(tile, num_m, BLOCK_M, BLOCK_N)
        rows = m0 + GROUP * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        cols = f0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        tau = gl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFF)
        last = gl.load(last_ptr + rows, mask=rows < N, other=-1)
        # A bias of -0 would give a pre-activation of -0, whose bits are a negative number's.
        acc = gl.zeros([HALF, BLOCK_N], gl.float32, layout=LAYOUT)
        if f0 + BLOCK_N > F:
            acc += (gl.load(bias_ptr + cols, mask=cols < F, other=0.0) + 0.0)[None, :]
        else:
            acc += (gl.load(bias_ptr + cols) + 0.0)[None, :]
        prev = stage
        for d0 in range(0, D, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                a_bufs.index(2 * stage + GROUP), b_bufs.index(stage).permute((1, 0)), acc,
                is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(prev), count=1, pred=d0 > 0)
            prev = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(prev), count=1)
        if f0 + BLOCK_N > F:
            acc = gl.where((cols < F)[None, :], acc, float("-inf"))
        # Bits above the limit pass: those from tau on up to latent `last`, those over tau beyond it.
        # Where tau is 0, negative pre-activations, zeros after the ReLU, pass too.
        inclusive = gl.where(tau == 0, -0x80000000, tau - 1)
        limit = gl.where(last >= f0, inclusive, tau)
        zeros = gl.zeros([HALF, BLOCK_N], gl.int32, layout=LAYOUT)
        gl.inline_asm_elementwise(
            PTX, CONSTRAINTS,
            [
                acc.to(gl.int32, bitcast=True),
                zeros + limit[:, None],
                zeros + rows[:, None],
                zeros + (rows * CAPACITY * 8)[:, None],
                zeros + cols[None, :],
                zeros.to(gl.int64) + count_ptr.to(gl.int64),
                zeros.to(gl.int64) + list_ptr.to(gl.int64),
            ],
            dtype=gl.int8, is_pure=False, pack=128,
        )  # fmt: skip


@gluon.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr, N, F, D,
    CAPACITY: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, PTX: gl.constexpr, CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    a_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, BLOCK_K], x_desc.layout)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                a_bufs, b_bufs, full, empty, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr,
                N, F, D, 0, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PTX, CONSTRAINTS,
            )),
            (_consume, (
                a_bufs, b_bufs, full, empty, bias_ptr, tau_ptr, last_ptr, count_ptr, list_ptr,
                N, F, D, 1, CAPACITY, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PTX, CONSTRAINTS,
            )),
            (_produce, (
                x_desc, w_desc, a_bufs, b_bufs, full, empty, N, F, D,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def _descriptor(rows: Tensor, block_rows: int) -> TensorDescriptor:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[rows.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([block_rows, BLOCK_K], kind)
    return TensorDescriptor.from_tensor(rows, [block_rows, BLOCK_K], layout)


def filter_rows(
    x: Tensor,  # [N, D] bf16 or fp16
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F] float32
    tau: Tensor,  # [N] int32
    last: Tensor,  # [N] int32
    count: Tensor,  # [N] int32, increased
    lists: Tensor,  # [N, capacity] int64, filled
    num_programs: int,
) -> None:
    """What `encode_topk._filter_kernel` does, on a GPU of compute capability 9.0."""
    _filter_kernel[(num_programs,)](
        _descriptor(x, BLOCK_M // 2), _descriptor(W_enc, BLOCK_N), b_enc, tau, last, count, lists,
        x.shape[0], W_enc.shape[0], x.shape[1], lists.shape[1], BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        _ptx(lists.shape[1]), _FILTER_CONSTRAINTS, num_warps=4,
    )  # fmt: skip
