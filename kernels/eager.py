"""The operations as autograd Functions that call the kernels straight away.

A custom op passes through torch's dispatcher and back into Python, which the host pays for at each
call; ops.py uses custom ops where a compiler traces and these everywhere else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import implementation, on_device, use_kernels
from .gradients import Kit, centred, decode_gradients, encode_gradients
from .reference import PairOrder


def compute(name: str, like: Tensor, *args: Any) -> Any:
    """Runs an operation's implementation for tensors like `like`, its dtypes as they are: a
    surrounding autocast would round the reference's float32 sums."""
    run = implementation(name, like)
    with on_device(like):
        if not torch.is_autocast_enabled(like.device.type):
            return run(*args)
        with torch.autocast(like.device.type, enabled=False):
            return run(*args)


DIRECT = Kit(
    gathered_dots=lambda grad, idx, W, *flat: compute("gathered_dots", W, grad, idx, W, *flat),
    scatter_rows=lambda coef, idx, rows, *rest: compute(
        "scatter_rows", rows, coef, idx, rows, *rest
    ),
    sparse_decode=lambda acts, idx, W, *flat: compute("sparse_decode", W, acts, idx, W, *flat),
    order_pairs=lambda idx, num_latents, coef: (
        compute("order_pairs", coef, idx, num_latents, coef) if use_kernels(coef) else None
    ),
)


def applies(*tensors: Tensor | None) -> bool:
    """True outside compilers and for tensors that hold data: no fakes, no subclasses, no meta."""
    plain = (Tensor, torch.nn.Parameter)
    return not torch.compiler.is_compiling() and all(
        t is None or (type(t) in plain and not t.is_meta) for t in tensors
    )


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def encode_list(
    rule: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """What an encoder finds by a rule, one of the three `..._encode` of `reference`: values and
    latents, of a flat list tokens and offsets, by the threshold rule how many pairs there are.
    """
    xc = centred(x, b_dec, W_enc.dtype).contiguous()
    found = compute(rule, W_enc, xc, W_enc, b_enc, *args)
    if rule == "topk_encode":
        return tuple(found)
    pairs, *number = found if rule == "threshold_encode" else (found,)
    return pairs.values, pairs.latents, pairs.tokens, pairs.offsets, *number


class _Shared:
    """The order of a list's pairs: made by a decoder in its forward pass, used by the encoder that
    made the list in its backward pass."""

    def __init__(self) -> None:
        self.order: PairOrder | None = None
        self.num_latents = self.version = -1
        self.side: torch.cuda.Stream | None = None

    def give(
        self, order: PairOrder, indices: Tensor, num_latents: int, side: torch.cuda.Stream | None
    ) -> None:
        """Keeps an order of these indices that a side stream makes."""
        self.order, self.side = order, side
        self.num_latents, self.version = num_latents, indices._version

    def take(self, indices: Tensor, num_latents: int) -> PairOrder | None:
        """The order, if it is that of these indices, for the current stream; once."""
        order, self.order = self.order, None
        if order is None or (self.num_latents, self.version) != (num_latents, indices._version):
            return None
        return _join(order, self.side, indices.device)


# By a list's indices, as long as they live.
_SHARED = WeakTensorKeyDictionary()


def _join(order: PairOrder, side: torch.cuda.Stream | None, device: torch.device) -> PairOrder:
    """An order made on a side stream, safe on the current one."""
    if side is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for t in order:
            t.record_stream(current)
    return order


def encode(
    rule: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """`Encode` where a gradient is wanted, else its list alone."""
    if not _wants_gradients(x, W_enc, b_enc, b_dec):
        return encode_list(rule, x, W_enc, b_enc, b_dec, *args)
    shared = _Shared() if use_kernels(W_enc) else None
    found: tuple[Tensor, ...] = Encode.apply(rule, shared, args, x, W_enc, b_enc, b_dec)
    if shared is not None:
        _SHARED[found[1]] = shared
    return found


def decode(top_acts: Tensor, top_idx: Tensor, W_dec: Tensor, *flat: Tensor | None) -> Tensor:
    """`Decode` where a gradient is wanted, else the reconstruction alone."""
    if not _wants_gradients(top_acts, W_dec):
        return compute("sparse_decode", W_dec, top_acts, top_idx, W_dec, *flat)  # type: ignore[no-any-return]
    return Decode.apply(top_acts, top_idx, W_dec, *flat)  # type: ignore[no-any-return]


class Encode(torch.autograd.Function):
    """An encoder by any rule."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: str,
        shared: _Shared | None,
        args: tuple[Any, ...],
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
    ) -> Any:
        """As `encode_list`."""
        output = encode_list(rule, x, W_enc, b_enc, b_dec, *args)
        ctx.shared = shared
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_enc, b_dec, *output[:4])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of the four tensors."""
        needs = ctx.needs_input_grad[3:]
        # Once: activation checkpointing hands each tensor out a single time.
        saved = ctx.saved_tensors
        order = None
        if ctx.shared is not None:
            order = ctx.shared.take(saved[5], saved[1].shape[0])
        return None, None, None, *encode_gradients(DIRECT, needs, saved, grads[0], order)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Of high priority: its small kernels need not wait for a large one's last program.
    return torch.cuda.Stream(device, priority=-1)


def _order_of(top_idx: Tensor, W_dec: Tensor, offsets: Tensor | None) -> PairOrder:
    """The order of a list's pairs, whatever their values: several decoders may share it."""
    used: Tensor | None = None
    if offsets is not None:
        # Unused slots would all be the first latent's.
        used = (torch.arange(top_idx.numel(), device=top_idx.device) < offsets[-1]).float()
    return compute("order_pairs", W_dec, top_idx, W_dec.shape[0], used)  # type: ignore[no-any-return]


def _order_beside(
    top_idx: Tensor, W_dec: Tensor, offsets: Tensor | None
) -> tuple[PairOrder, torch.cuda.Stream | None]:
    """`_order_of`, made on a side stream."""
    side = _side_stream(W_dec.device)
    with on_device(W_dec):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            order = _order_of(top_idx, W_dec, offsets)
    for t in (top_idx, offsets):
        if t is not None:
            t.record_stream(side)
    return order, side


class Decode(torch.autograd.Function):
    """`sparse_decode`; the order that its backward needs is made beside the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        top_acts: Tensor,
        top_idx: Tensor,
        W_dec: Tensor,
        tokens: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The reconstruction."""
        ctx.order, ctx.side = None, None
        # A graph that captures the forward pass alone would be left with a stream that never ends.
        if (
            ctx.needs_input_grad[2]
            and use_kernels(W_dec)
            and not torch.cuda.is_current_stream_capturing()
        ):
            ctx.order, ctx.side = _order_beside(top_idx, W_dec, offsets)
            shared: _Shared | None = _SHARED.get(top_idx)
            if shared is not None:
                shared.give(ctx.order, top_idx, W_dec.shape[0], ctx.side)
        ctx.save_for_backward(top_acts, top_idx, W_dec, tokens, offsets)
        out: Tensor = compute("sparse_decode", W_dec, top_acts, top_idx, W_dec, tokens, offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of top_acts and W_dec."""
        order: PairOrder | None = ctx.order
        if order is not None:
            order = _join(order, ctx.side, grads[0].device)
        needs = ctx.needs_input_grad
        found = decode_gradients(DIRECT, needs, ctx.saved_tensors, grads[0], order)
        return found[: len(needs)]
