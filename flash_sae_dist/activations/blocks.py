"""Blocks (Zarr's inner chunks) of one array, read in place and below Zarr, checksums verified."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c

from .open_file import ShardFile
from .store import ActivationStore, DamagedStoreError, storage_dtype

Array = npt.NDArray[Any]
# A process may often have 1024 files open; a store has thousands of shards.
_OPEN_FILES = 64
# To an object store, at once.
REQUESTS = 32
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


class BlockReader:
    """Reads blocks of an array of the store (`activations/<hookpoint>`, `tokens/document`), from
    any thread.

    A shard ends in its index, offset and length of each chunk as little-endian uint64, and a
    crc32c; each chunk ends in its own crc32c (Zarr v3 sharding codec). The index is read once a
    shard and kept, a chunk by one `preadv` or one request to an object store; the files used last
    stay open. Reads and checksums hold no GIL: google_crc32c, which does, came to 6 GB/s on two
    threads, crc32c to 35 (2026-11-30).
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
        self.files: OrderedDict[int, ShardFile] = OrderedDict()
        self.offsets: dict[int, list[int]] = {}
        self.sources: dict[int, Any] = {}  # of shards that other processes read
        self.lock = Lock()
        self.remote = not store.records.local

    def close(self) -> None:
        """Closes the shards' files."""
        with self.lock:
            self.files.clear()

    def _open(self, shard: int) -> tuple[ShardFile, list[int]]:
        with self.lock:
            file = self.files.pop(shard, None) or self.store.open_shard(self.name, shard)
            self.files[shard] = file
            if len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)
            offsets = self.offsets.get(shard)
        if offsets is None:
            # Other shards' indices come meanwhile.
            offsets = self._index(shard, file)
            with self.lock:
                self.offsets[shard] = offsets
        return file, offsets

    def _index(self, shard: int, file: ShardFile) -> list[int]:
        """Where each chunk of a shard begins, -1 where none of the right length does."""
        tail = np.empty(16 * self.chunks_a_shard + 4, np.uint8)
        start = file.size - len(tail)
        if start < 0 or not _holds(file, [tail.data], start, lambda: _is_whole(tail.data)):
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
        file, offset = self.locate(block)
        if not _holds(file, space.bytes, offset, lambda: crc32c(space.bytes[0]) == space.crc[0]):
            raise self.damaged(block)

    def locate(self, block: int) -> tuple[ShardFile, int]:
        """The file of a block and where the block begins in it."""
        shard, chunk = divmod(block, self.chunks_a_shard)
        file, offsets = self._open(shard)
        if offsets[chunk] < 0:
            raise self.damaged(block)
        return file, offsets[chunk]

    def place(self, block: int) -> tuple[Any, int]:
        """By what other processes open a block's file, and where the block begins in it: the file
        does not stay open. Raises as `read_into` does.
        """
        shard, chunk = divmod(block, self.chunks_a_shard)
        if shard not in self.sources:
            file = self.store.open_shard(self.name, shard)
            self.sources[shard], self.offsets[shard] = file.source, self._index(shard, file)
        if (offset := self.offsets[shard][chunk]) < 0:
            raise self.damaged(block)
        return self.sources[shard], offset

    def place_all(self) -> None:
        """Finds every shard's `place` at once, where each takes a request."""
        if self.remote:
            firsts = range(0, self.num_blocks, self.chunks_a_shard)
            with ThreadPoolExecutor(REQUESTS) as pool:
                list(pool.map(self.place, firsts))

    def damaged(self, block: int) -> DamagedStoreError:
        shard, chunk = divmod(block, self.chunks_a_shard)
        return DamagedStoreError(
            f"{self.store.shard_file(self.name, shard)} is damaged in chunk {chunk}: its crc32c "
            "does not hold; delete that file and run the same `flash-sae cache` again"
        )

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
        file, offsets = self._open(shard)
        data, size = as_bytes(np.empty(file.size, dtype=np.uint8)), self.chunk_bytes
        rows = self.empty(-(-(stop - start) // self.chunk_rows))
        places = offsets[: len(rows) // self.chunk_rows]

        def torn() -> int | None:
            """The first chunk that does not hold."""
            for chunk, at in enumerate(places):
                if not 0 <= at <= len(data) - size - 4 or not _is_whole(data[at : at + size + 4]):
                    return chunk
            return None

        if not _holds(file, [data], 0, lambda: torn() is None):
            raise self.damaged(shard * self.chunks_a_shard + (torn() or 0))
        target = as_bytes(rows)
        for chunk, at in enumerate(places):
            target[chunk * size : (chunk + 1) * size] = data[at : at + size]
        return rows[: stop - start]


def _is_whole(data: memoryview) -> bool:
    """Whether data end in their own crc32c."""
    return bool(crc32c(data) == _CRC_RESIDUE)


def _holds(
    file: ShardFile, views: list[memoryview], offset: int, is_right: Callable[[], bool]
) -> bool:
    """Reads into views; whether they then hold what was written."""
    wanted = sum(len(view) for view in views)
    return any(
        file.read_into(views, offset, fresh=fresh) == wanted and is_right() for fresh in file.tries
    )
