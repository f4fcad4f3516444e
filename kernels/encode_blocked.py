"""Encoder and exact top-k by library calls in blocks of rows: for float32, odd widths and k near F.

Each block holds at most 48 MiB of pre-activations and sort keys; no host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_encode import sort_keys

_BLOCK_BYTES = 48 << 20
_INDEX_BITS = 0x7FFFFFFF
# Of one pre-activation: float32 values before and after masking, and an int64 key.
_BYTES_EACH = 4 + 4 + 8


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return torch.addmm(b_enc, x, W_enc.T)
    return torch.mm(x, W_enc.T, out_dtype=torch.float32).add_(b_enc)


def _select(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 values, ties to the lowest column, NaN above +inf."""
    keys = sort_keys(values, torch.arange(values.shape[1], device=values.device))
    top = keys.topk(k, dim=1).values
    high = (top >> 32).to(torch.int32)
    picked = torch.where(high < 0, high ^ _INDEX_BITS, high).view(torch.float32)
    return picked, (_INDEX_BITS - (top & 0xFFFFFFFF)).to(torch.int32)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.topk_encode`, rows in blocks."""
    values = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    rows = max(1, _BLOCK_BYTES // (_BYTES_EACH * W_enc.shape[0]))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        pre = _pre_activations(x[part], W_enc, b_enc)
        values[part], indices[part] = _select(pre.relu_(), k)
    return values, indices


def masked_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The second list of `reference.topk_encode_aux`, rows in blocks."""
    values = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    rows = max(1, _BLOCK_BYTES // (_BYTES_EACH * W_enc.shape[0]))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        pre = _pre_activations(x[part], W_enc, b_enc)
        values[part], where = _select(pre.masked_fill(~mask, -torch.inf), k)
        indices[part] = where.masked_fill(values[part] == -torch.inf, 0)
    return values, indices
