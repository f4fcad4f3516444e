"""A file of a store, open for reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol


class ShardFile(Protocol):
    """A file of a store, open for reading from any thread until it is let go of."""

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    @property
    def tries(self) -> Sequence[bool]:
        """`fresh` of each read that may bring what those before it did not."""
        ...

    @property
    def source(self) -> Any:
        """What another process opens it by, as JSON takes it."""
        ...

    def read_into(self, views: list[memoryview], offset: int, *, fresh: bool = False) -> int:
        """Fills views with its bytes from offset on; how many there were. fresh: from where it is
        stored, whatever copies there are.
        """
        ...


class LocalFile:
    """See ShardFile: a file of a disk."""

    tries = (False,)

    def __init__(self, path: str) -> None:
        self.source: str = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def read_into(self, views: list[memoryview], offset: int, *, fresh: bool = False) -> int:
        """See ShardFile."""
        return os.preadv(self.descriptor, views, offset)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
