"""Every operation in plain PyTorch: the truth of the tests, the CPU path, and what the kernels
must equal.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  W_enc and W_dec are both [F, D]: a latent
is a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_encode import accumulate_dtype as accumulate_dtype
from .reference_encode import pre_activations as pre_activations
from .reference_encode import select_topk as select_topk
from .reference_encode import sort_keys as sort_keys
from .reference_encode import topk_encode as topk_encode
from .reference_encode import topk_encode_aux as topk_encode_aux


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K] int32 or int64
    W_dec: Tensor,  # [F, D]
) -> Tensor:  # [N, D] in W_dec's dtype
    """`recon[n] = sum_j top_acts[n, j] * W_dec[top_idx[n, j]]`, accumulated in float32 (float64
    for float64).
    """
    dtype = accumulate_dtype(W_dec.dtype)
    recon = F.embedding_bag(
        top_idx, W_dec.to(dtype), mode="sum", per_sample_weights=top_acts.to(dtype)
    )
    return recon.to(W_dec.dtype)


def gathered_dots(
    grad: Tensor,  # [N, D]
    top_idx: Tensor,  # [N, K]
    W: Tensor,  # [F, D]
) -> Tensor:  # [N, K] float32, or float64
    """`dots[n, j] = grad[n] . W[top_idx[n, j]]`: the decoder's gradient with respect to its
    activations.
    """
    dtype = accumulate_dtype(W.dtype)
    out = []
    for g, idx in zip(torch.split(grad, 256), torch.split(top_idx, 256), strict=True):
        out.append(torch.einsum("nkd,nd->nk", W[idx.long()].to(dtype), g.to(dtype)))
    return torch.cat(out)


def scatter_rows(
    coef: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    rows: Tensor,  # [N, D]
    num_latents: int,
    dtype: torch.dtype | None = None,
    order: PairOrder | None = None,
) -> Tensor:  # [F, D] in dtype; left out, float32, or float64
    """`out[f] = sum of coef[n, j] * rows[n] over the pairs with top_idx[n, j] == f`: both weight
    gradients.

    Deterministic: the pairs of a latent are added in token order. The kernel takes an order made
    before for the same pairs; here it is not needed.
    """
    del order
    wanted, dtype = dtype, accumulate_dtype(rows.dtype)
    num_tokens, k = top_idx.shape
    token = torch.arange(num_tokens, device=rows.device).repeat_interleave(k)
    empty = token.new_empty(0)
    # embedding_bag's own backward is this sum without an [N, K, D] tensor: 20x index_add_ at
    # N=1024 K=32 D=576.
    grad: Tensor = torch.ops.aten._embedding_bag_dense_backward(
        rows.to(dtype),
        top_idx.flatten().long(),
        token,
        empty,
        empty,
        num_latents,
        False,
        0,
        coef.to(dtype).flatten(),
    )
    return grad if wanted is None else grad.to(wanted)


def decode_backward(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    grad: Tensor,  # [N, D]
    order: PairOrder | None = None,
) -> tuple[Tensor, Tensor]:  # [N, K] float32/64, [F, D] in W_dec's dtype
    """`gathered_dots` and `scatter_rows`: the decoder's gradients. `order` as in `scatter_rows`."""
    del order
    grad_W = scatter_rows(top_acts, top_idx, grad, W_dec.shape[0], W_dec.dtype)
    return gathered_dots(grad, top_idx, W_dec), grad_W


def scatter_values(
    coef: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    num_latents: int,
    order: PairOrder | None = None,
) -> Tensor:  # [F] float32, or float64
    """`out[f] = sum of coef[n, j] over the pairs with top_idx[n, j] == f`: the encoder bias's
    gradient. `order` as in `scatter_rows`.
    """
    del order
    coef = coef.to(accumulate_dtype(coef.dtype)).flatten()
    return coef.new_zeros(num_latents).index_add_(0, top_idx.flatten().long(), coef)


def pair_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    residual: Tensor,  # [N, D]
    scale: Tensor,  # scalar
) -> tuple[Tensor, Tensor]:  # [N, K] float32/64 x 2
    """What a pair adds to its latent's rows: `scale * act` times the token's residual to W_dec's
    gradient, `scale * residual . W_dec[latent]` times the centred token to W_enc's; 0 where the
    activation is 0.
    """
    dots = gathered_dots(residual, top_idx, W_dec)
    return top_acts.to(dots.dtype) * scale, (dots * scale).masked_fill(top_acts == 0, 0)


