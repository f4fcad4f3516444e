"""The order of rows: which of them a stream holds, and a permutation of blocks for each epoch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class KeptRows:
    """The rows of a hookpoint that a stream holds, by blocks: all but some, or those alone.

    Only the rows that are left out (or held alone) are listed, so memory is theirs.
    """

    def __init__(
        self,
        rows: int,
        block_rows: int,
        listed: Ints,  # ascending row numbers
        *,
        alone: bool = False,
    ) -> None:
        self.block_rows, self.alone = block_rows, alone
        num_blocks = -(-rows // block_rows)
        if not alone:
            # What the last block lacks is left out like other rows.
            padding = np.arange(rows, num_blocks * block_rows, dtype=np.int64)
            listed = np.concatenate([listed, padding])
        self.listed = listed
        # Rows first[b] .. first[b + 1] of the list lie in block b.
        self.first = np.searchsorted(listed, block_rows * np.arange(num_blocks + 1))
        num_listed = np.diff(self.first)
        self.counts: Ints = num_listed if alone else block_rows - num_listed
        self._whole = np.arange(block_rows)

    def places(
        self,
        blocks: Ints,  # [m]
        starts: Ints,  # [m], where the first row of each block lies
    ) -> Ints:
        """Where the kept rows of blocks lie, in order, in memory that holds the blocks whole."""
        first = self.first[blocks]
        counts = self.first[blocks + 1] - first
        if not self.alone and not counts.any():
            return self._all(starts)
        ends = np.cumsum(counts)
        place = np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)
        # Row r of the list, in block b at starts[b].
        listed: Ints = self.listed[place]
        if self.alone:
            listed += np.repeat(starts - blocks * self.block_rows, counts)
            return listed
        shift = self.block_rows * (np.arange(len(blocks)) - blocks)
        kept = np.ones(len(blocks) * self.block_rows, dtype=bool)
        kept[listed + np.repeat(shift, counts)] = False
        return self._all(starts)[kept]

    def _all(self, starts: Ints) -> Ints:
        return np.add.outer(starts, self._whole).reshape(-1)


class Place(NamedTuple):
    """A position of a stream."""

    slot: int  # the block's number in the endless sequence of blocks
    skip: int  # rows of that block before it


class BlockOrder:
    """The endless stream of epochs: an epoch is a permutation of the blocks that hold any row.

    Rows inside a block keep the order in which they were shuffled when the store was written.
    """

    def __init__(self, counts: Ints, seed: int | None) -> None:
        """counts: the rows of each block that the stream holds, at least one in all. Without a seed
        blocks keep the order of their numbers.
        """
        self.counts, self.seed = counts, seed
        self.rows, self.blocks_an_epoch = int(counts.sum()), int(np.count_nonzero(counts))
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        order = np.arange(len(self.counts))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        order = order[self.counts[order] > 0]
        return order, np.cumsum(self.counts[order])

    def locate(self, position: int) -> Place:
        """Where a position of the stream lies."""
        epoch, offset = divmod(position, self.rows)
        _, ends = self._epoch(epoch)
        slot = int(np.searchsorted(ends, offset, side="right"))
        before = int(ends[slot - 1]) if slot else 0
        return Place(epoch * self.blocks_an_epoch + slot, offset - before)

    def blocks(self, first: int, stop: int) -> Ints:
        """The blocks of the sequence from number first to before stop."""
        found = []
        while first < stop:
            epoch, slot = divmod(first, self.blocks_an_epoch)
            order, _ = self._epoch(epoch)
            part = order[slot : slot + stop - first]
            found.append(part)
            first += len(part)
        return np.concatenate(found) if len(found) != 1 else found[0]
