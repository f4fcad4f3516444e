"""Active latents as one list of pairs, whatever form an architecture's codes have, and the pairs of
a whole pass on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.base import Codes

Array = npt.NDArray[Any]
# What a killed pass leaves, as a pattern.
LEFTOVERS = ".pairs-*.tmp"


class ActivePairs(NamedTuple):
    """Active latents of neighbouring rows of a store, ordered by row and then by latent."""

    rows: Tensor  # [M] int64, numbers in the store
    latents: Tensor  # [M] int64
    values: Tensor  # [M] float32 > 0

    def ordered(self) -> ActivePairs:
        """The same pairs in their order."""
        order = self.latents.argsort()
        order = order[self.rows[order].argsort(stable=True)]
        return ActivePairs(*(part[order] for part in self))

    def at(self, which: Tensor) -> ActivePairs:
        """Some of the pairs, by a mask or by their numbers."""
        return ActivePairs(*(part[which] for part in self))


def active_pairs(codes: Codes, first_row: int) -> ActivePairs:
    """What is active in the codes of the rows from first_row on."""
    is_active = codes.values > 0
    values, latents = codes.values[is_active], codes.latents[is_active]
    # A rectangle's tokens are its rows.
    token = is_active.nonzero()[:, 0] if codes.tokens is None else codes.tokens[is_active].long()
    return ActivePairs(token + first_row, latents.long(), values.float()).ordered()


class PairSpool:
    """The pairs of a pass, row after row in two files, so that memory does not grow with the store:
    8 bytes a pair, and 8 a row in memory. A context manager that removes its files.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f".pairs-{name}.tmp" for name in ("latents", "values")]
        self.files = [path.open("wb") for path in self.paths]
        self._counts: list[Array] = []
        self._maps: list[Array] = []
        self.offsets: Array = np.zeros(1, np.int64)

    def __enter__(self) -> PairSpool:
        return self

    def __exit__(self, *error: object) -> None:
        self._maps = []
        for file, path in zip(self.files, self.paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)

    def add(self, pairs: ActivePairs, first_row: int, num_rows: int) -> None:
        """Adds the pairs of the rows behind those that were added before."""
        counts = torch.bincount(pairs.rows - first_row, minlength=num_rows)
        self._counts.append(counts.cpu().numpy())
        for file, part in zip(self.files, (pairs.latents.int(), pairs.values), strict=True):
            part.cpu().numpy().tofile(file)

    def close(self) -> None:
        """Ends writing; `values_at` may be asked from now on."""
        for file in self.files:
            file.close()
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._counts))])
        self._maps = [
            # An empty file cannot be mapped.
            np.memmap(path, dtype, "r") if self.offsets[-1] else np.empty(0, dtype)
            for path, dtype in zip(self.paths, (np.int32, np.float32), strict=True)
        ]

    @property
    def num_rows(self) -> int:
        """Rows that were read."""
        return len(self.offsets) - 1

    def values_at(self, rows: Array, latents: Array) -> npt.NDArray[np.float32]:
        """Activation of each (row, latent) [n] float32; 0 where the latent is not active, NaN for a
        row that was not read (-1 or behind the last).
        """
        known = (rows >= 0) & (rows < self.num_rows)
        row = np.where(known, rows, 0)
        low, end = self.offsets[row], self.offsets[row + 1]
        high, latent_of, value_of = end.copy(), *self._maps
        # Binary search among the latents of each row, for all rows at once.
        while (open_ := low < high).any():
            middle = (low + high) // 2
            ahead = open_ & (latent_of[np.where(open_, middle, 0)] < latents)
            low = np.where(ahead, middle + 1, low)
            high = np.where(open_ & ~ahead, middle, high)
        found = low < end
        place = np.where(found, low, 0)
        if len(latent_of):
            found &= latent_of[place] == latents
            values = np.where(found, value_of[place], np.float32(0))
        else:
            values = np.zeros(len(rows), np.float32)
        return np.where(known, values, np.float32(np.nan)).astype(np.float32)
