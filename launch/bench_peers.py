"""Training steps of other libraries' classes, for `flash-sae bench step`, imported where they are
installed: SAELens's training classes, and sparsify's coder as an SAE and as a transcoder.

Each is a class's forward and backward pass under autocast to bfloat16 and a step of fused Adam on
float32 weights, no latent dead: what a step costs at least. SAELens's trainer clips the gradient
and counts which latents fire beside that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.matryoshka import prefix_widths
from .bench_training import LR, Shape, threshold_of

Step = Callable[[], Any]


def fused_adam(module: torch.nn.Module) -> torch.optim.Adam:
    """With the epsilon of every row of the table."""
    return torch.optim.Adam(module.parameters(), lr=LR, eps=6.25e-10, fused=True)


def _sae_lens_options(architecture: str, f: int, k: int) -> dict[str, Any]:
    """The same k, widths, and thresholds that let as many latents through as ours."""
    own: dict[str, dict[str, Any]] = {
        "TopK": {"k": k},
        "BatchTopK": {"k": k},
        "MatryoshkaBatchTopK": {"k": k, "matryoshka_widths": [*prefix_widths(f), f]},
        "JumpReLU": {"jumprelu_init_threshold": threshold_of(f), "decoder_init_norm": 1.0},
        "Gated": {},
        "Standard": {},
    }
    return own[architecture]


def sae_lens_step(shape: Shape, architecture: str, device: str = "cuda") -> Step:
    """A step of the class named by an architecture and TrainingSAE, its coefficients at their full
    values.
    """
    import sae_lens
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput

    n, d, f, k = shape
    config = getattr(sae_lens, f"{architecture}TrainingSAEConfig")
    options = _sae_lens_options(architecture, f, k)
    sae = getattr(sae_lens, f"{architecture}TrainingSAE")(
        config(d_in=d, d_sae=f, device=device, **options)
    )
    coefficients = {
        name: given.value if isinstance(given, TrainCoefficientConfig) else given
        for name, given in sae.get_coefficients().items()
    }
    optimizer, x = fused_adam(sae), torch.randn(n, d, device=device)

    def step() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            given = TrainStepInput(
                sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0,
                is_logging_step=False,
            )  # fmt: skip
            loss: Tensor = sae.training_forward_pass(given).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def sparsify_step(shape: Shape, device: str = "cuda", **options: bool) -> Step:
    """A step of sparsify's SparseCoder, whose forward pass is under autocast itself, as its trainer
    makes it; options of its config, such as transcode, which leaves decoder rows at any norm.
    """
    if device == "cpu":
        # Read where it is imported: without it its decoder asks Triton for a GPU.
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    n, d, f, k = shape
    coder = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k, **options), device=device)
    optimizer, x = fused_adam(coder), torch.randn(n, d, device=device)
    transcodes = coder.cfg.transcode
    y = torch.randn(n, d, device=device) if transcodes else None

    def step() -> Tensor:
        if not transcodes:
            coder.set_decoder_norm_to_unit_norm()
        loss: Tensor = coder(x, y).fvu
        loss.backward()  # type: ignore[no-untyped-call]
        if not transcodes:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# Each with the row of ours that it stands beside.
BY_ARCHITECTURE: dict[str, tuple[str, Callable[[Shape], Step]]] = {
    "SAELens's TopK": ("ours, fused, exact", lambda s: sae_lens_step(s, "TopK")),
    "SAELens's BatchTopK": ("ours, BatchTopK", lambda s: sae_lens_step(s, "BatchTopK")),
    "SAELens's Matryoshka": (
        "ours, Matryoshka",
        lambda s: sae_lens_step(s, "MatryoshkaBatchTopK"),
    ),
    "SAELens's JumpReLU": (
        "ours, JumpReLU, mean L0 64",
        lambda s: sae_lens_step(s, "JumpReLU"),
    ),
    "SAELens's ReLU": ("ours, ReLU, mean L0 64", lambda s: sae_lens_step(s, "Standard")),
    "SAELens's Gated": ("ours, Gated, mean L0 64", lambda s: sae_lens_step(s, "Gated")),
    "sparsify's transcoder": (
        "ours, transcoder",
        lambda s: sparsify_step(s, transcode=True),
    ),
    "sparsify's skip transcoder": (
        "ours, skip transcoder",
        lambda s: sparsify_step(s, transcode=True, skip_connection=True),
    ),
}
