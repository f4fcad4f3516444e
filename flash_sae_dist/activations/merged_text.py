"""The token table of a merged store: those of its stores behind one another, or the one of stores
of the same rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .records import Records
from .store import ActivationStore, TextShape
from .text import Place, TokenTable
from .text_parts import Part, TextParts

logger = logging.getLogger(__name__)
Array = npt.NDArray[np.int64]
# ids, document, position, keep and row of a token.
BYTES_A_TOKEN = 3 * 4 + 1 + 8


class Behind(NamedTuple):
    """A store whose text goes on where that of the stores before ends."""

    store: ActivationStore
    rows: int  # of the stores before
    documents: int


def shape_of(stores: Sequence[ActivationStore]) -> TextShape | None:
    """How the merged table is cut; None, as a log line says, where a store has no table to join."""
    shapes = [store.text_shape() for store in stores]
    first = shapes[0]
    if first is None or any(s is None or s.context_length != first.context_length for s in shapes):
        if any(shapes):
            logger.info("the merged store has no token table: not all stores have one of one width")
        return None
    return first


def num_tokens(stores: Sequence[ActivationStore], shape: TextShape) -> int:
    """Tokens of all tables."""
    return shape.context_length * sum(
        part.sequences for store in stores for part in _parts(store).known()
    )


def write(records: Records, shape: TextShape, texts: Sequence[Behind]) -> int:
    """Writes the table of all texts; the number of its sequences. What an earlier launch wrote of
    it is written again. Raises DamagedStoreError.
    """
    merged = TextParts(records, shape.context_length, shape.part_sequences)
    merged.drop()
    waiting = None
    for found in _cut(texts, shape.part_sequences):
        # Only what follows a part tells that it is not the last.
        if waiting is not None:
            _add(merged, *waiting, last=False)
        waiting = found
    assert waiting is not None
    _add(merged, *waiting, last=True)
    return sum(part.sequences for part in merged.known())


def _add(merged: TextParts, table: TokenTable, rows: Array, *, last: bool) -> None:
    merged.add(table, Part.of(table, last, Place()))
    merged.add_rows(len(merged.known()) - 1, rows)


def _cut(texts: Sequence[Behind], size: int) -> Iterator[tuple[TokenTable, Array]]:
    """All texts in pieces of so many sequences, the last may have fewer."""
    tables: list[TokenTable] = []
    rows: list[Array] = []
    for table, row in _all(texts):
        tables.append(table)
        rows.append(row)
        while sum(map(len, rows)) >= size:
            whole, numbers = _joined(tables), np.concatenate(rows)
            yield _some(whole, slice(size)), numbers[:size]
            tables, rows = [_some(whole, slice(size, None))], [numbers[size:]]
    if sum(map(len, rows)):
        yield _joined(tables), np.concatenate(rows)


def _all(texts: Sequence[Behind]) -> Iterator[tuple[TokenTable, Array]]:
    """Each part of each text, with the numbers that its documents and rows have now."""
    for store, rows_before, documents_before in texts:
        parts, start = _parts(store), 0
        for number, part in enumerate(parts.known()):
            table, stop = parts.load(number), start + part.sequences
            row = store.read_stored("text/row", start, stop)
            has = table.document >= 0
            table.document = np.where(has, table.document + np.int32(documents_before), -1)
            yield table, np.where(row >= 0, row + rows_before, -1)
            start = stop


def _parts(store: ActivationStore) -> TextParts:
    shape = store.text_shape()
    assert shape is not None
    return TextParts(store.records, shape.context_length, shape.part_sequences)


def _joined(tables: Sequence[TokenTable]) -> TokenTable:
    return TokenTable(
        np.concatenate([table.ids for table in tables]),
        np.concatenate([table.document for table in tables]),
        np.concatenate([table.position for table in tables]),
        np.concatenate([table.keep for table in tables]),
    )


def _some(table: TokenTable, which: slice) -> TokenTable:
    return TokenTable(
        table.ids[which], table.document[which], table.position[which], table.keep[which]
    )