def decode_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    scale: Tensor,  # scalar
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, D], [any] float32/64, [N, K] float32/64 x 2
    """`recon - x`, its squares in parts that are to be added (taken before it is rounded), and its
    `pair_coefs`.
    """
    dtype = accumulate_dtype(W_dec.dtype)
    residual = sparse_decode(top_acts, top_idx, W_dec.to(dtype)) + b_dec.to(dtype) - x.to(dtype)
    rounded, squares = residual.to(W_dec.dtype), residual.square().sum().view(1)
    return rounded, squares, *pair_coefs(top_acts, top_idx, W_dec, rounded, scale)


class PairOrder(NamedTuple):
    """(token, latent) pairs ordered by latent, those of a latent in pair order."""

    order: Tensor  # [P] int32 or int64, pairs; what stands beyond every latent's is not said
    latents: Tensor  # [P] int16 or int32, the ordered pairs' latents; F where a pair was dropped
    offsets: Tensor  # [F + 1] int32, where each latent's pairs begin


def order_pairs(
    top_idx: Tensor,  # any shape, P elements
    num_latents: int,
    coef: Tensor | None = None,  # as top_idx
) -> PairOrder:
    """The by-latent ordering that both weight gradients share; pairs whose coef is 0 go last,
    beyond every latent's.
    """
    # A radix sort's passes are the key's bytes: two are enough for most dictionaries.
    dtype = torch.int16 if num_latents < 2**15 else torch.int32
    keys = top_idx.flatten().to(dtype)
    if coef is not None:
        keys = keys.masked_fill(coef.flatten() == 0, num_latents)
    latents, order = keys.sort(stable=True)
    bounds = torch.arange(num_latents + 1, dtype=dtype, device=keys.device)
    return PairOrder(order, latents, torch.searchsorted(latents, bounds, out_int32=True))


def centre(
    x: Tensor,  # [N, D]
    b_dec: Tensor,  # [D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D] in dtype, [any, D] and [any] float32/64
    """`x - b_dec` in the compute dtype, its sums over tokens, its sum of squares; both in parts
    that are to be added.
    """
    centred = x.to(b_dec.dtype) - b_dec
    return centred.to(dtype), centred.sum(dim=0, keepdim=True), centred.square().sum().view(1)


def variance_of(
    sums: Tensor,  # [any, D]
    squares: Tensor,  # [any]
    num_tokens: int,
) -> Tensor:  # scalar
    """The batch's `sum of (x - mean)^2` from the parts that `centre` gives.

    It is `sum c^2 - (sum c)^2 / N` of c = x - b_dec: b_dec lies near the mean, so little cancels.
    """
    return squares.sum() - sums.sum(dim=0).square().sum() / num_tokens


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
    """A batch's (token, latent) pairs: the [N, K] of the main list, then the [N, K2] of a second
    one.

    The second list's decoder gradient has rows of its own, which follow the main ones in dec_rows.
    """

    indices: Tensor  # [P] int32
    dec_coef: Tensor  # [P] float32/64
    enc_coef: Tensor  # [P]
    dec_rows: Tensor  # [N, D], or [2 N, D] with a second list
    enc_rows: Tensor  # [N, D]
    shape: tuple[int, int, int]  # N, K, K2 (0 without a second list)


class AdamOptions(NamedTuple):
    """What a step of Adam needs beside tensors."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    lazy: bool = False  # only latents with pairs move
    unit_norm: bool = True  # W_dec rows: gradient along the row removed, row renormalised
    seed: int = 0  # of the stochastic rounding


def adam_scalars_(
    step: Tensor,  # scalar float32, incremented
    lr: Tensor,  # scalar float32/64
    betas: Tensor,  # [2] float64
    out: Tensor,  # [2] float32/64: lr / (1 - beta1^step), sqrt(1 - beta2^step)
) -> None:
    """Advances Adam's step count and writes the two scalars of its update, all on the device."""
    step.add_(1)
    correction = 1 - betas ** step.double()
    out[0] = lr / correction[0]
    out[1] = correction[1].sqrt()


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
) -> Tensor:  # [F, D] int64 in [0, 2**32)
    """The stochastic rounding's random bits: a hash of (seed, step, matrix, latent, column)."""
    device = step.device
    key = _mix32((step.long() * 0x9E3779B9 + (seed * 2 + matrix)) & 0xFFFFFFFF)
    row = _mix32(key ^ torch.arange(num_latents, device=device))
    col = torch.arange(D, device=device) * 0x9E3779B9
    return _mix32((row[:, None] + col) & 0xFFFFFFFF)


