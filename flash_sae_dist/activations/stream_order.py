"""The order of a stream's rows: a function of the text, the seeds, the sizes and the place among
the processes alone.

An epoch is the text once, its sequences in a random order within each part. They are cut into
passes, which the processes that train an SAE take in turns. A process puts neighbouring passes
into chunks and keeps the last K chunks. Each row of chunk c is dealt to one of the K windows c to
c + K - 1: a window is served, shuffled, once its own chunk is made, and so draws from K chunks.
What falls before the first window for which K chunks are there is served in that one, what falls
behind the last chunk in the last: each row of the text once an epoch.

So a place in the stream is a number of rows. Of what was served before it only the counts are
needed, and whoever goes on there runs the passes of K chunks at the most again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, count, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..config.base import ConfigError, UserError
from .holdout import document_hash
from .order import Ints
from .row_plan import Batch, Piece
from .text import TokenTable
from .text_parts import TextParts

_MOST_CHUNKS = 8
# What a generator of random numbers is for, beside the seeds.
_SEQUENCES, _DEAL, _SHUFFLE = 0, 1, 2
_PARTS_IN_MEMORY = 2
Mask = npt.NDArray[np.bool_]


class Share(NamedTuple):
    """One of the processes that train an SAE together."""

    rank: int
    num_ranks: int


class BufferShape(NamedTuple):
    """How the rows that a process mixes are cut."""

    num_chunks: int
    passes: int  # a chunk
    pass_rows: int  # at most

    @property
    def chunk_rows(self) -> int:
        """Rows that a chunk has room for."""
        return self.passes * self.pass_rows

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return self.num_chunks * self.chunk_rows

    @classmethod
    def of(cls, tokens: int, sequences: int, length: int) -> BufferShape:
        """Of a buffer of so many tokens and passes of so many sequences. Raises ConfigError where
        it cannot hold one pass.
        """
        a_pass = sequences * length
        if tokens < a_pass:
            raise ConfigError(
                f"train.buffer_tokens={tokens} is less than a forward pass of cache.batch_sequences"
                f"={sequences} x cache.context_length={length} tokens; set it to {8 * a_pass} or so"
            )
        chunks = min(_MOST_CHUNKS, tokens // a_pass)
        return cls(chunks, tokens // (chunks * a_pass), a_pass)


class Chunk(NamedTuple):
    """Neighbouring passes of a process."""

    number: int  # in its epoch
    passes: list[tuple[int, Ints]]  # part of the text, its sequences
    rows: int


class Window(NamedTuple):
    """Rows that are served one after another."""

    epoch: int
    batches: list[Batch]  # to be run before it is served; a piece's shard is a chunk of the buffer
    fresh: list[tuple[int, int]]  # chunks of the buffer that they fill, their rows
    places: Ints  # [n], rows of the buffer


class StreamOrder:
    """The endless order of one process's rows."""

    def __init__(
        self,
        parts: TextParts,
        shape: BufferShape,
        batch_sequences: int,
        seeds: tuple[int, int],  # of the sequences, of the mixing
        share: Share,
        holdout: float,
        wait: Callable[[int], None],  # called again and again while a part is not there
    ) -> None:
        self.parts, self.shape, self.batch_sequences = parts, shape, batch_sequences
        self.seeds, self.share, self.wait = seeds, share, wait
        self._first_hash = int(holdout * 2**32)
        self._is_left = False
        self._counts: list[Ints] = []  # rows of each sequence, by part
        self._part = lru_cache(maxsize=_PARTS_IN_MEMORY)(self._make_part)
        self._deal = lru_cache(maxsize=2 * shape.num_chunks)(self._make_deal)

    def windows(self, skip: int) -> Iterator[tuple[Window, int]]:
        """The windows from the one on that holds row number `skip` of the stream, each with how
        many of its rows are behind. Raises ConfigError where the text gives this process none.
        """
        for epoch in count():
            ring = deque[Chunk](maxlen=self.shape.num_chunks)
            made, any_row = -1, False
            for chunk, after in pairwise(chain(self._chunks(epoch), [None])):
                assert chunk is not None
                ring.append(chunk)
                if after is not None and len(ring) < self.shape.num_chunks:
                    continue
                is_first = chunk.number < self.shape.num_chunks
                parts = [self._dealt(chunk, c, is_first, after is None) for c in ring]
                rows = sum(
                    self._num_dealt(c.rows, dealt) for c, dealt in zip(ring, parts, strict=True)
                )
                any_row |= rows > 0
                if skip >= rows:
                    skip -= rows
                    continue
                fresh = [c for c in ring if c.number > made]
                made = chunk.number
                yield (
                    self._window(epoch, chunk.number, fresh, list(zip(ring, parts, strict=True))),
                    skip,
                )
                skip = 0
            if not any_row:
                raise self._no_rows()

    def sequences(self) -> Iterator[tuple[TokenTable, Mask, Ints]]:
        """Whole passes, without end: a part of the text, which of its tokens are trained on, the
        sequences of a pass. Passes of fewer sequences, or without a row, are left out. Raises
        ConfigError where the text gives none.
        """
        for epoch in count():
            found = False
            for part, sequences, rows in self._passes(epoch):
                if rows and len(sequences) == self.batch_sequences:
                    found = True
                    yield (*self._part(part), sequences)
            if not found:
                raise ConfigError(
                    f"the text gives no batch of {self.batch_sequences} whole sequences; lower "
                    "train.batch_tokens, or give more text"
                )

    def leave(self) -> None:
        """Ends a wait for the text in another thread, where it raises UserError."""
        self._is_left = True

    @property
    def rows_found(self) -> int:
        """Rows of the text, of all processes, in the parts that have been looked at."""
        return sum(int(counts.sum()) for counts in self._counts)

    def _no_rows(self) -> ConfigError:
        rank, world = self.share
        return ConfigError(
            f"the text gives no row to train on to process {rank + 1} of the {world} that train an "
            "SAE: it is cut into passes of cache.batch_sequences="
            f"{self.batch_sequences} sequences, which they take in turns; lower that or "
            "train.holdout, or give more text"
        )

    def _dealt(self, now: Chunk, chunk: Chunk, is_first: bool, is_last: bool) -> range:
        """Which of the K parts of a chunk are served in the window of the chunk `now`."""
        age = now.number - chunk.number
        return range(0 if is_first else age, self.shape.num_chunks if is_last else age + 1)

    def _num_dealt(self, rows: int, dealt: range) -> int:
        """How many rows of a chunk of so many have these numbers, modulo K."""
        chunks = self.shape.num_chunks
        return sum(-(-(rows - number) // chunks) for number in dealt if number < rows)

    def _chunks(self, epoch: int) -> Iterator[Chunk]:
        passes: list[tuple[int, Ints]] = []
        number, rows = 0, 0
        for part, sequences, held in self._passes(epoch):
            passes.append((part, sequences))
            rows += held
            if len(passes) == self.shape.passes:
                yield Chunk(number, passes, rows)
                number, passes, rows = number + 1, [], 0
        if passes:
            yield Chunk(number, passes, rows)

    def _passes(self, epoch: int) -> Iterator[tuple[int, Ints, int]]:
        """This process's passes: the part, its sequences, their rows."""
        passed, size = 0, self.batch_sequences
        for part in count():
            while len(self.parts.known()) <= part and not self.parts.ended:
                if self._is_left:
                    raise UserError("the stream was left while it waited for its text")
                self.wait(part)
            # Asked anew: the last part may have come between the two questions above.
            if part >= len(self.parts.known()):
                return
            counts = self._rows_of_sequences(part)
            order = self._rng(epoch, part, _SEQUENCES, of_rank=False).permutation(len(counts))
            firsts = np.arange(0, len(order), size)
            rows = np.add.reduceat(counts[order], firsts)
            for number in range(
                (self.share.rank - passed) % self.share.num_ranks, len(firsts), self.share.num_ranks
            ):
                first = int(firsts[number])
                yield part, order[first : first + size], int(rows[number])
            passed += len(firsts)

    def _rng(
        self, epoch: int, number: int, what: int, *, of_rank: bool = True
    ) -> np.random.Generator:
        place = [self.share.rank, self.share.num_ranks] if of_rank else []
        return np.random.default_rng([*self.seeds, epoch, number, what, *place])

    def _make_part(self, number: int) -> tuple[TokenTable, Mask]:
        """A part of the text, and which of its tokens are trained on."""
        table = self.parts.load(number)
        if not self._first_hash:
            return table, table.keep
        is_out = (table.document >= 0) & (document_hash(table.document) < self._first_hash)
        return table, table.keep & ~is_out

    def _rows_of_sequences(self, part: int) -> Ints:
        while len(self._counts) <= part:
            self._counts.append(self._part(len(self._counts))[1].sum(axis=1, dtype=np.int64))
        return self._counts[part]

    def _make_deal(self, epoch: int, chunk: int, rows: int) -> Ints:
        """The number modulo K that each row of a chunk has."""
        return self._rng(epoch, chunk, _DEAL).permutation(rows) % self.shape.num_chunks

    def _window(
        self, epoch: int, number: int, fresh: list[Chunk], parts: list[tuple[Chunk, range]]
    ) -> Window:
        found = []
        for chunk, dealt in parts:
            numbers = self._deal(epoch, chunk.number, chunk.rows)
            (rows,) = np.nonzero((numbers >= dealt.start) & (numbers < dealt.stop))
            found.append(rows + self._slot(chunk) * self.shape.chunk_rows)
        places = np.concatenate(found)
        places = places[self._rng(epoch, number, _SHUFFLE).permutation(len(places))]
        batches = [batch for chunk in fresh for batch in self._batches(chunk)]
        return Window(epoch, batches, [(self._slot(c), c.rows) for c in fresh], places)

    def _slot(self, chunk: Chunk) -> int:
        return chunk.number % self.shape.num_chunks

    def _batches(self, chunk: Chunk) -> Iterator[Batch]:
        """The passes of a chunk that give rows."""
        start = 0
        for number, sequences in chunk.passes:
            table, keep = self._part(number)
            source = np.flatnonzero(keep[sequences])
            if len(source):
                piece = Piece(self._slot(chunk), source, np.arange(start, start + len(source)))
                yield Batch(table.ids[sequences], table.attention[sequences], [piece], [])
            start += len(source)
