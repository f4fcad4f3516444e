"""The text around a store's rows: each token's row or none, in the sequences that the model saw."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..activations.store import ActivationStore
from ..activations.text import TokenTable

Array = npt.NDArray[Any]


class Windows(NamedTuple):
    """Tokens around examples, W places each."""

    ids: Array  # [n, W] int32, -1 for an imported row without a token
    rows: Array  # [n, W] int64, -1 where the token's activation was not stored
    inside: Array  # [n, W] bool, False beyond the sequence's ends


class Texts:
    """Tokens in order, in segments of one sequence each. Memory is about 30 bytes a token."""

    def __init__(
        self,
        ids: Array,  # [M] int32
        rows: Array,  # [M] int64, -1 where no row stands for a token
        document: Array,  # [M] int32
        position: Array,  # [M] int32, in the document; negative for special tokens
        starts: Array,  # [segments + 1], first token of each segment
        num_rows: int,  # rows that are asked for: 0 .. num_rows - 1
    ) -> None:
        self.ids, self.rows, self.starts = ids, np.where(rows < num_rows, rows, -1), starts
        self.document, self.position = document, position
        self.place = np.full(num_rows, -1, np.int64)
        has = self.rows >= 0
        self.place[self.rows[has]] = np.flatnonzero(has)

    def windows(self, rows: Array, before: int, after: int) -> Windows:
        """What stands around rows [n] that have a token."""
        at = self.place[rows][:, None]
        segment = np.searchsorted(self.starts, at, side="right") - 1
        places = at + np.arange(-before, after + 1)
        inside = (places >= self.starts[segment]) & (places < self.starts[segment + 1])
        places = np.where(inside, places, 0)
        rows_there = np.where(inside, self.rows[places], -1)
        return Windows(np.where(inside, self.ids[places], -1), rows_there, inside)


def open_texts(store: ActivationStore, num_rows: int) -> Texts:
    """The text of a store's first rows: from its token table, or for imported rows from the order
    of their documents.
    """
    if store.text_shape() is None:
        texts = _of_documents(store, num_rows)
    else:
        texts = _of_sequences(store, num_rows)
    # Zeros stand in those rows' place.
    lost = store.left_out[store.left_out < num_rows]
    texts.rows[texts.place[lost][texts.place[lost] >= 0]] = -1
    return texts


def _of_sequences(store: ActivationStore, num_rows: int) -> Texts:
    shape = store.text_shape()
    assert shape is not None
    # No token has the row of one that was left out.
    missing = num_rows - int((store.left_out < num_rows).sum())
    total = store.array("text/row").shape[0]
    parts: dict[str, list[Array]] = {"ids": [], "row": [], "document": [], "position": []}
    for start in range(0, total, shape.part_sequences):
        # Sequences are shuffled within a part, so rows come part by part.
        stop = min(total, start + shape.part_sequences)
        for name, values in parts.items():
            values.append(store.read_stored(f"text/{name}", start, stop))
        row = parts["row"][-1]
        missing -= int(((row >= 0) & (row < num_rows)).sum())
        if missing == 0:
            break
    ids, row, document, position = (np.concatenate(values) for values in parts.values())
    table = TokenTable(ids, document, position, row >= 0)
    seen = table.attention.reshape(-1)
    ends = np.cumsum(table.attention.sum(axis=1))
    ids, row, document, position = (a.reshape(-1)[seen] for a in (ids, row, document, position))
    return Texts(ids, row, document, position, np.concatenate([[0], ends]), num_rows)


def _of_documents(store: ActivationStore, num_rows: int) -> Texts:
    names = ("tokens/ids", "tokens/document", "tokens/position")
    ids, document, position = (store.read_stored(name, 0, num_rows) for name in names)
    order = np.lexsort((position, document))
    ids, document, position = ids[order], document[order], position[order]
    fresh = np.flatnonzero(np.diff(document) != 0) + 1
    starts = np.concatenate([[0], fresh, [num_rows]])
    return Texts(ids, order.astype(np.int64), document, position, starts, num_rows)
