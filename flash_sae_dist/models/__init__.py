"""The architectures: `ARCHITECTURES` is the one place where one is registered."""

from __future__ import annotations

from pathlib import Path

import torch

from .base import SparseCoder
from .batch_topk import BatchTopK
from .crosscoder import BatchTopKCrosscoder, ReLUCrosscoder, TopKCrosscoder
from .gated import Gated
from .jumprelu import JumpReLU
from .matryoshka import Matryoshka
from .multi_topk import MultiTopK
from .quantized import quantize as quantize
from .relu import ReLU
from .saved import check_sae_folder, read_spec
from .topk import TopKSAE

# The names that `sae.architecture` takes, in configs and beside saved weights.
ARCHITECTURES: dict[str, type[SparseCoder]] = {
    "topk": TopKSAE,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "relu": ReLU,
    "multi_topk": MultiTopK,
    "topk_crosscoder": TopKCrosscoder,
    "batch_topk_crosscoder": BatchTopKCrosscoder,
    "relu_crosscoder": ReLUCrosscoder,
}


def load_sae(folder: str | Path, *, device: torch.device | str = "cpu") -> SparseCoder:
    """Reads a saved SAE of any architecture. Raises ValueError where a file is missing or damaged,
    or the architecture is not registered.
    """
    path = Path(folder)
    check_sae_folder(path)
    try:
        name = read_spec(path)["architecture"]
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} holds no whole SAE ({e}); train or export it anew") from e
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{path} holds an SAE of architecture {name!r}; known: {known}")
    return ARCHITECTURES[name].load(path, device=device)
