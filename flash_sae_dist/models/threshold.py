"""Architectures whose latents are active above a threshold each: what ReLU, JumpReLU and Gated
share, and BatchTopK at inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.dispatch import implementation
from ..kernels.reference import Dense
from ..parallel.collectives import feed_shards
from .base import Codes, Pairs, SparseCoder

# Slots a token of the first try, and how many times as many the next has where they were too few.
_SLOTS, _MORE = 64, 4
# A threshold that no pre-activation reaches, of slots that are unused; finite, so that 0 times it
# is 0.
NEVER = 1e30


def whole_list(
    encode: Callable[[int], tuple[Pairs, Tensor]], num_tokens: int, num_latents: int
) -> Pairs:
    """All pairs that an encoder finds, however many: it is asked again with room for more where
    they did not fit. One unused slot at the most. A host sync.
    """
    limit = max(1, num_tokens * num_latents)
    capacity = min(limit, max(1, _SLOTS * num_tokens))
    found, more = encode(capacity)
    while bool(more):
        capacity = min(limit, _MORE * capacity)
        found, more = encode(capacity)
    # The same length whatever was tried: sums of other lengths round otherwise.
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
        sae.d_sae_local,
    )


class ThresholdCoder(SparseCoder):
    """A latent is active where its pre-activation exceeds a limit, on its own shard."""

    is_pairwise = True
    reads_host = "the number of active latents is read by the host"
    varied_lengths = True
    revivals = frozenset({"ghost", "resample", "none"})
    # A value that has no activation, no penalty and no gradient.
    idle: ClassVar[float] = 0.0

    def limits(self) -> Tensor | None:
        """Pre-activations [d_sae_local] above which a latent has an activation or a gradient while
        it is trained; None is 0 for all.
        """
        return None

    def shifted(self, found: Pairs, limits: Tensor | None) -> Pairs:
        """Pre-activations of pairs that were found by how far they exceed their limits."""
        if limits is None:
            return found
        return found._replace(values=found.values + self.of_pairs(limits, found, 0.0))

    def of_pairs(self, rows: Tensor, found: Codes, unused: float) -> Tensor:
        """Each pair's element of rows [d_sae_local], and a number for slots that are unused."""
        if isinstance(found, Dense):
            return rows.expand_as(found.values)
        assert found.offsets is not None
        slots = torch.arange(len(found.latents), device=rows.device)
        return rows[found.latents.long()].masked_fill(slots >= found.offsets[-1], unused)

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
            self.d_sae_local,
        )
        return self.shifted(found, limits)

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
        limits = self.limits()
        encode, bias = implementation("threshold_encode", W_enc), b_enc
        if limits is not None:
            bias = b_enc - limits
        none = torch.zeros((), dtype=b_enc.dtype, device=b_enc.device)
        found = whole_list(
            lambda capacity: encode(xc, W_enc, bias, none, capacity), len(xc), self.d_sae_local
        )
        return self.shifted(found, limits)
