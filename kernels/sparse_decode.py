"""Triton kernels of the sparse decoder: gather and weighted sum, the same with the loss's residual,
and gathered dot products.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  One program a token and a block of columns
(decode) or of pairs (dots); several latents' rows are in flight at once as a [BLOCK_K, BLOCK_D]
tile.  No atomics: the order of every sum is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import cdiv, next_power_of_2


@triton.jit
def _decode_kernel(
    acts_ptr,  # [N, K]
    idx_ptr,  # [N, K]
    w_ptr,  # [F, D]
    out_ptr,  # [N, D]
    b_ptr,  # [D], RESIDUAL only
    x_ptr,  # [N, D], RESIDUAL only
    sq_ptr,  # [N, blocks] sums of squares, RESIDUAL only
    D,
    K,
    RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        act = tl.load(acts_ptr + token * K + slot, mask=slot < K, other=0.0).to(tl.float32)
        latent = tl.load(idx_ptr + token * K + slot, mask=slot < K, other=0).to(tl.int64)
        # A zero activation loads nothing: on a shard most pairs belong to other shards.
        mask = (act != 0)[:, None] & (cols < D)[None, :]
        w = tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=mask, other=0.0)
        acc += act[:, None] * w.to(tl.float32)
    row = tl.sum(acc, axis=0)
    if RESIDUAL:
        x = tl.load(x_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        row += tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32) - x
        square = tl.sum(tl.where(cols < D, row * row, 0.0), axis=0)
        tl.store(sq_ptr + token * tl.num_programs(1) + tl.program_id(1), square)
    tl.store(out_ptr + token * D + cols, row.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _dots_kernel(
    grad_ptr,  # [N, D]
    idx_ptr,  # [N, K]
    w_ptr,  # [F, D]
    out_ptr,  # [N, K] float32
    acts_ptr,  # [N, K], COEFS only
    dec_ptr,  # [N, K] float32, COEFS only
    scale_ptr,  # scalar float32, COEFS only
    D,
    K,
    COEFS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = token * K + slot
    used = slot < K
    latent = tl.load(idx_ptr + pair, mask=used, other=0).to(tl.int64)
    if COEFS:
        act = tl.load(acts_ptr + pair, mask=used, other=0.0).to(tl.float32)
        wanted = used & (act != 0)
    else:
        wanted = used
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        mask = wanted[:, None] & (cols < D)[None, :]
        w = tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=mask, other=0.0)
        acc += g[None, :] * w.to(tl.float32)
    dots = tl.sum(acc, axis=1)
    if COEFS:
        scale = tl.load(scale_ptr)
        dots = dots * scale
        tl.store(dec_ptr + pair, act * scale, mask=used)
    tl.store(out_ptr + pair, dots, mask=used)


def _decode_blocks(D: int) -> dict[str, int]:
    # One warp a program, so that no sum crosses warps: 1.8x over four at D=768, K=32.
    return {"BLOCK_K": 4, "BLOCK_D": min(256, max(16, next_power_of_2(D))), "num_warps": 1}


def _dots_blocks(D: int, K: int) -> dict[str, int]:
    block_d = min(256, max(16, next_power_of_2(D)))
    return {"BLOCK_K": min(8, next_power_of_2(K)), "BLOCK_D": block_d, "num_warps": 1}


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K] int32 or int64
    W_dec: Tensor,  # [F, D]
) -> Tensor:  # [N, D] in W_dec's dtype
    """`reference.sparse_decode`; a row of W_dec whose activation is 0 is never read."""
    (N, K), D = top_idx.shape, W_dec.shape[1]
    out = W_dec.new_empty((N, D))
    if N:
        top_acts, top_idx, W_dec = top_acts.contiguous(), top_idx.contiguous(), W_dec.contiguous()
        blocks = _decode_blocks(D)
        args: tuple[Any, ...] = (top_acts, top_idx, W_dec, out, out, out, out, D, K)
        _decode_kernel[(N, cdiv(D, blocks["BLOCK_D"]))](*args, RESIDUAL=False, **blocks)
    return out


def decode_residual(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor]:  # [N, D] in W_dec's dtype, scalar float32
    """`reference.decode_residual` in one pass: the reconstruction itself is never written."""
    (N, K), D = top_idx.shape, W_dec.shape[1]
    out = W_dec.new_empty((N, D))
    blocks = _decode_blocks(D)
    num_blocks = cdiv(D, blocks["BLOCK_D"])
    sq = W_dec.new_empty((N, num_blocks), dtype=torch.float32)
    if N:
        args = (top_acts.contiguous(), top_idx.contiguous(), W_dec.contiguous(), out, b_dec)
        _decode_kernel[(N, num_blocks)](*args, x.contiguous(), sq, D, K, RESIDUAL=True, **blocks)
    return out, sq.sum()


def gathered_dots(
    grad: Tensor,  # [N, D]
    top_idx: Tensor,  # [N, K]
    W: Tensor,  # [F, D]
) -> Tensor:  # [N, K] float32
    """`reference.gathered_dots`."""
    (N, K), D = top_idx.shape, W.shape[1]
    out = W.new_empty((N, K), dtype=torch.float32)
    if N:
        blocks = _dots_blocks(D, K)
        grid = (N, cdiv(K, blocks["BLOCK_K"]))
        grad, top_idx, W = grad.contiguous(), top_idx.contiguous(), W.contiguous()
        _dots_kernel[grid](grad, top_idx, W, out, out, out, out, D, K, COEFS=False, **blocks)
    return out


def pair_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    residual: Tensor,  # [N, D]
    scale: Tensor,  # scalar float32
) -> tuple[Tensor, Tensor]:  # [N, K] float32 x 2
    """`reference.pair_coefs` in one pass."""
    (N, K), D = top_idx.shape, W_dec.shape[1]
    enc = W_dec.new_empty((N, K), dtype=torch.float32)
    dec = torch.empty_like(enc)
    if N:
        blocks = _dots_blocks(D, K)
        grid = (N, cdiv(K, blocks["BLOCK_K"]))
        args = (residual, top_idx.contiguous(), W_dec, enc, top_acts.contiguous(), dec, scale)
        _dots_kernel[grid](*args, D, K, COEFS=True, **blocks)
    return dec, enc
