"""Crosscoders: one dictionary that reads the rows of several hookpoints and gives them all back
(Lindsey et al., Anthropic, October 2024): with TopK, BatchTopK, or an L1 penalty.

Legend: S sources, the hookpoints; D_s their widths, D their sum; F d_sae of this shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from ..config.sae import SAEConfig
from .base import Codes, SparseCoder
from .batch_topk import BatchTopK, BatchTopKConfig
from .relu import ReLU, ReLUConfig
from .sparsity import Batch
from .topk import TopKConfig, TopKSAE
from .usual import TrainDefaults


class CrosscoderConfig(SAEConfig):
    """What all crosscoders have."""

    decoder_norms: Literal["sum", "whole"] = "sum"
    """What counts of a latent's decoder rows where it is ranked or penalised: sum: the sum of their
    norms over the hookpoints (Anthropic's, "crosscoder" in the fork of dictionary_learning that
    trains them); whole: the norm of all of them together, as of an SAE on rows side by side."""

    @model_validator(mode="after")
    def _rows_have_norms_of_their_own(self) -> Self:
        for key, none in (("input_norm", "none"), ("skip", False)):
            if (given := getattr(self, key)) != none:
                raise ValueError(
                    f"sae.{key}={given!r} is nothing that sae.architecture={self.architecture!r} "
                    "has; drop it"
                )
        return self


class Crosscoder(SparseCoder):
    """`recon_s = acts @ W_dec_s + b_dec_s`, the activations those of `sum over s of (x_s - b_dec_s)
    @ W_enc_s.T + b_enc`; see SparseCoder.

    Rows x [..., D] are those of the sources side by side, and so are W_enc and W_dec [F, D] and
    b_dec [D]. Each source's are divided by `source_scale` [S] behind `source_mean` [D], what
    training divided and subtracted, which `forward` undoes: decoder rows of the sources can be
    compared. A latent's decoder row is of norm 1 over all sources: references leave it free and
    multiply by its norms whatever they rank or penalise (`ranks`), which is the same function, its
    scale fixed. They subtract no b_dec either, which is another b_enc.

    The encoder starts as random rows and the decoder as its transpose, drawn for each source alone
    (so the fork of dictionary_learning; llamascopium draws one for all, which widths that differ
    rule out).
    """

    roles = SparseCoder.roles | {"source_scale": "whole", "source_mean": "whole"}
    source_scale: Tensor
    source_mean: Tensor

    @classmethod
    def from_config(cls, config: SAEConfig, d_in: int, **place: Any) -> Self:
        """See SparseCoder; place has the widths of the sources, too."""
        sources = place.pop("sources", (d_in,))
        sae = super().from_config(config, d_in, **place)
        sae.config = config
        sae.of_sources(sources)
        return sae

    def of_sources(self, sources: Sequence[int]) -> None:
        """Tells the widths of the sources. Raises ValueError where they do not add up to d_in."""
        if sum(sources) != self.d_in or min(sources) < 1:
            raise ValueError(f"sources={list(sources)} do not add up to d_in={self.d_in}")
        self.sources = tuple(sources)
        self.register_buffer("source_scale", torch.ones_like(self.b_dec[: len(sources)].detach()))
        self.register_buffer("source_mean", torch.zeros_like(self.b_dec.detach()))

    @torch.no_grad()
    def set_sources_(self, scales: Sequence[float], means: Sequence[Tensor | None]) -> None:
        """Tells what rows of each source are divided by, less a mean [D_s] where it has one."""
        self.source_scale.copy_(self.source_scale.new_tensor(list(scales)))
        for own, mean in zip(torch.split(self.source_mean, list(self.sources)), means, strict=True):
            own.copy_(torch.zeros_like(own) if mean is None else mean)

    def normalise(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """See SparseCoder."""
        scale = torch.cat(
            [s.expand(width) for s, width in zip(self.source_scale, self.sources, strict=True)]
        )
        return (x.to(scale.dtype) - self.source_mean) / scale, (scale, self.source_mean)

    def decoder_norms(self, W_dec: Tensor) -> Tensor:
        """The norms [F, S] of each source's rows."""
        parts = torch.split(W_dec, list(self.sources), dim=1)
        return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)

    def ranks(self) -> Tensor | None:
        """See SparseCoder: the sums of the decoder's norms."""
        assert isinstance(self.config, CrosscoderConfig)
        if self.config.decoder_norms == "whole":
            return None
        return self.decoder_norms(self.W_dec.detach()).sum(dim=1)

    def spec(self) -> dict[str, Any]:
        """See SparseCoder."""
        own = super().spec()
        head = {key: own.pop(key) for key in ("architecture", "d_in", "d_sae")}
        return head | {"sources": list(self.sources)} | own


