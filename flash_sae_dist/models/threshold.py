"""Architectures whose latents are active above a threshold each: what ReLU, JumpReLU and Gated
share, and BatchTopK at inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import ops
from ..kernels.dispatch import implementation
from ..kernels.reference import Dense
from ..parallel.collectives import feed_shards
from .base import Codes, Pairs, SparseCoder

# A threshold that no pre-activation reaches, of slots that are unused; finite, so that 0 times it
# is 0.
NEVER = 1e30


def whole_list(
    encode: Callable[[int], tuple[Pairs, Tensor]], num_tokens: int, sae: SparseCoder
) -> Pairs:
    """All pairs that an encoder finds, however many: it is asked again where they ask for another
    room than those that an SAE's tokens had last. One unused slot at the most. A host sync.
    """
    limit = max(1, num_tokens * sae.d_sae_local)

    def room(number: int) -> int:
        # A function of the number alone: sums over other lengths round otherwise.
        return min(limit, 1 << max(0, number - 1).bit_length())

    capacity = room(round(sae.last_pairs * num_tokens))
    found, number = encode(capacity)
    if room(there := int(number)) != capacity:
        found, _ = encode(room(there))
    sae.last_pairs = there / max(1, num_tokens)
    used = max(1, int(found.offsets[-1]))
    return Pairs(found.tokens[:used], found.latents[:used], found.values[:used], found.offsets)


def encode_above(sae: SparseCoder, x: Tensor, threshold: Tensor | float) -> Pairs:
    """All of a shard's activations `relu(pre)` of tokens x [N, d_in] above thresholds [d_sae_local]
    or one for all; differentiable. A host sync.
    """
    fed, b_dec = feed_shards(x, sae.mesh), sae.fed_centre()
    W_enc = sae.compute(sae.W_enc)
    return whole_list(
        lambda capacity: ops.threshold_encode(
            fed, W_enc, sae.b_enc, threshold, capacity, b_dec=b_dec
        ),
        len(x),
        sae,
    )


class _OfPairs(torch.autograd.Function):
    """`rows[latents]`, whose gradient is a sum over each latent's pairs in their order: the same
    bits each time, which atomics would not give."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, latents: Tensor) -> Tensor:
        ctx.save_for_backward(latents)
        ctx.num_latents = len(rows)
        return rows[latents.long()]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (latents,), grad = ctx.saved_tensors, grads[0].contiguous()
        # Most gradients are 0, those of slots that are unused too: a kernel leaves them out.
        sums = implementation("scatter_rows", grad)(
            grad[None], latents[None], grad.new_ones(1, 1), ctx.num_latents, grad.dtype
        )
        return sums.squeeze(1), None


class ThresholdCoder(SparseCoder):
    """A latent is active where its pre-activation exceeds a limit, on its own shard."""

    is_pairwise = True
    varied_lengths = True
    revivals = frozenset({"ghost", "resample", "none"})
    # A value that has no activation, no penalty and no gradient.
    idle: ClassVar[float] = 0.0

    def limits(self) -> Tensor | None:
        """Pre-activations [d_sae_local] above which a latent has an activation or a gradient while
        it is trained; None is 0 for all.
        """
        return None

    def of_pairs(self, rows: Tensor, found: Codes, unused: float) -> Tensor:
        """Each pair's element of rows [d_sae_local], and a number for slots that are unused."""
        if isinstance(found, Dense):
            return rows.expand_as(found.values)
        assert found.offsets is not None
        slots = torch.arange(len(found.latents), device=rows.device)
        own: Tensor = _OfPairs.apply(rows, found.latents)  # type: ignore[no-untyped-call]
        return own.masked_fill(slots >= found.offsets[-1], unused)

    def of_tokens(self, values: Tensor, found: Codes, num_tokens: int) -> Tensor:
        """Sums of values over each token's pairs [N], over all shards."""
        if isinstance(found, Dense):
            return self.over_shards(values.sum(dim=1))
        assert found.tokens is not None
        sums = values.new_zeros(num_tokens).index_add(0, found.tokens.long(), values)
        return self.over_shards(sums)

    def encode_rows(self, x: Tensor) -> Codes:
        """See SparseCoder."""
        return self.activate(self.candidates(x))

    def candidates(self, x: Tensor) -> Pairs:
        """See SparseCoder: pre-activations above their limits."""
        limits = self.limits()
        fed, b_dec = feed_shards(x, self.mesh), self.fed_centre()
        W_enc = self.compute(self.W_enc)
        # Below 0 there may be gradients, too: how far limits are exceeded is what is rectified.
        b_enc = self.b_enc if limits is None else self.b_enc - limits
        found = whole_list(
            lambda capacity: ops.threshold_encode(fed, W_enc, b_enc, 0.0, capacity, b_dec=b_dec),
            len(x),
            self,
        )
        if limits is None:
            return found
        return found._replace(values=found.values + self.of_pairs(limits, found, 0.0))

    def dense_candidates(self, x: Tensor) -> Dense:
        """`candidates` as all pairs of tokens x [N, d_in], differentiable."""
        fed, b_dec = feed_shards(x, self.mesh), self.fed_centre()
        W_enc = self.compute(self.W_enc)
        xc = (fed if b_dec is None else fed - b_dec).to(W_enc.dtype)
        return self.dense_found((xc @ W_enc.T).to(self.b_enc.dtype) + self.b_enc)

    def dense_found(self, pre: Tensor) -> Dense:
        """Those of pre-activations [N, d_sae_local]."""
        return Dense(torch.where(self.exceeds(pre), pre, self.idle))

    def exceeds(self, pre: Tensor) -> Tensor:
        """Which of pre-activations [N, d_sae_local] are candidates; NaN is one, as of a list."""
        limits = self.limits()
        return ~(pre <= 0 if limits is None else pre <= limits)

    def combine(self, codes: Codes, W_dec: Tensor | None = None) -> Tensor:
        """See SparseCoder."""
        if not isinstance(codes, Dense):
            return super().combine(codes, W_dec)
        W_dec = self.compute(self.W_dec if W_dec is None else W_dec)
        return self.over_shards((codes.values.to(W_dec.dtype) @ W_dec).to(self.b_dec.dtype))

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Pairs:
        """The same for the fused engine; see SparseCoder."""
        return whole_list(
            lambda capacity: self.select_within(xc, W_enc, b_enc, capacity), len(xc), self
        )

    def select_within(
        self, xc: Tensor, W_enc: Tensor, b_enc: Tensor, capacity: int
    ) -> tuple[Pairs, Tensor]:
        """`select` into a list of so many slots, and how many pairs there are, which may be more.
        Without a host sync.
        """
        limits = self.limits()
        limits = b_enc.new_zeros(()) if limits is None else limits
        encode = implementation("threshold_encode", W_enc)
        found: tuple[Pairs, Tensor] = encode(xc, W_enc, b_enc, limits, capacity)
        return found
