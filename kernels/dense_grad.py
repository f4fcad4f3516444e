"""Triton kernel of a weight matrix's dense gradient, as autograd wants it.

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
from .sparse_grad import block_sums, first_pairs, inside_of, latent_gradient


@triton.jit
def latents_kernel(
    order_ptr,  # [P] int32 or int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    tokens_ptr,  # [P] of a flat list, or None
    sums_ptr, values_ptr,  # [P // HEAVY, D] and [P // HEAVY] of block_sums
    out_ptr,  # [F, D]
    F, D, P, K, HEAVY: tl.constexpr, LATENTS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """LATENTS rows of the gradient in a block of columns, one after another."""
    # On one axis: a grid's others end at 65535.
    blocks = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inside_of(cols, D, FULL)
    start = tl.program_id(0) // blocks * LATENTS
    begin = tl.load(offsets_ptr + start)
    end = tl.load(offsets_ptr + tl.minimum(start + 1, F))
    pair = first_pairs(begin, order_ptr, P, PAIRS)
    for number in range(start, tl.minimum(start + LATENTS, F)):
        next_end = tl.load(offsets_ptr + tl.minimum(number + 2, F))
        next_pair = first_pairs(end, order_ptr, P, PAIRS)
        grad, _ = latent_gradient(
            pair, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr, values_ptr, cols,
            inside, D, K, HEAVY, PAIRS, BLOCK_D,
        )  # fmt: skip
        # What is written once makes room for the rows, which are read once a pair.
        at = (tl.zeros([], tl.int64) + number) * D + cols
        out = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=inside, eviction_policy="evict_first")
        begin, end, pair = end, next_end, next_pair


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
        order.order, order.offsets, coef, rows, tokens, sums.dec, sums.values, out, num_latents, D,
        P, K, HEAVY=sums.heavy, **sizes, num_warps=1,
    )  # fmt: skip
    return out
