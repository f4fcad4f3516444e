"""The public operations over `dispatch.implementation`: custom ops with fake and autograd
registrations where a compiler traces, eager.py's Functions elsewhere.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  Nothing here holds arithmetic of its own:
kernels, reference and gradients.py do, so they can be tested without autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager
from .dispatch import use_kernels
from .eager import compute
from .gradients import Kit, centred, decode_gradients, encode_gradients
from .reference import PairOrder, accumulate_dtype


class TopK(NamedTuple):
    """The active latents of each token."""

    values: Tensor  # [N, K] float32 (float64 for float64 inputs), descending, >= 0
    indices: Tensor  # [N, K] int32


@torch.library.custom_op("flash_sae_dist::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    xc = centred(x, b_dec, W_enc.dtype).contiguous()
    values, indices = compute("topk_encode", W_enc, xc, W_enc, b_enc, k)
    return values, indices


@_topk_encode.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    values = W_enc.new_empty((x.shape[0], k), dtype=accumulate_dtype(W_enc.dtype))
    return values, torch.empty_like(values, dtype=torch.int32)


@torch.library.custom_op("flash_sae_dist::sparse_decode", mutates_args=())
def _sparse_decode(top_acts: Tensor, top_idx: Tensor, W_dec: Tensor) -> Tensor:
    out: Tensor = compute("sparse_decode", W_dec, top_acts, top_idx, W_dec)
    return out


@_sparse_decode.register_fake
def _(top_acts: Tensor, top_idx: Tensor, W_dec: Tensor) -> Tensor:
    return W_dec.new_empty((top_acts.shape[0], W_dec.shape[1]))


@torch.library.custom_op("flash_sae_dist::gathered_dots", mutates_args=())
def gathered_dots(grad: Tensor, top_idx: Tensor, W: Tensor) -> Tensor:
    """`reference.gathered_dots`, by kernel where there is one."""
    out: Tensor = compute("gathered_dots", W, grad, top_idx, W)
    return out


@gathered_dots.register_fake
def _(grad: Tensor, top_idx: Tensor, W: Tensor) -> Tensor:
    return W.new_empty(top_idx.shape, dtype=accumulate_dtype(W.dtype))


@torch.library.custom_op("flash_sae_dist::order_pairs", mutates_args=())
def _order_pairs(top_idx: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.order_pairs` of all pairs, all int32."""
    like = top_idx.new_empty(0, dtype=torch.float32)
    order: PairOrder = compute("order_pairs", like, top_idx, num_latents)
    return order.order.int(), order.latents.int(), order.offsets


