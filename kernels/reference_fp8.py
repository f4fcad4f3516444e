"""The encoder's search by e4m3 products, in plain PyTorch: the part of reference.py for fp8.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

Products of rows rounded to e4m3 (3 bits of mantissa), each row by a scale of its own, say which
latents are a token's candidates: about twice k, of which exact activations then pick k. What is
selected has exact values, but a latent that is no candidate is missed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_encode import accumulate_dtype, pre_activations, select_topk
from .reference_sparse import gathered_dots

# The largest number of e4m3, and the least scale: products of two scales stay far from 0.
LARGEST, LEAST_SCALE = 448.0, 1e-15
_MAX_BLOCK_ELEMENTS = 1 << 25


def num_candidates(k: int, num_latents: int) -> int:
    """Latents of a token whose exact activations are computed. On Gaussian data the best 1.5 k by
    e4m3 products hold 0.9995 of the exact k, the best 2 k all."""
    return min(num_latents, k + max(k, 16))


def quantise_rows(
    rows: Tensor,  # [M, D]
) -> tuple[Tensor, Tensor]:  # [M, D] float8_e4m3fn, [M] float32
    """Rows in e4m3 and each one's scale, by which it is multiplied: its largest is LARGEST. A row
    that is not finite has a scale of NaN."""
    exact = rows.float()
    largest = exact.abs().amax(dim=1)
    scale = (largest / LARGEST).clamp_min(LEAST_SCALE)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (exact / scale[:, None]).to(torch.float8_e4m3fn), scale


def fp8_topk_encode(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]; of e4m3 with its scale
    b_enc: Tensor,  # [F]
    k: int,
    scale: Tensor | None = None,  # [F] float32
) -> tuple[Tensor, Tensor]:  # [N, k] float32/64, descending; [N, k] int32
    """`topk_encode` among the candidates that e4m3 products find: values are those of x and W_enc
    as they are, equal ones go to the lowest of the candidates."""
    rows, scales = quantise_rows(W_enc) if scale is None else (W_enc, scale)
    dtype = accumulate_dtype(x.dtype)
    rows, bias = rows.to(dtype), b_enc.to(dtype)
    found = []
    for part in x.split(max(1, _MAX_BLOCK_ELEMENTS // len(W_enc))):
        own, own_scale = quantise_rows(part)
        rough = pre_activations(own.to(dtype), rows, torch.zeros_like(bias))
        rough = (rough * own_scale[:, None] * scales + bias).relu()
        latents = select_topk(rough, num_candidates(k, len(W_enc)))[1].sort(dim=1).values
        exact = gathered_dots(part.to(dtype), latents, W_enc)
        if scale is not None:
            exact = exact * scale[latents]
        values, columns = select_topk((exact + bias[latents]).relu(), k)
        found.append((values, latents.gather(1, columns).int()))
    return torch.cat([v for v, _ in found]), torch.cat([i for _, i in found])