def round_stochastic(
    x: Tensor,  # float32
    bits: Tensor,  # int64 in [0, 2**16)
) -> Tensor:  # bfloat16
    """x rounded to one of its two bfloat16 neighbours, up with the probability of its remainder."""
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def pair_gradients(pairs: Pairs, num_latents: int) -> tuple[Tensor, Tensor]:
    """The dense [F, D] gradients of W_enc and W_dec that a step forms row by row."""
    N, K, K2 = pairs.shape
    enc = dec = None
    for begin, k, first in ((0, K, 0), (N * K, K2, N)):
        if k == 0:
            continue
        part = slice(begin, begin + N * k)
        idx = pairs.indices[part].view(N, k)
        rows = pairs.dec_rows[first : first + N]
        e = scatter_rows(pairs.enc_coef[part].view(N, k), idx, pairs.enc_rows, num_latents)
        d = scatter_rows(pairs.dec_coef[part].view(N, k), idx, rows, num_latents)
        enc, dec = (e, d) if enc is None or dec is None else (enc + e, dec + d)
    assert enc is not None
    assert dec is not None
    return enc, dec


def _adam_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,
    options: AdamOptions,
    rows: Tensor,  # the latents that move
    bits: Tensor | None = None,  # for bfloat16 moments
) -> None:
    grad = grad[rows].to(param.dtype)
    m = exp_avg[rows].to(param.dtype).lerp(grad, 1 - options.betas[0])
    v = exp_avg_sq[rows].to(param.dtype) * options.betas[1]
    v = v.addcmul(grad, grad, value=1 - options.betas[1])
    param[rows] -= scalars[0] * (m / (v.sqrt() / scalars[1] + options.eps))
    if bits is None:
        exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg.dtype)
    else:
        exp_avg[rows] = round_stochastic(m, bits[rows] & 0xFFFF)
        exp_avg_sq[rows] = round_stochastic(v, bits[rows] >> 16)


def sparse_adam_step_(
    rows: LatentRows,
    pairs: Pairs,
    order: PairOrder,
    scalars: Tensor,  # [2] of adam_scalars_
    step: Tensor,  # scalar
    options: AdamOptions,
    take_sums: Callable[[Tensor], None],  # [any, D] float32/64
) -> None:
    """One Adam step of every latent from its pairs, in place; the copies are refreshed.

    take_sums is given, before W_dec is stepped, the b_enc gradients times the rows of W_enc before
    the step, in parts that are to be added: b_dec's gradient through the encoder is their negative.

    Exact Adam moves every row; lazy Adam only latents that have pairs in order, with the bias
    correction of the global step count, as torch.optim.SparseAdam.
    """
    num_latents, D = rows.W_dec.shape
    enc, dec = pair_gradients(pairs, num_latents)
    grad_b_enc = scatter_values(pairs.enc_coef, pairs.indices, num_latents)
    take_sums(grad_b_enc[None] @ rows.W_enc.to(grad_b_enc.dtype))
    moved = torch.ones(num_latents, dtype=torch.bool, device=enc.device)
    if options.lazy:
        moved = order.offsets[1:] > order.offsets[:-1]
    if options.unit_norm:
        dec = dec - (dec * rows.W_dec).sum(dim=1, keepdim=True) * rows.W_dec
    grads = (enc, grad_b_enc, dec)
    params = (rows.W_enc, rows.b_enc, rows.W_dec)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        bits = None
        if rows.exp_avg[i].dtype == torch.bfloat16:
            bits = random_bits(options.seed, step, i // 2, num_latents, D)
        _adam_(param, rows.exp_avg[i], rows.exp_avg_sq[i], grad, scalars, options, moved, bits)
    if options.unit_norm:
        norm = rows.W_dec[moved].norm(dim=1, keepdim=True)
        rows.W_dec[moved] /= norm.clamp_min(torch.finfo(norm.dtype).tiny)
    if rows.copies is not None:
        rows.copies[0].copy_(rows.W_enc)
        rows.copies[1].copy_(rows.W_dec)


def adam_vector_(
    param: Tensor,  # [D]
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: Tensor,  # [2] of adam_scalars_
    options: AdamOptions,
) -> None:
    """One Adam step of a parameter that has no latents, in place."""
    every = torch.ones_like(param, dtype=torch.bool)
    _adam_(param, exp_avg, exp_avg_sq, grad, scalars, options, every)


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
