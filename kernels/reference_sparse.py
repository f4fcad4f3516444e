"""Decoder, its gradients and the order of pairs in plain PyTorch: the sparse part of reference.py.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  W_dec is [F, D]: a latent is a row.
Activations, latents and coefficients are a rectangle [N, K], or a flat list [C] with its `tokens`
and `offsets`: see Pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_encode import accumulate_dtype


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K] int32 or int64
    W_dec: Tensor,  # [F, D]
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> Tensor:  # [N, D] in W_dec's dtype
    """`recon[n] = sum_j top_acts[n, j] * W_dec[top_idx[n, j]]`, accumulated in float32 (float64
    for float64).
    """
    dtype = accumulate_dtype(W_dec.dtype)
    begins, _ = _bags(top_idx, tokens, offsets)
    weights = top_acts.to(dtype).flatten()
    if offsets is not None:
        # They would be the last token's.
        weights = weights.masked_fill(_unused(weights, offsets), 0)
    recon = F.embedding_bag(
        top_idx.flatten().long(), W_dec.to(dtype), begins, mode="sum", per_sample_weights=weights
    )
    # Rows of e4m3 are weights; what they make is not rounded to it.
    return recon if W_dec.element_size() == 1 else recon.to(W_dec.dtype)


def gathered_dots(
    grad: Tensor,  # [N, D]
    top_idx: Tensor,  # [N, K]
    W: Tensor,  # [F, D]
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> Tensor:  # [N, K] float32, or float64
    """`dots[n, j] = grad[n] . W[top_idx[n, j]]`: the decoder's gradient with respect to its
    activations; 0 in the slots that a flat list does not use.
    """
    dtype = accumulate_dtype(W.dtype)
    # The gradient of embedding_bag's weights, which gathers no [N, K, D]: 3.3 ms for an einsum's
    # 17.8 at N=1024 K=32 D=576 F=4096, on one core.
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(dtype),
        W.to(dtype),
        top_idx.flatten().long(),
        *_bags(top_idx, tokens, offsets),
        0,
    )
    if offsets is not None:
        dots = dots.masked_fill(_unused(dots, offsets), 0)
    return dots.view(top_idx.shape)


def nested_rows(
    parts: Tensor,  # [G, N, D]: what the pairs of each level reconstruct alone
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    weights: tuple[float, ...],  # of the levels' squared errors
    main: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [G, N, D] and [N, D] in dtype, [any]
    """Half the gradients by each level's part of the nested reconstructions, whose j-th has the
    parts up to j: the weighted residuals of levels j and above. The residual of level `main`, and
    sums of its squares.
    """
    wide = accumulate_dtype(b_dec.dtype)
    residuals = parts.to(wide).cumsum(0) + (b_dec.to(wide) - x.to(wide))
    weighted = torch.stack([w * r for w, r in zip(weights, residuals, strict=True)])
    rows = weighted.flip(0).cumsum(0).flip(0).to(dtype)
    return rows, residuals[main].to(dtype), residuals[main].square().sum().view(1)


def _unused(slots: Tensor, offsets: Tensor) -> Tensor:  # [C] bool
    """The slots that a flat list does not use."""
    return torch.arange(len(slots), device=slots.device) >= offsets[-1]


def _bags(
    top_idx: Tensor, tokens: Tensor | None = None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # [N], [N * K] int64
    """Where each token's pairs begin, and each pair's token."""
    if tokens is not None:
        begins = tokens if offsets is None else offsets[:-1]
        return begins.long(), tokens.long()
    num_tokens, k = top_idx.shape
    token = torch.arange(num_tokens, device=top_idx.device)
    return token * k, token.repeat_interleave(k)


def scatter_rows(
    coef: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    rows: Tensor,  # [N, D]
    num_latents: int,
    dtype: torch.dtype | None = None,
    order: PairOrder | None = None,
    tokens: Tensor | None = None,  # [C], of a flat list
) -> Tensor:  # [F, D] in dtype; left out, float32, or float64
    """`out[f] = sum of coef[n, j] * rows[n] over the pairs with top_idx[n, j] == f`: both weight
    gradients.

    Deterministic: the pairs of a latent are added in token order. The kernel takes an order made
    before for the same pairs; here it is not needed.
    """
    del order
    wanted, dtype = dtype, accumulate_dtype(rows.dtype)
    token = _bags(top_idx, tokens)[1]
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


def pair_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    residual: Tensor,  # [N, D]
    scale: Tensor,  # scalar
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # [N, K] float32/64 x 2
    """What a pair adds to its latent's rows: `scale * act` times the token's residual to W_dec's
    gradient, `scale * residual . W_dec[latent]` times the centred token to W_enc's; 0 where the
    activation is 0.
    """
    dots = gathered_dots(residual, top_idx, W_dec, tokens, offsets)
    return top_acts.to(dots.dtype) * scale, (dots * scale).masked_fill(top_acts == 0, 0)


class Levels(NamedTuple):
    """Which pairs are of which level of nested reconstructions; a token's stand in its order."""

    rows: Tensor  # [P] int32, each pair's row of [G, tokens, D]
    ends: Tensor  # [N, G] int32, where a level's pairs end among a token's
    tokens: int  # of a whole batch, of which these N may be a part


