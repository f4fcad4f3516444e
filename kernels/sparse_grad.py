"""Triton kernels of the weight gradients: sums over the (token, latent) pairs of each latent.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K).  The pairs are ordered by
latent once (pair_order.py), for the decoder's and the encoder's gradient.  A latent's pairs are
then added by one program in token order; aligned blocks of HEAVY pairs that belong wholly to one
latent are added beforehand by programs of their own, so that a latent that fires on every token
costs its program N / HEAVY rows.  No atomics: the order of every sum depends on positions alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import HeavySums, PairGradients, PairOrder
from .shapes import cdiv, next_power_of_2, num_programs

# Scratch of the heavy blocks is kept under this many bytes by making the blocks longer.
_MAX_SCRATCH_BYTES = 32 << 20
_MIN_HEAVY = 64
# Programs a multiprocessor that add such blocks.
_HEAVY_PROGRAMS = 8


@triton.jit
def token_of(pair, tokens_ptr, live, K):
    """The tokens of pairs: they are given for a flat list; a rectangle has K pairs a token."""
    token = pair // K if tokens_ptr is None else tl.load(tokens_ptr + pair, mask=live, other=0)
    return token.to(tl.int64)


@triton.jit
def _heavy_kernel(
    order_ptr,  # [P] int32 or int64
    latents_ptr,  # [P] ordered
    dec_coef_ptr,  # [P]
    enc_coef_ptr,  # [P], BOTH only
    dec_rows_ptr,  # [N, D]
    enc_rows_ptr,  # [N, D], BOTH only
    dec_out_ptr,  # [P // HEAVY, D]
    enc_out_ptr,  # [P // HEAVY, D], BOTH only
    values_ptr,  # [P // HEAVY]
    tokens_ptr,  # [P] of a flat list, or None
    dec_tokens_ptr,  # the same of dec_rows
    blocks,  # P // HEAVY
    F,
    D,
    K,
    BOTH: tl.constexpr,
    HEAVY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Most blocks belong to several latents: a program looks at some of them in turn.
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = tl.zeros([], tl.int64) + number
        first = tl.load(latents_ptr + block * HEAVY).to(tl.int32)
        last = tl.load(latents_ptr + block * HEAVY + HEAVY - 1).to(tl.int32)
        # Several programs share a block's columns.
        heavy = (first == last) & (first < F)
        parts = tl.where(heavy, tl.cdiv(D, BLOCK_D), 0)
        for part in range(tl.program_id(1), parts, tl.num_programs(1)):
            cols = part * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (cols < D)[None, :]
            values = tl.zeros([BLOCK_P], tl.float32)
            dec = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            enc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            for start in range(0, HEAVY, BLOCK_P):
                at = block * HEAVY + start + tl.arange(0, BLOCK_P)
                pair = tl.load(order_ptr + at).to(tl.int32)
                token = token_of(pair, dec_tokens_ptr, pair >= 0, K)
                coef = tl.load(dec_coef_ptr + pair).to(tl.float32)
                rows = tl.load(
                    dec_rows_ptr + token[:, None] * D + cols[None, :], mask=inside, other=0.0
                )
                dec += coef[:, None] * rows.to(tl.float32)
                if BOTH:
                    token = token_of(pair, tokens_ptr, pair >= 0, K)
                    coef = tl.load(enc_coef_ptr + pair).to(tl.float32)
                    rows = tl.load(
                        enc_rows_ptr + token[:, None] * D + cols[None, :], mask=inside, other=0.0
                    )
                    enc += coef[:, None] * rows.to(tl.float32)
                values += coef
            if part == 0:
                tl.store(values_ptr + block, tl.sum(values, axis=0))
            out = block * D + cols
            tl.store(dec_out_ptr + out, tl.sum(dec, axis=0), mask=cols < D)
            if BOTH:
                tl.store(enc_out_ptr + out, tl.sum(enc, axis=0), mask=cols < D)


@triton.jit
def inside_of(cols, D, FULL: tl.constexpr):
    """Which of some columns there are; where blocks fill D, a constant, which costs nothing."""
    return tl.full(cols.shape, 1, tl.int1) if FULL else cols < D


@triton.jit
def first_pairs(begin, order_ptr, P, PAIRS: tl.constexpr):
    """The ordered pairs from `begin` on, which `latent_gradient` starts with: loaded before it is
    known where they end, so that they are there when it is."""
    at = begin + tl.arange(0, PAIRS)
    # 32 bits: a 64-bit division, by which pairs' tokens are found, is slow.
    return tl.load(order_ptr + at, mask=at < P, other=0).to(tl.int32)


@triton.jit
def _add_pairs(
    grad, value, pair, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, cols, inside, D, K,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds the ordered pairs begin .. end, of which `pair` are the first, to a latent's gradient
    and its coefficients' sum, PAIRS rows in flight at once.
    """
    for i in range(begin, end, PAIRS):
        live = i + tl.arange(0, PAIRS) < end
        row = token_of(pair, tokens_ptr, live, K)
        coef = tl.load(coef_ptr + pair, mask=live, other=0.0).to(tl.float32)
        mask = live[:, None] & inside[None, :]
        # Kept in the L2 cache, through which weights and moments stream: 5 to 7% at D = 4096.
        rows = tl.load(
            rows_ptr + row[:, None] * D + cols[None, :], mask=mask, other=0.0,
            eviction_policy="evict_last",
        )  # fmt: skip
        pair = first_pairs(i + PAIRS, order_ptr, end, PAIRS)
        grad += tl.sum(coef[:, None] * rows.to(tl.float32), axis=0)
        value += tl.sum(coef, axis=0)
    return grad, value


