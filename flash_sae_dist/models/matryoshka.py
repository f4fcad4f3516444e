"""Matryoshka: BatchTopK whose first latents reconstruct alone, too, at several widths (Bussmann et
al. 2025, arXiv 2503.17547).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config.base import ConfigError, Latents
from ..config.sae import SAEConfig
from .base import Codes
from .batch_topk import BatchTopK, BatchTopKConfig

# SAEBench's and dictionary_learning's demo: each group is twice the one before, the last takes what
# is left.
_FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32)


def prefix_widths(d_sae: int) -> tuple[int, ...]:
    """Those that are taken where none are given, without the last."""
    return tuple(sorted({max(1, int(part * d_sae)) for part in _FRACTIONS}))


class MatryoshkaConfig(BatchTopKConfig):
    """Matryoshka sparse autoencoder with the batch rule."""

    architecture: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
    """matryoshka: batch_topk whose first latents reconstruct alone, too, at several widths."""
    prefix_widths: Annotated[tuple[Latents, ...], Field(min_length=1)] | None = None
    """Numbers of first latents that reconstruct alone, ascending; all of them come last and need
    not be named. Left out, 1/32, 3/32, 7/32 and 15/32 of d_sae (SAEBench's groups of 1/32, 1/16,
    1/8 and 1/4)."""
    prefix_losses: Literal["mean", "sum"] = "mean"
    """How the losses of the widths come together: their mean, as in the paper, or their sum, as in
    SAELens. (dictionary_learning divides by their number twice, which weakens them beside AuxK.)"""

    @model_validator(mode="after")
    def _widths_ascend(self) -> Self:
        if (widths := self.prefix_widths) is not None:
            if any(one >= other for one, other in zip(widths, widths[1:], strict=False)):
                raise ValueError(f"sae.prefix_widths={list(widths)} do not ascend; sort them")
            if self.d_sae is not None and widths[-1] > self.d_sae:
                raise ValueError(
                    f"sae.prefix_widths={list(widths)} exceed sae.d_sae={self.d_sae}; lower them"
                )
        return self

    def width(self, d_in: int) -> int:
        """Latents for a hookpoint of width d_in. Raises ConfigError where keys do not fit it."""
        d_sae = super().width(d_in)
        if self.prefix_widths is not None and self.prefix_widths[-1] > d_sae:
            raise ConfigError(
                f"sae.prefix_widths={list(self.prefix_widths)} exceed the {d_sae} latents of "
                f"sae.expansion_factor={self.expansion_factor} at width {d_in}; lower them"
            )
        return d_sae

    def widths(self, d_in: int) -> tuple[int, ...]:
        """All widths that reconstruct, the whole last."""
        d_sae = self.width(d_in)
        given = self.prefix_widths or prefix_widths(d_sae)
        return (*(width for width in given if width < d_sae), d_sae)


class Matryoshka(BatchTopK):
    """BatchTopK with one selection over all latents, and a loss a prefix of them."""

    Config: ClassVar[type[SAEConfig]] = MatryoshkaConfig
    config: MatryoshkaConfig

    def __init__(self, config: SAEConfig, d_in: int, **place: Any) -> None:
        super().__init__(config, d_in, **place)
        self.widths = self.config.widths(d_in)
        self._bounds = torch.tensor(self.widths[:-1], dtype=torch.int32) - self.first_latent

    @property
    def level_weights(self) -> tuple[float, ...]:
        """See SparseCoder."""
        count = len(self.widths)
        return (1.0 if self.config.prefix_losses == "sum" else 1 / count,) * count

    def levels(self, codes: Codes) -> Tensor:
        """See SparseCoder: the first width that a pair's latent is within."""
        # Kept on the device: a captured graph takes no tensor from the host.
        self._bounds = self._bounds.to(codes.latents.device)
        return torch.bucketize(codes.latents, self._bounds, out_int32=True, right=True)
