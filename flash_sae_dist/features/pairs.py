"""Active latents as one list of pairs, whatever form an architecture's codes have, and the pairs of
a whole pass on disk.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..activations.loader import copied_event, is_async
from ..models.base import Codes

Array = npt.NDArray[Any]
# What a killed pass leaves, as a pattern.
LEFTOVERS = ".pairs-*.tmp"
_WRITES_AHEAD = 2


class ActivePairs(NamedTuple):
    """Active latents of rows of a store, ordered by row and then by latent."""

    rows: Tensor  # [M] int64, numbers in the store
    latents: Tensor  # [M] int64
    values: Tensor  # [M] float32 > 0

    def at(self, which: Tensor) -> ActivePairs:
        """Some of the pairs, by a mask or by their numbers."""
        return ActivePairs(*(part[which] for part in self))


def active_pairs(codes: list[Codes], numbers: Tensor) -> ActivePairs:
    """What is active in the codes of neighbouring batches, whose rows have these numbers, on the
    same device. The host waits for the device once, whatever the number of batches.
    """
    tokens, first = [], 0
    for part in codes:
        if part.tokens is None:
            # A rectangle's tokens are its rows.
            count = len(part.values)
            token = torch.arange(count, device=numbers.device)[:, None].expand(part.values.shape)
        else:
            count, token = len(part.offsets) - 1, part.tokens.long()
        tokens.append(token.reshape(-1) + first)
        first += count
    token = torch.cat(tokens)
    latents = torch.cat([part.latents.reshape(-1) for part in codes]).long()
    values = torch.cat([part.values.reshape(-1) for part in codes]).float()
    active = (values > 0).nonzero()[:, 0]
    token, latents = token[active], latents[active]
    order = ((token << 32) + latents).argsort()
    return ActivePairs(numbers[token[order]], latents[order], values[active[order]])


class PairSpool:
    """The pairs of a pass, row after row in two files, so that memory does not grow with the store:
    8 bytes a pair, and 8 a row in memory. A thread writes them. A context manager that removes its
    files.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f".pairs-{name}.tmp" for name in ("latents", "values")]
        self.files = [path.open("wb") for path in self.paths]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pairs")
        self._under_way: deque[Future[None]] = deque()
        self._counts: list[Array] = []
        self._maps: list[Array] = []
        self.offsets: Array = np.zeros(1, np.int64)

    def __enter__(self) -> PairSpool:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._maps = []
        for file, path in zip(self.files, self.paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)

    def add(self, pairs: ActivePairs, first_row: int, stop_row: int) -> None:
        """Adds the pairs of all rows from first_row to before stop_row; rows behind those that were
        added before.
        """
        counts = torch.bincount(pairs.rows - first_row, minlength=stop_row - first_row)
        parts = [_to_host(part) for part in (counts, pairs.latents.int(), pairs.values)]
        copied = copied_event(counts.device) if is_async(counts.device) else None
        self._under_way.append(self._thread.submit(self._write, parts, copied))
        while len(self._under_way) > _WRITES_AHEAD:
            self._under_way.popleft().result()

    def _write(self, parts: list[Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        counts, *columns = (part.numpy() for part in parts)
        self._counts.append(counts)
        for file, column in zip(self.files, columns, strict=True):
            column.tofile(file)

    def close(self) -> None:
        """Ends writing; `values_at` may be asked from now on."""
        while self._under_way:
            self._under_way.popleft().result()
        for file in self.files:
            file.close()
        self.offsets = np.concatenate([np.zeros(1, np.int64), *self._counts]).cumsum()
        self._maps = [
            # An empty file cannot be mapped. A plain array: slices of a memmap are slow.
            np.asarray(np.memmap(path, dtype, "r")) if self.offsets[-1] else np.empty(0, dtype)
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
        latent_of, value_of = self._maps
        # Binary search among the latents of each row, for all rows at once, by steps that halve.
        step = (1 << int((end - low).max(initial=0)).bit_length()) >> 1
        while step:
            behind = low + step
            ahead = latent_of[np.minimum(behind, end) - 1] < latents
            low += (ahead & (behind <= end)) * step
            step >>= 1
        found = low < end
        place = np.where(found, low, 0)
        if len(latent_of):
            found &= latent_of[place] == latents
            values = np.where(found, value_of[place], np.float32(0))
        else:
            values = np.zeros(len(rows), np.float32)
        return np.where(known, values, np.float32(np.nan)).astype(np.float32)


def _to_host(values: Tensor) -> Tensor:
    """A copy that the host does not wait for, where the values are on a GPU."""
    if not is_async(values.device):
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)
