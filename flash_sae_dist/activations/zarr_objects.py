"""An object store as Zarr takes it: for metadata, statistics and whole shards."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from .remote import READS, wait_s

if TYPE_CHECKING:
    from .remote import Objects


class ZarrObjects(ObjectStore[Any]):
    """Zarr's own store over obstore, with errors in one sentence, and bodies that come short asked
    for again.
    """

    def __init__(self, objects: Objects, *, read_only: bool = False) -> None:
        super().__init__(objects.store, read_only=read_only)
        self.objects = objects

    def with_read_only(self, read_only: bool = False) -> ZarrObjects:
        """See zarr.abc.store.Store."""
        return ZarrObjects(self.objects, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """See zarr.abc.store.Store."""
        for number in range(1, READS + 1):
            with self.objects.asking(key):
                found = await super().get(key, prototype, byte_range)
                if found is None or len(found) == await self._length(key, byte_range, found):
                    return found
            await asyncio.sleep(wait_s(number))
        raise self.objects.failure(key, "its end is missing")

    async def _length(self, key: str, byte_range: ByteRequest | None, found: Buffer) -> int:
        """Bytes that an answer should have; what was listed may be an object of before."""
        if isinstance(byte_range, RangeByteRequest):
            return byte_range.end - byte_range.start
        if isinstance(byte_range, SuffixByteRequest):
            return byte_range.suffix
        listed = self.objects.listed.get(key)
        return len(found) if listed and listed.size == len(found) else await self.getsize(key)

    async def set(self, key: str, value: Buffer) -> None:
        """See zarr.abc.store.Store."""
        with self.objects.asking(key):
            await super().set(key, value)
