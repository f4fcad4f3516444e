"""Triton kernels that form both weight gradients of a latent in registers and apply Adam to its
rows in the same pass: no dense gradient exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs.  A program adds a latent's pairs
as sparse_grad.py says.  W_enc is done in narrow blocks of columns by one warp each, W_dec in whole
rows, which its constraint needs; apart they take fewer registers than together.  A step reads and
writes each parameter and moment once: the floor is 24 bytes a parameter with float32 moments, and
the compute copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import AdamOptions, LatentRows, PairOrder, Pairs
from .shapes import cdiv, next_power_of_2
from .sparse_grad import first_pairs, heavy_sums, inside_of, latent_gradient

_MAX_D = 16384
# Of the partial sums for b_dec, a row a program.
_MAX_SUMS_BYTES = 32 << 20


@triton.jit
def _mix32(h):
    """MurmurHash3's finaliser on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _random_bits(seed, step_ptr, MATRIX: tl.constexpr, latent, cols):
    """`reference.random_bits` of one latent."""
    step = tl.load(step_ptr).to(tl.int32).to(tl.uint32)
    key = _mix32(step * 0x9E3779B9 + (seed * 2 + MATRIX).to(tl.uint32))
    row = _mix32(key ^ latent.to(tl.uint32))
    return _mix32(row + cols.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def _round_stochastic(x, bits):
    """`reference.round_stochastic`, kept in float32 (its low 16 bits are zero)."""
    raised = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return tl.where(x != x, x, raised.to(tl.float32, bitcast=True))


@triton.jit
def _adam(w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps):
    m += one_minus_beta1 * (grad - m)
    v = beta2 * v + one_minus_beta2 * grad * grad
    # step_size * m / (sqrt(v) / correction + eps), both sides times the correction: one division.
    correction = tl.load(scalars_ptr + 1)
    step_size = tl.load(scalars_ptr) * correction
    return w - step_size * (m / (tl.sqrt(v) + eps * correction)), m, v


@triton.jit
def _store_moments(
    m_ptr, v_ptr, at, mask, m, v, seed, step_ptr, MATRIX: tl.constexpr, latent, cols
):
    if m_ptr.dtype.element_ty == tl.bfloat16:
        bits = _random_bits(seed, step_ptr, MATRIX, latent, cols)
        m = _round_stochastic(m, bits & 0xFFFF)
        v = _round_stochastic(v, bits >> 16)
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _adam_encoder_kernel(
    order_ptr,  # [P] int32 or int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    sums_ptr,  # [P // HEAVY, D] of heavy_sums
    values_ptr,  # [P // HEAVY] of heavy_sums
    W_ptr,  # [F, D], and so on
    m_ptr,
    v_ptr,
    copy_ptr,
    b_ptr,
    b_m_ptr,
    b_v_ptr,
    weighted_ptr,  # [cdiv(F, LATENTS), D]
    scalars_ptr,  # [2] of adam_scalars_
    step_ptr,
    F,
    D,
    P,
    NK,
    K,
    K2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    seed,
    LAZY: tl.constexpr,
    COPIES: tl.constexpr,
    HEAVY: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
):
    """LATENTS rows of W_enc in a block of columns, one after another; the old rows times their
    bias gradients are summed on the way, for b_dec.
    """
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inside_of(cols, D, FULL)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    start = tl.program_id(0) * LATENTS
    begin = tl.load(offsets_ptr + start)
    end = tl.load(offsets_ptr + tl.minimum(start + 1, F))
    pair = first_pairs(begin, order_ptr, P, PAIRS)
    for i in range(0, tl.minimum(LATENTS, F - start)):
        latent = (start + i).to(tl.int64)
        # The next latent's pairs begin where this one's end: loaded a latent ahead.
        next_end = tl.load(offsets_ptr + tl.minimum(latent + 2, F))
        next_pair = first_pairs(end, order_ptr, P, PAIRS)
        if (not LAZY) | (begin < end):
            at = latent * D + cols
            w = tl.load(W_ptr + at, mask=inside, other=0.0)
            m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad, value = latent_gradient(
                pair, begin, end, order_ptr, coef_ptr, rows_ptr, sums_ptr, values_ptr, cols, inside,
                D, 0, NK, K, K2, HEAVY, PAIRS, BLOCK_D,
            )  # fmt: skip
            weighted += value * w
            w, m, v = _adam(
                w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps
            )  # fmt: skip
            tl.store(W_ptr + at, w, mask=inside)
            if COPIES:
                tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=inside)
            _store_moments(m_ptr, v_ptr, at, inside, m, v, seed, step_ptr, 0, latent, cols)
            if tl.program_id(1) == 0:
                b, b_m, b_v = _adam(
                    tl.load(b_ptr + latent), tl.load(b_m_ptr + latent), tl.load(b_v_ptr + latent),
                    value, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps,
                )  # fmt: skip
                tl.store(b_ptr + latent, b)
                tl.store(b_m_ptr + latent, b_m)
                tl.store(b_v_ptr + latent, b_v)
        begin = end
        end = next_end
        pair = next_pair
    tl.store(weighted_ptr + tl.program_id(0) * D + cols, weighted, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _adam_decoder_kernel(
    order_ptr,  # [P] int32 or int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N or 2 N, D]
    sums_ptr,  # [P // HEAVY, D] of heavy_sums
    values_ptr,  # [P // HEAVY]; what is read here is not used
    W_ptr,  # [F, D], and so on
    m_ptr,
    v_ptr,
    copy_ptr,
    scalars_ptr,  # [2] of adam_scalars_
    step_ptr,
    D,
    N,
    NK,
    K,
    K2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    seed,
    LAZY: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    COPIES: tl.constexpr,
    HEAVY: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
):
    """A whole row of W_dec: the constraint needs its sums."""
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + latent)
    end = tl.load(offsets_ptr + latent + 1)
    if (not LAZY) | (begin < end):
        cols = tl.arange(0, BLOCK_D)
        inside = inside_of(cols, D, FULL)
        at = latent * D + cols
        # Before the gather, whose latency they share.
        w = tl.load(W_ptr + at, mask=inside, other=0.0)
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad, value = latent_gradient(
            first_pairs(begin, order_ptr, end, PAIRS), begin, end, order_ptr, coef_ptr, rows_ptr,
            sums_ptr, values_ptr, cols, inside, D, N, NK, K, K2, HEAVY, PAIRS, BLOCK_D,
        )  # fmt: skip
        if UNIT_NORM:
            grad -= tl.sum(grad * w, axis=0) * w
        w, m, v = _adam(
            w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps
        )  # fmt: skip
        if UNIT_NORM:
            norm = tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0))
            w *= 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
        tl.store(W_ptr + at, w, mask=inside)
        if COPIES:
            tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=inside)
        _store_moments(m_ptr, v_ptr, at, inside, m, v, seed, step_ptr, 1, latent, cols)


