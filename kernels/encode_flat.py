"""The batch rule and the threshold rule: encoders of which a token has any number of latents.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, C slots of the list that is made.

The filter of encode_plan.py's picture with one limit for all rows, and no tile left out as a
sample; what passes is candidates. Batch rule:

1. A strided sample of latents is multiplied by the library. Cells are a latent and a group of
   tokens; of their largest activations the `rank`-th is the limit, which 2 to 4 times N K
   activations pass. (A cell counts once, so that a latent that fires everywhere, as trained SAEs
   have some, does not stand for a whole stride of such.)
2. The filter appends what passes to a row's lists; these are gathered into one buffer of keys.
3. The N K-th largest by rounds of counts in 4096 bins: two as a rule, four where the first found
   it above all of the sample's, or found too few; the others of four find nothing to do.
4. Counts a row, their running sums, and the pairs.

A row whose lists overflowed, as that of a first token to which most latents respond, is computed
densely, 16 such rows at once, in every one of these steps; of the first such rows products are
kept. So are all rows where the limit was too high. The threshold rule is steps 2 and 4 with
thresholds taken off the bias; where the filter does not fit the shape (encode.choose), all rows
are dense, and the products the library's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import encode
from .encode_candidates import (
    BINS,
    COUNT,
    EMIT,
    PAIRS,
    ROUND,
    collect_kernel,
    flat_kernel,
    limit_kernel,
)
from .encode_plan import Plan, flat_plan
from .encode_rows import _BLOCK_BYTES, _products
from .reference_encode import Pairs
from .shapes import cdiv, next_power_of_2, num_programs

_STATE = 16  # numbers on the device
# Rows of a dense tile, its latents, the width of its products; parts of a row that programs share,
# and these a multiprocessor. Rows with keys a program.
_ROWS, _COLS, _DEPTH, _SPANS, _WORKERS = 16, 64, 64, 128, 4
_TOKENS = 8


class _Sample(NamedTuple):
    """What the batch's limit is found from."""

    step: int  # each so manyth latent
    size: int  # latents
    group: int  # tokens a cell
    rank: int  # which largest cell is the limit


