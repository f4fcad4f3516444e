"""Pre-activations that are ranked by their products with something of each latent, as a crosscoder
ranks them by its decoder's norms: the encoder's rows are multiplied, and what is found is divided.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ..kernels.reference import Pairs, Slots

_Found = TypeVar("_Found", Slots, Pairs)


def ranked(W_enc: Tensor, b_enc: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder whose pre-activations are multiplied by ranks [d_sae_local]."""
    return W_enc * ranks[:, None].to(W_enc.dtype), b_enc * ranks


def unranked(found: _Found, ranks: Tensor | None) -> _Found:
    """Pairs that such an encoder has found, with their own pre-activations."""
    if ranks is None:
        return found
    return found._replace(values=found.values / ranks[found.latents.long()])
