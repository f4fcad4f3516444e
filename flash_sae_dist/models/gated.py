"""Gated: which latents are active and how much are two questions (Rajamanoharan et al. 2024, arXiv
2404.16014).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config.sae import SAEConfig
from .base import Codes
from .sparsity import Batch
from .threshold import ThresholdCoder
from .usual import TrainDefaults


class GatedConfig(SAEConfig):
    """Gated sparse autoencoder."""

    architecture: Literal["gated"] = "gated"
    """gated: a gate decides which latents are active, a rescaled copy of it how much."""
    l1_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the summed gate activations beside the squared error, of rows of norm sqrt(d_in):
    SAELens's l1_coefficient under expected_average_only_in."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Part of the steps over which the sparsity's coefficient rises linearly from 0;
    dictionary_learning's 2000 steps are 0.05 of 40,000."""


class Gated(ThresholdCoder):
    """`recon = ((pi > 0) * relu(exp(r_mag) * (x - b_dec) @ W_enc.T + b_mag)) @ W_dec + b_dec`, pi =
    `(x - b_dec) @ W_enc.T + b_enc`; see SparseCoder. b_enc is the gate's bias.

    The gate is trained by the L1 penalty and by reconstructing the input itself, with a copy of the
    decoder that this trains not (the paper's; SAELens trains the decoder too).
    """

    Config: ClassVar[type[SAEConfig]] = GatedConfig
    roles = ThresholdCoder.roles | {"r_mag": "rows", "b_mag": "rows"}
    in_data_units = ThresholdCoder.in_data_units | {"b_mag"}
    bias_apart = True
    # dictionary_learning's: 5e-5 and no momentum.
    revivals = frozenset({"resample", "none"})
    defaults = TrainDefaults(lr=5e-5, lr_steps=None, adam_betas=(0.0, 0.999), dead_latents="none")
    config: GatedConfig

    def __init__(self, config: SAEConfig, d_in: int, **place: Any) -> None:
        super().__init__(config, d_in, **place)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    @torch.no_grad()
    def restart_(self, mask: Tensor) -> None:
        """See SparseCoder."""
        super().restart_(mask)
        self.r_mag[mask] = self.b_mag[mask] = 0

    @classmethod
    def scaled_penalty(cls, config: SAEConfig) -> str | None:
        """See SparseCoder."""
        return "sae.architecture='gated'"

    @property
    def sparsity_warmup(self) -> float:
        """See SparseCoder."""
        return self.config.sparsity_warmup

    def activate(self, found: Codes) -> Codes:
        """See SparseCoder. Values that are found are the gate's."""
        scale = self.r_mag.exp()
        rows = (scale, self.b_mag - self.b_enc * scale)
        scale, bias = (self.of_pairs(row, found, 0.0) for row in rows)
        scaled = found.values * scale + bias
        return found._replace(values=scaled.relu() * (found.values > 0))

    def penalty(self, x: Tensor, found: Codes, codes: Codes, batch: Batch) -> Tensor:
        """See SparseCoder."""
        W_dec = self.W_dec if batch.W_dec is None else batch.W_dec
        gate = self.combine(found, W_dec=W_dec.detach()) + self.b_dec.detach()
        wrong = (x - gate).square().sum() * batch.inverse
        summed = self.over_shards(found.values.sum()) / batch.unit
        return wrong + batch.ramp * self.config.l1_coefficient * batch.squared * summed
