"""Which token's activation becomes which row of a store, and in which forward passes.

The sequences of each part of the text stand in a random order, their kept tokens are numbered
through, and the rows of each shard are shuffled: each a function of the text and of cache.seed
alone. A shard is made in the passes of its unit of neighbouring shards, whose sequences are cut
into batches from the unit's first one on: so the batch in which a row is computed does not depend
on which shards are missing. The text need not be whole: what is asked for waits for its part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .store import Geometry
from .text import TokenTable
from .text_parts import TextParts

_SHARDS_A_UNIT = 8
# Units enough that processes, each of which makes whole ones, end at about the same time.
_UNITS = 64
_PARTS_IN_MEMORY = 3
Indices = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """Rows of one shard in a batch."""

    shard: int
    source: Indices  # place of each in the batch's tokens [B * T]
    target: Indices  # row of each in the shard


class Batch(NamedTuple):
    """A forward pass."""

    ids: npt.NDArray[np.int32]  # [B, T]
    attention: npt.NDArray[np.bool_]  # [B, T]
    pieces: list[Piece]
    whole: list[int]  # shards of which no row is missing after it


class _Part(NamedTuple):
    """A part of the text in its random order."""

    table: TokenTable
    order: Indices  # [S]
    ends: Indices  # [S], rows of the store up to the end of each sequence
    first: int  # rows of the parts before

    def row(self, sequence: int) -> int:
        """Rows before a sequence."""
        return int(self.ends[sequence - 1]) if sequence else self.first


def shards_a_unit(num_shards: int) -> int:
    """Neighbouring shards that are made in the same passes: a sequence that lies in two units is
    run for both.
    """
    return max(1, min(_SHARDS_A_UNIT, num_shards // _UNITS))


class RowPlan:
    """Places of rows, for a store's geometry; until the text has ended it may have fewer rows."""

    def __init__(
        self,
        parts: TextParts,
        geometry: Geometry,
        unit: int,  # shards
        seed: int,
        batch: int,  # sequences
    ) -> None:
        self.parts, self.geometry, self.unit = parts, geometry, unit
        self.seed, self.batch = seed, batch
        # Called again and again while a part of the text is not there.
        self.wait: Callable[[], None] = lambda: None
        self._part = lru_cache(maxsize=_PARTS_IN_MEMORY)(self._make_part)
        self._targets = lru_cache(maxsize=2 * _SHARDS_A_UNIT)(self._make_targets)
        self._settle()

    def _settle(self) -> None:
        if self.parts.ended:
            rows = min(self.geometry.rows, self.parts.rows_before[-1])
            self.geometry = self.geometry._replace(rows=rows)

    def _await(self, rows: int | None) -> None:
        """Waits until the text has given so many rows, or has ended."""
        while not self.parts.ended and (rows is None or self.parts.rows_before[-1] < rows):
            self.wait()
        self._settle()

    def _make_part(self, number: int) -> _Part:
        table, first = self.parts.load(number), self.parts.rows_before[number]
        order = np.random.default_rng([self.seed, number, 1]).permutation(len(table.ids))
        return _Part(table, order, first + np.cumsum(table.keep.sum(axis=1)[order]), first)

    def _make_targets(self, shard: int) -> Indices:
        """The row in the shard of each of its tokens."""
        shuffle = self._shuffle(shard)
        targets = np.empty_like(shuffle)
        targets[shuffle] = np.arange(len(shuffle))
        return targets

    def _shuffle(self, shard: int) -> Indices:
        """The token of the shard that stands in each of its rows."""
        start, stop = self.geometry.shard_range(shard)
        return np.random.default_rng([self.seed, shard]).permutation(stop - start)

    def _sequences(self, start: int, stop: int) -> Iterator[tuple[_Part, int, int]]:
        """The sequences that hold these rows: of each part the first and that after the last."""
        while start < stop:
            part = self._part(bisect_right(self.parts.rows_before, start) - 1)
            first = int(np.searchsorted(part.ends, start, side="right"))
            last = min(int(np.searchsorted(part.ends, stop, side="left")) + 1, len(part.ends))
            yield part, first, last
            start = int(part.ends[last - 1])

    def tokens(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """Where each row of a shard comes from: ids, document and position, as the store names
        them.
        """
        start, stop = self.geometry.shard_range(shard)
        found: dict[str, list[npt.NDArray[Any]]] = {"ids": [], "document": [], "position": []}
        for part, first, last in self._sequences(start, stop):
            sequences = part.order[first:last]
            keep = part.table.keep[sequences]
            rows = slice(max(0, start - part.row(first)), stop - part.row(first))
            for name, values in found.items():
                values.append(getattr(part.table, name)[sequences][keep][rows])
        shuffle = self._shuffle(shard)
        return {f"tokens/{name}": np.concatenate(v)[shuffle] for name, v in found.items()}

    def batches(self, todo: list[int], rank: int, world: int) -> Iterator[Batch]:
        """The passes with which one of several processes makes its part of the missing shards:
        whole units, in turns. Passes that give none of their rows are left out.
        """
        missing, turns = set(todo), count()
        for unit in count():
            shards = range(unit * self.unit, (unit + 1) * self.unit)
            start = shards.start * self.geometry.shard_rows
            if start >= self.geometry.rows:
                # The first process ends the one that tokenises when it leaves: others may wait for
                # it still, and the store has all of the text.
                self._await(None)
                return
            if missing.isdisjoint(shards) or next(turns) % world != rank:
                continue
            self._await(min(self.geometry.rows, shards.stop * self.geometry.shard_rows))
            stop = min(self.geometry.rows, shards.stop * self.geometry.shard_rows)
            wanted = [s for s in shards if s in missing and s < self.geometry.num_shards]
            for part, first, last in self._sequences(start, stop):
                for at in range(first, last, self.batch):
                    batch = self._batch(part, at, min(at + self.batch, last), wanted)
                    if batch.pieces:
                        yield batch

    def _batch(self, part: _Part, first: int, last: int, wanted: list[int]) -> Batch:
        sequences = part.order[first:last]
        source = np.flatnonzero(part.table.keep[sequences])
        start, stop = part.row(first), part.row(last)
        pieces, whole = [], []
        for shard in wanted:
            begin, end = self.geometry.shard_range(shard)
            a, b = max(start, begin), min(stop, end)
            if a < b:
                target = self._targets(shard)[a - begin : b - begin]
                pieces.append(Piece(shard, source[a - start : b - start], target))
                if b == end:
                    whole.append(shard)
        table = part.table
        return Batch(table.ids[sequences], table.attention[sequences], pieces, whole)

    def rows_of_part(self, number: int) -> Indices:  # [S, T]
        """The row of the store that stands for each token of a part, -1 where none does."""
        part = self._part(number)
        places = np.full(part.table.ids.shape, -1, dtype=np.int64)
        rows = np.arange(part.first, int(part.ends[-1]))
        for shard in range(part.first // self.geometry.shard_rows, self.geometry.num_shards):
            begin, end = self.geometry.shard_range(shard)
            a, b = max(begin, part.first), min(end, int(part.ends[-1]))
            if a >= b:
                break
            targets = self._targets(shard)[a - begin : b - begin]
            rows[a - part.first : b - part.first] = begin + targets
        ordered = places[part.order]
        ordered[part.table.keep[part.order]] = rows
        places[part.order] = np.where(ordered < self.geometry.rows, ordered, -1)
        return places
