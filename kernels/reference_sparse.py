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


def decode_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    scale: Tensor,  # scalar
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, D], [any] float32/64, [N, K] float32/64 x 2
    """`recon - x`, its squares in parts that are to be added (taken before it is rounded), and its
    `pair_coefs`.
    """
    dtype = accumulate_dtype(W_dec.dtype)
    recon = sparse_decode(top_acts, top_idx, W_dec.to(dtype), tokens, offsets)
    residual = recon + b_dec.to(dtype) - x.to(dtype)
    rounded, squares = residual.to(W_dec.dtype), residual.square().sum().view(1)
    coefs = pair_coefs(top_acts, top_idx, W_dec, rounded, scale, tokens, offsets)
    return rounded, squares, *coefs


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
