"""The encoder's matmul for GPUs of any kind: writes tiles of pre-activations, or filters them.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard).  The same lists as
encode_hopper.py makes; encode_plan.py has the picture.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .encode_plan import BLOCK_M, CELL, Plan, spread
from .shapes import num_programs, num_stages

BLOCK_K = 64


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def _places(hit, length):
    """A place for each pair [M, runs, 4] that is hit, behind the `length` entries that each of a
    row's four lists has, and the lists' new lengths. A thread counts alone: splitting and joining
    moves nothing."""
    M: tl.constexpr = hit.shape[0]
    RUNS: tl.constexpr = hit.shape[1]
    if RUNS > 1:
        left, right = hit.reshape(M, 2, RUNS // 2, 4).permute(0, 2, 3, 1).split()
        left, length = _places(left, length)
        right, length = _places(right, length)
        place = tl.join(left, right).permute(0, 3, 1, 2).reshape(M, RUNS, 4)
    else:
        place = length[:, None, :]
        length += tl.sum(hit, 1)
    return place, length


@triton.jit
def _append(
    tile, out_ptr, entries, length, capacity, limit, latent, apart, RUN: tl.constexpr,
    LISTS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Appends the pairs of a tile of which one exceeds its row's limit, to one of four lists of a
    row each; returns the lists' new lengths. See encode_epilogue.append_tile.

    In parts of MOST runs: a store moves what it stores to other threads, which for few at a time
    costs barriers, for many registers."""
    M: tl.constexpr = tile.shape[0]
    RUNS: tl.constexpr = tile.shape[1] // 8
    if RUNS > MOST:
        left, right = _halves(tile)
        length = _append(
            left, out_ptr, entries, length, capacity, limit, latent, apart, RUN, LISTS, MOST
        )
        length = _append(
            right, out_ptr, entries, length, capacity, limit, latent, apart, RUN + RUNS // 2, LISTS,
            MOST,
        )  # fmt: skip
    else:
        first, second = tile.reshape(M, RUNS, 4, 2).split()
        first = first.to(tl.int32, bitcast=True)
        second = second.to(tl.int32, bitcast=True)
        run = RUN + tl.arange(0, RUNS)[None, :, None]
        hit = tl.maximum(first, second) > limit[:, :, None]
        place, length = _places(hit.to(tl.int32), length)
        # Negative where nothing is stored: one number to move from a thread to another less.
        entry = tl.where(hit & (place < capacity), entries[:, None, :] + place * (3 * LISTS), -1)
        there = entry >= 0
        tl.store(out_ptr + entry, first, mask=there)
        tl.store(out_ptr + entry + 1, second, mask=there)
        tl.store(out_ptr + entry + 2, latent[:, None, :] + run * apart, mask=there)
    return length


