"""A step of Adam over latents' rows in plain PyTorch: the part of reference.py that optimizes.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, P pairs (N * K), M listed dead latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference_sparse import PairOrder, scatter_rows

# On the CPU a block's weights, moments and gradient stay in a core's cache from one operation to
# the next.
_BLOCK_ELEMENTS = 1 << 17


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


class PairGradients(NamedTuple):
    """A batch's (token, latent) pairs and what each adds to its latent's gradients: `dec_coef`
    times its token's row of dec_rows to W_dec's, `enc_coef` times that of enc_rows to W_enc's,
    `enc_coef` to b_enc's. Pairs of coefficient 0 are none. With nested reconstructions dec_rows
    are several a token, and `rows` says which is a pair's.
    """

    latents: Tensor  # [P] int32
    dec_coef: Tensor  # [P] float32/64
    enc_coef: Tensor  # [P]
    dec_rows: Tensor  # [N, D] residual, or [G * N, D]
    enc_rows: Tensor  # [N, D] centred input
    k: int  # pairs of each token, one after another; without meaning where tokens are given
    tokens: Tensor | None = None  # [P] int32, of flat lists
    rows: Tensor | None = None  # [P] int32, each pair's row of dec_rows where it is not its token's

    @property
    def of_dec(self) -> Tensor | None:
        """Each pair's row of dec_rows; None for those of a rectangle's tokens."""
        return self.tokens if self.rows is None else self.rows


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

    pairs: PairGradients
    order: PairOrder
    dense: DenseRows | None = None
    sums: HeavySums | None = None  # of heavy_sums; made anew where it is left out
    bias: Tensor | None = None  # [F], of b_enc's what pre-activations do not have


class AdamOptions(NamedTuple):
    """What a step of Adam needs beside tensors."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    lazy: bool = False  # only latents with pairs move
    unit_norm: bool = True  # W_dec rows: gradient along the row removed, row renormalised
    seed: int = 0  # of the stochastic rounding
    scaled: bool = False  # whether the last of the scalars, which scales gradients, is not 1
    unit: float = 1.0  # of b_enc and b_dec, which are in the data's units: its root mean square
    decay: float = 0.0  # AdamW's decoupled weight decay, of W_enc and W_dec alone
    sign: bool = False  # `schedule_free_` in place of Adam, its momentum the first beta
    renorm: bool = True  # with unit_norm; False where the caller scales rows before a step


def adam_scalars_(
    step: Tensor,  # scalar float32, incremented
    lr: Tensor,  # scalar float32/64
    betas: Tensor,  # [2] float64
    out: Tensor,  # [4] float32/64: lr / (1 - beta1^step), sqrt(1 - beta2^step), 1, lr
) -> None:
    """Advances Adam's step count and writes the scalars of its update, all on the device; the third
    scales the gradients, which clipping changes.
    """
    step.add_(1)
    correction = 1 - betas ** step.double()
    out[0] = lr / correction[0]
    out[1] = correction[1].sqrt()
    out[2] = 1
    out[3] = lr


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


def heavy_sums(order: PairOrder, pairs: PairGradients, num_latents: int) -> None:
    """What a frequent latent's pairs come to, added ahead by many programs; here not needed."""
    del order, pairs, num_latents
    return


def _add_dense_(total: Tensor, grads: Gradients, part: str) -> None:
    """Adds the listed latents' rows of one of DenseRows' gradients."""
    if grads.dense is not None:
        listed = (grads.dense.slots >= 0).nonzero().squeeze(1)
        rows = getattr(grads.dense, part)[grads.dense.slots[listed].long()]
        total.index_add_(0, listed, rows.to(total.dtype))


def _tokens(pairs: PairGradients) -> Tensor:  # [P]
    if pairs.tokens is not None:
        return pairs.tokens
    return torch.arange(len(pairs.latents), device=pairs.latents.device) // pairs.k


def encoder_gradients(grads: Gradients, num_latents: int) -> tuple[Tensor, Tensor]:
    """The gradients of W_enc [F, D] and b_enc [F] through pre-activations, as a step forms them row
    by row."""
    pairs = grads.pairs
    enc = scatter_rows(
        pairs.enc_coef, pairs.latents, pairs.enc_rows, num_latents, tokens=_tokens(pairs)
    )
    bias = pairs.enc_coef.new_zeros(num_latents)
    bias.index_add_(0, pairs.latents, pairs.enc_coef)
    _add_dense_(enc, grads, "enc")
    _add_dense_(bias, grads, "bias")
    return enc, bias


