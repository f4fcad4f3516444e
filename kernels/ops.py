"""The public operations over `dispatch.implementation`: custom ops with fake and autograd
registrations where a compiler traces, eager.py's Functions elsewhere.

Legend: N tokens, D d_in, F d_sae (of this shard), K k, C slots of a flat list.  Nothing here holds
arithmetic of its own: kernels, reference and gradients.py do, so they can be tested without
autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import eager
from .dispatch import use_kernels
from .eager import compute
from .gradients import Kit, decode_gradients, encode_gradients
from .reference import PairOrder, Pairs, Slots, accumulate_dtype


def _op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A custom op that runs as it stands in eager code; fake gives a compiler its results' shapes
    and dtypes."""
    name, opened, rest = schema.partition("(")
    qualified = f"flash_sae_dist::{name}"
    op = torch.library.custom_op(qualified, run, mutates_args=(), schema=opened + rest)
    op.register_fake(fake)
    return op


def _fake_slots(W_enc: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Values and latents."""
    values = W_enc.new_empty(shape, dtype=accumulate_dtype(W_enc.dtype))
    return values, torch.empty_like(values, dtype=torch.int32)


def _fake_pairs(x: Tensor, W_enc: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, latents, tokens and offsets of a flat list."""
    values, latents = _fake_slots(W_enc, capacity)
    return values, latents, torch.empty_like(latents), latents.new_empty(x.shape[0] + 1)


def _of_order(order: list[Tensor]) -> PairOrder | None:
    """An order as ops hand it on: no tensors where none was made."""
    return PairOrder(*order) if order else None


def _run_order(top_idx: Tensor, num_latents: int, coef: Tensor | None) -> tuple[Tensor, ...]:
    """`reference.order_pairs`, all int32."""
    like = top_idx.new_empty(0, dtype=torch.float32)
    order: PairOrder = compute("order_pairs", like, top_idx, num_latents, coef)
    return order.order.int(), order.latents.int(), order.offsets


def _fake_order(top_idx: Tensor, num_latents: int, coef: Tensor | None) -> tuple[Tensor, ...]:
    order = top_idx.new_empty(top_idx.numel(), dtype=torch.int32)
    return order, torch.empty_like(order), order.new_empty(num_latents + 1)


_INPUTS = "Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec"
_FLAT = "Tensor? tokens=None, Tensor? offsets=None"
_topk_encode = _op(
    f"topk_encode({_INPUTS}, int k) -> (Tensor, Tensor)",
    partial(eager.encode_list, "topk_encode"),
    lambda x, W_enc, b_enc, b_dec, k: _fake_slots(W_enc, x.shape[0], k),
)
_batch_topk_encode = _op(
    f"batch_topk_encode({_INPUTS}, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    partial(eager.encode_list, "batch_topk_encode"),
    lambda x, W_enc, b_enc, b_dec, k: _fake_pairs(x, W_enc, x.shape[0] * k),
)
_threshold_encode = _op(
    f"threshold_encode({_INPUTS}, Tensor threshold, int capacity) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(eager.encode_list, "threshold_encode"),
    lambda x, W_enc, b_enc, b_dec, threshold, capacity: (
        *_fake_pairs(x, W_enc, capacity),
        x.new_empty((), dtype=torch.int32),
    ),
)
_sparse_decode = _op(
    f"sparse_decode(Tensor top_acts, Tensor top_idx, Tensor W_dec, {_FLAT}) -> Tensor",
    lambda acts, idx, W, *flat: compute("sparse_decode", W, acts, idx, W, *flat),
    lambda acts, idx, W, tokens=None, offsets=None: W.new_empty(
        (acts.shape[0] if offsets is None else offsets.shape[0] - 1, W.shape[1])
    ),
)
_gathered_dots = _op(
    f"gathered_dots(Tensor grad, Tensor top_idx, Tensor W, {_FLAT}) -> Tensor",
    lambda grad, idx, W, *flat: compute("gathered_dots", W, grad, idx, W, *flat),
    lambda grad, idx, W, *flat: W.new_empty(idx.shape, dtype=accumulate_dtype(W.dtype)),
)
_order_pairs = _op(
    "order_pairs(Tensor top_idx, int num_latents, Tensor? coef) -> (Tensor, Tensor, Tensor)",
    _run_order,
    _fake_order,
)
_scatter_rows = _op(
    "scatter_rows(Tensor coef, Tensor top_idx, Tensor rows, int num_latents, ScalarType dtype, "
    "Tensor[] order, Tensor? tokens) -> Tensor",
    lambda coef, idx, rows, num_latents, dtype, order, tokens: compute(
        "scatter_rows", rows, coef, idx, rows, num_latents, dtype, _of_order(order), tokens
    ),
    lambda coef, idx, rows, num_latents, dtype, order, tokens: rows.new_empty(
        (num_latents, rows.shape[1]), dtype=dtype
    ),
)


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[:4])


def _traced_order(top_idx: Tensor, num_latents: int, like: Tensor, coef: Tensor) -> list[Tensor]:
    """An order of all pairs, made by an op of its own: a compiler finds that the decoder's gradient
    and the encoder's ask for the same one. None where the reference does without.

    A rectangle's pairs of coefficient 0 are among them: a token that is not finite makes their
    gradients NaN. A flat list's are not, for its unused slots would all be the first latent's."""
    if not use_kernels(like):
        return []
    return list(_order_pairs(top_idx, num_latents, coef if coef.ndim == 1 else None))


