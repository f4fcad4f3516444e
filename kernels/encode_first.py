"""The fused encoder for Hopper: a matmul whose programs agree on thresholds after a first tile.

Legend: N tokens of this launch, D d_in, F d_sae (of this shard), K k.

1. PARTS programs share a block of 128 rows, each of which does every PARTS-th tile of latents. The
   first tile of each (or the first FIRST, where latents are many) is the sample: of the 64 columns
   of it that a thread has of a row, CELLS parts, the largest activations are written for all. A
   row's threshold is a value that the ORDER-th largest of these reaches, such that the k largest
   activations reach it but for one row in 1e8 (`encode_first_plan._order`). Each of the programs
   finds some rows' thresholds and tells the others, so they wait for one another there, once, and
   all of a launch have to be on the GPU at the same time (a cooperative launch, which cannot begin
   beside a kernel that holds multiprocessors). Programs on multiprocessors that blocks' own leave
   idle do the last tiles of all blocks, block after block.
2. Each thread appends what reaches the threshold to lists of its own, so nothing is atomic: pairs
   of neighbours, of which one at least does, and for each tile that has any a record of which. That
   is a comparison and a predicated store for each two of its 128 accumulators (rows r and r + 8 of
   the instruction's layout), on the fp32 sums; nothing goes through shared memory.
3. `encode_pick.pick_kernel` finds the exact k of a row's lists.
4. Few tokens after the last whole block would cost a round of tiles. For each tile of latents two
   programs multiply these with them, too, a half each (as encode_tiles.py does), and write their
   pre-activations and the largest of each run's 8 neighbours, from which they are selected.

Tiles are no neighbours, of which all might be large where latents are sorted: a tile takes 8
neighbours out of each 32nd part of the latents, and tiles follow one another in scattered order.

The kernel is in encode_first_kernel.py, the per-thread code is PTX (encode_first_ptx.py), as Triton
has no way to say what a thread holds. Of a kernel's instructions a multiprocessor keeps 64 KiB from
call to call; what is behind is fetched anew (4 us for a filter's), so the code is kept short.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .encode_first_kernel import filter_kernel
from .encode_first_plan import FirstPlan
from .encode_hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    LEAD,
    STAGES,
    descriptor,
    rows_descriptor,
)
from .encode_pick import pick_kernel
from .encode_plan import RUN
from .encode_zeros import Zeros
from .shapes import cdiv, next_power_of_2


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
        self.tail = torch.empty(plan.tail, plan.tail_pitch(F), device=W_enc.device)
        self.maxima = torch.empty(self.tail.numel() // RUN, dtype=torch.int32, device=W_enc.device)
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
        rest = N % BLOCK_M if self.plan.tail else 0
        N -= rest
        if rest:
            # Two blocks multiply it.
            assert rest <= self.plan.tail
            assert 2 * BLOCK_M <= N == self.plan.block_rows
        F, plan = self.W_enc.shape[0], self.plan
        runs = self.W_enc[: self.whole * BLOCK_N].view(32, -1, D)
        bias = self.b_enc[: self.whole * BLOCK_N].view(32, -1)
        num_m = cdiv(N, BLOCK_M)
        others = plan.others if num_m * BLOCK_M == plan.block_rows else 0
        regular = plan.regular if others else self.whole + 1
        filter_kernel[(num_m * plan.parts + others,)](
            descriptor(x, BLOCK_M // 2, BLOCK_K), descriptor(runs, 32, BLOCK_N // 32, BLOCK_K),
            descriptor(self.W_enc, BLOCK_N, BLOCK_K), rows_descriptor(bias, 32, BLOCK_N // 32),
            descriptor(self.b_enc, BLOCK_N), descriptor(x, plan.tail or BLOCK_M // 2, BLOCK_K),
            *self.keys, self.told, self.count, lists, self.b_enc, self.tail, self.maxima,
            lists.stride(0), N, rest, F, D, self.whole, _spread(self.whole), regular, plan.order,
            plan.parts, plan.others > 0, plan.shares(F), plan.first, plan.cells, plan.capacity,
            plan.records(F), plan.together, plan.tail, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, LEAD,
            num_warps=4, launch_cooperative_grid=True,
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
    scratch = _scratch(rows + plan.tail, plan.pitch(F), x.device)
    filter_rows, lists = _Filter(W_enc, b_enc, plan), plan.lists(F)
    groups = cdiv(F, RUN) if plan.tail else 0
    for start in range(0, N, rows + plan.tail):
        part = x[start : start + rows + plan.tail]
        size = part.shape[0]
        filter_rows(part, scratch)
        padded = rows if plan.tail else cdiv(size, BLOCK_M) * BLOCK_M
        pick_kernel[(size,)](
            part, W_enc, b_enc, filter_rows.count, scratch, scratch.stride(0), *filter_rows.keys,
            filter_rows.told, filter_rows.tail, filter_rows.maxima, values[start:],
            indices[start:], F, D, k, filter_rows.whole, padded, lists, plan.capacity,
            plan.records(F), plan.held, plan.size, plan.keys, next_power_of_2(k),
            min(32, plan.keys // 2), 64, plan.keys_per_row, next_power_of_2(plan.keys_per_row),
            next_power_of_2(lists), plan.others > 0, groups, plan.tail_pitch(F) // RUN, plan.warps,
            num_warps=plan.warps, maxnreg=plan.registers, launch_pdl=True,
        )  # fmt: skip
    _zeros.give(filter_rows.zeros, filter_rows.may_stay)
    return values, indices
