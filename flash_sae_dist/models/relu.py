"""ReLU with an L1 penalty (Bricken et al. 2023; Anthropic's update of April 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..config.sae import SAEConfig
from .base import Codes
from .sparsity import Batch
from .threshold import ThresholdCoder
from .usual import TrainDefaults


class ReLUConfig(SAEConfig):
    """ReLU sparse autoencoder with an L1 penalty."""

    architecture: Literal["relu"] = "relu"
    """relu: every positive pre-activation is active; an L1 penalty keeps them few."""
    l1_coefficient: float = Field(default=5.0, ge=0)
    """Weight of the summed activations beside the squared error, of rows of norm sqrt(d_in)
    (Anthropic's, April 2024, and SAELens's l1_coefficient under expected_average_only_in): it means
    the same on data of any scale."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Part of the steps over which the sparsity's coefficient rises linearly from 0; 0.05 is
    Anthropic's of April 2024."""


class ReLU(ThresholdCoder):
    """`recon = relu((x - b_dec) @ W_enc.T + b_enc) @ W_dec + b_dec`; see SparseCoder.

    Decoder rows are of unit norm, where Anthropic leaves them free and weights activations by their
    norms: the same function, its scale fixed.
    """

    Config: ClassVar[type[SAEConfig]] = ReLUConfig
    # Anthropic's rate of April 2024; none of their dead latents are revived.
    defaults = TrainDefaults(lr=5e-5, lr_steps=None, dead_latents="none")
    config: ReLUConfig

    @classmethod
    def scaled_penalty(cls, config: SAEConfig) -> str | None:
        """See SparseCoder."""
        return "sae.architecture='relu'"

    @property
    def sparsity_warmup(self) -> float:
        """See SparseCoder."""
        return self.config.sparsity_warmup

    def penalty(self, x: Tensor, found: Codes, codes: Codes, batch: Batch) -> Tensor:
        """See SparseCoder."""
        summed = self.over_shards(codes.values.sum()) / batch.unit
        return batch.ramp * self.config.l1_coefficient * batch.squared * summed