class TopKCrosscoderConfig(CrosscoderConfig, TopKConfig):
    """TopK crosscoder."""

    architecture: Literal["topk_crosscoder"] = "topk_crosscoder"  # type: ignore[assignment]
    """topk_crosscoder: topk of several hookpoints (train.hookpoint joins them by +), which ranks
    pre-activations by their products with decoder norms."""


class TopKCrosscoder(Crosscoder, TopKSAE):
    """The k latents of a token with the largest pre-activations times decoder norms are active."""

    Config: ClassVar[type[SAEConfig]] = TopKCrosscoderConfig
    roles = Crosscoder.roles


class BatchTopKCrosscoderConfig(CrosscoderConfig, BatchTopKConfig):
    """BatchTopK crosscoder."""

    architecture: Literal["batch_topk_crosscoder"] = "batch_topk_crosscoder"  # type: ignore[assignment]
    """batch_topk_crosscoder: batch_topk of several hookpoints (train.hookpoint joins them by +),
    pre-activations ranked by their products with decoder norms."""


class BatchTopKCrosscoder(Crosscoder, BatchTopK):
    """The same over a batch; `threshold` is of pre-activations themselves, `mean_threshold` of
    their products. (The fork of dictionary_learning keeps activations and thresholds likewise.)
    """

    Config: ClassVar[type[SAEConfig]] = BatchTopKCrosscoderConfig
    roles = BatchTopK.roles | Crosscoder.roles


class ReLUCrosscoderConfig(CrosscoderConfig, ReLUConfig):
    """Crosscoder with an L1 penalty."""

    architecture: Literal["relu_crosscoder"] = "relu_crosscoder"  # type: ignore[assignment]
    """relu_crosscoder: relu of several hookpoints (train.hookpoint joins them by +), the L1 penalty
    on activations times decoder norms."""


class ReLUCrosscoder(Crosscoder, ReLU):
    """Anthropic's: the penalty is `sum over latents of act * sum over s of |W_dec_s|`, whose
    gradient makes latents of few sources, too.
    """

    Config: ClassVar[type[SAEConfig]] = ReLUCrosscoderConfig
    roles = ReLU.roles | Crosscoder.roles
    # The rate of the fork of dictionary_learning for its crosscoders with L1.
    defaults = TrainDefaults(lr=1e-4, lr_steps=None, dead_latents="none")

    @classmethod
    def autograd_reason(cls, config: SAEConfig) -> str | None:
        """See SparseCoder."""
        assert isinstance(config, CrosscoderConfig)
        if config.decoder_norms == "whole":
            return None
        return "the penalty on decoder norms has a gradient of its own for all decoder rows"

    def penalty(self, x: Tensor, found: Codes, codes: Codes, batch: Batch) -> Tensor:
        """See SparseCoder."""
        assert isinstance(self.config, CrosscoderConfig)
        if self.config.decoder_norms == "sum":
            norms = self.decoder_norms(self.W_dec).sum(dim=1)
            codes = codes._replace(values=codes.values * self.of_pairs(norms, codes, 0.0))
        return super().penalty(x, found, codes, batch)
