"""The token table of a store: its sequences in parts, written ahead of the forward passes.

`text/ids`, `text/document`, `text/position` [S, T] int32 and `text/keep` [S, T] uint8 are Zarr
arrays with one shard a part, to which `row` [S, T] int64 comes at the end: the row of the store
that stands for a token, or -1. Each part has a record, written after its files: what they hold,
and the place in the text that is behind it, so that a launch that ended goes on there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ..identity import digest
from .records import DamagedStoreError, Records
from .shard_files import shard_pieces
from .store import text_chunk
from .store_files import Piece
from .text import Making, Place, Sequence, TokenTable, no_rows, sequences, table_of

TYPES = {"ids": "int32", "document": "int32", "position": "int32", "keep": "uint8"}
# A part is also what sequences are shuffled within.
_PART_TOKENS = 1 << 21
_PARTS_IN_MEMORY = 3


class Part(NamedTuple):
    """What is recorded of a part."""

    sequences: int
    rows: int  # tokens to store
    documents: int  # of the text up to its end
    largest: int  # token id
    last: bool  # nothing of the text follows that the store needs
    behind: Place
    crc32c: dict[str, str]  # by array

    @classmethod
    def of(cls, table: TokenTable, last: bool, behind: Place) -> Part:
        """Of the sequences of a part."""
        sums = {name: f"{crc32c(_bits(table, name).tobytes()):08x}" for name in TYPES}
        documents = int(table.document.max()) + 1
        sizes = len(table.ids), int(table.keep.sum())
        return cls(*sizes, documents, int(table.ids.max()), last, behind, sums)

    def same_text(self, other: Part) -> bool:
        """Whether two parts hold the same tokens."""
        return self.crc32c == other.crc32c and self.last == other.last


def _bits(table: TokenTable, name: str) -> npt.NDArray[Any]:
    return np.ascontiguousarray(getattr(table, name)).astype(TYPES[name], copy=False)


def _record_name(part: int) -> str:
    return f"text-{part:08d}.json"


def part_path(name: str, part: int) -> str:
    """Where a part of an array lives in the store."""
    return f"text/{name}/c/{part}/0"


class TextParts:
    """The parts of a store's text that are there, to be read and added to."""

    def __init__(self, records: Records, context_length: int, size: int) -> None:
        """size: sequences a part."""
        self.records, self.context_length, self.size = records, context_length, size
        self._known: list[Part] = []
        self._rows = [0]  # before each part that is known, and behind the last
        self.load = lru_cache(maxsize=_PARTS_IN_MEMORY)(self._load)

    def known(self) -> list[Part]:
        """The parts that are recorded, from the first on without a gap."""
        while not (self._known and self._known[-1].last):
            found = self.records.read(_record_name(len(self._known)))
            if found is None:
                break
            try:
                part = Part(**{**found, "behind": Place(*found["behind"])})
            except TypeError as e:
                raise self._damaged(len(self._known), str(e)) from e
            self._known.append(part)
            self._rows.append(self._rows[-1] + part.rows)
        return self._known

    @property
    def rows_before(self) -> list[int]:
        """Rows of the parts before each that is known; those of all of them behind the last."""
        self.known()
        return self._rows

    @property
    def ended(self) -> bool:
        """Whether the last part is there."""
        known = self.known()
        return bool(known) and known[-1].last

    def add(self, table: TokenTable, part: Part) -> None:
        """Writes the part behind those that are known."""
        number = len(self.known())
        for name in TYPES:
            self.records.files.write(part_path(name, number), self._pieces(_bits(table, name)))
        self.records.write(_record_name(number), part._asdict())

    def add_rows(self, number: int, rows: npt.NDArray[np.int64]) -> None:  # [S, T]
        """Writes the rows of a part's tokens."""
        self.records.files.write(part_path("row", number), self._pieces(rows))

    def _pieces(self, values: npt.NDArray[Any]) -> list[Piece]:
        """A part's file of an array [S, T]."""
        chunk = text_chunk(self.size)
        return shard_pieces(values, chunk, self.size // chunk)[0]

    def _load(self, number: int) -> TokenTable:
        """A part's sequences. Raises DamagedStoreError."""
        part = self.known()[number]
        arrays = {name: self._array(number, part, name) for name in TYPES}
        keep = arrays.pop("keep").astype(np.bool_)
        return TokenTable(**arrays, keep=keep)

    def _array(self, number: int, part: Part, name: str) -> npt.NDArray[Any]:
        file, dtype = part_path(name, number), np.dtype(TYPES[name])
        size = text_chunk(self.size) * self.context_length * dtype.itemsize
        chunks = -(-part.sequences // text_chunk(self.size))

        def parse(data: bytes) -> npt.NDArray[Any]:
            if len(data) >= chunks * (size + 4):
                bodies = np.frombuffer(data, np.uint8, chunks * (size + 4))
                bodies = bodies.reshape(chunks, size + 4)
                values = np.ascontiguousarray(bodies[:, :size]).view(dtype)
                values = values.reshape(-1, self.context_length)[: part.sequences]
                same = f"{crc32c(values.tobytes()):08x}" == part.crc32c.get(name)
                # The index and the chunks' own checksums, too.
                if same and b"".join(self._pieces(values)) == data:
                    return values
            raise self._damaged(number, f"{file} does not hold what was written")

        try:
            return self.records.files.read(file, parse)
        except FileNotFoundError as e:
            raise self._damaged(number, f"{file} is missing") from e

    def _damaged(self, number: int, why: str) -> DamagedStoreError:
        record = self.records.where(_record_name(number))
        return DamagedStoreError(
            f"part {number} of the text is damaged: {self.records.root}/{why}; delete {record} and "
            "run the same `flash-sae cache` again"
        )

    def drop_damaged(self) -> DamagedStoreError | None:
        """Takes back the first part that is missing or does not hold what was written, and all
        behind it, which are to be made again; what was wrong. One process calls it, before any
        work.
        """
        found, number = None, 0
        self.drop(len(self.known()))
        try:
            for number in range(len(self.known())):
                self._load(number)
        except DamagedStoreError as e:
            found = e
            self.drop(min(number, len(self._known)))
        return found

    def drop(self, first: int = 0) -> None:
        """Takes back the parts from one on."""
        del self._known[first:], self._rows[first + 1 :]
        self.load.cache_clear()
        for name in self.records.names("text-"):
            if int(name[5:13]) >= first:
                self.records.files.remove(f"records/{name}")


def digest_of(parts: list[Part]) -> str:
    """Of the token ids, of what the model sees and what is stored."""
    return digest([[part.sequences, part.crc32c] for part in parts])


def part_size(context_length: int, batch_sequences: int) -> int:
    """Sequences of a part: about two million tokens, whole batches and whole chunks."""
    unit = math.lcm(batch_sequences, 16)
    return max(1, _PART_TOKENS // (context_length * unit)) * unit


def made_parts(
    making: Making,
    size: int,
    num_rows: int,  # tokens to store, all parts together
    before: list[Part],  # that are there already
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[tuple[TokenTable, Part]]:
    """The parts behind others, until they give num_rows tokens to store or the text ends. advance
    is told the tokens to store that were found. Raises ConfigError where the text gives no whole
    sequence, or none with a token to store.
    """
    rows = sum(part.rows for part in before)
    start = before[-1].behind if before else Place()
    waiting: list[Sequence] = []
    behind = start
    for sequence, place in sequences(making, start):
        if len(waiting) == size:
            # Only what follows a full part tells that it is not the last.
            table = table_of(waiting, making)
            yield table, Part.of(table, False, behind)
            waiting = []
        waiting.append(sequence)
        behind = place
        found = int(sequence.keep.sum())
        rows += found
        advance(found)
        if rows >= num_rows:
            break
    table = table_of(waiting, making)
    if rows == 0:
        raise no_rows(making.cfg)
    yield table, Part.of(table, True, behind)
