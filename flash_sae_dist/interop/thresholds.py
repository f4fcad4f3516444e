"""Thresholds of latents that were selected per token: those that keep each latent's frequency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.base import SparseCoder
from .contents import Contents, contents_of

if TYPE_CHECKING:
    from ..activations.store import ActivationStore

# Of pre-activations [rows, latents] at a time.
_BLOCK_BYTES = 1 << 28
_ROWS = 16_384


def rows_of(store: ActivationStore, hookpoint: str) -> Tensor:  # [N, d_in]
    """Rows from everywhere in a store to measure thresholds on. Raises ConfigError where it has
    not that hookpoint."""
    # Not at the top: an SAE's files are read without the libraries of a store.
    from ..activations.loader import ActivationLoader

    count = min(_ROWS, store.kept_rows)
    with ActivationLoader(store, hookpoint, batch_tokens=count, seed=0, num_steps=1) as loader:
        return next(iter(loader)).float()


def with_thresholds(sae: SparseCoder, x: Tensor) -> Contents:
    """An SAE and the thresholds of its latents, which it may have of itself."""
    contents = contents_of(sae)
    if "threshold" not in contents.weights:
        contents.weights["threshold"] = thresholds_of(sae, x)
    return contents


@torch.no_grad()
def thresholds_of(
    sae: SparseCoder,
    x: Tensor,  # [N, d_in] rows to measure on
) -> Tensor:  # [d_sae], inf for latents that did not fire
    """For each latent the threshold above which as many of the rows' pre-activations lie as it was
    active on: halfway between the least that is kept and the largest that is not.
    """
    x = sae.normalise(x)[0]
    codes = sae.encode_rows(x)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=x.device)
    fired.index_add_(0, codes.latents.flatten().long(), (codes.values > 0).flatten().long())
    out = torch.full((sae.d_sae,), torch.inf, dtype=sae.W_dec.dtype, device=x.device)
    block = max(1, _BLOCK_BYTES // (4 * max(1, len(x))))
    for at in range(0, sae.d_sae, block):
        rows = torch.arange(at, min(at + block, sae.d_sae), device=x.device)
        pre = sae.pre_activations(x, rows, sae.b_enc[rows]).relu()
        ordered = torch.cat([pre.sort(dim=0, descending=True).values, torch.zeros_like(pre[:1])])
        counts = fired[rows]
        kept = ordered.gather(0, (counts - 1).clamp_min(0)[None])[0]
        left = ordered.gather(0, counts[None])[0]
        out[rows] = torch.where(counts > 0, (kept + left) / 2, torch.inf)
    return out
