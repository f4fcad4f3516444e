"""The encoder's search by e4m3 products: the filter finds about twice k candidates a token, and
their exact activations pick k. See reference_fp8.py.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, C candidates a token.

Within a row only ranks matter, so that the filter works in units of the token's scale s: it sums
products from bias / (s t) on, t the latent's scale, and multiplies by t at the end.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import encode, encode_rows
from .dispatch import fp8_obstacle
from .encode_filter import PlainFilter
from .encode_select import key_of, relu_bits
from .reference_fp8 import LARGEST, LEAST_SCALE, num_candidates
from .shapes import next_power_of_2
from .sparse_decode import gathered_dots

if TYPE_CHECKING:
    from .encode_hopper import HopperFilter

logger = logging.getLogger(__name__)
_BLOCK_K = 128


@triton.jit
def quantise_kernel(
    rows_ptr,  # [M, D]
    out_ptr,  # [M, D] e4m3
    scale_ptr,  # [M] float32
    D, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row in e4m3, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    at = row * D + cols
    part = tl.load(rows_ptr + at, mask=cols < D, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(part), 0) / LARGEST, LEAST)
    finite = tl.min((tl.abs(part) < float("inf")).to(tl.int32), 0) > 0
    scale = tl.where(finite, scale, float("nan"))
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + at, (part / scale).to(tl.float8e4nv), mask=cols < D)


@triton.jit
def pick_kernel(
    dots_ptr,  # [N, C] float32
    latents_ptr,  # [N, C] int32
    bias_ptr,  # [F] float32
    scale_ptr,  # [F] float32, or None
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    C, k, POW2: tl.constexpr,
):  # fmt: skip
    """A row's k largest of its candidates."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, POW2)
    latent = tl.load(latents_ptr + row * C + j, mask=j < C, other=0)
    value = tl.load(dots_ptr + row * C + j, mask=j < C, other=0.0)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr + latent)
    value += tl.load(bias_ptr + latent)
    keys = tl.where(j < C, key_of(relu_bits(value), latent), -1)
    keys = tl.sort(keys, descending=True)
    value = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(values_ptr + row * k + j, value, mask=j < k)
    tl.store(indices_ptr + row * k + j, 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32), mask=j < k)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows`."""
    rows = rows.contiguous()
    M, D = rows.shape
    out = torch.empty(M, D, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(M, dtype=torch.float32, device=rows.device)
    if M:
        block = next_power_of_2(D)
        warps = max(4, min(16, block // 1024))
        quantise_kernel[(M,)](rows, out, scale, D, LARGEST, LEAST_SCALE, block, num_warps=warps)
    return out, scale


class _Quantised:
    """A filter of e4m3 rows, for tokens that are not."""

    def __init__(self, matmul: PlainFilter | HopperFilter) -> None:
        self.matmul = matmul

    def write(self, x: Tensor, scratch: Tensor) -> None:
        """See `PlainFilter`."""
        self.x, scale = quantise_rows(x)
        self.matmul.inverse = scale.reciprocal()
        self.matmul.write(self.x, scratch)

    def filter(self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor) -> None:
        """See `PlainFilter`."""
        self.matmul.filter(self.x, limit, scratch, count)


def rescored(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F] float32
    scale: Tensor | None,  # [F] float32
    latents: Tensor,  # [N, C] int32
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The k largest of the candidates' activations."""
    N, C = latents.shape
    dots = gathered_dots(x, latents, W_enc)
    values, indices = dots.new_empty(N, k), latents.new_empty(N, k)
    pick_kernel[(N,)](
        dots, latents, b_enc, scale, values, indices, C, k, max(32, next_power_of_2(C)), num_warps=1
    )
    return values, indices


@lru_cache(maxsize=64)
def _tell_exact(N: int, D: int, F: int, k: int) -> None:
    """Once a shape."""
    logger.warning(
        "fp8 products do not serve %d tokens of width %d, %d latents and k=%d, which are searched "
        "exactly: they need more than 256 tokens, a width that 16 divides, k of 256 "
        "(multi_topk: 64) at the most, and some 40 times as many latents",
        N, D, F, k,
    )  # fmt: skip


def fp8_topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype; or e4m3 with its scale
    b_enc: Tensor,  # [F]
    k: int,
    scale: Tensor | None = None,  # [F] float32
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.fp8_topk_encode`; exact over all latents where the filter does not serve: few
    tokens, many candidates, rows that are no multiples of 16 bytes."""
    if (obstacle := fp8_obstacle(x.device)) is not None:
        raise ValueError(obstacle)
    x, W_enc, b_enc = encode.aligned(x), encode.aligned(W_enc), encode.aligned(b_enc.float())
    wide = num_candidates(k, len(W_enc))
    design, plan = encode.choose(x, W_enc, wide, fp8=True)
    if plan is None:
        _tell_exact(*x.shape, len(W_enc), k)
        return encode_rows.topk_encode(x, W_enc, b_enc, k, scale)
    rows, scales = quantise_rows(W_enc) if scale is None else (W_enc, scale)
    args = (rows, b_enc / scales, plan)
    matmul: PlainFilter | HopperFilter
    if design == "plain":
        matmul = PlainFilter(*args, block_k=_BLOCK_K, scale=scales)
    else:
        from .encode_hopper import HopperFilter

        matmul = HopperFilter(*args, scale=scales)
    _, latents = encode.filtered_topk(x, W_enc, b_enc, wide, plan, _Quantised(matmul), scale)
    return rescored(x, W_enc, b_enc, scale, latents, k)
