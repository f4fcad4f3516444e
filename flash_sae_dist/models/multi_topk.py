"""MultiTopK: TopK that also reconstructs from 4 k latents, so that it bears other numbers of active
latents than it was trained with (Gao et al. 2024, arXiv 2406.04093, section 5.3).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..config.sae import SAEConfig
from ..kernels import ops
from ..kernels.dispatch import implementation
from ..parallel.collectives import feed_shards
from ..parallel.selection import global_topk_mask
from .base import Codes, Slots
from .topk import TopKConfig, TopKSAE

# The paper's, and sparsify's: FVU(k) + FVU(4 k) / 8.
_WEIGHT = 1 / 8


class MultiTopKConfig(TopKConfig):
    """MultiTopK sparse autoencoder."""

    architecture: Literal["multi_topk"] = "multi_topk"  # type: ignore[assignment]
    """multi_topk: topk with a second loss, FVU at 4 k active latents a token, times 1/8."""


class MultiTopK(TopKSAE):
    """TopK at use; training adds FVU(4 k) / 8. What fires is counted among the k."""

    Config: ClassVar[type[SAEConfig]] = MultiTopKConfig
    level_weights: ClassVar[tuple[float, ...]] = (1.0, _WEIGHT)
    main_level: ClassVar[int] = 0
    times: ClassVar[int] = 4  # candidates for each of the k

    @property
    def _most(self) -> int:
        return min(self.times * self.k, self.d_sae)

    def candidates(self, x: Tensor) -> Slots:
        """See SparseCoder: the 4 k largest of each token."""
        top = ops.topk_encode(
            feed_shards(x, self.mesh),
            self.compute(self.W_enc),
            self.b_enc,
            min(self._most, self.d_sae_local),
            b_dec=self.fed_centre(),
        )
        return self._kept(*top)

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Slots:
        """The same for the fused engine; see SparseCoder."""
        k = min(self._most, self.d_sae_local)
        return self._kept(*implementation(self.search, W_enc)(xc, W_enc, b_enc, k))

    def _kept(self, values: Tensor, latents: Tensor) -> Slots:
        keep = global_topk_mask(values, latents, self._most, self.first_latent, self.mesh)
        return Slots(values if keep is None else values * keep, latents)

    def levels(self, codes: Codes) -> Tensor:
        """See SparseCoder: 0 for a token's k largest over all shards, 1 for the others."""
        keep = global_topk_mask(codes.values, codes.latents, self.k, self.first_latent, self.mesh)
        if keep is None:
            columns = torch.arange(codes.latents.shape[1], device=codes.latents.device)
            keep = (columns < self.k).expand_as(codes.latents)
        return (~keep).int()
