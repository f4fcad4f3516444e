"""Triton kernels that form both weight gradients of a latent in registers and apply Adam to its
rows in the same pass: no dense gradient exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs.  A program adds a latent's pairs
as sparse_grad.py says.  W_enc is done in narrow blocks of columns by one warp each, W_dec in whole
rows, which its constraint needs (wide ones in several passes); apart they take fewer registers than
together.  A step reads and writes each parameter and moment once: the floor is 24 bytes a parameter
with float32 moments, and the compute copy.  DENSE adds the rows of listed dead latents, which dense
products have formed; NORM forms the gradients for their squared norm alone, which clipping needs
before any row moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import AdamOptions, Gradients, HeavySums, LatentRows
from .shapes import cdiv, next_power_of_2
from .sparse_grad import first_pairs, heavy_sums, inside_of, latent_gradient

# Wider rows of W_dec than registers hold are done in blocks of columns.
_MAX_BLOCK, _WIDE_BLOCK = 16384, 4096
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
def adam(
    w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps, unit=1.0,
    SIGN: tl.constexpr = False,
):  # fmt: skip
    """eps is already divided by the parameter's unit. SIGN: `reference_adam.schedule_free_`."""
    if SIGN:
        w += (m - w) * (1 - 1 / (1 - one_minus_beta1))
        sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
        m -= tl.load(scalars_ptr + 3) * unit * sign
        w += (m - w) * tl.load(scalars_ptr + 1)
        w += (m - w) * one_minus_beta1
        v = m
    else:
        m += one_minus_beta1 * (grad - m)
        v = beta2 * v + one_minus_beta2 * grad * grad
        # step_size * m / (sqrt(v) / correction + eps), both sides times the correction: one
        # division.
        correction = tl.load(scalars_ptr + 1)
        step_size = tl.load(scalars_ptr) * correction * unit
        w -= step_size * (m / (tl.sqrt(v) + eps * correction))
    return w, m, v


