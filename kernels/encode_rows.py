"""Encoder by a library matmul in blocks of rows, whose k largest are then selected: for few tokens,
float32, odd widths, k near F.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

Each block holds at most 56 MiB of pre-activations and keys, or one row, whose own are more from 4M
latents on; no host sync.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_plan import sort_size
from .encode_select import stream_row
from .reference_encode import sort_keys
from .shapes import next_power_of_2

_BLOCK_BYTES = 56 << 20
_INDEX_BITS = 0x7FFFFFFF
# Of e4m3 rows that are products' operands at once.
_DECODED_ELEMENTS = 1 << 22
# Of one pre-activation, where torch selects: float32 values, their bits, and an int64 key.
_BYTES_EACH = 4 + 4 + 8
# Beyond it torch selects.
_MAX_K = 512
# Pre-activations of a row that are looked at together.
_CHUNK = 2048


@triton.jit
def _rows_kernel(
    pre_ptr,  # [N, F] float32, without bias
    bias_ptr,  # [F] float32
    keys_ptr,  # [N, KEYS] int64, scratch
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    F, k, SORT: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stream_row(
        None, None, pre_ptr + row * F, bias_ptr, None, keys_ptr + row * KEYS, values_ptr + row * k,
        indices_ptr + row * k, F, 0, k, SORT, KEYS, CHUNK, 1,
    )  # fmt: skip


def _sizes(F: int, k: int) -> tuple[int, int, int]:
    """SORT, KEYS and CHUNK of a row's selection."""
    sort, chunk = sort_size(k), min(_CHUNK, next_power_of_2(max(F, 32)))
    return sort, next_power_of_2(sort + chunk), chunk


def select_rows(
    pre: Tensor,  # [N, F] float32, without bias, contiguous
    b_enc: Tensor,  # [F] float32
    values: Tensor,  # [N, k] float32, filled
    indices: Tensor,  # [N, k] int32, filled
) -> None:
    """The k largest of `relu(pre + b_enc)` of each row, descending, ties to the lowest latent; NaN
    above +inf."""
    (N, k), F = values.shape, pre.shape[1]
    sort, held, chunk = _sizes(F, k)
    keys = torch.empty(N, held, dtype=torch.int64, device=pre.device)
    _rows_kernel[(N,)](
        pre, b_enc, keys, values, indices, F, k, sort, held, chunk, num_warps=max(1, chunk // 256)
    )


def _products(x: Tensor, W_enc: Tensor, scale: Tensor | None = None) -> Tensor:
    if scale is not None:
        pre = torch.empty(len(x), len(W_enc), dtype=torch.float32, device=x.device)
        step = max(1, _DECODED_ELEMENTS // x.shape[1])
        for at in range(0, len(W_enc), step):
            part = slice(at, at + step)
            pre[:, part] = _products(x, W_enc[part].to(x.dtype)) * scale[part]
        return pre
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


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.topk_encode`, rows in blocks; b_enc is float32, and so a scale of e4m3 rows."""
    N, F = len(x), len(W_enc)
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    row_bytes = _BYTES_EACH * F if k > _MAX_K else 4 * F + 8 * _sizes(F, k)[1]
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        pre = _products(x[part], W_enc, scale)
        if k <= _MAX_K:
            select_rows(pre, b_enc, values[part], indices[part])
        else:
            values[part], indices[part] = _select(pre.add_(b_enc).relu_(), k)
    return values, indices
