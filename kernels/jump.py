"""Triton kernels of JumpReLU over a list of pairs: activations, and what its straight-through
gradients make of theirs.

Legend: N tokens, F d_sae (of this shard), C slots of a flat list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import cdiv


@triton.jit
def _jump_kernel(
    pre_ptr,  # [C]
    latents_ptr,  # [C]
    threshold_ptr,  # [F]
    offsets_ptr,  # [N + 1]
    grad_ptr,  # [C] by activations; None for these themselves
    cost_ptr,  # scalar, or None
    out_ptr,  # [C] activations, or gradients by pre-activations
    edge_ptr,  # [C] gradients by thresholds, or None
    N,
    C,
    factor,
    width,
    TO_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = at < tl.load(offsets_ptr + N)
    pre = tl.load(pre_ptr + at, mask=used, other=0.0)
    latent = tl.load(latents_ptr + at, mask=used, other=0)
    threshold = tl.load(threshold_ptr + latent, mask=used, other=0.0)
    above = (pre > threshold).to(tl.float32)
    if grad_ptr is None:
        # A NaN stays one.
        tl.store(out_ptr + at, pre * above, mask=at < C)
    else:
        grad = tl.load(grad_ptr + at, mask=used, other=0.0)
        band = used & (tl.abs(pre - threshold) < width / 2)
        edge = tl.where(band, (threshold * grad + tl.load(cost_ptr) * factor) / width, 0.0)
        out = grad * above
        if TO_INPUT:
            out += edge
        tl.store(out_ptr + at, out, mask=at < C)
        tl.store(edge_ptr + at, -edge, mask=at < C)


def jump_acts(
    pre: Tensor,  # [C]
    latents: Tensor,  # [C]
    threshold: Tensor,  # [F]
    offsets: Tensor,  # [N + 1]
) -> Tensor:  # [C]
    """`reference.jump_acts` in one launch."""
    acts, N, C = torch.empty_like(pre), len(offsets) - 1, len(pre)
    args = (pre, latents, threshold, offsets, None, None, acts, None, N, C, 1.0, 1.0)
    _jump_kernel[(cdiv(C, 512),)](*args, TO_INPUT=False, BLOCK=512)
    return acts


def jump_grads(
    pre: Tensor,  # [C]
    latents: Tensor,  # [C]
    threshold: Tensor,  # [F]
    offsets: Tensor,  # [N + 1]
    grad: Tensor,  # [C]
    cost: Tensor,  # scalar
    factor: float,
    width: float,
    to_input: bool,
) -> tuple[Tensor, Tensor]:  # [C] x 2
    """`reference.jump_grads` in one launch."""
    out, edge, N, C = torch.empty_like(pre), torch.empty_like(pre), len(offsets) - 1, len(pre)
    args = (pre, latents, threshold, offsets, grad, cost, out, edge, N, C, factor, width)
    _jump_kernel[(cdiv(C, 512),)](*args, TO_INPUT=to_input, BLOCK=512)
    return out, edge
