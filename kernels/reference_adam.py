"""A step of Adam over latents' rows in plain PyTorch: the part of reference.py that optimizes.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K), M listed dead latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference_sparse import PairOrder, scatter_rows, scatter_values


class LatentRows(NamedTuple):
    """The parameters whose rows are latents, with Adam's moments; a step changes them in place.

    Moments may be bfloat16 for the two matrices: they are then rounded stochastically.
    """

    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    exp_avg: tuple[Tensor, Tensor, Tensor]  # of W_enc, b_enc, W_dec
    exp_avg_sq: tuple[Tensor, Tensor, Tensor]
    copies: tuple[Tensor, Tensor] | None  # W_enc and W_dec in the compute dtype


class Pairs(NamedTuple):
    """A batch's (token, latent) pairs, `k` of each token one after another, and what each adds to
    its latent's gradients: `dec_coef` times its token's row of dec_rows to W_dec's, `enc_coef`
    times that of enc_rows to W_enc's, `enc_coef` to b_enc's.
    """

    indices: Tensor  # [N * K] int32
    dec_coef: Tensor  # [N * K] float32/64
    enc_coef: Tensor  # [N * K]
    dec_rows: Tensor  # [N, D] residual
    enc_rows: Tensor  # [N, D] centred input
    k: int


class DenseRows(NamedTuple):
    """Gradients of a few latents (the listed dead ones) that dense products have formed."""

    slots: Tensor  # [F] int32, a latent's row below; -1 where it is not listed
    enc: Tensor  # [M, D] float32/64
    dec: Tensor  # [M, D]
    bias: Tensor  # [M]


class HeavySums(NamedTuple):
    """Sums of the aligned blocks of `heavy` ordered pairs that belong to one latent; the rest is
    not written.
    """

    heavy: int  # pairs a block
    dec: Tensor  # [P // heavy, D] float32
    enc: Tensor | None  # [P // heavy, D] float32
    values: Tensor  # [P // heavy] float32, sums of the last list's coefficients


class Gradients(NamedTuple):
    """A batch's gradients in the form that an optimizer step takes."""

    pairs: Pairs
    order: PairOrder
    dense: DenseRows | None = None
    sums: HeavySums | None = None  # of heavy_sums; made anew where it is left out


class AdamOptions(NamedTuple):
    """What a step of Adam needs beside tensors."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    lazy: bool = False  # only latents with pairs move
    unit_norm: bool = True  # W_dec rows: gradient along the row removed, row renormalised
    seed: int = 0  # of the stochastic rounding
    scaled: bool = False  # whether the last of the scalars, which scales gradients, is not 1
    unit: float = 1.0  # of b_enc and b_dec, which are in the data's units: its root mean square


def adam_scalars_(
    step: Tensor,  # scalar float32, incremented
    lr: Tensor,  # scalar float32/64
    betas: Tensor,  # [2] float64
    out: Tensor,  # [3] float32/64: lr / (1 - beta1^step), sqrt(1 - beta2^step), 1
) -> None:
    """Advances Adam's step count and writes the scalars of its update, all on the device; the last
    scales the gradients, which clipping changes.
    """
    step.add_(1)
    correction = 1 - betas ** step.double()
    out[0] = lr / correction[0]
    out[1] = correction[1].sqrt()
    out[2] = 1


def _mix32(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def random_bits(
    seed: int,
    step: Tensor,  # scalar
    matrix: int,
    num_latents: int,
    D: int,
    first_latent: int = 0,
) -> Tensor:  # [F, D] int64 in [0, 2**32)
    """The stochastic rounding's random bits: a hash of (seed, step, matrix, latent, column), the
    latent's index being that over all shards.
    """
    device = step.device
    key = _mix32((step.long() * 0x9E3779B9 + (seed * 2 + matrix)) & 0xFFFFFFFF)
    row = _mix32(key ^ (first_latent + torch.arange(num_latents, device=device)))
    col = torch.arange(D, device=device) * 0x9E3779B9
    return _mix32((row[:, None] + col) & 0xFFFFFFFF)


def round_stochastic(
    x: Tensor,  # float32
    bits: Tensor,  # int64 in [0, 2**16)
) -> Tensor:  # bfloat16
    """x rounded to one of its two bfloat16 neighbours, up with the probability of its remainder."""
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def heavy_sums(order: PairOrder, pairs: Pairs, num_latents: int) -> None:
    """What a frequent latent's pairs come to, added ahead by many programs; here not needed."""
    del order, pairs, num_latents
    return