@triton.jit
def _step(
    w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    SCALED: tl.constexpr, DECAYS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """`adam` of a matrix's row, clipped and decayed."""
    if SCALED:
        grad *= tl.load(scalars_ptr + 2)
    if DECAYS:
        w *= 1 - weight_decay * tl.load(scalars_ptr + 3)
    return adam(w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps, SIGN=SIGN)


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
def _slot_of(
    slots_ptr, latent, has_pairs, LAZY: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr
):
    """Where a latent's dense gradients are, -1 if it is not listed; and whether its rows move."""
    slot = -1
    moves = (not (LAZY or NORM)) | has_pairs
    if DENSE:
        slot = tl.load(slots_ptr + latent)
        moves = moves | (slot >= 0)
    return slot, moves


@triton.jit
def _gradient(
    pair, begin, end, slot, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr, values_ptr,
    dense_ptr, bias_ptr, cols, inside, D, K, DENSE: tl.constexpr, HEAVY: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`latent_gradient`, and a listed latent's dense gradients added."""
    grad, value = latent_gradient(
        pair, begin, end, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr, values_ptr, cols,
        inside, D, K, HEAVY, PAIRS, BLOCK_D,
    )  # fmt: skip
    if DENSE:
        at = slot.to(tl.int64) * D + cols
        if slot >= 0:
            grad += tl.load(dense_ptr + at, mask=inside, other=0.0)
            value += tl.load(bias_ptr + slot)
    return grad, value


@triton.jit(do_not_specialize=["seed", "first_latent"])
def _encoder_kernel(
    order_ptr, offsets_ptr,  # [P] int32 or int64, [F + 1]
    coef_ptr, rows_ptr, tokens_ptr,  # [P], [N, D], [P] of flat lists or None
    sums_ptr, values_ptr,  # [P // HEAVY, D] and [P // HEAVY] of heavy_sums
    slots_ptr, dense_ptr, dense_bias_ptr,  # [F] int32, [M, D] and [M], DENSE only
    W_ptr, m_ptr, v_ptr, copy_ptr,  # [F, D]
    b_ptr, b_m_ptr, b_v_ptr,  # [F]
    bias_ptr,  # [F] float32 of Gradients, or None
    weighted_ptr,  # [cdiv(F, LATENTS), D]
    squares_ptr,  # [cdiv(F, LATENTS), blocks of columns], NORM only
    scalars_ptr,  # [4] of adam_scalars_
    step_ptr, F, D, P, K, one_minus_beta1, beta2, one_minus_beta2, eps, seed, first_latent,
    unit, eps_of_unit, weight_decay,  # two of b_enc, DECAYS only
    LAZY: tl.constexpr, SCALED: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr,
    DECAYS: tl.constexpr, SIGN: tl.constexpr, COPIES: tl.constexpr, HEAVY: tl.constexpr,
    LATENTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """LATENTS rows of W_enc in a block of columns, one after another; the old rows times their
    bias gradients are summed on the way, for b_dec.
    """
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inside_of(cols, D, FULL)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    start = tl.program_id(0) * LATENTS
    begin = tl.load(offsets_ptr + start)
    end = tl.load(offsets_ptr + tl.minimum(start + 1, F))
    pair = first_pairs(begin, order_ptr, P, PAIRS)
    for i in range(0, tl.minimum(LATENTS, F - start)):
        latent = (start + i).to(tl.int64)
        # The next latent's pairs begin where this one's end: loaded a latent ahead.
        next_end = tl.load(offsets_ptr + tl.minimum(latent + 2, F))
        next_pair = first_pairs(end, order_ptr, P, PAIRS)
        slot, moves = _slot_of(slots_ptr, latent, begin < end, LAZY, DENSE, NORM)
        if moves:
            at = latent * D + cols
            w = tl.load(W_ptr + at, mask=inside, other=0.0)
            if not NORM:
                m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
                v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad, value = _gradient(
                pair, begin, end, slot, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr,
                values_ptr, dense_ptr, dense_bias_ptr, cols, inside, D, K, DENSE, HEAVY, PAIRS,
                BLOCK_D,
            )  # fmt: skip
            weighted += value * w
            if bias_ptr is not None:
                value += tl.load(bias_ptr + latent)
            if NORM:
                own = tl.where(cols == 0, (value * unit) * (value * unit), 0.0)
                squares += tl.where(inside, grad * grad, 0.0) + own
            else:
                w, m, v = _step(
                    w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps,
                    weight_decay, SCALED, DECAYS, SIGN,
                )  # fmt: skip
                tl.store(W_ptr + at, w, mask=inside)
                if COPIES:
                    tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=inside)
                row = latent + first_latent
                _store_moments(m_ptr, v_ptr, at, inside, m, v, seed, step_ptr, 0, row, cols)
                if tl.program_id(1) == 0:
                    if SCALED:
                        value *= tl.load(scalars_ptr + 2)
                    b, b_m, b_v = adam(
                        tl.load(b_ptr + latent), tl.load(b_m_ptr + latent),
                        tl.load(b_v_ptr + latent), value, scalars_ptr, one_minus_beta1, beta2,
                        one_minus_beta2, eps_of_unit, unit, SIGN,
                    )  # fmt: skip
                    tl.store(b_ptr + latent, b)
                    tl.store(b_m_ptr + latent, b_m)
                    tl.store(b_v_ptr + latent, b_v)
        begin, end, pair = end, next_end, next_pair
    tl.store(weighted_ptr + tl.program_id(0) * D + cols, weighted, mask=inside)
    if NORM:
        at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares_ptr + at, tl.sum(squares, 0))


@triton.jit
def _one_over_norm(squares):
    return 1.0 / tl.maximum(tl.sqrt(squares), 1.1754943508222875e-38)


@triton.jit
def _normalise(
    W_ptr, copy_ptr, latent, squares, D, COPIES: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Scales a row of W_dec that was written with this sum of squares."""
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = inside_of(cols, D, FULL)
        at = latent * D + cols
        w = tl.load(W_ptr + at, mask=inside, other=0.0) * _one_over_norm(squares)
        tl.store(W_ptr + at, w, mask=inside)
        if COPIES:
            tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "first_latent"])
def _decoder_kernel(
    order_ptr,  # [P] int32 or int64
    offsets_ptr,  # [F + 1]
    coef_ptr,  # [P]
    rows_ptr,  # [N, D]
    tokens_ptr,  # [P] of flat lists, or None
    sums_ptr, values_ptr,  # [P // HEAVY, D] and [P // HEAVY] of heavy_sums
    slots_ptr, dense_ptr, dense_bias_ptr,  # [F] int32, [M, D] and [M], DENSE only
    W_ptr, m_ptr, v_ptr, copy_ptr,  # [F, D]
    squares_ptr,  # [F], NORM only
    scalars_ptr,  # [4] of adam_scalars_
    step_ptr, D, K, one_minus_beta1, beta2, one_minus_beta2, eps, seed, first_latent,
    weight_decay,  # DECAYS only
    LAZY: tl.constexpr, SCALED: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr,
    DECAYS: tl.constexpr, SIGN: tl.constexpr, UNIT_NORM: tl.constexpr, RENORM: tl.constexpr,
    COPIES: tl.constexpr, HEAVY: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A whole row of W_dec: the constraint needs its sums. Of one that is wider than BLOCK_D the
    gradient is formed twice, for its part along the row and for the update, and a third pass scales
    the row.
    """
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + latent)
    end = tl.load(offsets_ptr + latent + 1)
    slot, moves = _slot_of(slots_ptr, latent, begin < end, LAZY, DENSE, NORM)
    squares = tl.zeros([], tl.float32)
    if moves:
        pair = first_pairs(begin, order_ptr, end, PAIRS)
        along = tl.zeros([], tl.float32)
        if WIDE and UNIT_NORM:
            for start in range(0, D, BLOCK_D):
                cols = start + tl.arange(0, BLOCK_D)
                inside = inside_of(cols, D, FULL)
                w = tl.load(W_ptr + latent * D + cols, mask=inside, other=0.0)
                grad, _ = _gradient(
                    pair, begin, end, slot, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr,
                    values_ptr, dense_ptr, dense_bias_ptr, cols, inside, D, K, DENSE, HEAVY, PAIRS,
                    BLOCK_D,
                )  # fmt: skip
                along += tl.sum(grad * w, axis=0)
        # The compiler makes no loop of a single block.
        for start in range(0, D if WIDE else 1, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            inside = inside_of(cols, D, FULL)
            at = latent * D + cols
            # Before the gather, whose latency they share.
            w = tl.load(W_ptr + at, mask=inside, other=0.0)
            if not NORM:
                m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
                v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad, _ = _gradient(
                pair, begin, end, slot, order_ptr, coef_ptr, rows_ptr, tokens_ptr, sums_ptr,
                values_ptr, dense_ptr, dense_bias_ptr, cols, inside, D, K, DENSE, HEAVY, PAIRS,
                BLOCK_D,
            )  # fmt: skip
            if UNIT_NORM:
                if not WIDE:
                    along = tl.sum(grad * w, axis=0)
                grad -= along * w
            if NORM:
                squares += tl.sum(tl.where(inside, grad * grad, 0.0), axis=0)
            else:
                w, m, v = _step(
                    w, m, v, grad, scalars_ptr, one_minus_beta1, beta2, one_minus_beta2, eps,
                    weight_decay, SCALED, DECAYS, SIGN,
                )  # fmt: skip
                if RENORM:
                    squares += tl.sum(tl.where(inside, w * w, 0.0), axis=0)
                    if not WIDE:
                        w *= _one_over_norm(squares)
                tl.store(W_ptr + at, w, mask=inside)
                if COPIES and not (WIDE and RENORM):
                    tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=inside)
                row = latent + first_latent
                _store_moments(m_ptr, v_ptr, at, inside, m, v, seed, step_ptr, 1, row, cols)
        if WIDE and RENORM and not NORM:
            # What other threads of this program have stored is read.
            tl.debug_barrier()
            _normalise(W_ptr, copy_ptr, latent, squares, D, COPIES, BLOCK_D, FULL)
    if NORM:
        tl.store(squares_ptr + latent, squares)


def _decoder_blocks(D: int) -> dict[str, int]:
    wide = D > _MAX_BLOCK
    block_d = _WIDE_BLOCK if wide else next_power_of_2(D)
    # 8 columns a thread: more threads in flight were faster than more columns each (seed shape).
    warps = 16 if wide else min(16, max(1, block_d // 256))
    sizes = {"BLOCK_D": block_d, "FULL": D % block_d == 0, "WIDE": wide}
    return sizes | {"PAIRS": 2, "num_warps": warps}


def _encoder_blocks(F: int, D: int) -> dict[str, int]:
    block_d = min(256, max(16, next_power_of_2(D)))
    programs_a_latent = cdiv(D, block_d)
    # Rows a program: enough programs to fill a GPU, few enough partial sums for b_dec.
    latents = min(64, max(1, F * programs_a_latent // 8192))
    latents = next_power_of_2(latents + 1) // 2
    latents = max(latents, next_power_of_2(cdiv(F * D * 4, _MAX_SUMS_BYTES)))
    full = D % block_d == 0
    return {"LATENTS": latents, "BLOCK_D": block_d, "FULL": full, "PAIRS": 1, "num_warps": 1}


def _dense_args(rows: LatentRows, grads: Gradients, *, decoder: bool) -> tuple[Tensor, ...]:
    """slots_ptr, dense_ptr and dense_bias_ptr of the kernels."""
    if grads.dense is None:
        return grads.order.offsets, rows.b_enc, rows.b_enc
    dense = grads.dense
    return dense.slots, dense.dec if decoder else dense.enc, dense.bias


def _sums(rows: LatentRows, grads: Gradients) -> HeavySums:
    return grads.sums or heavy_sums(grads.order, grads.pairs, rows.W_dec.shape[0])


def _constants(options: AdamOptions, first_latent: int) -> tuple[float, ...]:
    beta1, beta2 = options.betas
    return 1 - beta1, beta2, 1 - beta2, options.eps, options.seed, first_latent


def _flags(rows: LatentRows, grads: Gradients, options: AdamOptions) -> dict[str, bool]:
    dense = grads.dense is not None
    copies = rows.copies is not None
    flags = {"LAZY": options.lazy, "SCALED": options.scaled, "DECAYS": options.decay > 0}
    return flags | {"DENSE": dense, "COPIES": copies, "SIGN": options.sign}


def _encoder(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,
    step: Tensor,
    options: AdamOptions,
    first_latent: int,
    *,
    norm: bool,
) -> tuple[Tensor, Tensor]:  # [any, D], [any] with norm
    (F, D), pairs, order = rows.W_enc.shape, grads.pairs, grads.order
    sums = _sums(rows, grads)
    assert sums.enc is not None
    blocks = _encoder_blocks(F, D)
    grid = (cdiv(F, blocks["LATENTS"]), cdiv(D, blocks["BLOCK_D"]))
    weighted = rows.W_enc.new_empty((grid[0], D), dtype=torch.float32)
    squares = weighted.new_empty(grid if norm else (0,))
    copy = rows.W_enc if rows.copies is None else rows.copies[0]
    _encoder_kernel[grid](
        order.order, order.offsets, pairs.enc_coef, pairs.enc_rows, pairs.tokens, sums.enc,
        sums.values,
        *_dense_args(rows, grads, decoder=False),
        rows.W_enc, rows.exp_avg[0], rows.exp_avg_sq[0], copy,
        rows.b_enc, rows.exp_avg[1], rows.exp_avg_sq[1], grads.bias, weighted, squares,
        scalars, step, F, D, order.order.numel(), pairs.k, *_constants(options, first_latent),
        options.unit, options.eps / options.unit, options.decay,
        NORM=norm, HEAVY=sums.heavy, **_flags(rows, grads, options), **blocks,
    )  # fmt: skip
    return weighted, squares.flatten()


def _decoder(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,
    step: Tensor,
    options: AdamOptions,
    first_latent: int,
    *,
    norm: bool,
) -> Tensor:  # [F] with norm
    (F, D), pairs, order = rows.W_dec.shape, grads.pairs, grads.order
    blocks = _decoder_blocks(D)
    sums = _sums(rows, grads)
    squares = rows.W_dec.new_empty(F if norm else 0, dtype=torch.float32)
    copy = rows.W_dec if rows.copies is None else rows.copies[1]
    _decoder_kernel[(F,)](
        order.order, order.offsets, pairs.dec_coef, pairs.dec_rows, pairs.of_dec, sums.dec,
        sums.values,
        *_dense_args(rows, grads, decoder=True),
        rows.W_dec, rows.exp_avg[2], rows.exp_avg_sq[2], copy, squares,
        scalars, step, D, pairs.k, *_constants(options, first_latent),
        options.decay, NORM=norm, UNIT_NORM=options.unit_norm,
        RENORM=options.unit_norm and options.renorm, HEAVY=sums.heavy,
        **_flags(rows, grads, options), **blocks,
    )  # fmt: skip
    return squares


def encoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> tuple[Tensor, Tensor]:  # [any], [any, D] float32
    """`reference.encoder_squares`: the encoder's pass without its updates."""
    unused = rows.b_enc
    weighted, squares = _encoder(rows, grads, unused, unused, options, 0, norm=True)
    return squares, weighted


def decoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> Tensor:  # [F] float32
    """`reference.decoder_squares`: the decoder's pass without its updates."""
    return _decoder(rows, grads, rows.b_enc, rows.b_enc, options, 0, norm=True)


def adam_encoder_(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,  # [4] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> Tensor:  # [any, D] float32
    """`reference.adam_encoder_`: one pass over W_enc's rows."""
    return _encoder(rows, grads, scalars, step, options, first_latent, norm=False)[0]


def adam_decoder_(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,  # [4] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> None:
    """`reference.adam_decoder_`: one pass over W_dec's rows."""
    _decoder(rows, grads, scalars, step, options, first_latent, norm=False)