@triton.jit
def _adam_vector_kernel(
    param_ptr, m_ptr, v_ptr, grad_ptr, scalars_ptr, D,
    one_minus_beta1, beta2, one_minus_beta2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < D
    w, m, v = _adam(
        tl.load(param_ptr + at, mask=mask), tl.load(m_ptr + at, mask=mask),
        tl.load(v_ptr + at, mask=mask), tl.load(grad_ptr + at, mask=mask), scalars_ptr,
        one_minus_beta1, beta2, one_minus_beta2, eps,
    )  # fmt: skip
    tl.store(param_ptr + at, w, mask=mask)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)


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


@triton.jit
def _reset_fired_kernel(counter_ptr, acts_ptr, idx_ptr, P, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    act = tl.load(acts_ptr + at, mask=at < P, other=0.0)
    latent = tl.load(idx_ptr + at, mask=at < P, other=0).to(tl.int64)
    # Every store writes the same value: their order does not matter.
    tl.store(counter_ptr + latent, tl.zeros([BLOCK], tl.int64), mask=(at < P) & (act > 0))


def _decoder_blocks(D: int) -> dict[str, int]:
    if D > _MAX_D:
        raise ValueError(f"sparse_adam_step_ takes D up to {_MAX_D}, not {D}; use torch.optim.Adam")
    block_d = next_power_of_2(D)
    # 8 columns a thread: more threads in flight were faster than more columns each (seed shape).
    warps = min(16, max(1, block_d // 256))
    return {"BLOCK_D": block_d, "FULL": block_d == D, "PAIRS": 2, "num_warps": warps}


def _encoder_blocks(F: int, D: int) -> dict[str, int]:
    block_d = min(256, max(16, next_power_of_2(D)))
    programs_a_latent = cdiv(D, block_d)
    # Rows a program: enough programs to fill a GPU, few enough partial sums for b_dec.
    latents = min(64, max(1, F * programs_a_latent // 8192))
    latents = next_power_of_2(latents + 1) // 2
    latents = max(latents, next_power_of_2(cdiv(F * D * 4, _MAX_SUMS_BYTES)))
    full = D % block_d == 0
    return {"LATENTS": latents, "BLOCK_D": block_d, "FULL": full, "PAIRS": 1, "num_warps": 1}


def sparse_adam_step_(
    rows: LatentRows,
    pairs: Pairs,
    order: PairOrder,
    scalars: Tensor,  # [2] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    take_sums: Callable[[Tensor], None],  # [any, D] float32
) -> None:
    """`reference.sparse_adam_step_`: one pass over W_enc's rows, one over W_dec's."""
    F, D = rows.W_dec.shape
    N, K, K2 = pairs.shape
    P = order.order.numel()
    decoder_blocks = _decoder_blocks(D)  # refuses before anything is changed
    sums = heavy_sums(
        order, pairs.dec_coef, pairs.dec_rows, F, pairs.shape, pairs.enc_coef, pairs.enc_rows
    )
    copies = rows.copies or (rows.W_enc, rows.W_dec)
    beta1, beta2 = options.betas
    constants = (1 - beta1, beta2, 1 - beta2, options.eps, options.seed)
    flags = {"LAZY": options.lazy, "COPIES": rows.copies is not None, "HEAVY": sums.heavy}
    moments = tuple(zip(rows.exp_avg, rows.exp_avg_sq, strict=True))
    blocks = _encoder_blocks(F, D)
    grid = (cdiv(F, blocks["LATENTS"]), cdiv(D, blocks["BLOCK_D"]))
    weighted = rows.W_enc.new_empty((grid[0], D), dtype=torch.float32)
    _adam_encoder_kernel[grid](
        order.order, order.offsets, pairs.enc_coef, pairs.enc_rows, sums.enc, sums.values,
        rows.W_enc, *moments[0], copies[0], rows.b_enc, *moments[1], weighted,
        scalars, step, F, D, P, N * K, K, max(K2, 1), *constants, **flags, **blocks,
    )  # fmt: skip
    take_sums(weighted)
    _adam_decoder_kernel[(F,)](
        order.order, order.offsets, pairs.dec_coef, pairs.dec_rows, sums.dec, sums.values,
        rows.W_dec, *moments[2], copies[1],
        scalars, step, D, N, N * K, K, max(K2, 1), *constants,
        UNIT_NORM=options.unit_norm, **flags, **decoder_blocks,
    )  # fmt: skip


def adam_scalars_(
    step: Tensor,  # scalar float32
    lr: Tensor,  # scalar float32
    betas: Tensor,  # [2] float64
    out: Tensor,  # [2] float32
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
    args = (param, exp_avg, exp_avg_sq, grad, scalars, D)
    _adam_vector_kernel[(cdiv(D, 256),)](*args, 1 - beta1, beta2, 1 - beta2, options.eps, BLOCK=256)


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