@triton.jit
def latent_gradient(
    pair, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr, values_ptr, cols, inside,
    D, K, HEAVY: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A latent's gradient and its coefficients' sum: its pairs, of which `pair` are the first,
    before, within and after the whole blocks that heavy_sums added.
    """
    first, last = tl.cdiv(begin, HEAVY), end // HEAVY
    split = first < last
    grad = tl.zeros([BLOCK_D], tl.float32)
    value = tl.sum(tl.zeros([PAIRS], tl.float32), axis=0)
    grad, value = _add_pairs(
        grad, value, pair, begin, tl.where(split, first * HEAVY, end), order_ptr, coef_ptr,
        rows_ptr, tokens_ptr, cols, inside, D, K, PAIRS,
    )  # fmt: skip
    if split:
        for block in range(first, last):
            # 32 bits suffice: the scratch is bounded.
            grad += tl.load(sums_ptr + block * D + cols, mask=inside, other=0.0)
            value += tl.load(values_ptr + block)
        pair = first_pairs(last * HEAVY, order_ptr, end, PAIRS)
        grad, value = _add_pairs(
            grad, value, pair, last * HEAVY, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, cols,
            inside, D, K, PAIRS,
        )  # fmt: skip
    return grad, value


def heavy_block(num_pairs: int, D: int, matrices: int) -> int:
    """Pairs a heavy block, so that the sums of all blocks stay within the scratch limit."""
    heavy = _MIN_HEAVY
    while num_pairs // heavy * D * 4 * matrices > _MAX_SCRATCH_BYTES:
        heavy *= 2
    return heavy


def heavy_sums(order: PairOrder, pairs: PairGradients, num_latents: int) -> HeavySums:
    """`reference.heavy_sums`: both gradients' in one pass, where their rows are as wide."""
    widths = {pairs.dec_rows.shape[1], pairs.enc_rows.shape[1]}
    if len(widths) > 1:
        heavy = heavy_block(order.order.numel(), max(widths), 2)
        dec, enc = (
            block_sums(order, coef, rows, num_latents, pairs.k, of, heavy=heavy)
            for coef, rows, of in (
                (pairs.dec_coef, pairs.dec_rows, pairs.of_dec),
                (pairs.enc_coef, pairs.enc_rows, pairs.tokens),
            )
        )
        return HeavySums(heavy, dec.dec, enc.dec, enc.values)
    return block_sums(
        order, pairs.dec_coef, pairs.dec_rows, num_latents, pairs.k, pairs.of_dec, pairs.enc_coef,
        pairs.enc_rows, pairs.tokens,
    )  # fmt: skip


def block_sums(
    order: PairOrder,
    dec_coef: Tensor,  # [P]
    dec_rows: Tensor,  # [N, D]
    num_latents: int,
    k: int,
    tokens: Tensor | None = None,  # [P], of a flat list
    enc_coef: Tensor | None = None,  # [P]
    enc_rows: Tensor | None = None,  # [N, D]
    enc_tokens: Tensor | None = None,  # [P], of a flat list
    heavy: int | None = None,  # pairs a block
) -> HeavySums:
    """Adds the pairs of every aligned block that belongs to one latent, for one gradient or both
    in one pass.
    """
    P, D = order.order.numel(), dec_rows.shape[1]
    heavy = heavy or heavy_block(P, D, 1 if enc_rows is None else 2)
    blocks = P // heavy
    dec = dec_rows.new_empty((blocks, D), dtype=torch.float32)
    enc = torch.empty_like(dec) if enc_rows is not None else None
    values = dec.new_empty(blocks)
    if blocks:
        block_d = min(256, next_power_of_2(D))
        shares = cdiv(D, 4 * block_d)
        programs = max(1, _HEAVY_PROGRAMS * num_programs(dec.device) // shares)
        _heavy_kernel[(min(blocks, programs), shares)](
            order.order, order.latents, dec_coef, dec_coef if enc_coef is None else enc_coef,
            dec_rows, dec_rows if enc_rows is None else enc_rows, dec, dec if enc is None else enc,
            values, enc_tokens, tokens, blocks, num_latents, D, k,
            BOTH=enc is not None, HEAVY=heavy, BLOCK_P=8, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return HeavySums(heavy, dec, enc, values)
