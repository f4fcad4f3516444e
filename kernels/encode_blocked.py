"""Encoder by a library matmul in blocks of rows: for few tokens where encode_tiles.py does not
serve, float32, odd widths, k near F.

Each block holds at most 56 MiB of pre-activations and what their selection takes; no host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import encode_rows
from .encode_plan import GroupSizes, group_sizes
from .reference_encode import sort_keys
from .shapes import cdiv

_BLOCK_BYTES = 56 << 20
# Of one block of rows that is to be faster than the fused encoder.
_FEW_BYTES = 50 << 20
_INDEX_BITS = 0x7FFFFFFF
# Of one pre-activation: float32 values, their bits, and an int64 key.
_BYTES_EACH = 4 + 4 + 8


def _products(x: Tensor, W_enc: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x @ W_enc.T
    return torch.mm(x, W_enc.T, out_dtype=torch.float32)


def _select(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 values, ties to the lowest column, NaN above +inf."""
    keys = sort_keys(values, torch.arange(values.shape[1], device=values.device))
    top = keys.topk(k, dim=1).values
    high = (top >> 32).to(torch.int32)
    picked = torch.where(high < 0, high ^ _INDEX_BITS, high).view(torch.float32)
    return picked, (_INDEX_BITS - (top & 0xFFFFFFFF)).to(torch.int32)


def _row_bytes(F: int, sizes: GroupSizes | None) -> int:
    """Bytes that a row takes: pre-activations, groups' largest, slots and keys."""
    if sizes is None:
        return _BYTES_EACH * F
    return 4 * F + 4 * cdiv(F, sizes.size) + (4 + 2 * 8) * sizes.k_pow2


def is_faster(N: int, D: int, F: int, k: int) -> bool:
    """Whether it is to be taken before the fused encoder, by an H100's times: all rows are one
    block, and either few or so wide that what the selection reads weighs little."""
    one_block = 4 * N * F <= _FEW_BYTES and group_sizes(F, k) is not None
    return one_block and (N <= 256 or D >= 1024)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.topk_encode`, rows in blocks; b_enc is float32."""
    values = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    sizes = group_sizes(W_enc.shape[0], k)
    rows = max(1, _BLOCK_BYTES // _row_bytes(W_enc.shape[0], sizes))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        pre = _products(x[part], W_enc)
        if sizes:
            encode_rows.select_rows(pre, b_enc, sizes, values[part], indices[part])
        else:
            values[part], indices[part] = _select(pre.add_(b_enc).relu_(), k)
    return values, indices
