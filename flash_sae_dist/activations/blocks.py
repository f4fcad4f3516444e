"""Blocks (Zarr's inner chunks) of one array, read in place and below Zarr where the store is a
local folder, checksums verified.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c

from .store import ActivationStore, DamagedStoreError, storage_dtype

Array = npt.NDArray[Any]
# A process may often have 1024 files open; a store has thousands of shards.
_OPEN_FILES = 64
# crc32c of any bytes followed by their own crc32c.
_CRC_RESIDUE = 0x48674BC7


def as_bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array, in place."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


class BlockSpace(NamedTuple):
    """Memory for a block and the checksum behind it."""

    rows: Array  # [chunk_rows, ...]
    crc: npt.NDArray[np.uint32]  # [1]
    bytes: list[memoryview]  # both, as `preadv` takes them

    @classmethod
    def of(cls, rows: Array) -> BlockSpace:
        """Space in a contiguous array [chunk_rows, ...]."""
        crc = np.empty(1, dtype="<u4")
        return cls(rows, crc, [as_bytes(rows), as_bytes(crc)])


class _File:
    """A file open for reading until the last who reads it lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class BlockReader:
    """Reads blocks of an array of the store (`activations/<hookpoint>`, `tokens/document`), from
    any thread.

    A shard ends in its index, offset and length of each chunk as little-endian uint64, and a
    crc32c; each chunk ends in its own crc32c (Zarr v3 sharding codec). The index is read once a
    shard and kept, a chunk by one `preadv`; the files used last stay open. Reads and checksums hold
    no GIL: google_crc32c, which does, came to 6 GB/s on two threads, crc32c to 35 (2026-11-30).
    """

    def __init__(self, store: ActivationStore, name: str) -> None:
        self.store, self.name = store, name
        kind, _, hookpoint = name.partition("/")
        is_rows = kind == "activations"
        self.tail = (store.width(hookpoint),) if is_rows else ()
        self.dtype = np.dtype("float32" if kind == "scales" else "int32")
        if is_rows:
            self.dtype = storage_dtype(store.dtype)
        is_bf16 = self.dtype == np.uint16
        self.torch_dtype = torch.bfloat16 if is_bf16 else getattr(torch, str(self.dtype))
        self.chunk_rows = store.geometry.chunk_rows
        self.chunk_bytes = self.chunk_rows * store.shape.row_bytes(name)
        self.num_blocks = -(-store.rows // self.chunk_rows)
        self.chunks_a_shard = store.geometry.shard_rows // self.chunk_rows
        self.files: OrderedDict[int, _File] = OrderedDict()
        self.offsets: dict[int, list[int]] = {}
        self.lock = Lock()
        self.remote = None if store.records.local else store.array(name)

    def close(self) -> None:
        """Closes the shards' files."""
        with self.lock:
            self.files.clear()

    def _open(self, shard: int) -> tuple[_File, list[int]]:
        with self.lock:
            file = self.files.pop(shard, None) or _File(self.store.shard_file(self.name, shard))
            self.files[shard] = file
            if len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)
            if shard not in self.offsets:
                self.offsets[shard] = self._index(shard, file)
            return file, self.offsets[shard]

    def _index(self, shard: int, file: _File) -> list[int]:
        """Where each chunk of a shard begins, -1 where none of the right length does."""
        size = 16 * self.chunks_a_shard + 4
        start = os.fstat(file.descriptor).st_size - size
        tail = os.pread(file.descriptor, size, start) if start >= 0 else b""
        if len(tail) != size or crc32c(tail) != _CRC_RESIDUE:
            raise DamagedStoreError(
                f"{self.store.shard_file(self.name, shard)} is torn: its index does not hold; "
                "delete that file and run the same `flash-sae cache` again"
            )
        index = np.frombuffer(tail, dtype="<u8", count=2 * self.chunks_a_shard).reshape(-1, 2)
        whole = (index[:, 1] == self.chunk_bytes + 4) & (index[:, 0] <= start)
        return [at if ok else -1 for at, ok in zip(index[:, 0].tolist(), whole, strict=True)]

    def read_into(self, block: int, space: BlockSpace) -> None:
        """Reads a block in place; what lies behind the last row of the last block is undefined.

        Raises DamagedStoreError where a checksum does not hold.
        """
        if self.remote is not None:
            rows = self._remote_rows(block)
            space.rows[: len(rows)] = rows
            return
        file, offset = self.locate(block)
        size = os.preadv(file.descriptor, space.bytes, offset)
        if size != self.chunk_bytes + 4 or crc32c(space.bytes[0]) != space.crc[0]:
            raise self.damaged(block)

    def locate(self, block: int) -> tuple[_File, int]:
        """The file of a block of a local store and where the block begins in it."""
        shard, chunk = divmod(block, self.chunks_a_shard)
        file, offsets = self._open(shard)
        if offsets[chunk] < 0:
            raise self.damaged(block)
        return file, offsets[chunk]

    def place(self, block: int) -> tuple[str, int]:
        """The path of a block's file and where the block begins in it, for others to read: the file
        does not stay open. Raises as `read_into` does.
        """
        shard, chunk = divmod(block, self.chunks_a_shard)
        path = self.store.shard_file(self.name, shard)
        if shard not in self.offsets:
            self.offsets[shard] = self._index(shard, _File(path))
        if (offset := self.offsets[shard][chunk]) < 0:
            raise self.damaged(block)
        return path, offset

    def damaged(self, block: int) -> DamagedStoreError:
        shard, chunk = divmod(block, self.chunks_a_shard)
        return DamagedStoreError(
            f"{self.store.shard_file(self.name, shard)} is damaged in chunk {chunk}: its crc32c "
            "does not hold; delete that file and run the same `flash-sae cache` again"
        )

    def _remote_rows(self, block: int) -> Array:
        assert self.remote is not None
        start = block * self.chunk_rows
        stop = min(self.store.rows, start + self.chunk_rows)
        try:
            return np.asarray(self.remote[start:stop])
        except ValueError as e:
            raise DamagedStoreError(
                f"{self.name} of {self.store.path} is damaged in rows {start}..{stop}: {e}; "
                "delete that shard's file and run the same `flash-sae cache` again"
            ) from e

    def empty(self, num_blocks: int = 1) -> Array:
        """Memory for blocks, not pinned: [num_blocks * chunk_rows, ...]."""
        return np.empty((num_blocks * self.chunk_rows, *self.tail), self.dtype)

    def read(self, block: int) -> Array:
        """The rows of one block. Raises as `read_into` does."""
        space = BlockSpace.of(self.empty())
        self.read_into(block, space)
        return space.rows[: self.store.rows - block * self.chunk_rows]

    def read_shard(self, shard: int) -> Array:
        """The rows of a shard from one read of its file, for arrays whose blocks are a few KiB."""
        start, stop = self.store.geometry.shard_range(shard)
        if self.remote is not None:
            return self.store.read(self.name, start, stop)
        file, offsets = self._open(shard)
        data = as_bytes(np.empty(os.fstat(file.descriptor).st_size, dtype=np.uint8))
        got, size = os.preadv(file.descriptor, [data], 0), self.chunk_bytes
        rows = self.empty(-(-(stop - start) // self.chunk_rows))
        target = as_bytes(rows)
        for chunk in range(len(rows) // self.chunk_rows):
            at = offsets[chunk]
            if not 0 <= at <= got - size - 4 or crc32c(data[at : at + size + 4]) != _CRC_RESIDUE:
                raise self.damaged(shard * self.chunks_a_shard + chunk)
            target[chunk * size : (chunk + 1) * size] = data[at : at + size]
        return rows[: stop - start]
