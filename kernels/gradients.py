"""Gradients of the encoder and the decoder over the selected pairs alone.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  Written once for ops.py's custom ops, which
a compiler traces, and for eager.py's Functions, which call the kernels straight away: a `Kit` says
how the parts are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import PairOrder


class Kit(NamedTuple):
    """The operations that gradients are made of, by the names they have in `reference`."""

    gathered_dots: Callable[..., Tensor]
    scatter_rows: Callable[..., Tensor]
    sparse_decode: Callable[..., Tensor]
    order_pairs: Callable[[Tensor, int, Tensor], PairOrder | None]


def centred(x: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x - b_dec` in the compute dtype, subtracted in b_dec's."""
    return x.to(dtype) if b_dec is None else (x.to(b_dec.dtype) - b_dec).to(dtype)


def encode_gradients(
    kit: Kit,
    needs: Sequence[bool],  # whether x, W_enc, b_enc, b_dec need a gradient
    saved: Sequence[Tensor],  # x, W_enc, b_enc, b_dec or None, values, latents, as `_flat`
    grad: Tensor | None,  # of the values
    order: PairOrder | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc, b_enc and b_dec from that of the values; an order of all pairs made
    before is used.

    `grad_b_dec = -(sum over tokens of grad_pre) @ W_enc` costs F*D: no [N, D] gradient is made
    unless x needs one.
    """
    if grad is None:
        return None, None, None, None
    x, W_enc, b_enc, b_dec, values, idx = saved[:6]
    tokens, offsets = _flat(saved[6:])
    coef = grad * (values > 0)  # ReLU's gradient
    need_x, need_W, need_b, need_b_dec = needs
    num_latents = W_enc.shape[0]
    grad_x = grad_W = grad_b = grad_b_dec = None
    if order is None and (need_W or need_b or need_b_dec):
        order = kit.order_pairs(idx, num_latents, coef)
    if need_W:
        xc = centred(x, b_dec, W_enc.dtype).contiguous()
        grad_W = kit.scatter_rows(coef, idx, xc, num_latents, W_enc.dtype, order, tokens)
    if need_b or need_b_dec:
        ones, dtype = coef.new_ones(len(x), 1), coef.dtype
        sums = kit.scatter_rows(coef, idx, ones, num_latents, dtype, order, tokens).squeeze(1)
        grad_b = sums.to(b_enc.dtype) if need_b else None
        if need_b_dec:
            grad_b_dec = -(sums.to(W_enc.dtype) @ W_enc).to(b_dec.dtype)
    if need_x:
        grad_x = kit.sparse_decode(coef, idx, W_enc, tokens, offsets).to(x.dtype)
    return grad_x, grad_W, grad_b, grad_b_dec


def _flat(rest: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """A flat list's tokens and offsets; a rectangle has none."""
    return (rest[0], rest[1]) if rest else (None, None)


def decode_gradients(
    kit: Kit,
    needs: Sequence[bool],  # whether top_acts, top_idx, W_dec need a gradient
    saved: Sequence[Tensor],  # top_acts, top_idx, W_dec, tokens and offsets or None
    grad: Tensor,  # [N, D]
    order: PairOrder | None = None,
) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    """Gradients of top_acts and W_dec; an order of all pairs made before is used."""
    top_acts, top_idx, W_dec, tokens, offsets = saved
    grad = grad.contiguous()
    grad_acts = grad_W = None
    if needs[0]:
        grad_acts = kit.gathered_dots(grad, top_idx, W_dec, tokens, offsets).to(top_acts.dtype)
    if needs[2]:
        grad_W = kit.scatter_rows(
            top_acts, top_idx, grad, W_dec.shape[0], W_dec.dtype, order, tokens
        )
    return grad_acts, None, grad_W, None, None
