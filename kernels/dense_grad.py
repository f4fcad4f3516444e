"""Triton kernel of a weight matrix's dense gradient, as autograd wants it, with the dot products of
its rows on request.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K).  The pairs are ordered by
latent.  A program has a block of columns of some neighbouring latents, one after another. The next
latent's pairs begin where this one's end, so their numbers are loaded a latent ahead. No atomics:
the order of every sum depends on positions alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pair_order import order_pairs
from .reference import PairOrder
from .shapes import cdiv, next_power_of_2
from .sparse_grad import block_sums, first_pairs, inside_of, token_of


@triton.jit
def _load_pairs(pair, live, coef_ptr, rows_ptr, tokens_ptr, cols, inside, D, K):
    """Some pairs' coefficients and rows."""
    coef = tl.load(coef_ptr + pair, mask=live, other=0.0).to(tl.float32)
    row = token_of(pair, tokens_ptr, live, K) * D
    mask = live[:, None] & inside[None, :]
    rows = tl.load(
        rows_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0,
        eviction_policy="evict_last",
    )  # fmt: skip
    return coef, rows


@triton.jit
def _add_loaded(grad, w, coef, rows, parts_ptrs, live, DOTS: tl.constexpr):
    """Adds rows to a latent's gradient; DOTS writes their dot products with the latent's row."""
    rows = rows.to(tl.float32)
    if DOTS:
        tl.store(parts_ptrs, tl.sum(rows * w[None, :], axis=1), mask=live)
    return grad + tl.sum(coef[:, None] * rows, axis=0)


@triton.jit
def add_pairs(
    grad, w, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, parts_ptr, cols, inside, D, K,
    DOTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds the ordered pairs begin .. end to a latent's gradient; DOTS as in `_add_loaded`."""
    slots = tl.arange(0, PAIRS)
    pair = first_pairs(begin, order_ptr, end, PAIRS)
    for i in range(begin, end, PAIRS):
        live = i + slots < end
        coef, rows = _load_pairs(pair, live, coef_ptr, rows_ptr, tokens_ptr, cols, inside, D, K)
        pair = first_pairs(i + PAIRS, order_ptr, end, PAIRS)
        grad = _add_loaded(grad, w, coef, rows, parts_ptr + i + slots, live, DOTS)
    return grad


@triton.jit
def latents_kernel(
    order_ptr,  # [P] int32 or int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    tokens_ptr,  # [P] of a flat list, or None
    w_ptr,  # [F, D], DOTS only
    sums_ptr,  # [P // HEAVY, D] float32, of the blocks that belong to one latent
    parts_ptr,  # [blocks of columns, P] float32, DOTS only
    out_ptr,  # [F, D]
    F,
    D,
    P,
    K,
    DOTS: tl.constexpr,
    HEAVY: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
):
    """LATENTS rows of the gradient in a block of columns, one after another."""
    # On one axis: a grid's others end at 65535.
    blocks = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) % blocks
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inside_of(cols, D, FULL)
    parts_ptr += block * P
    slots = tl.arange(0, PAIRS)
    start = tl.program_id(0) // blocks * LATENTS
    begin = tl.load(offsets_ptr + start)
    end = tl.load(offsets_ptr + tl.minimum(start + 1, F))
    pair = first_pairs(begin, order_ptr, P, PAIRS)
    for number in range(start, tl.minimum(start + LATENTS, F)):
        next_end = tl.load(offsets_ptr + tl.minimum(number + 2, F))
        next_pair = first_pairs(end, order_ptr, P, PAIRS)
        at = (tl.zeros([], tl.int64) + number) * D + cols
        grad = tl.zeros([BLOCK_D], tl.float32)
        w = grad
        if begin < end:
            live = begin + slots < end
            coef, rows = _load_pairs(
                pair, live, coef_ptr, rows_ptr, tokens_ptr, cols, inside, D, K
            )  # fmt: skip
            if DOTS:
                w = tl.load(w_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
                w = w.to(tl.float32)
            first, last = tl.cdiv(begin, HEAVY), end // HEAVY  # whole blocks of this latent
            if first < last:
                grad = add_pairs(
                    grad, w, begin, first * HEAVY, order_ptr, coef_ptr, rows_ptr, tokens_ptr,
                    parts_ptr, cols, inside, D, K, DOTS, PAIRS,
                )  # fmt: skip
                for heavy in range(first, last):
                    # 32 bits suffice: the scratch is bounded.
                    grad += tl.load(sums_ptr + heavy * D + cols, mask=inside, other=0.0)
                begin = last * HEAVY
            else:
                grad = _add_loaded(grad, w, coef, rows, parts_ptr + begin + slots, live, DOTS)
                begin += PAIRS
            grad = add_pairs(
                grad, w, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, parts_ptr, cols,
                inside, D, K, DOTS, PAIRS,
            )  # fmt: skip
        # What is read and written once makes room for the rows, which are read once a pair.
        out = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=inside, eviction_policy="evict_first")
        begin = end
        end = next_end
        pair = next_pair


def latents_blocks(F: int, D: int) -> tuple[int, dict[str, int | bool]]:
    """Programs and sizes of `latents_kernel`, of one warp each: no sum crosses warps."""
    block_d = min(512, max(16, next_power_of_2(D)))
    blocks = cdiv(D, block_d)
    # Enough programs to fill a GPU several times over.
    latents = 16 if F * blocks >= 1 << 19 else 4
    sizes = {"LATENTS": latents, "PAIRS": 1, "BLOCK_D": block_d, "FULL": D % block_d == 0}
    return blocks * cdiv(F, latents), sizes


def scatter_rows(
    coef: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    rows: Tensor,  # [N, D]
    num_latents: int,
    dtype: torch.dtype | None = None,
    order: PairOrder | None = None,
    tokens: Tensor | None = None,  # [C], of a flat list
) -> Tensor:  # [F, D] in dtype; left out, float32
    """`reference.scatter_rows`; an order made before for the same pairs is used again."""
    P, K, D = top_idx.numel(), top_idx.shape[-1], rows.shape[1]
    if P == 0:
        return rows.new_zeros((num_latents, D), dtype=dtype or torch.float32)
    coef, rows = coef.contiguous(), rows.contiguous()
    order = order_pairs(top_idx, num_latents, coef) if order is None else order
    sums = block_sums(order, coef, rows, num_latents, K, tokens)
    out = rows.new_empty((num_latents, D), dtype=dtype or torch.float32)
    programs, sizes = latents_blocks(num_latents, D)
    latents_kernel[(programs,)](
        order.order, order.offsets, coef, rows, tokens, rows, sums.dec, coef, out,
        num_latents, D, P, K, DOTS=False, HEAVY=sums.heavy, **sizes, num_warps=1,
    )  # fmt: skip
    return out
