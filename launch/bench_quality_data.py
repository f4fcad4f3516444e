"""The rows of `flash-sae bench quality`: of a store, of a mixture with known features, and of
SAELens's synthetic benchmark.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations.store import ActivationStore
from ..config.base import ConfigError


class Size(NamedTuple):
    """Of a training: its tokens are steps x batch."""

    d_sae: int
    k: int
    steps: int
    batch: int


class Data(NamedTuple):
    """Rows to train on and rows to measure on."""

    name: str
    rows: Tensor  # [N, D] float32
    held: Tensor  # [M, D]
    features: Tensor | None  # [G, D], where they are known
    size: Size


# Small enough for a CPU.
MIXTURE = Size(512, 8, 600, 512)
STORE = Size(2048, 32, 468, 512)
_FEATURES, _WIDTH, _HELD = 512, 64, 8192


def mixture(size: Size, *, width: int = _WIDTH, num_features: int = _FEATURES) -> Data:
    """Sums of known directions of unit norm, of which a token has size.k in the mean, by
    probabilities that fall as 1 / rank ** 0.5, with exponential coefficients and an offset.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_features, width, generator=generator)
    features /= features.norm(dim=1, keepdim=True)
    weights = torch.arange(1, num_features + 1).float().rsqrt()
    chance = (weights * size.k / weights.sum()).clamp_max(0.5)
    offset = torch.randn(width, generator=generator) / math.sqrt(width)
    num_rows = min(size.steps * size.batch, 2**18) + _HELD
    parts = []
    for count in (4096,) * -(-num_rows // 4096):
        on = torch.rand(count, num_features, generator=generator) < chance
        coefficients = torch.empty(count, num_features).exponential_(generator=generator) + 0.5
        parts.append((on * coefficients) @ features + offset)
    rows = torch.cat(parts)[:num_rows]
    return Data("mixture", rows[_HELD:], rows[:_HELD], features, size)


def synthetic(made: dict[str, Tensor], size: Size) -> Data:
    """SAELens's synthetic rows, as its own environment drew them."""
    rows = made["rows"]
    return Data("sae_lens synthetic", rows[_HELD:], rows[:_HELD], made["features"], size)


def synthetic_job(size: Size) -> dict[str, Any]:
    """What bench_quality_peers.py draws them by."""
    rows = min(size.steps * size.batch, 2**18) + _HELD
    return {"num_features": _FEATURES, "d_in": _WIDTH, "rows": rows}


def of_store(path: str, hookpoint: str | None, size: Size) -> Data:
    """All rows of a hookpoint, the last tenth held out, 2**14 at most; of documents that training
    has not seen but for one. Raises ConfigError where there are too few.
    """
    store = ActivationStore.open(path)
    hookpoint = hookpoint or store.hookpoints[-1]
    rows = store.tensor(hookpoint, 0, store.rows).float()
    rows = rows[rows.square().sum(dim=1) > 0]  # those that were left out are zeros
    held = min(2**14, len(rows) // 10)
    if held < size.batch:
        raise ConfigError(
            f"{path} has {len(rows)} rows, of which a tenth is held out: too few for batches of "
            f"{size.batch}; cache more tokens, or lower --batch"
        )
    return Data(f"store, {hookpoint}", rows[:-held], rows[-held:], None, size)
