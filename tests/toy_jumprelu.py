"""A JumpReLU SAE for formats that hold no other: active is what exceeds its latent's threshold."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.models.base import Codes, Role, SparseCoder


class JumpReLUConfig(SAEConfig):
    """Shape of a JumpReLU SAE."""

    architecture: Literal["jumprelu"] = "jumprelu"


class JumpReLU(SparseCoder):
    """`pre * (pre > threshold)`, all of its latents in slots."""

    Config: ClassVar[type[SAEConfig]] = JumpReLUConfig
    roles: ClassVar[dict[str, Role]] = {**SparseCoder.roles, "threshold": "rows"}

    def __init__(self, config: SAEConfig, d_in: int, **place: object) -> None:
        super().__init__(config, d_in, **place)  # type: ignore[arg-type]
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, 0.1))

    def encode_rows(self, x: Tensor) -> Codes:
        """See SparseCoder."""
        pre = self.pre_activations(x, torch.arange(self.d_sae), self.b_enc)
        indices = torch.arange(self.d_sae, dtype=torch.int32).expand(len(x), -1)
        return Codes(pre.relu() * (pre > self.threshold), indices)