class Nest(NamedTuple):
    """What `decode_coefs` computes."""

    weights: tuple[float, ...] = (1.0,)  # of the levels' squared errors, see `nested_rows`
    main: int = 0
    every: bool = False  # dot products of pairs without an activation, too
    levels: Levels | None = None  # of several levels, as `by_level` orders pairs


class Decoded(NamedTuple):
    """What a batch's pairs come to."""

    residual: Tensor  # [N, D] recon - x of the main level, in W_dec's dtype
    squares: Tensor  # [any] float32/64, of it before it is rounded; in parts that are to be added
    dec_coef: Tensor  # [N, K] float32/64, of `pair_coefs`
    enc_coef: Tensor  # [N, K]
    rows: Tensor  # [G, N, D], of `nested_rows`


def by_level(
    levels: Tensor,  # [N, K] int32, or [C] of a flat list
    top_acts: Tensor,  # as levels
    top_idx: Tensor,  # likewise, int32
    offsets: Tensor | None,  # [N + 1] of a flat list
    number: int,  # of levels
    first: int,  # the first token of N
    tokens: int,  # of the whole batch
) -> tuple[Tensor, Tensor, Levels]:  # as top_acts and top_idx
    """Activations and latents, each token's in the order of levels, else as they were."""
    N = len(levels) if offsets is None else len(offsets) - 1
    if offsets is None:
        token = torch.arange(N, device=levels.device).repeat_interleave(levels.shape[1])
        used = torch.ones_like(token, dtype=torch.bool)
    else:
        slots = torch.arange(len(levels), device=levels.device)
        used = slots < offsets[-1]
        token = torch.searchsorted(offsets[1:].long(), slots, right=True)
    level = levels.flatten()
    order = torch.argsort(token * number + level.masked_fill(~used, 0), stable=True)
    acts, idx = (t.flatten()[order].masked_fill(~used, 0) for t in (top_acts, top_idx))
    rows = level[order] * tokens + first + token
    of = token[used] * number + level[used]
    ends = torch.bincount(of, minlength=N * number).view(N, number).cumsum(1)
    found = Levels(rows.masked_fill(~used, 0).int(), ends.int(), tokens)
    return acts.view_as(top_acts), idx.view_as(top_idx), found


def decode_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    scale: Tensor,  # scalar
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
    nest: Nest = Nest(),  # noqa: B008
) -> Decoded:
    """`recon - x`, and its `pair_coefs`; with nested reconstructions a pair's dot product is with
    its level's row of `nested_rows`.
    """
    wide = W_dec.to(accumulate_dtype(W_dec.dtype))
    of_level = level_masks(top_idx, nest)
    parts = torch.stack(
        [sparse_decode(top_acts * own, top_idx, wide, tokens, offsets) for own in of_level]
    )
    rows, residual, squares = nested_rows(parts, b_dec, x, nest.weights, nest.main, W_dec.dtype)
    found = (gathered_dots(row, top_idx, W_dec, tokens, offsets) for row in rows)
    dots = sum(own * dots for own, dots in zip(of_level, found, strict=True)) * scale
    if not nest.every:
        dots = dots.masked_fill(top_acts == 0, 0)
    return Decoded(residual, squares, top_acts.to(dots.dtype) * scale, dots, rows)


def level_masks(top_idx: Tensor, nest: Nest) -> Tensor:  # [G, N, K] bool
    """Which pairs are of each level, 1 and 0."""
    if nest.levels is None:
        return torch.ones((1, *top_idx.shape), dtype=torch.bool, device=top_idx.device)
    every = torch.arange(len(nest.weights), device=top_idx.device)
    level = nest.levels.rows // nest.levels.tokens
    return (level == every[:, None]).view(-1, *top_idx.shape)


def in_band(pre: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    """The kernel of straight-through gradients: 1 / width within width / 2 of a threshold."""
    return ((pre - threshold).abs() < width / 2).to(pre.dtype) / width


def jump_acts(
    pre: Tensor,  # [C]
    latents: Tensor,  # [C]
    threshold: Tensor,  # [F]
    offsets: Tensor,  # [N + 1]
) -> Tensor:  # [C]
    """JumpReLU of a flat list's pre-activations."""
    acts = pre * (pre > threshold[latents.long()])
    return acts.masked_fill(_unused(acts, offsets), 0)


def jump_grads(
    pre: Tensor,  # [C]
    latents: Tensor,  # [C]
    threshold: Tensor,  # [F]
    offsets: Tensor,  # [N + 1]
    grad: Tensor,  # [C], by activations
    cost: Tensor,  # scalar, which times factor is what a pair's being active costs
    factor: float,
    width: float,
    to_input: bool,
) -> tuple[Tensor, Tensor]:  # [C] x 2, by pre-activations and by each pair's threshold
    """Gradients of `jump_acts` and of a cost of each active pair, as `models.sparsity` has them."""
    own = threshold[latents.long()]
    edge = (own * grad + cost * factor) * in_band(pre, own, width)
    edge = edge.masked_fill(_unused(edge, offsets), 0)
    to_pre = (grad * (pre > own)).masked_fill(_unused(edge, offsets), 0)
    return to_pre + edge if to_input else to_pre, -edge


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


def token_sums(
    x: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor]:  # [any, D] and [any] float32/64
    """Sums of tokens, and of all squares, in parts that are to be added."""
    wide = x.to(accumulate_dtype(x.dtype))
    return wide.sum(dim=0, keepdim=True), wide.square().sum().view(1)
