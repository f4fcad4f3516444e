"""Triton kernels that order the (token, latent) pairs by latent, for the weights' gradients.

Legend: N tokens, F d_sae (of this shard), K k, P pairs (N * K).

A stable counting sort. Each pair takes a number within its latent from an atomic counter, in
whatever order the programs come; the counters' running sums say where each latent's pairs begin;
each pair goes to its latent's place of that number, and then to the place that its rank among its
latent's pairs gives, which is the order of the pairs themselves: the result does not depend on the
programs' order. But for a fill these are kernels, whose priority a captured graph keeps: a library
sort was seen to wait there for the large kernels that it should run beside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .reference import PairOrder
from .shapes import cdiv

# Ranks take the time of the square of a latent's pairs, sums of counts of the square of F: beyond
# these torch's sort is taken. With one latent on all of 4096 tokens at D=768 F=24576 k=32 a step
# takes 0.85 ms for 0.77 (launch.bench step, H100); all tokens on the same latents were not timed.
_MAX_MEAN, _MAX_PAIRS, _MAX_LATENTS = 16, 1 << 20, 1 << 18
_SPAN = 1024


@triton.jit
def _count_kernel(
    idx_ptr,  # [P]
    coef_ptr,  # [P], HAS_COEF only
    counts_ptr,  # [F] int32 zeros
    numbers_ptr,  # [P] int32, -1 where a pair's coefficient is 0
    P, F, HAS_COEF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < P
    latent = tl.load(idx_ptr + at, mask=live, other=0)
    if HAS_COEF:
        live = live & (tl.load(coef_ptr + at, mask=live, other=0.0) != 0)
    # A latent that does not exist is the caller's mistake, but memory is not written for it.
    live = live & (latent >= 0) & (latent < F)
    number = tl.atomic_add(counts_ptr + latent, 1, mask=live, sem="relaxed")
    tl.store(numbers_ptr + at, tl.where(live, number, -1), mask=at < P)


@triton.jit
def _sum_counts_kernel(
    counts_ptr,  # [F]
    offsets_ptr,  # [F + 1]
    F, SPAN: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """offsets[f] = the sum of the counts before f; a program adds what lies before its span by
    itself, which the L2 cache holds."""
    start = tl.program_id(0) * SPAN
    before = tl.zeros([BEFORE], tl.int32)
    for first in range(0, start, BEFORE):
        f = first + tl.arange(0, BEFORE)
        before += tl.load(counts_ptr + f, mask=f < start, other=0)
    f = start + tl.arange(0, SPAN)
    through = tl.sum(before, 0) + tl.cumsum(tl.load(counts_ptr + f, mask=f < F, other=0), 0)
    tl.store(offsets_ptr + f + 1, through, mask=f < F)
    if start == 0:
        tl.store(offsets_ptr, tl.zeros([], tl.int32))


@triton.jit
def _place_kernel(
    idx_ptr,  # [P]
    numbers_ptr,  # [P]
    offsets_ptr,  # [F + 1]
    placed_ptr,  # [P] int32
    P, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers_ptr + at, mask=at < P, other=-1)
    live = number >= 0
    latent = tl.load(idx_ptr + at, mask=live, other=0).to(tl.int32)
    place = tl.load(offsets_ptr + latent, mask=live, other=0) + number
    tl.store(placed_ptr + place, at, mask=live)


@triton.jit
def _rank_kernel(
    idx_ptr,  # [P]
    offsets_ptr,  # [F + 1]
    placed_ptr,  # [P] int32
    order_ptr,  # [P] int32
    latents_ptr,  # [P] int32
    P, F, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each placed pair's rank among its latent's; places beyond all get pair 0 and latent F.

    A latent's pairs lie together, so a block looks at the places from its first latent's begin to
    its last one's end, WIDTH at once: few where latents are rare, and where one has thousands of
    pairs each is loaded once a block.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < tl.load(offsets_ptr + F)
    pair = tl.load(placed_ptr + place, mask=live, other=0)
    latent = tl.load(idx_ptr + pair, mask=live, other=0).to(tl.int32)
    begin = tl.load(offsets_ptr + latent, mask=live, other=0)
    end = tl.load(offsets_ptr + latent + 1, mask=live, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    last = tl.max(end, 0)
    at = tl.min(tl.where(live, begin, P), 0) + tl.arange(0, WIDTH)
    other = tl.load(placed_ptr + at, mask=at < last, other=0)
    for _ in range(0, last - tl.min(at, 0), WIDTH):
        # The next are on their way while these are compared.
        after = tl.load(placed_ptr + at + WIDTH, mask=at + WIDTH < last, other=0)
        same = (at[:, None] >= begin[None, :]) & (at[:, None] < end[None, :])
        rank += tl.sum((same & (other[:, None] < pair[None, :])).to(tl.int32), 0)
        at += WIDTH
        other = after
    to = tl.where(live, begin + rank, place)
    tl.store(order_ptr + to, pair, mask=place < P)
    tl.store(latents_ptr + to, tl.where(live, latent, F), mask=place < P)


def _by_counting(top_idx: Tensor, num_latents: int, coef: Tensor | None) -> PairOrder:
    P, F = top_idx.numel(), num_latents
    counts = torch.zeros(F, dtype=torch.int32, device=top_idx.device)
    offsets = counts.new_empty(F + 1)
    numbers, placed, order, latents = (counts.new_empty(P) for _ in range(4))
    _count_kernel[(cdiv(P, 256),)](
        top_idx, top_idx if coef is None else coef, counts, numbers, P, F,
        HAS_COEF=coef is not None, BLOCK=256,
    )  # fmt: skip
    _sum_counts_kernel[(cdiv(F, _SPAN),)](counts, offsets, F, SPAN=_SPAN, BEFORE=4096)
    _place_kernel[(cdiv(P, 256),)](top_idx, numbers, offsets, placed, P, BLOCK=256)
    _rank_kernel[(cdiv(P, 128),)](
        top_idx, offsets, placed, order, latents, P, F, BLOCK=128, WIDTH=128
    )
    return PairOrder(order, latents, offsets)


def order_pairs(
    top_idx: Tensor,  # any shape, P elements
    num_latents: int,
    coef: Tensor | None = None,  # as top_idx
) -> PairOrder:
    """`reference.order_pairs`; which pairs of coefficient 0 come at the end is not said. Raises
    ValueError where there are 2**31 pairs or more."""
    P = top_idx.numel()
    if P >= 2**31:
        raise ValueError(
            f"{P} pairs of a token and a latent are more than kernels number (2**31 - 1); "
            "take fewer tokens at once"
        )
    counts = 0 < P <= min(_MAX_MEAN * num_latents, _MAX_PAIRS) and num_latents <= _MAX_LATENTS
    by = _by_counting if counts else reference.order_pairs
    return by(top_idx.contiguous(), num_latents, None if coef is None else coef.contiguous())
