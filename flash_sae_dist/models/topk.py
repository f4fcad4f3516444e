"""The TopK sparse autoencoder, whole or one shard of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.base import ConfigError, Latents
from ..config.sae import SAEConfig
from ..files import replacing, write_text
from ..kernels import ops
from ..parallel import collectives, selection
from ..parallel.mesh import Mesh

WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "config.json"


class TopKConfig(SAEConfig):
    """Shape of a TopK sparse autoencoder."""

    architecture: Literal["topk"] = "topk"
    """topk: the k largest pre-activations of a token are active. It decides which other keys there
    are."""
    k: Latents
    """Active latents a token."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(
                f"sae.k={self.k} exceeds sae.d_sae={self.d_sae}; lower k or widen the dictionary"
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


class SAEOutput(NamedTuple):
    """What one forward pass of an SAE gives."""

    recon: Tensor  # [N, d_in]
    top_acts: (
        Tensor  # [N, k] >= 0, descending over all latents; 0 where another shard holds the latent
    )
    top_idx: Tensor  # [N, k] int32, rows of this shard


class TopKSAE(nn.Module):
    """`recon = topk(relu((x - b_dec) @ W_enc.T + b_enc)) @ W_dec + b_dec`, an ordinary nn.Module.

    W_enc and W_dec are [d_sae_local, d_in], b_enc is [d_sae_local], b_dec is [d_in]. On a mesh
    with several shards a rank holds rows `mesh.shard * d_sae_local` onwards, and every method is
    collective over the shard group. Under autocast the products take autocast's dtype; sums and
    the selection stay float32.
    """

    Config: ClassVar[type[SAEConfig]] = TopKConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        mesh: Mesh | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.mesh = mesh if mesh is not None else Mesh.single()
        if not 1 <= k <= d_sae:
            raise ValueError(f"k={k} is outside 1..d_sae={d_sae}; lower k or widen the dictionary")
        if d_sae % self.mesh.num_shards:
            raise ValueError(
                f"d_sae={d_sae} is not divisible by the {self.mesh.num_shards} shards; "
                f"use d_sae={-(-d_sae // self.mesh.num_shards) * self.mesh.num_shards}"
            )
        self.d_sae_local = d_sae // self.mesh.num_shards
        shape = (self.d_sae_local, d_in)
        self.W_enc = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae_local, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def first_latent(self) -> int:
        """Index over all shards of this rank's first latent."""
        return self.mesh.shard * self.d_sae_local

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Unit-norm random decoder rows, the encoder equal to them, zero biases.

        A row is drawn from (seed, its index over all shards): the weights do not depend on the
        number of shards.
        """
        for start in range(0, self.d_sae_local, _ROWS_A_SEED):
            stop = min(start + _ROWS_A_SEED, self.d_sae_local)
            self.W_dec[start:stop] = _unit_rows(
                seed, self.first_latent + start, stop - start, self.d_in
            ).to(self.W_dec)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def _compute(self, weight: Tensor) -> Tensor:
        device = weight.device.type
        if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            return weight.to(torch.get_autocast_dtype(device))
        return weight

    def encode(self, x: Tensor) -> ops.TopK:
        """The k active latents of each token over all shards: values [N, k] and local indices [N,
        k] int32.

        x is [N, d_in]. On several shards a value is 0 wherever the selection left this rank's
        candidate out. Raises ValueError on a width that does not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"x must be [N, {self.d_in}], not {list(x.shape)}; flatten batch and sequence first"
            )
        # A shard narrower than k offers all it has: no more of its latents can be selected.
        k_local = min(self.k, self.d_sae_local)
        top = ops.topk_encode(
            collectives.feed_shards(x, self.mesh),
            self._compute(self.W_enc),
            self.b_enc,
            k_local,
            b_dec=collectives.feed_shards(self.b_dec, self.mesh),
        )
        keep = selection.global_topk_mask(
            top.values, top.indices, self.k, self.first_latent, self.mesh
        )
        return top if keep is None else ops.TopK(top.values * keep, top.indices)

    def encode_with_aux(self, x: Tensor, aux_mask: Tensor, k_aux: int) -> ops.TopKAux:
        """`encode`, and from the same pass the k_aux best latents within aux_mask [d_sae_local]
        over all shards.

        The second list holds raw pre-activations [N, k_aux]: -inf where the mask ran out or
        another shard's are larger.
        """
        local = (min(self.k, self.d_sae_local), min(k_aux, self.d_sae_local))
        top = ops.topk_encode_aux(
            collectives.feed_shards(x, self.mesh),
            self._compute(self.W_enc),
            self.b_enc,
            local[0],
            aux_mask,
            local[1],
            b_dec=collectives.feed_shards(self.b_dec, self.mesh),
        )
        first = self.first_latent
        keep = selection.global_topk_mask(top.values, top.indices, self.k, first, self.mesh)
        if keep is None:
            return top
        k_aux = min(k_aux, self.d_sae)
        keep_aux = selection.global_topk_mask(
            top.aux_values, top.aux_indices, k_aux, first, self.mesh
        )
        assert keep_aux is not None
        aux_values = top.aux_values.masked_fill(~keep_aux, -torch.inf)
        return ops.TopKAux(top.values * keep, top.indices, aux_values, top.aux_indices)

    def combine(self, top_acts: Tensor, top_idx: Tensor) -> Tensor:
        """`sum_j top_acts[n, j] * W_dec[top_idx[n, j]]` [N, d_in], summed over shards: no b_dec."""
        partial = ops.sparse_decode(top_acts, top_idx, self._compute(self.W_dec))
        return collectives.sum_over_shards(partial.to(self.b_dec.dtype), self.mesh)

    def decode(self, top_acts: Tensor, top_idx: Tensor) -> Tensor:
        """`combine(top_acts, top_idx) + b_dec`: the reconstruction [N, d_in]."""
        return self.combine(top_acts, top_idx) + self.b_dec

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and decodes x [N, d_in]; both parts are differentiable, the selection is not."""
        top = self.encode(x)
        return SAEOutput(self.decode(*top), *top)

    def save(self, folder: str | Path) -> None:
        """Writes this (unsharded) SAE as safetensors and json, renamed into place."""
        assert self.mesh.num_shards == 1, "gather the shards before saving"
        path = Path(folder)
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        with replacing(path / WEIGHTS_FILE) as partial:
            save_file(weights, partial)
        config = {"architecture": "topk", "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        write_text(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")

    @staticmethod
    def is_whole(folder: str | Path) -> bool:
        """Whether a folder holds what `save` writes, none of it cut short. Reads no weights."""
        path = Path(folder)
        try:
            json.loads((path / CONFIG_FILE).read_text())
            with safe_open(path / WEIGHTS_FILE, framework="pt"):
                return True
        except (OSError, ValueError, SafetensorError):
            return False

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Reads what `save` wrote. Raises ValueError where a file is missing, damaged or does not
        fit.
        """
        path = Path(folder)
        try:
            config = json.loads((path / CONFIG_FILE).read_text())
            weights = load_file(path / WEIGHTS_FILE)
            sae = cls(config["d_in"], config["d_sae"], config["k"], dtype=weights["W_enc"].dtype)
            sae.load_state_dict(weights)
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as e:
            raise ValueError(
                f"{path} holds no whole TopK SAE ({e}); train or export it anew"
            ) from e
        return sae.to(device)


_ROWS_A_SEED = 64


def _unit_rows(seed: int, first: int, count: int, d_in: int) -> Tensor:
    """Rows first .. first+count of the random decoder, unit norm, [count, d_in] float64."""
    rows = []
    for block in range(first // _ROWS_A_SEED, (first + count - 1) // _ROWS_A_SEED + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows.append(torch.randn(_ROWS_A_SEED, d_in, generator=generator))
    offset = first % _ROWS_A_SEED
    drawn = torch.cat(rows)[offset : offset + count].double()
    return nn.functional.normalize(drawn, dim=1)
