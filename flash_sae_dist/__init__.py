"""flash_sae_dist: train sparse autoencoders at scale."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.base import SAEOutput
    from .models.quantized import quantize
    from .models.topk import TopKSAE

if sys.platform == "win32":
    raise ImportError(
        "flash_sae_dist runs on Linux and macOS, not on Windows itself; install it in WSL 2"
    )

__version__ = "0.1.0"
__all__ = ["SAEOutput", "TopKSAE", "__version__", "quantize"]


def __getattr__(name: str) -> object:
    # Loaded on first use: `flash-sae --help` need not wait for torch.
    if name in ("SAEOutput", "TopKSAE", "quantize"):
        from .models import base, quantized, topk

        home = {"SAEOutput": base, "TopKSAE": topk, "quantize": quantized}[name]
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
