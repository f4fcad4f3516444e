"""Triton kernels of the decoder's whole backward pass: the weights' gradient and the activations'
from one gather of the incoming gradient's rows.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K).  The pairs are ordered by
latent, so that a row of W_dec is read once, not once a pair. A program has some latents and a block
of columns: it adds up its part of the weights' gradient as dense_grad.py says, and writes its part
of each pair's dot product, which `_gather_dots_kernel` adds in the order of the blocks. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sparse_decode
from .dense_grad import add_pairs, latents_blocks, latents_kernel, scatter_rows
from .pair_order import order_pairs
from .reference import PairOrder
from .shapes import cdiv
from .sparse_grad import heavy_block

# The parts of the dot products; beyond it they are computed by themselves.
_MAX_PARTS_BYTES = 64 << 20


@triton.jit
def _heavy_kernel(
    order_ptr,  # [P] int32 or int64
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
        for part in range(tl.program_id(1), tl.cdiv(D, BLOCK_D), tl.num_programs(1)):
            cols = part * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = cols < D
            w = tl.load(w_ptr + first.to(tl.int64) * D + cols, mask=inside, other=0.0)
            grad = add_pairs(
                tl.zeros([BLOCK_D], tl.float32), w.to(tl.float32), block * HEAVY,
                block * HEAVY + HEAVY, order_ptr, coef_ptr, rows_ptr, None, parts_ptr + part * P,
                cols, inside, D, K, True, PAIRS,
            )  # fmt: skip
            tl.store(sums_ptr + block * D + cols, grad, mask=inside)


@triton.jit
def _gather_dots_kernel(
    order_ptr, offsets_ptr, parts_ptr, out_ptr, F, P, blocks, BLOCK: tl.constexpr
):
    """out[pair] = the sum of its parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Beyond them stands any pair.
    live = at < tl.load(offsets_ptr + F)
    pair = tl.load(order_ptr + at, mask=live, other=0)
    dots = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        dots += tl.load(parts_ptr + block * P + at, mask=live, other=0.0)
    tl.store(out_ptr + pair, dots, mask=live)


def decode_backward(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    grad: Tensor,  # [N, D]
    order: PairOrder | None = None,
) -> tuple[Tensor, Tensor]:  # [N, K] float32, [F, D] in W_dec's dtype
    """`reference.decode_backward`; an order of all pairs made before is used."""
    (N, K), (F, D), P = top_idx.shape, W_dec.shape, top_idx.numel()
    programs, sizes = latents_blocks(F, D)
    block_d = sizes["BLOCK_D"]
    blocks = cdiv(D, block_d)
    if P == 0 or P * blocks * 4 > _MAX_PARTS_BYTES:
        dots = sparse_decode.gathered_dots(grad, top_idx, W_dec)
        return dots, scatter_rows(top_acts, top_idx, grad, F, W_dec.dtype, order)
    top_acts, grad, W_dec = top_acts.contiguous(), grad.contiguous(), W_dec.contiguous()
    order = order_pairs(top_idx, F) if order is None else order
    heavy = heavy_block(P, D, 1)
    parts = torch.empty(blocks, P, dtype=torch.float32, device=grad.device)
    sums = torch.empty(P // heavy, D, dtype=torch.float32, device=grad.device)
    if P // heavy:
        _heavy_kernel[(P // heavy, cdiv(blocks, 4))](
            order.order, order.latents, top_acts, grad, W_dec, sums, parts, F, D, P, K,
            HEAVY=heavy, PAIRS=4, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    out = torch.empty_like(W_dec)
    latents_kernel[(programs,)](
        order.order, order.offsets, top_acts, grad, None, W_dec, sums, parts, out, F, D, P, K,
        DOTS=True, HEAVY=heavy, **sizes, num_warps=1,
    )  # fmt: skip
    dots = torch.empty(N, K, dtype=torch.float32, device=grad.device)
    _gather_dots_kernel[(cdiv(P, 256),)](
        order.order, order.offsets, parts, dots, F, P, blocks, BLOCK=256
    )
    return dots, out