@triton.jit
def _multiply(
    x_desc, w_desc, rest_desc, bias_ptr, inverse_ptr, scale_ptr, m0, tile, whole, N, F, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N], bias included: 8 neighbours of each of the latents' parts, or, of
    the tile behind the `whole`, the last latents. Of scaled operands (encode_fp8.py) bias times a
    row's `inverse`, and then all times a latent's `scale`."""
    cols = tl.arange(0, BLOCK_N)
    scattered = tile < whole
    latent = tl.where(
        scattered, cols // 8 * (whole * 8) + tile * 8 + cols % 8, whole * BLOCK_N + cols
    )
    bias = tl.load(bias_ptr + latent, mask=latent < F, other=float("-inf"))
    # + 0: a pre-activation of -0 would have a negative number's bits.
    if scale_ptr is None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
    else:
        rows = m0 + tl.arange(0, BLOCK_M)
        inverse = tl.load(inverse_ptr + rows, mask=rows < N, other=1.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :] * inverse[:, None]
    if scattered:
        for d0 in range(0, D, BLOCK_K):
            a = x_desc.load([m0, d0])
            b = w_desc.load([0, tile * 8, d0]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        for d0 in range(0, D, BLOCK_K):
            a = x_desc.load([m0, d0])
            b = rest_desc.load([whole * BLOCK_N, d0])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + latent, mask=latent < F, other=1.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["capacity", "spread", "begin", "end"])
def filter_kernel(
    x_desc, w_desc, rest_desc, bias_ptr, limit_ptr, out_ptr, count_ptr, inverse_ptr, scale_ptr,
    pitch, capacity, N, F, D, whole, spread, begin, end, PARTS: tl.constexpr,
    WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """Tiles of the positions from `begin` to `end`: their pre-activations and the largest of their
    cells (WRITE), or lists of those that pass their rows' limits. A program keeps to a block of
    rows and every PARTS-th position."""
    LISTS: tl.constexpr = 4 * PARTS
    MOST: tl.constexpr = 8  # runs; 16 are no faster on an H200
    num_m = tl.cdiv(N, BLOCK_M)
    quad = tl.arange(0, 4)[None, :]
    cols = tl.arange(0, BLOCK_N)
    for unit in range(tl.program_id(0), num_m * PARTS, tl.num_programs(0)):
        part = unit // num_m
        m0 = unit % num_m * BLOCK_M
        rows = m0 + tl.arange(0, BLOCK_M)
        row = rows.to(tl.int64)[:, None]
        there = row < N
        limit = tl.load(limit_ptr + row, mask=there & (not WRITE), other=0x7FFFFFFF)
        entries = rows[:, None] * pitch + 3 * (part * 4 + quad)
        length = tl.zeros((BLOCK_M, 4), tl.int32)
        for position in range(begin + part, end, PARTS):
            tile = tl.where(position < whole, position * spread % whole, whole)
            acc = _multiply(
                x_desc, w_desc, rest_desc, bias_ptr, inverse_ptr, scale_ptr, m0, tile, whole, N, F,
                D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            if WRITE:
                out = out_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
                at = row * pitch + (position - begin) * BLOCK_N + cols[None, :]
                tl.store(out + at, acc, mask=there)
                bits = acc.to(tl.int32, bitcast=True).reshape(BLOCK_M, BLOCK_N // CELL, CELL)
                cell = (position - begin) * (BLOCK_N // CELL) + tl.arange(0, BLOCK_N // CELL)
                at = row * pitch + (end - begin) * BLOCK_N + cell[None, :]
                tl.store(out_ptr + at, tl.max(bits, 2), mask=there)
            else:
                first = tl.where(tile < whole, tile * 8, whole * BLOCK_N)
                apart = tl.where(tile < whole, whole * 8, 8)
                latent = first + 2 * quad + tl.zeros((BLOCK_M, 4), tl.int32)
                length = _append(
                    acc, out_ptr, entries, length, capacity, limit, latent, apart, 0, LISTS, MOST
                )
        if not WRITE:
            tl.store(count_ptr + row * LISTS + part * 4 + quad, length, mask=there)


class PlainFilter:
    """The matmul of one call, for its blocks of rows one after another."""

    def __init__(
        self,
        W_enc: Tensor,  # [F, D]
        b_enc: Tensor,  # [F] float32
        plan: Plan,
        block_k: int = BLOCK_K,
        block_m: int = BLOCK_M,
        scale: Tensor | None = None,  # [F] float32: see encode_fp8.py
    ) -> None:
        (F, D), n = W_enc.shape, plan.block_n
        runs = W_enc[: plan.whole * n].view(n // 8, plan.whole * 8, D)
        self.plan, self.F, self.bias, self.block = plan, F, b_enc, (block_m, n, block_k)
        self.scale, self.inverse = scale, scale  # the latter of each block of rows
        self.w = TensorDescriptor.from_tensor(runs, [n // 8, 8, block_k])
        self.rest = TensorDescriptor.from_tensor(W_enc, [n, block_k])
        # 16-bit inputs are exact in the tensor cores' fp32 sums whatever is named here.
        self.precision = "ieee" if W_enc.element_size() == 4 else "tf32"
        self.stages = num_stages(W_enc.device, (block_m + n) * block_k * W_enc.element_size())

    def write(self, x: Tensor, scratch: Tensor) -> None:
        """The sample's pre-activations, to the front of each row of scratch [N, pitch] int32, and
        the bits of the largest of each CELL neighbours behind them."""
        self._launch(x, scratch, scratch, scratch, 0, self.plan.sample, write=True)

    def filter(self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor) -> None:
        """What passes a row's limit (of int32 bits, which it exceeds) of the other tiles, to the
        lists in each row of scratch, and their lengths, to count [N, lists] int32."""
        end = self.plan.positions(self.F)
        self._launch(x, limit, scratch, count, self.plan.sample, end, write=False)

    def _launch(
        self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor, begin: int, end: int, *,
        write: bool,
    ) -> None:  # fmt: skip
        (N, D), plan, (m, n, k) = x.shape, self.plan, self.block
        parts = self.plan.sample if write else self.plan.parts
        filter_kernel[(num_programs(x.device),)](
            TensorDescriptor.from_tensor(x, [m, k]), self.w, self.rest, self.bias, limit, scratch,
            count, self.inverse, self.scale, scratch.stride(0), plan.capacity, N, self.F, D,
            plan.whole, spread(plan.whole), begin, end, parts, write, m, n, k, self.precision, CELL,
            num_warps=8 if m > 64 else 4, num_stages=self.stages,
        )  # fmt: skip
