"""Architectures whose codes are flat lists: BatchTopK, exact over shards and replicas, and a
threshold a latent.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.kernels import ops
from flash_sae_dist.kernels.dispatch import implementation
from flash_sae_dist.models.base import Pairs, SparseCoder
from flash_sae_dist.parallel.collectives import feed_shards
from flash_sae_dist.parallel.selection import global_batch_mask


class BatchConfig(SAEConfig):
    """The k largest a token on the mean of a batch."""

    architecture: Literal["batch"] = "batch"
    k: int
    """Active latents a token, on the mean."""


class Batch(SparseCoder):
    """The N * k largest pre-activations of all tokens, rectified."""

    Config: ClassVar[type[SAEConfig]] = BatchConfig

    @property
    def offered(self) -> int:
        """Candidates a token of this rank: it may hold all of the batch's."""
        assert isinstance(self.config, BatchConfig)
        return min(self.config.k * self.mesh.num_replicas, self.d_sae_local)

    def encode_rows(self, x: Tensor) -> Pairs:
        self.check_input(x)
        x, b_dec = (feed_shards(t, self.mesh) for t in (x, self.b_dec))
        W_enc = self.compute(self.W_enc)
        return self.over_all(ops.batch_topk_encode(x, W_enc, self.b_enc, self.offered, b_dec=b_dec))

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Pairs:
        encode = implementation("batch_topk_encode", W_enc)
        return self.over_all(encode(xc, W_enc, b_enc, self.offered))

    def over_all(self, pairs: Pairs) -> Pairs:
        """Of each rank's candidates those of the batch over all ranks."""
        assert isinstance(self.config, BatchConfig)
        total = (len(pairs.offsets) - 1) * self.mesh.num_replicas * self.config.k
        keep = global_batch_mask(pairs, total, self.mesh)
        return pairs if keep is None else pairs._replace(values=pairs.values * keep)


class JumpConfig(SAEConfig):
    """All pre-activations above a limit."""

    architecture: Literal["jump"] = "jump"
    limit: float
    """Lowest of the latents' thresholds."""
    capacity: int
    """Pairs a token that there is room for, on the mean."""


class Jump(SparseCoder):
    """Pre-activations above their latent's threshold, all others zero; thresholds stay as they
    are.
    """

    Config: ClassVar[type[SAEConfig]] = JumpConfig

    def _limits(self, num_tokens: int) -> tuple[Tensor, int]:
        assert isinstance(self.config, JumpConfig)
        latents = torch.arange(self.d_sae_local, device=self.W_enc.device) + self.first_latent
        limits = self.config.limit * (1 + latents % 3).to(self.b_enc.dtype)
        return limits, self.config.capacity * num_tokens

    def encode_rows(self, x: Tensor) -> Pairs:
        self.check_input(x)
        x, b_dec = (feed_shards(t, self.mesh) for t in (x, self.b_dec))
        W_enc, limits = self.compute(self.W_enc), self._limits(len(x))
        return ops.threshold_encode(x, W_enc, self.b_enc, *limits, b_dec=b_dec)[0]

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Pairs:
        encode = implementation("threshold_encode", W_enc)
        pairs: Pairs = encode(xc, W_enc, b_enc, *self._limits(len(xc)))[0]
        return pairs