def sample_of(N: int, F: int, k: int) -> _Sample:
    """So large a sample that its limit is seldom too high. Where a latent fires on a part p of the
    tokens and log p deviates by 1 to 2.5, the logarithm of how many times N K activations pass was
    7 or more standard deviations above 0 in a simulation with 512 latents at N=4096 F=24576 k=32,
    where 384 are taken now; 1.9 to 4 times as many do."""
    group = 32
    while group > 1 and 5 * group * k > F:
        group //= 2
    size = max(1, min(F // 8, max(256, min(512, F // 64))))
    cells = cdiv(N, group) * size
    # Cells that hold one of the N K largest, were latents alike.
    mean = cells * (1 - math.exp(-group * k / F))
    return _Sample(F // size, size, group, math.ceil(1.6 * mean + 6 * math.sqrt(mean) + 8))


class Flat:
    """One call of either rule: its inputs, buffers, and launches."""

    def __init__(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, capacity: int, room: int,
        design: encode.Design, plan: Plan | None,
    ) -> None:  # fmt: skip
        N, F, device = len(x), len(W_enc), x.device
        self.x, self.W_enc, self.bias, self.theta = x, W_enc, b_enc, theta
        self.capacity, self.design, self.plan = capacity, design, plan
        counters = torch.zeros(_STATE + BINS.value + 3 * N, dtype=torch.int32, device=device)
        sizes = (_STATE, BINS.value, 3 * N)
        self.state, self.bins, self.above = counters.split(sizes)
        self.keys = torch.empty(room if plan else 0, dtype=torch.int64, device=device)
        self.spans, self.dense = counters.new_empty(2, N), counters.new_empty(N)
        self.parts = counters.new_empty(N, 2, _SPANS)
        self.tokens, self.latents = counters.new_empty(capacity), counters.new_empty(capacity)
        self.values = b_enc.new_empty(capacity)
        self.offsets = counters.new_empty(N + 1)
        rows = plan.block_rows if plan else max(1, _BLOCK_BYTES // (4 * F))
        self.block_rows = min(N, rows)

    def limit(self, k: int) -> Tensor:  # [N] int32
        """The batch's limit, by a sample."""
        N, F = len(self.x), len(self.W_enc)
        sample = sample_of(N, F, k)
        weights = self.W_enc[: sample.step * sample.size : sample.step]
        pre = _products(self.x, weights)
        limit: Tensor = self.state.new_empty(N)
        cols = min(128, next_power_of_2(sample.size))
        limit_kernel[(cdiv(N, sample.group), cdiv(sample.size, cols))](
            pre, self.bias, limit, self.bins, self.state, N, sample.size, sample.step, sample.rank,
            N * k, sample.group, cols, num_warps=4,
        )  # fmt: skip
        return limit

    def collect(self, limit: Tensor, count_bins: bool) -> None:
        """Keys of what passes the limits, row block after row block."""
        plan, N, F = self.plan, len(self.x), len(self.W_enc)
        assert plan is not None
        matmul = encode.matmul_of(self.design, self.W_enc, self.bias, plan)
        rows = min(N, plan.block_rows)
        scratch = self.state.new_empty(rows, plan.pitch)
        count = self.state.new_empty(rows, plan.lists)
        pow2 = next_power_of_2(plan.lists)
        for start in range(0, N, rows):
            part = self.x[start : start + rows]
            matmul.filter(part, limit[start:], scratch, count)
            collect_kernel[(len(part),)](
                limit, count, scratch, self.keys, self.spans, self.dense, self.bins, self.state,
                plan.pitch, plan.capacity, len(self.keys), start, N, F, plan.lists, pow2,
                max(1, plan.keys // pow2), count_bins, num_warps=encode.select_warps(plan),
            )  # fmt: skip
        self.scratch = scratch

    def steps(self, *modes: tl.constexpr) -> None:
        """Steps over all candidates, one after another."""
        N, F = len(self.x), len(self.W_enc)
        if self.plan is not None:
            products = self.scratch.view(torch.float32).view(-1)
            stored = products.numel() // F
            for i, mode in enumerate(modes):
                # The first round's keys were counted when they were collected.
                keyed = 0 if i == 0 and mode is ROUND else cdiv(N, _TOKENS)
                self._launch(mode, products, keyed, 0, 0, stored, 1)
            return
        parts = self.x.split(self.block_rows)
        products = torch.empty(0)
        for turn, mode in enumerate(modes):
            for i, part in enumerate(parts):
                if len(parts) > 1 or turn == 0:
                    products = _products(part, self.W_enc)
                self._launch(mode, products, 0, len(part), i * self.block_rows, 0, len(parts))

    def _launch(
        self, mode: tl.constexpr, products: Tensor, keyed: int, number: int, first_row: int,
        stored: int, launches: int,
    ) -> None:  # fmt: skip
        (N, D), F = self.x.shape, len(self.W_enc)
        programs = keyed + _WORKERS * num_programs(self.x.device)
        precision = "ieee" if self.x.element_size() == 4 else "tf32"
        flat_kernel[(programs,)](
            self.x, self.W_enc, self.bias, self.theta, self.keys, self.spans, self.dense, products,
            self.parts, self.above, self.offsets, *self.pairs()[:3], self.bins, self.state,
            int(self.theta.ndim > 0), self.capacity, keyed, number, first_row, stored,
            programs * launches, N, F, D, mode.value, self.plan is None, _TOKENS, 128, _SPANS,
            _ROWS, _COLS, _DEPTH, precision, num_warps=4,
        )  # fmt: skip

    def pairs(self) -> Pairs:
        """What was found."""
        return Pairs(self.tokens, self.latents, self.values, self.offsets)


def _prepared(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, mean: float, room: int
) -> tuple[Tensor, Tensor, Tensor, encode.Design, Plan | None]:
    """Inputs from 16-byte boundaries on, and the design of a call."""
    x, W_enc, b_enc = encode.aligned(x), encode.aligned(W_enc), encode.aligned(b_enc.float())
    design = encode.kind_of(x)
    if design != "rows":
        sizes = (*x.shape, W_enc.shape[0], mean, room, num_programs(x.device))
        if (plan := flat_plan(*sizes)) is not None:
            return x, W_enc, b_enc, design, plan
    return x, W_enc, b_enc, "rows", None


def batch_topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    k: int,
) -> Pairs:  # of N * k slots
    """`reference.batch_topk_encode` on a GPU; no host sync."""
    room = 6 * len(x) * k + 4096
    found = _prepared(x, W_enc, b_enc, 2.5 * k, room)
    return by_batch(*found, k, room)


def by_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, design: encode.Design, plan: Plan | None, k: int,
    room: int,
) -> Pairs:  # fmt: skip
    """`batch_topk_encode` by a design, of inputs from 16-byte boundaries on."""
    call = Flat(x, W_enc, b_enc, b_enc.new_zeros(()), len(x) * k, room, design, plan)
    if len(x) == 0:
        call.offsets.zero_()
        return call.pairs()
    limit = call.limit(k)
    if plan is not None:
        call.collect(limit, True)
    call.steps(ROUND, ROUND, ROUND, ROUND, COUNT, EMIT)
    return call.pairs()


def threshold_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    threshold: Tensor,  # [F], or a scalar for all
    capacity: int,
) -> tuple[Pairs, Tensor]:  # of `capacity` slots; scalar int32, how many pairs there are
    """`reference.threshold_encode` on a GPU; no host sync."""
    theta = threshold.float().contiguous()
    found = _prepared(x, W_enc, b_enc.float() - theta, capacity / max(1, len(x)), capacity)
    return by_threshold(*found, theta, capacity)


def by_threshold(
    x: Tensor, W_enc: Tensor, bias: Tensor, design: encode.Design, plan: Plan | None, theta: Tensor,
    capacity: int,
) -> tuple[Pairs, Tensor]:  # fmt: skip
    """`threshold_encode` by a design, of a bias from which the thresholds were taken."""
    call = Flat(x, W_enc, bias, theta, capacity, capacity, design, plan)
    if len(x) == 0:
        call.offsets.zero_()
    else:
        if plan is not None:
            call.collect(torch.zeros_like(call.dense), False)
        call.steps(COUNT, EMIT)
    return call.pairs(), call.state[PAIRS.value]
