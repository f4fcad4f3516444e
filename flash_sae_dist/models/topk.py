"""TopK: the k largest pre-activations of a token are active (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from ..config.base import ConfigError, Latents
from ..config.sae import InputNorm, SAEConfig
from ..kernels import ops
from ..kernels.dispatch import implementation
from ..parallel.collectives import feed_shards
from ..parallel.mesh import Mesh
from ..parallel.selection import global_topk_mask
from .base import Slots, SparseCoder
from .ranks import ranked, unranked


class TopKConfig(SAEConfig):
    """Shape of a TopK sparse autoencoder."""

    architecture: Literal["topk"] = "topk"
    """topk: the k largest pre-activations of a token are active."""
    k: Latents
    """Active latents a token."""
    search: Literal["exact", "fp8"] = "exact"
    """How the fused engine's steps find a token's largest latents. fp8: products of rows rounded to
    e4m3 find about 2 k candidates, whose exact activations pick k; a latent that is no candidate is
    missed. For wide SAEs, on GPUs since Ada and Hopper; topk and multi_topk alone."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(
                f"sae.k={self.k} exceeds sae.d_sae={self.d_sae}; lower k or widen the dictionary"
            )
        if self.search != "exact" and self.architecture not in ("topk", "multi_topk"):
            raise ValueError(
                f"sae.search={self.search!r} finds each token's own k largest, and "
                f"sae.architecture={self.architecture!r} selects otherwise; drop sae.search, or "
                "use topk or multi_topk"
            )
        return self

    def width(self, d_in: int) -> int:
        """Latents for a hookpoint of width d_in. Raises ConfigError where k does not fit, or the
        latents exceed what is numbered in 32 bits.
        """
        d_sae = super().width(d_in)
        if self.k > d_sae:
            raise ConfigError(
                f"sae.k={self.k} exceeds the {d_sae} latents of "
                f"sae.expansion_factor={self.expansion_factor} at width {d_in}; "
                "lower k or raise expansion_factor"
            )
        return d_sae


class TopKSAE(SparseCoder):
    """`recon = topk(relu((x - b_dec) @ W_enc.T + b_enc)) @ W_dec + b_dec`; see SparseCoder."""

    Config: ClassVar[type[SAEConfig]] = TopKConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        input_norm: InputNorm = "none",
        skip: bool = False,
        search: Literal["exact", "fp8"] = "exact",
        d_out: int | None = None,
        mesh: Mesh | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = 0,
    ) -> None:
        if not 1 <= k <= d_sae:
            raise ValueError(f"k={k} is outside 1..d_sae={d_sae}; lower k or widen the dictionary")
        config = self.Config.model_validate(
            {"d_sae": d_sae, "k": k, "input_norm": input_norm, "skip": skip, "search": search}
        )
        place: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "device": device, "seed": seed}
        super().__init__(config, d_in, d_out=d_out, **place)
        self.k = k
        self.search = "topk_encode" if search == "exact" else "fp8_topk_encode"

    @classmethod
    def from_config(cls, config: SAEConfig, d_in: int, **place: Any) -> Self:
        """An SAE of what a config's section `sae` says; place is mesh, dtype, device and seed."""
        assert isinstance(config, TopKConfig)
        own: dict[str, Any] = {"input_norm": config.input_norm, "skip": config.skip}
        if config.search != "exact":
            own["search"] = config.search
        return cls(d_in, config.width(d_in), config.k, **own, **place)

    @property
    def _local_k(self) -> int:
        """k of the top-k kernel. A shard narrower than k offers all it has: no more of its latents
        can be selected.
        """
        return min(self.k, self.d_sae_local)

    def encode_rows(self, x: Tensor) -> Slots:
        """See SparseCoder: values [N, k] and local latents [N, k] int32. On several shards a value
        is 0 wherever the selection left this rank's candidate out.
        """
        W_enc: Tensor = self.compute(self.W_enc)
        b_enc: Tensor = self.b_enc
        if (ranks := self.ranks()) is not None:
            W_enc, b_enc = ranked(W_enc, b_enc, ranks)
        fed, b_dec = feed_shards(x, self.mesh), self.fed_centre()
        top = ops.topk_encode(fed, W_enc, b_enc, self._local_k, b_dec=b_dec)
        return unranked(self._over_shards(*top), ranks)

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Slots:
        """The same for the fused engine; see SparseCoder."""
        if (ranks := self.ranks()) is not None:
            W_enc, b_enc = ranked(W_enc, b_enc, ranks)
        top = implementation(self.search, W_enc)(xc, W_enc, b_enc, self._local_k)
        return unranked(self._over_shards(*top), ranks)

    def _over_shards(self, values: Tensor, latents: Tensor) -> Slots:
        keep = global_topk_mask(values, latents, self.k, self.first_latent, self.mesh)
        return Slots(values if keep is None else values * keep, latents)
