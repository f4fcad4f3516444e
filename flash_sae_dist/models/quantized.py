"""An SAE for inference whose weights are e4m3 with a scale a row: a quarter of float32's memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.dispatch import fp8_obstacle
from ..kernels.eager import compute as run_op
from .base import Codes, Slots, SparseCoder
from .topk import TopKConfig, TopKSAE

_ARCHITECTURES = ("topk", "multi_topk")
# Latents whose rows are multiplied at once by `decode_dense`.
_BLOCK = 4096


class QuantizedTopK(TopKSAE):
    """What `quantize` makes: reads, steers and reconstructs as a TopKSAE, without gradients.

    e4m3 products of tokens and W_enc find about 2 k candidates; their activations are products of
    the tokens as they are (bfloat16 on a GPU) with the e4m3 rows. No rows are decoded but those
    that are at work.
    """

    W_enc_scale: Tensor
    W_dec_scale: Tensor

    def __init__(self, sae: TopKSAE) -> None:
        d_out = sae.d_out if sae.transcodes else None
        super().__init__(
            sae.d_in,
            sae.d_sae,
            sae.k,
            input_norm=sae.config.input_norm,
            skip=sae.config.skip,
            d_out=d_out,
            dtype=sae.b_dec.dtype,
            device="meta",
            seed=None,
        )
        self.about = sae.about
        for name in ("b_enc", "b_dec", "W_skip"):
            if (whole := getattr(sae, name)) is not None:
                setattr(self, name, nn.Parameter(whole.detach().clone(), requires_grad=False))
        for name in ("W_enc", "W_dec"):
            weights = getattr(sae, name).detach()
            rows, scale = run_op("quantise_rows", weights, weights)
            delattr(self, name)
            self.register_buffer(name, rows)
            self.register_buffer(f"{name}_scale", scale)

    @torch.no_grad()
    def encode_rows(self, x: Tensor) -> Slots:
        """See SparseCoder. Raises ValueError on a GPU without fp8."""
        if (obstacle := fp8_obstacle(x.device)) is not None:
            raise ValueError(f"a quantized SAE cannot be used here: {obstacle}")
        if self.W_enc.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"a quantized SAE was cast to {self.W_enc.dtype}; move it with .to(device) alone, "
                "or quantize the SAE it was made from again"
            )
        x = x.to(self.b_dec.dtype)
        xc = x if self.centre is None else x - self.centre
        xc = xc.to(torch.bfloat16) if x.is_cuda else xc
        given = (xc, self.W_enc, self.b_enc, self.k, self.W_enc_scale)
        return Slots(*run_op("fp8_topk_encode", xc, *given))

    @torch.no_grad()
    def combine(self, codes: Codes, W_dec: Tensor | None = None) -> Tensor:
        """See SparseCoder; of its own W_dec alone."""
        assert W_dec is None
        values = codes.values * self.W_dec_scale[codes.latents.long()]
        given = (values, codes.latents, self.W_dec, codes.tokens, codes.offsets)
        recon: Tensor = run_op("sparse_decode", self.b_dec, *given)
        return recon.to(self.b_dec.dtype)

    @torch.no_grad()
    def decode_dense(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """See Interventions; some latents after others, so that W_dec is never whole."""
        recon: Tensor | int = 0
        for at in range(0, self.d_sae, _BLOCK):
            part = slice(at, at + _BLOCK)
            rows = self.W_dec[part].to(acts.dtype) * self.W_dec_scale[part, None].to(acts.dtype)
            recon = recon + acts[..., part] @ rows
        return recon + self.base(x)

    def save(self, *args: object, **kwargs: object) -> None:
        """Raises ValueError: an SAE is quantized where it is used."""
        raise ValueError("a quantized SAE is not saved; save the SAE it was made from")


def quantize(sae: SparseCoder, dtype: Literal["fp8"] = "fp8") -> QuantizedTopK:
    """An SAE for inference with W_enc and W_dec in e4m3, a scale a row, on sae's device; sae stays
    as it is, so free it where memory counts.

    Raises ValueError for another dtype, an architecture that selects otherwise than by a token's k
    largest, one of several shards, or a GPU without fp8 (it is there since Ada and Hopper). A CPU
    emulates it, slowly.
    """
    if dtype != "fp8":
        raise ValueError(f"dtype={dtype!r} is not 'fp8', the one there is")
    if not isinstance(sae.config, TopKConfig) or sae.config.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"an SAE of architecture {sae.config.architecture!r} cannot be quantized; "
            f"{' and '.join(_ARCHITECTURES)} can"
        )
    if sae.mesh.num_shards > 1:
        raise ValueError("quantize needs a whole SAE, not one of several shards; load it whole")
    if (obstacle := fp8_obstacle(sae.W_enc.device)) is not None:
        raise ValueError(f"the SAE cannot be quantized: {obstacle}")
    assert isinstance(sae, TopKSAE)
    return QuantizedTopK(sae).eval()