@_order_pairs.register_fake
def _(top_idx: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    order = top_idx.new_empty(top_idx.numel(), dtype=torch.int32)
    return order, torch.empty_like(order), order.new_empty(num_latents + 1)


def _order(parts: tuple[Tensor | None, Tensor | None, Tensor | None]) -> PairOrder | None:
    """An order as ops hand it on."""
    order, latents, offsets = parts
    if order is None or latents is None or offsets is None:
        return None
    return PairOrder(order, latents, offsets)


@torch.library.custom_op("flash_sae_dist::scatter_rows", mutates_args=())
def scatter_rows(
    coef: Tensor,
    top_idx: Tensor,
    rows: Tensor,
    num_latents: int,
    dtype: torch.dtype | None = None,
    order: Tensor | None = None,
    latents: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`reference.scatter_rows`, by kernel where there is one."""
    made = _order((order, latents, offsets))
    out: Tensor = compute("scatter_rows", rows, coef, top_idx, rows, num_latents, dtype, made)
    return out


@scatter_rows.register_fake
def _(
    coef: Tensor,
    top_idx: Tensor,
    rows: Tensor,
    num_latents: int,
    dtype: torch.dtype | None = None,
    order: Tensor | None = None,
    latents: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    dtype = dtype or accumulate_dtype(rows.dtype)
    return rows.new_empty((num_latents, rows.shape[1]), dtype=dtype)


@torch.library.custom_op("flash_sae_dist::scatter_values", mutates_args=())
def scatter_values(
    coef: Tensor,
    top_idx: Tensor,
    num_latents: int,
    order: Tensor | None = None,
    latents: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`reference.scatter_values`, by kernel where there is one."""
    made = _order((order, latents, offsets))
    out: Tensor = compute("scatter_values", coef, coef, top_idx, num_latents, made)
    return out


@scatter_values.register_fake
def _(
    coef: Tensor,
    top_idx: Tensor,
    num_latents: int,
    order: Tensor | None = None,
    latents: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    return coef.new_empty((num_latents,), dtype=accumulate_dtype(coef.dtype))


@torch.library.custom_op("flash_sae_dist::decode_backward", mutates_args=())
def _decode_both(
    top_acts: Tensor,
    top_idx: Tensor,
    W_dec: Tensor,
    grad: Tensor,
    order: Tensor | None,
    latents: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.decode_backward`, by kernel where there is one."""
    made = _order((order, latents, offsets))
    dots, rows = compute("decode_backward", W_dec, top_acts, top_idx, W_dec, grad, made)
    return dots, rows


@_decode_both.register_fake
def _(
    top_acts: Tensor,
    top_idx: Tensor,
    W_dec: Tensor,
    grad: Tensor,
    order: Tensor | None,
    latents: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dots = W_dec.new_empty(top_idx.shape, dtype=accumulate_dtype(W_dec.dtype))
    # Contiguous whatever W_dec is.
    return dots, W_dec.new_empty(W_dec.shape)


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, b_enc, b_dec = inputs[:4]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, b_enc, b_dec, *output)


def _traced_order(
    top_idx: Tensor, num_latents: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """An order of all pairs, made by an op of its own: a compiler finds that the decoder's gradient
    and the encoder's ask for the same one. None where the reference does without.

    Pairs of coefficient 0 are among them: a token that is not finite makes their gradients NaN."""
    if not use_kernels(like):
        return None, None, None
    order, latents, offsets = _order_pairs(top_idx, num_latents)
    return order, latents, offsets


_CUSTOM = Kit(
    gathered_dots=lambda grad, idx, W: gathered_dots(grad, idx, W),
    scatter_rows=lambda coef, idx, rows, num_latents, dtype, order: scatter_rows(
        coef, idx, rows, num_latents, dtype, *_traced_order(idx, num_latents, rows)
    ),
    scatter_values=lambda coef, idx, num_latents, order: scatter_values(
        coef, idx, num_latents, *_traced_order(idx, num_latents, coef)
    ),
    sparse_decode=lambda acts, idx, W: _sparse_decode(acts, idx, W),
    order_pairs=lambda idx, num_latents, coef: None,
    decode_backward=lambda acts, idx, W, grad, order: _decode_both(
        acts, idx, W, grad, *_traced_order(idx, W.shape[0], W)
    ),
)


def _encode_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return *encode_gradients(_CUSTOM, ctx.needs_input_grad[:4], ctx.saved_tensors, grads[0]), None


_topk_encode.register_autograd(_encode_backward, setup_context=_encode_setup)


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return decode_gradients(_CUSTOM, ctx.needs_input_grad, ctx.saved_tensors, grad)


_sparse_decode.register_autograd(_decode_backward, setup_context=_decode_setup)


def _check_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> None:
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[1]:
        raise ValueError(
            f"x must be [N, D] and W_enc [F, D] with one D, not {list(x.shape)} and "
            f"{list(W_enc.shape)}; flatten batch dims, and store a latent as a row of W_enc"
        )
    if b_enc.shape != W_enc.shape[:1]:
        raise ValueError(
            f"b_enc must be [F] = [{W_enc.shape[0]}], one a row of W_enc, not {list(b_enc.shape)}"
        )
    if b_dec is not None and b_dec.shape != W_enc.shape[1:]:
        raise ValueError(f"b_dec must be [D] = [{W_enc.shape[1]}], not {list(b_dec.shape)}")
    if not 1 <= k <= W_enc.shape[0]:
        raise ValueError(
            f"k={k} is outside 1..{W_enc.shape[0]}, the number of latents; change k or widen W_enc"
        )
    for name, tensor in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor, not {tensor.dtype}; convert it first"
            )
        if tensor.device != W_enc.device:
            raise ValueError(
                f"{name} is on {tensor.device} but W_enc on {W_enc.device}; move them to one device"
            )


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, b_dec: Tensor | None = None
) -> TopK:
    """The k largest activations `relu((x - b_dec) @ W_enc.T + b_enc)` of each token, exactly.

    x [N, D] is cast to W_enc's dtype (float64, float32, bfloat16 or float16), W_enc [F, D], b_enc
    [F], b_dec [D]; sums and the selection are float32 (float64 for float64). Values descend; equal
    values go to the lowest index, so a row with fewer than k positive activations ends in zeros at
    the lowest indices whose activation is zero. NaN sorts above +inf, as in `torch.topk`, so that
    it reaches the loss instead of hiding. Differentiable in x, W_enc, b_enc and b_dec; a zero
    value passes no gradient. Raises ValueError on shapes, dtypes, devices or k that do not fit.
    """
    _check_encode(x, W_enc, b_enc, b_dec, k)
    op = eager.encode if eager.applies(x, W_enc, b_enc, b_dec) else _topk_encode
    return TopK(*op(x, W_enc, b_enc, b_dec, k))


def sparse_decode(top_acts: Tensor, top_idx: Tensor, W_dec: Tensor) -> Tensor:
    """`recon[n] = sum_j top_acts[n, j] * W_dec[top_idx[n, j]]` [N, D], in W_dec's dtype,
    accumulated in float32.

    top_acts [N, K] floating point, top_idx [N, K] int32 or int64 in [0, F), W_dec [F, D].
    Differentiable in top_acts and W_dec (float64: accumulated in float64); deterministic. Raises
    ValueError on shapes or dtypes that do not fit.
    """
    if top_acts.ndim != 2 or top_acts.shape != top_idx.shape:
        raise ValueError(
            "top_acts and top_idx must both be [N, K], "
            f"not {list(top_acts.shape)} and {list(top_idx.shape)}"
        )
    if top_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"top_idx must be int32 or int64, not {top_idx.dtype}; use the indices of topk_encode"
        )
    if W_dec.ndim != 2:
        raise ValueError(f"W_dec must be [F, D], a latent a row, not {list(W_dec.shape)}")
    op = eager.decode if eager.applies(top_acts, top_idx, W_dec) else _sparse_decode
    out: Tensor = op(top_acts, top_idx, W_dec)
    return out
