"""A hookpoint's rows in the order of their numbers, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .blocks import BlockReader
from .loader import READERS, readers_of
from .store import ActivationStore
from .stored_rows import StoredRows

_AHEAD = 4


class RowBlock(NamedTuple):
    """Neighbouring rows of a store."""

    first: int
    rows: Tensor  # [n, D] in host memory, of the store's own float type, of int8 in float32


def row_blocks(
    store: ActivationStore, hookpoint: str, *, stop: int, batch_tokens: int
) -> Iterator[RowBlock]:
    """Rows 0 .. stop - 1, about batch_tokens at a time and never less than a chunk of the store.
    Rows that the store leaves out are there, as zeros. Raises DamagedStoreError.
    """
    readers = readers_of(store, hookpoint)
    chunk = store.geometry.chunk_rows
    step = max(1, batch_tokens // chunk)
    last = -(-stop // chunk)

    def read(first: int) -> RowBlock:
        blocks = range(first, min(first + step, last))
        start = first * chunk
        parts = [_rows(reader, blocks)[: stop - start] for reader in readers]
        return RowBlock(start, StoredRows(*parts).tensor())

    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[RowBlock]] = deque()
        try:
            for first in range(0, last, step):
                waiting.append(pool.submit(read, first))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for reader in readers:
                reader.close()


def _rows(reader: BlockReader, blocks: range) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return np.concatenate([reader.read(block) for block in blocks])
