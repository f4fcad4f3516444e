"""The encoder in plain PyTorch: the part of reference.py that selects.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  W_enc is [F, D]: a latent is a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are encoded in blocks of at most this many pre-activations, so that a wide SAE fits a
# laptop's memory.
_MAX_BLOCK_ELEMENTS = 1 << 25


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select_topk(
    values: Tensor,  # [N, M]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] values in descending order, [N, k] int64 columns
    """The k largest of each row, exactly: ties go to the lowest column, NaN sorts above +inf as in
    `torch.topk`.
    """
    # topk breaks ties arbitrarily: where the next value equals the k-th, or both are NaN, sort.
    top, cols = values.topk(min(k + 1, values.shape[1]), dim=1)
    ambiguous = ((top[:, k:] == top[:, k - 1 : k]) | top[:, k:].isnan()).any(dim=1)
    top, cols = top[:, :k], cols[:, :k]
    if bool(ambiguous.any()):
        rows = ambiguous.nonzero().squeeze(1)
        ordered, order = values[rows].sort(dim=1, descending=True, stable=True)
        top[rows], cols[rows] = ordered[:, :k], order[:, :k]
    cols, by_col = cols.sort(dim=1)
    top, by_value = top.gather(1, by_col).sort(dim=1, descending=True, stable=True)
    return top, cols.gather(1, by_value)


def sort_key(values: Tensor) -> Tensor:
    """Integers that order as float32 (int32) or float64 (int64) values, both zeros alike, NaN above
    +inf.
    """
    kind, sign = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(kind)
    # Negative floats count down. In place: the keys are the largest tensors there are.
    bits ^= (bits >> sign) & torch.iinfo(kind).max
    return bits


def sort_keys(
    values: Tensor,  # float32
    latents: Tensor,  # integers from 0 to 2**31 - 1, of a shape that broadcasts
) -> Tensor:  # int64
    """Keys that order as (value, lowest latent first): their k largest are a top-k without ties,
    found without a host sync.
    """
    keys = sort_key(values).to(torch.int64)
    keys <<= 32
    keys += 0x7FFFFFFF - latents
    return keys


def pre_activations(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
) -> Tensor:  # [N, F] float32, or float64 for float64 inputs
    """`x @ W_enc.T + b_enc`, accumulated and returned in `accumulate_dtype(x.dtype)`."""
    dtype = accumulate_dtype(x.dtype)
    return torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype).T)


def topk_encode(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32/64, descending; [N, k] int32
    """The k largest of `relu(x @ W_enc.T + b_enc)` a row; equal values, zeros too, go to the
    lowest index.
    """
    values, indices = [], []
    for rows in torch.split(x, max(1, _MAX_BLOCK_ELEMENTS // W_enc.shape[0])):
        v, i = select_topk(pre_activations(rows, W_enc, b_enc).relu_(), k)
        values.append(v)
        indices.append(i.to(torch.int32))
    return torch.cat(values), torch.cat(indices)
