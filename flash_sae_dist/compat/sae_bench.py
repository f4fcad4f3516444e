"""An SAE as SAEBench takes it: `selected_saes=[("mine", BenchSAE(sae, model_name, hook_layer))]`.

SAEBench, and with it its config class, has to be installed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..interop.hook_names import hook_name as lens_name
from ..models.base import SparseCoder


class BenchSAE(nn.Module):
    """Dense activations and a decoder whose rows are of norm 1, as SAEBench's evaluations expect.

    Where an SAE's rows are not, its activations are multiplied by their norms: what is selected and
    reconstructed stays the same.
    """

    def __init__(
        self,
        sae: SparseCoder,
        model_name: str,
        hook_layer: int,
        hook_name: str | None = None,  # left out, TransformerLens's name of the SAE's hookpoint
    ) -> None:
        super().__init__()
        # In a list, whose modules are not this one's: its parameters are told below.
        self._held = [sae.eval()]
        norms = sae.W_dec.detach().norm(dim=1)
        self.norms = nn.Parameter(norms, requires_grad=False)
        self.W_enc = nn.Parameter((sae.W_enc.detach() * norms[:, None]).T.contiguous())
        self.W_dec = nn.Parameter(sae.W_dec.detach() / norms[:, None])
        self.b_enc = nn.Parameter(sae.b_enc.detach() * norms)
        self.b_dec = nn.Parameter(sae.b_dec.detach().clone())
        if hook_name is None and sae.about.hookpoint is not None:
            hook_name = lens_name(sae.about.hookpoint)
        config = importlib.import_module("sae_bench.custom_saes.custom_sae_config").CustomSAEConfig
        self.cfg: Any = config(
            model_name, d_in=sae.d_in, d_sae=sae.d_sae, hook_layer=hook_layer,
            hook_name=hook_name or f"blocks.{hook_layer}.hook_resid_post",
        )  # fmt: skip
        self.cfg.architecture = str(sae.spec()["architecture"])
        # Its own code asks for this name, too.
        self.cfg.architecture_str = self.cfg.architecture
        self.cfg.context_size = sae.about.context_length or 128
        self.cfg.dtype = str(sae.W_dec.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> BenchSAE:
        """Moves it, and the SAE behind it."""
        self._held[0].to(*args, **kwargs)
        super().to(*args, **kwargs)
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [..., d_sae]."""
        return self._held[0].encode_dense(x.to(self.dtype)) * self.norms

    @torch.no_grad()
    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction [..., d_in]."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Encodes and decodes."""
        return self.decode(self.encode(x))

    def check_decoder_norms(self) -> bool:
        """Whether decoder rows are of norm 1: they are made so."""
        return True