_CUSTOM = Kit(
    gathered_dots=_gathered_dots,
    scatter_rows=lambda coef, idx, rows, num_latents, dtype, order, tokens: _scatter_rows(
        coef, idx, rows, num_latents, dtype, _traced_order(idx, num_latents, rows, coef), tokens
    ),
    sparse_decode=_sparse_decode,
    order_pairs=lambda idx, num_latents, coef: None,
)


def _encode_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = encode_gradients(_CUSTOM, needs[:4], ctx.saved_tensors, grads[0])
    return *found, *(None for _ in needs[4:])


for _op_of_a_rule in (_topk_encode, _batch_topk_encode, _threshold_encode):
    _op_of_a_rule.register_autograd(_encode_backward, setup_context=_encode_setup)
_sparse_decode.register_autograd(
    lambda ctx, grad: decode_gradients(_CUSTOM, ctx.needs_input_grad, ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _check_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int = 1
) -> None:
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


def _encode(op: Any, rule: str, *args: Any) -> tuple[Tensor, ...]:
    """By autograd Functions, or where a compiler traces by the custom op."""
    run = partial(eager.encode, rule) if eager.applies(*args[:4]) else op
    return run(*args)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, b_dec: Tensor | None = None
) -> Slots:
    """The k largest activations `relu((x - b_dec) @ W_enc.T + b_enc)` of each token, exactly.

    x [N, D] is cast to W_enc's dtype (float64, float32, bfloat16 or float16), W_enc [F, D], b_enc
    [F], b_dec [D]; sums and the selection are float32 (float64 for float64). Values descend; equal
    values go to the lowest index, so a row with fewer than k positive activations ends in zeros at
    the lowest indices whose activation is zero. NaN sorts above +inf, as in `torch.topk`, so that
    it reaches the loss instead of hiding. Differentiable in x, W_enc, b_enc and b_dec; a zero
    value passes no gradient. Raises ValueError on shapes, dtypes, devices or k that do not fit.
    """
    _check_encode(x, W_enc, b_enc, b_dec, k)
    return Slots(*_encode(_topk_encode, "topk_encode", x, W_enc, b_enc, b_dec, k))


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, b_dec: Tensor | None = None
) -> Pairs:
    """The N * k largest activations `relu((x - b_dec) @ W_enc.T + b_enc)` of all tokens together,
    exactly: BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).

    As `topk_encode`, but a token may have any number of them, in a list of N * k slots. Equal
    values go to the lowest (token, latent). Zeros are never among them: where fewer are positive
    the list is shorter. NaN sorts above +inf.
    """
    _check_encode(x, W_enc, b_enc, b_dec, k)
    values, latents, tokens, offsets = _encode(
        _batch_topk_encode, "batch_topk_encode", x, W_enc, b_enc, b_dec, k
    )
    return Pairs(tokens, latents, values, offsets)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    capacity: int,
    *,
    b_dec: Tensor | None = None,
) -> tuple[Pairs, Tensor]:
    """All activations `relu((x - b_dec) @ W_enc.T + b_enc)` above a threshold, strictly: JumpReLU,
    and the inference of BatchTopK. threshold is [F], one a latent, or one for all.

    As `topk_encode`, but a token may have any number of them, in a list of `capacity` slots; a
    scalar int32 on the device says how many there are: where that is more, the list has some.
    Zeros are never among them, NaN always is. No gradient passes to the threshold.
    """
    _check_encode(x, W_enc, b_enc, b_dec)
    limit = torch.as_tensor(threshold, dtype=accumulate_dtype(W_enc.dtype), device=W_enc.device)
    if limit.ndim > 0 and limit.shape != b_enc.shape:
        raise ValueError(
            f"threshold must be a number or [F] = [{W_enc.shape[0]}], one a latent, not "
            f"{list(limit.shape)}"
        )
    if capacity < 1 and len(x):
        raise ValueError(f"capacity={capacity} must be at least 1, the pairs that are kept")
    limit = limit.detach().clamp_min(0)
    values, latents, tokens, offsets, number = _encode(
        _threshold_encode, "threshold_encode", x, W_enc, b_enc, b_dec, limit, capacity
    )
    return Pairs(tokens, latents, values, offsets), number


def sparse_decode(
    top_acts: Tensor,
    top_idx: Tensor,
    W_dec: Tensor,
    tokens: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`recon[n] = sum_j top_acts[n, j] * W_dec[top_idx[n, j]]` [N, D], in W_dec's dtype,
    accumulated in float32.

    top_acts [N, K] floating point, top_idx [N, K] int32 or int64 in [0, F), W_dec [F, D]; or both
    [C], a flat list, with the tokens [C] and offsets [N + 1] that its encoder gave.
    Differentiable in top_acts and W_dec (float64: accumulated in float64); deterministic. Raises
    ValueError on shapes or dtypes that do not fit.
    """
    if (tokens is None) != (offsets is None):
        raise ValueError("a flat list has tokens and offsets, a rectangle neither; give both")
    if top_acts.ndim != (2 if tokens is None else 1) or top_acts.shape != top_idx.shape:
        raise ValueError(
            f"top_acts and top_idx must both be {'[N, K]' if tokens is None else '[C]'}, "
            f"not {list(top_acts.shape)} and {list(top_idx.shape)}"
        )
    if top_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"top_idx must be int32 or int64, not {top_idx.dtype}; use the latents of topk_encode"
        )
    if W_dec.ndim != 2:
        raise ValueError(f"W_dec must be [F, D], a latent a row, not {list(W_dec.shape)}")
    applies = eager.applies(top_acts, top_idx, W_dec, tokens, offsets)
    op = eager.decode if applies else _sparse_decode
    out: Tensor = op(top_acts, top_idx, W_dec, tokens, offsets)
    return out
