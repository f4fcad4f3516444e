"""Rows of hookpoints in the order of their numbers, each once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .aligned import AlignedLoaders
from .loader import ActivationLoader
from .order import Ints
from .store import ActivationStore


class RowBatch(NamedTuple):
    """Rows that the store does not leave out, by rising number."""

    numbers: Ints  # [n]
    rows: tuple[Tensor, ...]  # [n, D] of each hookpoint, on the device


def batches_in_order(
    store: ActivationStore,
    hookpoints: list[str],
    *,
    stop: int,
    batch_tokens: int,
    device: torch.device,
) -> Iterator[RowBatch]:
    """Rows 0 .. stop - 1, batch_tokens at a time. Raises DamagedStoreError."""
    lost = store.left_out[store.left_out < stop]
    # Rows that come before each of those that are left out.
    before, left = lost - np.arange(len(lost)), stop - len(lost)
    if not left:
        return
    size = min(batch_tokens, left)
    loaders = AlignedLoaders(
        lambda name: ActivationLoader(
            store, name, batch_tokens=size, seed=None, num_steps=-(-left // size), device=device
        ),
        hookpoints,
    )
    with loaders:
        for first, rows in zip(range(0, left, size), loaders, strict=True):
            at = np.arange(first, min(first + size, left))
            numbers = at + np.searchsorted(before, at, side="right")
            # The last batch goes on with the first rows of the store.
            yield RowBatch(numbers, tuple(part[: len(at)] for part in rows))
