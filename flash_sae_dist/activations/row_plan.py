"""Which token's activation becomes which row of a store, and in which forward passes.

Sequences stand in a random order, their kept tokens are numbered through, and the rows of each
shard are shuffled: each a function of the text and of cache.seed alone. A shard is made in the
passes of its unit of neighbouring shards, whose sequences are cut into batches from the unit's
first one on: so the batch in which a row is computed does not depend on which shards are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .store import Geometry
from .text import TokenTable

_SHARDS_A_UNIT = 8
# Units enough that processes, each of which makes whole ones, end at about the same time.
_UNITS = 64
Indices = npt.NDArray[np.int64]


class Part(NamedTuple):
    """Rows of one shard in a batch."""

    shard: int
    source: Indices  # place of each in the batch's tokens [B * T]
    target: Indices  # row of each in the shard


class Batch(NamedTuple):
    """A forward pass."""

    ids: npt.NDArray[np.int32]  # [B, T]
    attention: npt.NDArray[np.bool_]  # [B, T]
    parts: list[Part]
    whole: list[int]  # shards of which no row is missing after it


class RowPlan:
    """Places of rows, for a store's geometry."""

    def __init__(self, table: TokenTable, geometry: Geometry, seed: int, batch: int) -> None:
        self.table, self.geometry, self.seed, self.batch = table, geometry, seed, batch
        # Sequences in a random order: each shard mixes documents of the whole text.
        self.order = np.random.default_rng(seed).permutation(len(table.ids))
        self.ends = np.cumsum(table.keep.sum(axis=1)[self.order])
        self.unit = max(1, min(_SHARDS_A_UNIT, geometry.num_shards // _UNITS))

    def mine(self, todo: list[int], rank: int, world: int) -> list[int]:
        """The shards of todo that one of several processes makes: whole units, in turns."""
        units = [list(shards) for _, shards in groupby(todo, lambda s: s // self.unit)]
        return [shard for shards in units[rank::world] for shard in shards]

    def _shuffle(self, shard: int) -> Indices:
        """The row of the shard's i-th token is where i stands in it."""
        start, stop = self.geometry.shard_range(shard)
        return np.random.default_rng([self.seed, shard]).permutation(stop - start)

    def _targets(self, shard: int) -> Indices:
        """The row of each of the shard's tokens."""
        shuffle = self._shuffle(shard)
        targets = np.empty_like(shuffle)
        targets[shuffle] = np.arange(len(shuffle))
        return targets

    def _sequences(self, shard: int) -> tuple[int, int]:
        """The first sequence, in the random order, with a row of a shard, and that after the
        last.
        """
        start, stop = self.geometry.shard_range(shard)
        first = int(np.searchsorted(self.ends, start, side="right"))
        return first, int(np.searchsorted(self.ends, stop, side="left")) + 1

    def _first_row(self, sequence: int) -> int:
        return int(self.ends[sequence - 1]) if sequence else 0

    def tokens(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """Where each row of a shard comes from: ids, document and position, as the store names
        them.
        """
        start, stop = self.geometry.shard_range(shard)
        first, last = self._sequences(shard)
        sequences, skipped = self.order[first:last], start - self._first_row(first)
        keep, shuffle = self.table.keep[sequences], self._shuffle(shard)
        rows = slice(skipped, skipped + stop - start)
        return {
            f"tokens/{name}": getattr(self.table, name)[sequences][keep][rows][shuffle]
            for name in ("ids", "document", "position")
        }

    def batches(self, shards: list[int]) -> Iterator[Batch]:
        """The passes that make these shards, ascending; passes that give none of their rows are
        left out.
        """
        for unit, group in groupby(shards, lambda s: s // self.unit):
            wanted = list(group)
            first = self._sequences(unit * self.unit)[0]
            end = min((unit + 1) * self.unit, self.geometry.num_shards) - 1
            last = self._sequences(end)[1]
            targets = {s: self._targets(s) for s in wanted}
            for at in range(first, last, self.batch):
                batch = self._batch(at, min(at + self.batch, last), wanted, targets)
                if batch.parts:
                    yield batch

    def _batch(
        self, first: int, last: int, wanted: list[int], targets: dict[int, Indices]
    ) -> Batch:
        sequences = self.order[first:last]
        source = np.flatnonzero(self.table.keep[sequences])
        start, stop = self._first_row(first), int(self.ends[last - 1])
        parts, whole = [], []
        for shard in wanted:
            begin, end = self.geometry.shard_range(shard)
            a, b = max(start, begin), min(stop, end)
            if a < b:
                where = targets[shard][a - begin : b - begin]
                parts.append(Part(shard, source[a - start : b - start], where))
                if b == end:
                    whole.append(shard)
        return Batch(self.table.ids[sequences], self.table.attention[sequences], parts, whole)