def _whole(bias: Tensor, grads: Gradients) -> Tensor:
    """b_enc's gradient from its part through pre-activations."""
    return bias if grads.bias is None else bias + grads.bias


def decoder_gradient(grads: Gradients, num_latents: int) -> Tensor:  # [F, D]
    """`encoder_gradients` for W_dec."""
    pairs = grads.pairs
    rows = _tokens(pairs) if pairs.rows is None else pairs.rows
    dec = scatter_rows(pairs.dec_coef, pairs.latents, pairs.dec_rows, num_latents, tokens=rows)
    _add_dense_(dec, grads, "dec")
    return dec


def _blocks(rows: Tensor) -> list[slice]:
    """Rows [F, any] in blocks that stay in a core's cache on the CPU, whole elsewhere."""
    size = max(1, _BLOCK_ELEMENTS // rows[0].numel()) if rows.device.type == "cpu" else len(rows)
    return [slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]


def schedule_free_(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    lr: Tensor | float,
    part: Tensor | float,  # 1 / steps, this one among them
    momentum: float,
) -> None:
    """Sign descent, averaged in place of a schedule (Defazio et al. 2024, arXiv 2405.15682): z
    moves by lr a step, x is the average of all z, and gradients are taken at y between them. In
    place; x is `y.lerp(z, 1 - 1 / momentum)`.
    """
    # In y's memory: back to x, x on towards z, and out to y again.
    y.lerp_(z, 1 - 1 / momentum)
    z.sub_(grad.sign().mul_(lr))
    y.lerp_(z, part)
    y.lerp_(z, 1 - momentum)


def _adam_(
    param: Tensor,  # [any, ...], as all below
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,  # of param's dtype
    scalars: Tensor,
    options: AdamOptions,
    bits: Tensor | None = None,  # for bfloat16 moments
    unit: float = 1.0,  # of the parameter
) -> None:
    if options.sign:
        lr = scalars[3] * unit
        schedule_free_(param, exp_avg, grad, lr, scalars[1], options.betas[0])
        return
    m = exp_avg.to(param.dtype).lerp_(grad, 1 - options.betas[0])
    v = exp_avg_sq.to(param.dtype).mul_(options.betas[1])
    v.addcmul_(grad, grad, value=1 - options.betas[1])
    update = v.sqrt().div_(scalars[1]).add_(options.eps / unit)
    param.sub_(torch.div(m, update, out=update).mul_(scalars[0] * unit))
    if bits is not None:
        exp_avg.copy_(round_stochastic(m, bits & 0xFFFF))
        exp_avg_sq.copy_(round_stochastic(v, bits >> 16))


def _tangent(dec: Tensor, W_dec: Tensor, options: AdamOptions) -> Tensor:
    """W_dec's gradient without its part along the (unit-norm) rows."""
    if not options.unit_norm:
        return dec
    return dec - (dec * W_dec).sum(dim=1, keepdim=True) * W_dec


def _moved(rows: LatentRows, grads: Gradients, options: AdamOptions) -> Tensor | None:  # [F] bool
    """The latents that move; None where all do."""
    if not options.lazy:
        return None
    moved = grads.order.offsets[1:] > grads.order.offsets[:-1]
    return moved if grads.dense is None else moved | (grads.dense.slots >= 0)


def _step_rows_(
    rows: LatentRows,
    i: int,  # which of the three
    grad: Tensor,  # as rows[i]
    moved: Tensor | None,  # [F] bool
    scalars: Tensor,
    step: Tensor,
    options: AdamOptions,
    first_latent: int,
) -> None:
    """Adam over one parameter's rows; W_dec's stay unit-norm."""
    weights = (rows.W_enc, rows.b_enc, rows.W_dec)[i]
    whole = (weights, rows.exp_avg[i], rows.exp_avg_sq[i], grad.to(weights.dtype))
    unit = options.unit if i == 1 else 1.0
    for block in _blocks(weights):
        own = None if moved is None else moved[block].nonzero().squeeze(1)
        param, exp_avg, exp_avg_sq, g = (t[block] if own is None else t[block][own] for t in whole)
        if i == 2:
            g = _tangent(g, param, options)
        if options.scaled:
            g = g * scalars[2]
        bits: Tensor | None = None
        if exp_avg.dtype == torch.bfloat16:
            first, count = first_latent + block.start, block.stop - block.start
            bits = random_bits(options.seed, step, i // 2, count, weights.shape[1], first)
            bits = bits if own is None else bits[own]
        if options.decay and i != 1:
            param.mul_(1 - options.decay * scalars[3])
        _adam_(param, exp_avg, exp_avg_sq, g, scalars, options, bits, unit)
        if i == 2 and options.unit_norm and options.renorm:
            norm = param.norm(dim=1, keepdim=True)
            param /= norm.clamp_min_(torch.finfo(norm.dtype).tiny)
        if own is not None:
            for t, changed in zip(whole, (param, exp_avg, exp_avg_sq), strict=False):
                t[block][own] = changed


def encoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> tuple[Tensor, Tensor]:  # [any] and [any, D] float32/64
    """Squared norm of the gradients of W_enc and b_enc (per unit) in parts that are to be added,
    and the sums that `adam_encoder_` returns.
    """
    enc, bias = encoder_gradients(grads, rows.W_dec.shape[0])
    sums = bias[None] @ rows.W_enc.to(bias.dtype)
    bias = _whole(bias, grads)
    return torch.stack([enc.square().sum(), (bias * options.unit).square().sum()]), sums


def decoder_squares(
    rows: LatentRows, grads: Gradients, options: AdamOptions
) -> Tensor:  # [any] float32/64
    """Squared norm of W_dec's gradient, without its part along the rows, in parts that are to be
    added.
    """
    dec = decoder_gradient(grads, rows.W_dec.shape[0])
    return _tangent(dec, rows.W_dec, options).square().sum().view(1)


def clip_(
    b_dec: Tensor,  # [D], the decoder's part of b_dec's gradient
    over_encoder: Tensor,  # [D], the encoder's, negated
    squares: Tensor,  # [2], of the encoder's and the decoder's gradients over all shards
    largest: float,
    scalars: Tensor,  # [4] of adam_scalars_, the third is written
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
    scalars: Tensor,  # [4] of adam_scalars_; the third scales every gradient
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> Tensor:  # [any, D] float32/64
    """One Adam step of W_enc's and b_enc's rows from a batch's gradients, in place; W_enc's copy
    is refreshed.

    Returns the unscaled b_enc gradients through pre-activations (without grads.bias) times the rows
    of W_enc before the step, in parts that are to be added: b_dec's gradient through the encoder is
    their negative. Exact Adam moves every row; lazy Adam only latents with pairs in order and
    listed ones, with the bias correction of the global step count, as torch.optim.SparseAdam. Under
    x -> s x the gradients of W_enc and W_dec stay and b_enc's goes with 1/s: its step is lr * unit
    and its epsilon eps / unit, so that b_enc / unit moves as at unit 1. With options.decay every
    row of W_enc that moves is first multiplied by 1 - lr * decay, as by torch.optim.AdamW.
    first_latent is the index of the first row over all shards, by which bfloat16 moments are
    rounded alike on any number of shards.
    """
    enc, bias = encoder_gradients(grads, rows.W_dec.shape[0])
    sums = bias[None] @ rows.W_enc.to(bias.dtype)
    moved = _moved(rows, grads, options)
    for i, grad in enumerate((enc, _whole(bias, grads))):
        _step_rows_(rows, i, grad, moved, scalars, step, options, first_latent)
    if rows.copies is not None:
        rows.copies[0].copy_(rows.W_enc)
    return sums


def adam_decoder_(
    rows: LatentRows,
    grads: Gradients,
    scalars: Tensor,  # [4] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    first_latent: int = 0,
) -> None:
    """`adam_encoder_` for W_dec's rows: the gradient's part along a row is removed before, the row
    renormalised after.
    """
    dec, moved = decoder_gradient(grads, rows.W_dec.shape[0]), _moved(rows, grads, options)
    _step_rows_(rows, 2, dec, moved, scalars, step, options, first_latent)
    if rows.copies is not None:
        rows.copies[1].copy_(rows.W_dec)


def adam_vector_(
    param: Tensor,  # [D]
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,  # [4] of adam_scalars_
    options: AdamOptions,
) -> None:
    """One Adam step of a parameter that has no latents and is in the data's units, in place."""
    scaled = (grad * scalars[2]).to(param.dtype)
    _adam_(param, exp_avg, exp_avg_sq, scaled, scalars, options, unit=options.unit)


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
