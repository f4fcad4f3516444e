"""Triton kernels that form both weight gradients of a latent in registers and apply Adam to its
rows in the same pass: no dense gradient exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs.  One program a latent; it adds the
latent's pairs as sparse_grad.py says.  A step reads and writes each parameter and moment once: the
floor is 24 bytes a parameter with float32 moments, and the compute copy.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .reference import AdamOptions, LatentRows, PairOrder, Pairs
from .sparse_grad import _token_of, heavy_sums

_MAX_D = 16384


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
    step_size = tl.load(scalars_ptr)
    correction = tl.load(scalars_ptr + 1)
    return w - step_size * (m / (tl.sqrt(v) / correction + eps)), m, v


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


@triton.jit
def _add_pairs(
    dec,
    enc,
    begin,
    end,
    order_ptr,
    dec_coef_ptr,
    enc_coef_ptr,
    dec_rows_ptr,
    enc_rows_ptr,
    cols,
    D,
    N,
    NK,
    K,
    K2,
    PAIRS: tl.constexpr,
):
    """Adds the ordered pairs begin .. end to the two gradients, PAIRS rows in flight at once."""
    for i in range(begin, end, PAIRS):
        at = i + tl.arange(0, PAIRS)
        pair = tl.load(order_ptr + at, mask=at < end, other=0)
        token = _token_of(pair, NK, K, K2)
        row = token + tl.where(pair < NK, 0, N)
        dec_coef = tl.load(dec_coef_ptr + pair, mask=at < end, other=0.0).to(tl.float32)
        enc_coef = tl.load(enc_coef_ptr + pair, mask=at < end, other=0.0).to(tl.float32)
        mask = (at < end)[:, None] & (cols < D)[None, :]
        dec_row = tl.load(dec_rows_ptr + row[:, None] * D + cols[None, :], mask=mask, other=0.0)
        enc_row = tl.load(enc_rows_ptr + token[:, None] * D + cols[None, :], mask=mask, other=0.0)
        dec += tl.sum(dec_coef[:, None] * dec_row.to(tl.float32), axis=0)
        enc += tl.sum(enc_coef[:, None] * enc_row.to(tl.float32), axis=0)
    return dec, enc


@triton.jit(do_not_specialize=["seed"])
def _adam_rows_kernel(
    order_ptr,  # [P] int64
    offsets_ptr,  # [F + 1]
    dec_coef_ptr,  # [P]
    enc_coef_ptr,  # [P]
    dec_rows_ptr,  # [N or 2 N, D]
    enc_rows_ptr,  # [N, D]
    dec_sums_ptr,  # [P // HEAVY, D] of heavy_sums
    enc_sums_ptr,  # [P // HEAVY, D]
    grad_b_ptr,  # [F]
    W_enc_ptr,  # [F, D], and so on
    W_enc_m_ptr,
    W_enc_v_ptr,
    W_enc_copy_ptr,
    b_enc_ptr,
    b_enc_m_ptr,
    b_enc_v_ptr,
    W_dec_ptr,
    W_dec_m_ptr,
    W_dec_v_ptr,
    W_dec_copy_ptr,
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
    EARLY: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + latent)
    end = tl.load(offsets_ptr + latent + 1)
    if (not LAZY) | (begin < end):
        cols = tl.arange(0, BLOCK_D)
        inside = cols < D
        at = latent * D + cols
        first, last = tl.cdiv(begin, HEAVY), end // HEAVY  # whole blocks of this latent
        split = first < last
        if EARLY:
            w = tl.load(W_enc_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
            m = tl.load(W_enc_m_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
            v = tl.load(W_enc_v_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
        dec = tl.zeros([BLOCK_D], tl.float32)
        enc = tl.zeros([BLOCK_D], tl.float32)
        dec, enc = _add_pairs(
            dec, enc, begin, tl.where(split, first * HEAVY, end), order_ptr, dec_coef_ptr,
            enc_coef_ptr, dec_rows_ptr, enc_rows_ptr, cols, D, N, NK, K, K2, PAIRS,
        )  # fmt: skip
        if split:
            for block in range(first, last):
                # 32 bits suffice: the scratch is bounded.
                dec += tl.load(dec_sums_ptr + block * D + cols, mask=inside, other=0.0)
                enc += tl.load(enc_sums_ptr + block * D + cols, mask=inside, other=0.0)
            dec, enc = _add_pairs(
                dec, enc, last * HEAVY, end, order_ptr, dec_coef_ptr,
                enc_coef_ptr, dec_rows_ptr, enc_rows_ptr, cols, D, N, NK, K, K2, PAIRS,
            )  # fmt: skip

        if not EARLY:
            w = tl.load(W_enc_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
            m = tl.load(W_enc_m_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
            v = tl.load(W_enc_v_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
        m = m.to(tl.float32)
        v = v.to(tl.float32)
        w, m, v = _adam(
            w, m, v, enc, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps
        )  # fmt: skip
        tl.store(W_enc_ptr + at, w, mask=inside, eviction_policy=EV)
        if COPIES:
            copy = w.to(W_enc_copy_ptr.dtype.element_ty)
            tl.store(W_enc_copy_ptr + at, copy, mask=inside)
        _store_moments(
            W_enc_m_ptr, W_enc_v_ptr, at, inside, m, v, seed, step_ptr, 0, latent, cols
        )  # fmt: skip

        w = tl.load(W_dec_ptr + at, mask=inside, other=0.0, eviction_policy=EV)
        m = tl.load(W_dec_m_ptr + at, mask=inside, other=0.0, eviction_policy=EV).to(tl.float32)
        v = tl.load(W_dec_v_ptr + at, mask=inside, other=0.0, eviction_policy=EV).to(tl.float32)
        if UNIT_NORM:
            dec -= tl.sum(dec * w, axis=0) * w
        w, m, v = _adam(
            w, m, v, dec, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps
        )  # fmt: skip
        if UNIT_NORM:
            norm = tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0))
            w = w / tl.maximum(norm, 1.1754943508222875e-38)
        tl.store(W_dec_ptr + at, w, mask=inside, eviction_policy=EV)
        if COPIES:
            copy = w.to(W_dec_copy_ptr.dtype.element_ty)
            tl.store(W_dec_copy_ptr + at, copy, mask=inside)
        _store_moments(
            W_dec_m_ptr, W_dec_v_ptr, at, inside, m, v, seed, step_ptr, 1, latent, cols
        )  # fmt: skip

        b, m, v = _adam(
            tl.load(b_enc_ptr + latent), tl.load(b_enc_m_ptr + latent),
            tl.load(b_enc_v_ptr + latent), tl.load(grad_b_ptr + latent), scalars_ptr,
            one_minus_beta1, beta2, one_minus_beta2, eps,
        )  # fmt: skip
        tl.store(b_enc_ptr + latent, b)
        tl.store(b_enc_m_ptr + latent, m)
        tl.store(b_enc_v_ptr + latent, v)


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


def _row_blocks(D: int) -> dict[str, Any]:
    if D > _MAX_D:
        raise ValueError(f"sparse_adam_step_ takes D up to {_MAX_D}, not {D}; use torch.optim.Adam")
    block_d = triton.next_power_of_2(D)
    return {
        "BLOCK_D": block_d,
        "PAIRS": 4 if block_d <= 1024 else 2,
        "EARLY": 0,
        "EV": "",
        "num_warps": min(16, max(4, block_d // 512)),
    }


def sparse_adam_step_(
    rows: LatentRows,
    pairs: Pairs,
    order: PairOrder,
    grad_b_enc: Tensor,  # [F]
    scalars: Tensor,  # [2] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
) -> None:
    """`reference.sparse_adam_step_` in one pass over the latents' rows."""
    F, D = rows.W_dec.shape
    N, K, K2 = pairs.shape
    sums = heavy_sums(
        order, pairs.dec_coef, pairs.dec_rows, F, pairs.shape, pairs.enc_coef, pairs.enc_rows
    )
    copies = rows.copies or (rows.W_enc, rows.W_dec)
    _adam_rows_kernel[(F,)](
        order.order,
        order.offsets,
        pairs.dec_coef,
        pairs.enc_coef,
        pairs.dec_rows,
        pairs.enc_rows,
        sums.dec,
        sums.enc,
        grad_b_enc,
        rows.W_enc,
        rows.exp_avg[0],
        rows.exp_avg_sq[0],
        copies[0],
        rows.b_enc,
        rows.exp_avg[1],
        rows.exp_avg_sq[1],
        rows.W_dec,
        rows.exp_avg[2],
        rows.exp_avg_sq[2],
        copies[1],
        scalars,
        step,
        D,
        N,
        N * K,
        K,
        max(K2, 1),
        1 - options.betas[0],
        options.betas[1],
        1 - options.betas[1],
        options.eps,
        options.seed,
        LAZY=options.lazy,
        UNIT_NORM=options.unit_norm,
        COPIES=rows.copies is not None,
        HEAVY=sums.heavy,
        **_row_blocks(D),
    )


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
    _adam_vector_kernel[(triton.cdiv(D, 256),)](
        *args, 1 - beta1, beta2, 1 - beta2, options.eps, BLOCK=256
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
        _reset_fired_kernel[(triton.cdiv(P, 512),)](*args, BLOCK=512)
