"""flash_sae_dist: train sparse autoencoders at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.topk import SAEOutput, TopKSAE

__version__ = "0.1.0"
__all__ = ["SAEOutput", "TopKSAE", "__version__"]


def __getattr__(name: str) -> object:
    # Loaded on first use: `flash-sae --help` need not wait for torch.
    if name in ("SAEOutput", "TopKSAE"):
        from .models import topk

        return getattr(topk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
