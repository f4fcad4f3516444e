"""A Triton kernel that centres the batch and gathers what its variance needs.

Legend: N tokens, D d_in.  Partial sums are written by block and added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import cdiv

_ROWS = 32
_COLS = 128


@triton.jit
def _centre_kernel(
    x_ptr,  # [N, D]
    b_ptr,  # [D]
    out_ptr,  # [N, D], CENTRE only
    sums_ptr,  # [row blocks, D]
    squares_ptr,  # [row blocks, col blocks]
    N, D, CENTRE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (row < N)[:, None] & (cols < D)[None, :]
    at = row[:, None] * D + cols[None, :]
    centred = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if CENTRE:
        b = tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        centred = tl.where(mask, centred - b[None, :], 0.0)
        tl.store(out_ptr + at, centred.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * D + cols, tl.sum(centred, axis=0), mask=cols < D)
    square = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
    tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), square)


def centre(
    x: Tensor,  # [N, D]
    b_dec: Tensor,  # [D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D] in dtype, [blocks, D] float32, [blocks, blocks]
    """`reference.centre` in one pass over x."""
    N, D = x.shape
    grid = (cdiv(N, _ROWS), cdiv(D, _COLS))
    out = x.new_empty((N, D), dtype=dtype)
    sums = x.new_empty((grid[0], D), dtype=torch.float32)
    squares = x.new_empty(grid, dtype=torch.float32)
    _centre_kernel[grid](
        x.contiguous(), b_dec, out, sums, squares, N, D,
        CENTRE=True, ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip
    return out, sums, squares


def token_sums(x: Tensor) -> tuple[Tensor, Tensor]:  # [blocks, D] float32, [blocks, blocks]
    """`reference.token_sums` in one pass over x [N, D]."""
    N, D = x.shape
    grid = (cdiv(N, _ROWS), cdiv(D, _COLS))
    sums = x.new_empty((grid[0], D), dtype=torch.float32)
    squares = x.new_empty(grid, dtype=torch.float32)
    _centre_kernel[grid](
        x.contiguous(), x, x, sums, squares, N, D,
        CENTRE=False, ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip
    return sums, squares