def dense_gradients(grads: Gradients, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of W_enc [F, D], b_enc [F] and W_dec [F, D] that a step forms row by row."""
    pairs, shape = grads.pairs, (-1, grads.pairs.k)
    idx, enc_coef = pairs.indices.view(shape), pairs.enc_coef.view(shape)
    enc = scatter_rows(enc_coef, idx, pairs.enc_rows, num_latents)
    dec = scatter_rows(pairs.dec_coef.view(shape), idx, pairs.dec_rows, num_latents)
    bias = scatter_values(enc_coef, idx, num_latents)
    if grads.dense is not None:
        dense = grads.dense
        listed = (dense.slots >= 0).nonzero().squeeze(1)
        slots = dense.slots[listed].long()
        for total, part in ((enc, dense.enc), (dec, dense.dec), (bias, dense.bias)):
            total[listed] += part[slots].to(total.dtype)
    return enc, bias, dec


def _adam_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,
    options: AdamOptions,
    rows: Tensor,  # the latents that move
    bits: Tensor | None = None,  # for bfloat16 moments
    unit: float = 1.0,  # of the parameter
) -> None:
    grad = grad[rows].to(param.dtype)
    m = exp_avg[rows].to(param.dtype).lerp(grad, 1 - options.betas[0])
    v = exp_avg_sq[rows].to(param.dtype) * options.betas[1]
    v = v.addcmul(grad, grad, value=1 - options.betas[1])
    step_size, eps = scalars[0] * unit, options.eps / unit
    param[rows] -= step_size * (m / (v.sqrt() / scalars[1] + eps))
    if bits is None:
        exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg.dtype)
    else:
        exp_avg[rows] = round_stochastic(m, bits[rows] & 0xFFFF)
        exp_avg_sq[rows] = round_stochastic(v, bits[rows] >> 16)


def _tangent(dec: Tensor, W_dec: Tensor, options: AdamOptions) -> Tensor:
    """W_dec's gradient without its part along the (unit-norm) rows."""
    if not options.unit_norm:
        return dec
    return dec - (dec * W_dec).sum(dim=1, keepdim=True) * W_dec


def _moved(rows: LatentRows, grads: Gradients, options: AdamOptions) -> Tensor:
    order, moved = grads.order, torch.ones_like(rows.b_enc, dtype=torch.bool)
    if options.lazy:
        moved = order.offsets[1:] > order.offsets[:-1]
        if grads.dense is not None:
            moved = moved | (grads.dense.slots >= 0)
    return moved


def _bits(
    rows: LatentRows, i: int, step: Tensor, options: AdamOptions, first_latent: int
) -> Tensor | None:
    if rows.exp_avg[i].dtype != torch.bfloat16:
        return None
    F_local, D = rows.W_dec.shape
    return random_bits(options.seed, step, i // 2, F_local, D, first_latent)


def encoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> tuple[Tensor, Tensor]:  # [any] and [any, D] float32/64
    """Squared norm of the gradients of W_enc and b_enc (per unit) in parts that are to be added,
    and the sums that `adam_encoder_` returns.
    """
    enc, bias, _ = dense_gradients(grads, rows.W_dec.shape[0])
    squares = torch.stack([enc.square().sum(), (bias * options.unit).square().sum()])
    return squares, bias[None] @ rows.W_enc.to(bias.dtype)


def decoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> Tensor:  # [any] float32/64
    """Squared norm of W_dec's gradient, without its part along the rows, in parts that are to be
    added.
    """
    _, _, dec = dense_gradients(grads, rows.W_dec.shape[0])
    return _tangent(dec, rows.W_dec, options).square().sum().view(1)


def clip_(
    b_dec: Tensor,  # [D], the decoder's part of b_dec's gradient
    over_encoder: Tensor,  # [D], the encoder's, negated
    squares: Tensor,  # [2], of the encoder's and the decoder's gradients over all shards
    largest: float,
    scalars: Tensor,  # [3] of adam_scalars_, the last is written
    unit: float = 1.0,
) -> Tensor:  # [D]
    """Writes the factor by which torch.nn.utils.clip_grad_norm_ scales gradients whose norm is over
    `largest`, those of the biases taken per unit; returns b_dec's gradient, not scaled.
    """
    grad = b_dec - over_encoder
    norm = (squares.sum() + (grad * unit).square().sum()).sqrt()
    scalars[2] = (largest / (norm + 1e-6)).clamp_max(1.0)
    return grad


def adam_encoder_(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,  # [3] of adam_scalars_; the last scales every gradient
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> Tensor:  # [any, D] float32/64
    """One Adam step of W_enc's and b_enc's rows from a batch's gradients, in place; W_enc's copy
    is refreshed.

    Returns the unscaled b_enc gradients times the rows of W_enc before the step, in parts that are
    to be added: b_dec's gradient through the encoder is their negative. Exact Adam moves every
    row; lazy Adam only latents with pairs in order and listed ones, with the bias correction of
    the global step count, as torch.optim.SparseAdam. Under x -> s x the gradients of W_enc and
    W_dec stay and b_enc's goes with 1/s: its step is lr * unit and its epsilon eps / unit, so that
    b_enc / unit moves as at unit 1. first_latent is the index of the first row
    over all shards, by which bfloat16 moments are rounded alike on any number of shards.
    """
    enc, bias, _ = dense_gradients(grads, rows.W_dec.shape[0])
    sums = bias[None] @ rows.W_enc.to(bias.dtype)
    moved = _moved(rows, grads, options)
    for i, (param, grad) in enumerate(((rows.W_enc, enc), (rows.b_enc, bias))):
        bits = _bits(rows, i, step, options, first_latent) if i == 0 else None
        moments, unit = (rows.exp_avg[i], rows.exp_avg_sq[i]), options.unit if i == 1 else 1.0
        _adam_(param, *moments, grad * scalars[2], scalars, options, moved, bits, unit)
    if rows.copies is not None:
        rows.copies[0].copy_(rows.W_enc)
    return sums


def adam_decoder_(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,  # [3] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> None:
    """`adam_encoder_` for W_dec's rows: the gradient's part along a row is removed before, the row
    renormalised after.
    """
    _, _, dec = dense_gradients(grads, rows.W_dec.shape[0])
    dec = _tangent(dec, rows.W_dec, options) * scalars[2]
    moved, bits = _moved(rows, grads, options), _bits(rows, 2, step, options, first_latent)
    _adam_(rows.W_dec, rows.exp_avg[2], rows.exp_avg_sq[2], dec, scalars, options, moved, bits)
    if options.unit_norm:
        norm = rows.W_dec[moved].norm(dim=1, keepdim=True)
        rows.W_dec[moved] /= norm.clamp_min(torch.finfo(norm.dtype).tiny)
    if rows.copies is not None:
        rows.copies[1].copy_(rows.W_dec)


def adam_vector_(
    param: Tensor,  # [D]
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,  # [3] of adam_scalars_
    options: AdamOptions,
) -> None:
    """One Adam step of a parameter that has no latents and is in the data's units, in place."""
    every, scaled = torch.ones_like(param, dtype=torch.bool), grad * scalars[2]
    _adam_(param, exp_avg, exp_avg_sq, scaled, scalars, options, every, unit=options.unit)


def count_fired_(
    tokens_since_fired: Tensor,  # [F] int64
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    batch_tokens: int,
) -> None:
    """Adds batch_tokens to every counter, then 0 where a latent had a positive activation."""
    fired = torch.zeros_like(tokens_since_fired, dtype=torch.int32)
    fired.scatter_reduce_(0, top_idx.flatten().long(), (top_acts > 0).flatten().int(), "amax")
    tokens_since_fired.add_(batch_tokens).masked_fill_(fired.bool(), 0)
