# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""A Triton decoder and sparse gradients in the style of OpenAI's sparse_autoencoder: the
benchmarks' peer, written fairly (whole rows a program, pairs sorted once, float32 atomics only at
the ends of a latent's run).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_kernel(acts_ptr, idx_ptr, w_ptr, out_ptr, D, K, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for j in range(0, K):
        latent = tl.load(idx_ptr + row * K + j).to(tl.int64)
        act = tl.load(acts_ptr + row * K + j).to(tl.float32)
        acc += act * tl.load(w_ptr + latent * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _dots_kernel(grad_ptr, idx_ptr, w_ptr, out_ptr, D, K, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    grad = tl.load(grad_ptr + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    for j in range(0, K):
        latent = tl.load(idx_ptr + row * K + j).to(tl.int64)
        w = tl.load(w_ptr + latent * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * K + j, tl.sum(grad * w, axis=0))


@triton.jit
def _scatter_kernel(
    order_ptr, latents_ptr, coef_ptr, rows_ptr, out_ptr, P, D, K,
    PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program adds PAIRS sorted pairs and writes each latent's run by atomics."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0) * PAIRS
    last = tl.minimum(first + PAIRS, P)
    latent = tl.load(latents_ptr + first).to(tl.int64)
    for i in range(first, last):
        here = tl.load(latents_ptr + i).to(tl.int64)
        if here != latent:
            tl.atomic_add(out_ptr + latent * D + cols, acc, mask=cols < D)
            acc = tl.zeros([BLOCK_D], tl.float32)
            latent = here
        pair = tl.load(order_ptr + i)
        row = tl.load(rows_ptr + (pair // K) * D + cols, mask=cols < D, other=0.0)
        acc += tl.load(coef_ptr + pair).to(tl.float32) * row.to(tl.float32)
    tl.atomic_add(out_ptr + latent * D + cols, acc, mask=cols < D)


def _gather(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    (N, K), D = idx.shape, W.shape[1]
    out = W.new_empty((N, D))
    _decode_kernel[(N,)](acts, idx, W, out, D, K, BLOCK_D=triton.next_power_of_2(D), num_warps=8)
    return out


def _dots(grad: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    (N, K), D = idx.shape, W.shape[1]
    out = W.new_empty((N, K), dtype=torch.float32)
    _dots_kernel[(N,)](grad, idx, W, out, D, K, BLOCK_D=triton.next_power_of_2(D), num_warps=8)
    return out


def _scatter(coef: Tensor, idx: Tensor, rows: Tensor, num_latents: int) -> Tensor:
    K, D, P = idx.shape[1], rows.shape[1], idx.numel()
    latents, order = idx.flatten().sort()
    out = rows.new_zeros((num_latents, D), dtype=torch.float32)
    grid = (triton.cdiv(P, 32), triton.cdiv(D, 1024))
    _scatter_kernel[grid](order, latents, coef, rows, out, P, D, K, PAIRS=32, BLOCK_D=1024)
    return out


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(acts, idx, W_dec)
        return _gather(acts, idx, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        acts, idx, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_W = _scatter(acts.contiguous(), idx, grad, W_dec.shape[0])
        return _dots(grad, idx, W_dec).to(acts.dtype), None, grad_W.to(W_dec.dtype)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        W16 = W.to(x.dtype)
        values, idx = torch.nn.functional.linear(x, W16, b.to(x.dtype)).relu_().topk(k, dim=1)
        ctx.save_for_backward(x, W16, values, idx)
        ctx.mark_non_differentiable(idx)
        return values, idx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, W16, values, idx = ctx.saved_tensors
        coef = (grads[0] * (values > 0)).float().contiguous()
        sums = coef.new_zeros(W16.shape[0]).index_add_(0, idx.flatten(), coef.flatten())
        # Only b_dec hangs on x here: one row holds the sum over tokens, and broadcasting keeps it.
        grad_x = torch.zeros_like(x)
        grad_x[0] = sums.to(W16.dtype) @ W16
        return grad_x, _scatter(coef, idx, x, W16.shape[0]), sums, None


def decode(acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
    """[N, K], [N, K], [F, D] -> [N, D], differentiable in acts and W_dec."""
    out: Tensor = _Decode.apply(acts, idx, W_dec)  # type: ignore[no-untyped-call]
    return out


def encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk(relu(x @ W.T + b))` by a dense product; x's gradient is right in its sum alone."""
    values, idx = _Encode.apply(x, W, b, k)  # type: ignore[no-untyped-call]
    return values, idx
