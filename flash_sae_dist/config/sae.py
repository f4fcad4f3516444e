"""The section sae: what all architectures have; their own keys stand in their files."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import ConfigError, Latents, StrictModel

InputNorm = Literal["none", "layer_norm"]


class SAEConfig(StrictModel):
    """Architecture and width of a sparse autoencoder."""

    architecture: str
    """Name in `flash_sae_dist.models.ARCHITECTURES`; it decides which other keys there are."""
    d_sae: Latents | None = None
    """Latents over all shards; give this or expansion_factor."""
    expansion_factor: float | None = Field(default=None, gt=0, lt=2**31)
    """d_sae as a multiple of the hookpoint's width."""
    input_norm: InputNorm = "none"
    """layer_norm: each token is standardised (its mean taken out, divided by its deviation) before
    it is encoded, and the reconstruction put back, as OpenAI's SAEs do; losses are then those of
    standardised tokens."""
    skip: bool = False
    """Transcoders (train.target) alone: a matrix [d_out, d_in], zero at first, adds what of the
    target is affine in the input (Paulo et al. 2025, arXiv 2501.18823; sparsify's skip_connection).
    """

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if (self.d_sae is None) == (self.expansion_factor is None):
            raise ValueError(
                f"give one of sae.d_sae and sae.expansion_factor, not d_sae={self.d_sae} with "
                f"expansion_factor={self.expansion_factor}"
            )
        return self

    def width(self, d_in: int) -> int:
        """Latents for a hookpoint of width d_in. Raises ConfigError where the keys do not fit that
        width, or the latents exceed what is numbered in 32 bits.
        """
        d_sae = self.d_sae or round((self.expansion_factor or 0) * d_in)
        if d_sae >= 2**31:
            raise ConfigError(
                f"sae.expansion_factor={self.expansion_factor} gives {d_sae} latents at width "
                f"{d_in}, more than 2**31 - 1; lower it"
            )
        return d_sae
