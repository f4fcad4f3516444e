"""Triton kernels of the decoder's whole backward pass: the weights' gradient and the activations'
from one gather of the incoming gradient's rows.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K).  The pairs are ordered by
latent, so that a row of W_dec is read once, not once a pair. A program has some latents and a block
of columns: it adds up its part of the weights' gradient as sparse_grad.py says, and writes its part
of each pair's dot product, which `_gather_dots_kernel` adds in the order of the blocks. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sparse_decode
from .reference import PairOrder
from .shapes import cdiv, next_power_of_2
from .sparse_grad import heavy_block, order_pairs, scatter_rows

# The parts of the dot products; beyond it they are computed by themselves.
_MAX_PARTS_BYTES = 64 << 20


@triton.jit
def _add_pairs(
    grad, w, begin, end, order_ptr, coef_ptr, rows_ptr, parts_ptr, cols, D, K, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds the ordered pairs begin .. end to a latent's gradient and writes their dot products with
    its row."""
    for i in range(begin, end, PAIRS):
        at = i + tl.arange(0, PAIRS)
        pair = tl.load(order_ptr + at, mask=at < end, other=0)
        coef = tl.load(coef_ptr + pair, mask=at < end, other=0.0).to(tl.float32)
        mask = (at < end)[:, None] & (cols < D)[None, :]
        rows = tl.load(rows_ptr + (pair // K)[:, None] * D + cols[None, :], mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        grad += tl.sum(coef[:, None] * rows, axis=0)
        tl.store(parts_ptr + at, tl.sum(rows * w[None, :], axis=1), mask=at < end)
    return grad


@triton.jit
def _heavy_kernel(
    order_ptr,  # [P] int64
    latents_ptr,  # [P] ordered
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    w_ptr,  # [F, D]
    sums_ptr,  # [P // HEAVY, D] float32
    parts_ptr,  # [blocks of columns, P] float32
    F,
    D,
    P,
    K,
    HEAVY: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """An aligned block of pairs that belong to one latent."""
    block = tl.program_id(0).to(tl.int64)
    first = tl.load(latents_ptr + block * HEAVY).to(tl.int32)
    last = tl.load(latents_ptr + block * HEAVY + HEAVY - 1).to(tl.int32)
    if (first == last) & (first < F):
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = cols < D
        w = tl.load(w_ptr + first.to(tl.int64) * D + cols, mask=inside, other=0.0).to(tl.float32)
        grad = _add_pairs(
            tl.zeros([BLOCK_D], tl.float32), w, block * HEAVY, block * HEAVY + HEAVY, order_ptr,
            coef_ptr, rows_ptr, parts_ptr + tl.program_id(1) * P, cols, D, K, PAIRS,
        )  # fmt: skip
        tl.store(sums_ptr + block * D + cols, grad, mask=inside)


@triton.jit
def _latents_kernel(
    order_ptr,  # [P] int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    w_ptr,  # [F, D]
    sums_ptr,  # [P // HEAVY, D] of _heavy_kernel
    parts_ptr,  # [blocks of columns, P] float32
    out_ptr,  # [F, D]
    F,
    D,
    P,
    K,
    HEAVY: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # On one axis: a grid's others end at 65535.
    blocks = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) % blocks
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    parts_ptr += block * P
    start = tl.program_id(0) // blocks * LATENTS
    for i in range(0, tl.minimum(LATENTS, F - start)):
        latent = (start + i).to(tl.int64)
        begin = tl.load(offsets_ptr + latent)
        end = tl.load(offsets_ptr + latent + 1)
        grad = tl.zeros([BLOCK_D], tl.float32)
        if begin < end:
            w = tl.load(w_ptr + latent * D + cols, mask=inside, other=0.0).to(tl.float32)
            first, last = tl.cdiv(begin, HEAVY), end // HEAVY  # whole blocks of this latent
            split = first < last
            grad = _add_pairs(
                grad, w, begin, tl.where(split, first * HEAVY, end), order_ptr, coef_ptr, rows_ptr,
                parts_ptr, cols, D, K, PAIRS,
            )  # fmt: skip
            if split:
                for heavy in range(first, last):
                    # 32 bits suffice: the scratch is bounded.
                    grad += tl.load(sums_ptr + heavy * D + cols, mask=inside, other=0.0)
                grad = _add_pairs(
                    grad, w, last * HEAVY, end, order_ptr, coef_ptr, rows_ptr, parts_ptr, cols, D,
                    K, PAIRS,
                )  # fmt: skip
        tl.store(out_ptr + latent * D + cols, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gather_dots_kernel(order_ptr, parts_ptr, out_ptr, P, blocks, BLOCK: tl.constexpr):
    """out[pair] = the sum of its parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order_ptr + at, mask=at < P, other=0)
    dots = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        dots += tl.load(parts_ptr + block * P + at, mask=at < P, other=0.0)
    tl.store(out_ptr + pair, dots, mask=at < P)


def decode_backward(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    grad: Tensor,  # [N, D]
    order: PairOrder | None = None,
) -> tuple[Tensor, Tensor]:  # [N, K] float32, [F, D] in W_dec's dtype
    """`reference.decode_backward`; an order of all pairs made before is used."""
    (N, K), (F, D), P = top_idx.shape, W_dec.shape, top_idx.numel()
    block_d = min(256, max(16, next_power_of_2(D)))
    blocks = cdiv(D, block_d)
    if P == 0 or P * blocks * 4 > _MAX_PARTS_BYTES:
        dots = sparse_decode.gathered_dots(grad, top_idx, W_dec)
        return dots, scatter_rows(top_acts, top_idx, grad, F, W_dec.dtype)
    top_acts, grad, W_dec = top_acts.contiguous(), grad.contiguous(), W_dec.contiguous()
    order = order_pairs(top_idx, F) if order is None else order
    heavy = heavy_block(P, D, 1)
    parts = torch.empty(blocks, P, dtype=torch.float32, device=grad.device)
    sums = torch.empty(P // heavy, D, dtype=torch.float32, device=grad.device)
    sizes = {"HEAVY": heavy, "PAIRS": 4, "BLOCK_D": block_d, "num_warps": 1}
    if P // heavy:
        _heavy_kernel[(P // heavy, blocks)](
            order.order, order.latents, top_acts, grad, W_dec, sums, parts, F, D, P, K, **sizes
        )
    out = torch.empty_like(W_dec)
    _latents_kernel[(blocks * cdiv(F, 4),)](
        order.order, order.offsets, top_acts, grad, W_dec, sums, parts, out, F, D, P, K, LATENTS=4,
        **sizes,
    )  # fmt: skip
    dots = torch.empty(N, K, dtype=torch.float32, device=grad.device)
    _gather_dots_kernel[(cdiv(P, 512),)](order.order, parts, dots, P, blocks, BLOCK=512)
    return dots, out
