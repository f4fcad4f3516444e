"""What a latent's decoder row points at: output tokens, and other latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores at a time.
_BLOCK_ELEMENTS = 1 << 25


class Ranked(NamedTuple):
    """The largest of each latent's scores, in falling order."""

    scores: Tensor  # [L, n] float32
    indices: Tensor  # [L, n] int64


def _block_rows(width: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, width))


@torch.no_grad()
def output_tokens(
    directions: Tensor,  # [L, D]
    unembedding: Tensor,  # [V, D]
    count: int,
) -> tuple[Ranked, Ranked]:
    """The tokens whose logits `directions @ unembedding.T` are largest, and those that are
    smallest (in rising order).
    """
    count, unembedding = min(count, len(unembedding)), unembedding.float()
    raised, lowered = [], []
    for part in torch.split(directions, _block_rows(len(unembedding))):
        logits = part.float() @ unembedding.T
        raised.append(logits.topk(count, dim=1))
        lowered.append(logits.topk(count, dim=1, largest=False))
    return _joined(raised), _joined(lowered)


@torch.no_grad()
def nearest_latents(
    W_dec: Tensor,  # [F, D]
    latents: Tensor,  # [L] int64
    count: int,
) -> Ranked:
    """The other latents whose decoder rows have the largest cosine with each of these."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    count = min(count, len(unit) - 1)
    found = []
    for part in torch.split(latents, _block_rows(len(unit))):
        cosines = unit[part] @ unit.T
        cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
        found.append(cosines.topk(count, dim=1))
    return _joined(found)


def _joined(parts: list[torch.return_types.topk]) -> Ranked:
    return Ranked(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))
