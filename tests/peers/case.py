"""One small SAE and batch, the same for every library, and how what they give is kept."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data/peers"
N, D, F, K = 24, 8, 32, 4
WIDTHS = (4, 12, 32)
# Latents of these numbers are dead: they are too small for any selection.
DEAD = (1, 6, 13, 20, 27, 30)
BANDWIDTH, SPARSITY, TARGET_L0 = 0.25, 0.375, 5.0
TANH_SCALE, PRE_ACT = 4.0, 0.125
# A batch's gradients of these, under our names and shapes, stand beside its losses.
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "r_mag", "b_mag", "W_skip")


def make() -> dict[str, Tensor]:
    """Weights and a batch in float64; a latent is a row of W_enc and W_dec, of unit norm there."""
    g = torch.Generator().manual_seed(21)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    W_dec = torch.nn.functional.normalize(draw(F, D), dim=1)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[list(DEAD)] = True
    b_enc = 0.1 * draw(F)
    W_enc = W_dec + 0.2 * draw(F, D)
    b_enc[dead] -= 0.5
    W_enc[dead] /= 2
    return {
        "x": draw(N, D) + 0.3,
        "y": draw(N, D) - 0.2,
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "b_dec": 0.2 * draw(D),
        "threshold": 0.1 + 0.4 * torch.rand(F, generator=g, dtype=torch.float64),
        "b_gate": b_enc - 0.1,
        "r_mag": 0.2 * draw(F),
        "b_mag": 0.1 * draw(F),
        "W_skip": 0.1 * draw(D, D),
        "dead": dead,
    }


def keep(library: str, cases: dict[str, dict[str, Tensor]], version: str) -> None:
    """Writes what a library gave: by case its losses by name, and gradients as `grad.NAME`."""
    tensors = {
        f"{case}/{name}": tensor.detach().clone().contiguous()
        for case, values in {"case": make(), **cases}.items()
        for name, tensor in values.items()
    }
    DATA.mkdir(parents=True, exist_ok=True)
    save_file(tensors, DATA / f"{library}.safetensors", metadata={"version": version})


def read(library: str) -> dict[str, dict[str, Tensor]]:
    """What `keep` wrote."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(DATA / f"{library}.safetensors").items():
        case, _, name = key.partition("/")
        found.setdefault(case, {})[name] = tensor
    return found
