"""Rows that no training sees: whole documents, the same ones for every job on a store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .blocks import BlockReader
from .order import Ints, KeptRows
from .store import ActivationStore

MAX_ROWS = 100_000
_SHARDS_AT_ONCE = 16


class HeldOut(NamedTuple):
    """What is held out of a store's hookpoints."""

    rows: Ints  # ascending
    num_documents: int

    def told(self) -> str:
        """What to say of it behind the key."""
        if not self.num_documents:
            return "holds out nothing: no document that its hash puts first has so few rows"
        return f"keeps {len(self.rows)} rows of {self.num_documents} documents out of training"


def document_hash(documents: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint32]:
    """A hash of document numbers, on which the choice depends alone (murmur3's finalizer)."""
    h = documents.astype(np.uint32)
    h += np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(16)
    return h


@lru_cache(maxsize=8)
def held_out(store: ActivationStore, share: float) -> HeldOut:
    """The documents that come first by their hash, as many as have at most `share` of the rows and
    MAX_ROWS together.

    Documents of more rows than that alone are left in, and so are all beyond twice the share of
    hashes: a store of few documents, or of one, may have none held out. Rows of no document (-1)
    never are; those that the store leaves out are in no document's. Raises DamagedStoreError.
    """
    limit = min(MAX_ROWS, int(share * store.rows))
    bound = min(2**32, int(2 * limit / store.rows * 2**32))
    rows, documents = _candidates(store, bound) if limit else (np.empty(0, np.int64),) * 2
    names, of, counts = np.unique(documents, return_inverse=True, return_counts=True)
    order = np.lexsort((names, document_hash(names)))
    order = order[counts[order] <= limit]
    taken = order[np.cumsum(counts[order]) <= limit]
    is_out = np.zeros(len(names), dtype=bool)
    is_out[taken] = True
    found = np.setdiff1d(rows[is_out[of]], store.left_out, assume_unique=True)
    return HeldOut(found, len(taken))


def served_rows(store: ActivationStore, out: HeldOut, *, alone: bool) -> KeptRows:
    """The rows of a stream: all but those that are held out and those that the store leaves out,
    or what is held out alone.
    """
    listed = out.rows if alone else np.union1d(out.rows, store.left_out)
    return KeptRows(store.rows, store.geometry.chunk_rows, listed, alone=alone)


def _candidates(store: ActivationStore, bound: int) -> tuple[Ints, Ints]:
    """Rows whose document's hash is below a bound, and those documents."""
    reader = BlockReader(store, "tokens/document")

    def of_shard(shard: int) -> tuple[Ints, Ints]:
        numbers = reader.read_shard(shard)
        (rows,) = np.nonzero((document_hash(numbers) < bound) & (numbers >= 0))
        return rows + store.geometry.shard_range(shard)[0], numbers[rows].astype(np.int64)

    try:
        # An object store answers each in its own time.
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            found = list(pool.map(of_shard, range(store.geometry.num_shards)))
    finally:
        reader.close()
    return np.concatenate([rows for rows, _ in found]), np.concatenate([d for _, d in found])
