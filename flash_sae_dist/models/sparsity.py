"""What sparsity losses are made of: straight-through gradients, and what losses of a batch share.

All act on lists of pairs alone. A list holds every pair whose activation or whose gradient is not
zero, so that nothing is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.reference import in_band


class Batch(NamedTuple):
    """What the losses of a step share, whatever the micro-batch, replica or shard."""

    inverse: Tensor  # scalar, 1 / the batch's total variance; 0 where it has none
    tokens: int  # of all replicas
    unit: float  # root mean square of the data's elements: rows / unit are of norm sqrt(d_in)
    ramp: Tensor  # scalar, part of a coefficient that its schedule gives by now
    l0: Tensor | None = None  # scalar, mean active latents a token, for `needs_l0`
    W_dec: Tensor | None = None  # in the dtype of products, where the SAE's own is in another

    @property
    def squared(self) -> Tensor:
        """What a loss a token, of rows of norm sqrt(d_in) beside their squared error (Anthropic's
        and SAELens's form), is multiplied by where FVU stands for that error.
        """
        return self.inverse * self.unit**2


class Edges(NamedTuple):
    """JumpReLU whose penalty depends on the number of active pairs: its gradients are `jump_grads`
    of the kernels.
    """

    threshold: Tensor  # [d_sae_local], the only parameter of its own
    cost: Tensor  # scalar, which times factor is the penalty's gradient by a pair's being active
    factor: float
    width: float
    to_input: bool


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.to_input = width, to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        over_edge = threshold * in_band(pre, threshold, ctx.width) * grads[0]
        to_pre = grads[0] * (pre > threshold)
        return to_pre + over_edge if ctx.to_input else to_pre, -over_edge, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.to_input = width, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        over_edge = in_band(pre, threshold, ctx.width) * grads[0]
        return over_edge if ctx.to_input else None, -over_edge, None, None


def jump(
    pre: Tensor,  # any shape
    threshold: Tensor,  # likewise
    width: float,
    to_input: bool,
) -> Tensor:
    """JumpReLU `pre * H(pre - threshold)` with straight-through gradients (Rajamanoharan et al.
    2024, arXiv 2407.14435): the threshold's is `-threshold / width` for pre-activations within
    width / 2 of it. to_input gives them the opposite, as Anthropic (January 2025).
    """
    out: Tensor = _Jump.apply(pre, threshold, width, to_input)  # type: ignore[no-untyped-call]
    return out


def step(pre: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
    """`H(pre - threshold)`, whose sum is L0, with the gradient `-1 / width` likewise."""
    out: Tensor = _Step.apply(pre, threshold, width, to_input)  # type: ignore[no-untyped-call]
    return out
