"""Triton kernels of an optimizer step beside its two large passes: Adam's scalars, b_dec, clipping,
firing counters; each is one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .reference import AdamOptions
from .shapes import cdiv
from .sparse_adam import adam


@triton.jit
def _adam_vector_kernel(
    param_ptr, m_ptr, v_ptr, grad_ptr, scalars_ptr, D,
    one_minus_beta1, beta2, one_minus_beta2, eps_of_unit, unit, BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < D
    grad = tl.load(grad_ptr + at, mask=mask) * tl.load(scalars_ptr + 2)
    w, m, v = adam(
        tl.load(param_ptr + at, mask=mask), tl.load(m_ptr + at, mask=mask),
        tl.load(v_ptr + at, mask=mask), grad, scalars_ptr, one_minus_beta1, beta2,
        one_minus_beta2, eps_of_unit, unit, SIGN,
    )  # fmt: skip
    tl.store(param_ptr + at, w, mask=mask)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)


@triton.jit
def _clip_kernel(
    b_dec_ptr, over_ptr, squares_ptr, grad_ptr, scalars_ptr, D, largest, unit, BLOCK: tl.constexpr
):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(b_dec_ptr + at, mask=at < D, other=0.0)
        grad -= tl.load(over_ptr + at, mask=at < D, other=0.0)
        tl.store(grad_ptr + at, grad, mask=at < D)
        grad *= unit
        total += grad * grad
    squares = tl.load(squares_ptr) + tl.load(squares_ptr + 1) + tl.sum(total, 0)
    tl.store(scalars_ptr + 2, tl.minimum(largest / (tl.sqrt(squares) + 1e-6), 1.0))


@triton.jit
def _scalars_kernel(step_ptr, lr_ptr, betas_ptr, out_ptr):
    """Powers by squaring in float64: exact to rounding for any step count."""
    step = tl.load(step_ptr) + 1
    tl.store(step_ptr, step)
    square1 = tl.load(betas_ptr)
    square2 = tl.load(betas_ptr + 1)
    power1 = square1 * 0 + 1
    power2 = square2 * 0 + 1
    left = step.to(tl.int32)
    for _ in range(31):
        odd = (left & 1) == 1
        power1 = tl.where(odd, power1 * square1, power1)
        power2 = tl.where(odd, power2 * square2, power2)
        square1 = square1 * square1
        square2 = square2 * square2
        left = left >> 1
    lr = tl.load(lr_ptr).to(tl.float64)
    tl.store(out_ptr, (lr / (1 - power1)).to(tl.float32))
    tl.store(out_ptr + 1, tl.sqrt(1 - power2).to(tl.float32))
    tl.store(out_ptr + 2, 1.0)
    tl.store(out_ptr + 3, lr.to(tl.float32))


@triton.jit
def _reset_fired_kernel(counter_ptr, acts_ptr, idx_ptr, P, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    act = tl.load(acts_ptr + at, mask=at < P, other=0.0)
    latent = tl.load(idx_ptr + at, mask=at < P, other=0).to(tl.int64)
    # Every store writes the same value: their order does not matter.
    tl.store(counter_ptr + latent, tl.zeros([BLOCK], tl.int64), mask=(at < P) & (act > 0))


def clip_(
    b_dec: Tensor,  # [D] float32
    over_encoder: Tensor,  # [D] float32
    squares: Tensor,  # [2] float32
    largest: float,
    scalars: Tensor,  # [4] float32
    unit: float = 1.0,
) -> Tensor:  # [D] float32
    """`reference.clip_` in one launch."""
    grad = b_dec.new_empty(b_dec.shape)
    _clip_kernel[(1,)](
        b_dec, over_encoder, squares, grad, scalars, b_dec.numel(), largest, unit, BLOCK=1024
    )
    return grad


def adam_scalars_(
    step: Tensor,  # scalar float32
    lr: Tensor,  # scalar float32
    betas: Tensor,  # [2] float64
    out: Tensor,  # [4] float32
) -> None:
    """`reference.adam_scalars_` in one launch."""
    _scalars_kernel[(1,)](step, lr, betas, out)


def adam_vector_(
    param: Tensor,  # [D]
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,
    options: AdamOptions,
) -> None:
    """`reference.adam_vector_` in one launch."""
    D, (beta1, beta2) = param.numel(), options.betas
    args = (param, exp_avg, exp_avg_sq, grad, scalars, D, 1 - beta1, beta2, 1 - beta2)
    unit = options.unit
    _adam_vector_kernel[(cdiv(D, 256),)](
        *args, options.eps / unit, unit, BLOCK=256, SIGN=options.sign
    )


def count_fired_(
    tokens_since_fired: Tensor,  # [F] int64
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    batch_tokens: int,
) -> None:
    """`reference.count_fired_`."""
    tokens_since_fired.add_(batch_tokens)
    P = top_idx.numel()
    if P:
        args = (tokens_since_fired, top_acts.contiguous(), top_idx.contiguous(), P)
        _reset_fired_kernel[(cdiv(P, 512),)](*args, BLOCK=512)
