"""The bytes of a shard's file, made below Zarr: no copy of the rows, no lock, many threads at
once.

A shard holds its chunks one after another, each with its crc32c behind it, then the index: offset
and length of each chunk as little-endian uint64 (all ones where there is no chunk), and a crc32c
of that (Zarr v3's sharding codec).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from .store_files import Piece

_NO_CHUNK = 2**64 - 1


def shard_pieces(
    rows: npt.NDArray[Any],  # [n, ...], contiguous
    chunk_rows: int,
    chunks_a_shard: int,
) -> tuple[list[Piece], int]:
    """The file of a shard that holds these rows, in pieces that refer to them, and the crc32c of
    the rows; the last chunk is filled up with zeros.
    """
    assert rows.flags.c_contiguous
    pieces: list[Piece] = []
    index = np.full((chunks_a_shard, 2), _NO_CHUNK, dtype="<u8")
    at = of_rows = 0
    for number, start in enumerate(range(0, len(rows), chunk_rows)):
        chunk = rows[start : start + chunk_rows]
        # A megabyte or less: the second pass finds it in the core's own cache.
        of_rows = crc32c(_bytes(chunk), of_rows)
        if len(chunk) < chunk_rows:
            padding = np.zeros((chunk_rows - len(chunk), *rows.shape[1:]), dtype=rows.dtype)
            chunk = np.concatenate([chunk, padding])
        body = _bytes(chunk)
        pieces += [body, with_checksum(body)]
        index[number] = at, len(body) + 4
        at += len(body) + 4
    table = index.tobytes()
    return [*pieces, table, with_checksum(table)], of_rows


def with_checksum(data: Piece) -> bytes:
    """The four bytes that stand behind data."""
    return crc32c(data).to_bytes(4, "little")


def _bytes(rows: npt.NDArray[Any]) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data
