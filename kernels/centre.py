"""Triton kernels over the batch and over W_enc that the step's biases and loss need.

Legend: N tokens, D d_in, F d_sae (of this shard).  Partial sums are written by block and added in
a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
_COLS = 128


@triton.jit
def _centre_kernel(
    x_ptr,  # [N, D]
    b_ptr,  # [D]
    out_ptr,  # [N, D]
    sums_ptr,  # [row blocks, D]
    squares_ptr,  # [row blocks, col blocks]
    N,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (row < N)[:, None] & (cols < D)[None, :]
    at = row[:, None] * D + cols[None, :]
    b = tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - b[None, :], 0.0)
    tl.store(out_ptr + at, centred.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * D + cols, tl.sum(centred, axis=0), mask=cols < D)
    square = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
    tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
def _weighted_rows_kernel(
    weights_ptr,  # [F]
    w_ptr,  # [F, D]
    out_ptr,  # [latent blocks, D]
    F,
    D,
    LATENTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for start in range(0, LATENTS, BLOCK_F):
        latent = tl.program_id(0).to(tl.int64) * LATENTS + start + tl.arange(0, BLOCK_F)
        weight = tl.load(weights_ptr + latent, mask=latent < F, other=0.0)
        # Latents that did not fire have no gradient: their rows are not read.
        mask = (weight != 0)[:, None] & (cols < D)[None, :]
        w = tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * w.to(tl.float32)
    tl.store(out_ptr + tl.program_id(0) * D + cols, tl.sum(acc, axis=0), mask=cols < D)


def centre(
    x: Tensor,  # [N, D]
    b_dec: Tensor,  # [D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D] in dtype, [blocks, D] float32, [blocks, blocks]
    """`reference.centre` in one pass over x."""
    N, D = x.shape
    grid = (triton.cdiv(N, _ROWS), triton.cdiv(D, _COLS))
    out = x.new_empty((N, D), dtype=dtype)
    sums = x.new_empty((grid[0], D), dtype=torch.float32)
    squares = x.new_empty(grid, dtype=torch.float32)
    _centre_kernel[grid](
        x.contiguous(), b_dec, out, sums, squares, N, D, ROWS=_ROWS, COLS=_COLS, num_warps=4
    )
    return out, sums, squares


def weighted_rows(
    weights: Tensor,  # [F] float32
    W: Tensor,  # [F, D]
) -> Tensor:  # [D] float32
    """`reference.weighted_rows`, reading only rows whose weight is not 0."""
    F, D = W.shape
    block_d = min(256, triton.next_power_of_2(D))
    # 512 partial sums a column: enough programs to fill a GPU at D = 768.
    latents = max(_ROWS, triton.next_power_of_2(F) // 512)
    grid = (triton.cdiv(F, latents), triton.cdiv(D, block_d))
    out = W.new_empty((grid[0], D), dtype=torch.float32)
    _weighted_rows_kernel[grid](
        weights, W, out, F, D, LATENTS=latents, BLOCK_F=16, BLOCK_D=block_d, num_warps=4
    )
    return out.sum(dim=0)
