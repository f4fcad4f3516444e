"""A process that reads blocks into memory that it shares with the one that started it:

    python -m flash_sae_dist.activations.read_worker DESCRIPTOR

DESCRIPTOR is that of the memory. Each line of standard input is a JSON list of [file, offset,
start, size]: a block with its crc32c behind it, to be read to that byte of the memory; a file is a
path, or as an object store's `source` tells. Each is answered by a line: empty, or the first of the
list that failed, as [number, sentence], where a checksum that does not hold has an empty sentence.
It ends when its standard input does. It imports next to nothing, so that it starts at once.
"""

from __future__ import annotations

import json
import mmap
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from crc32c import crc32c

from .open_file import LocalFile, ShardFile

if TYPE_CHECKING:
    from .local_cache import Sources

# A process may often have 1024 files open; a store has thousands of shards.
_OPEN_FILES = 64
# Of a process, to an object store, at once.
_REQUESTS = 16


class _Files:
    """The files that were used last, open."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, ShardFile] = OrderedDict()
        self.sources: Sources | None = None
        self.pool: ThreadPoolExecutor | None = None

    def file(self, source: Any) -> ShardFile:
        """A file, opened where it is not."""
        name = source if isinstance(source, str) else json.dumps(source)
        if name not in self.open:
            self.open[name] = self._opened(source)
            if len(self.open) > _OPEN_FILES:
                self.open.popitem(last=False)
        self.open.move_to_end(name)
        return self.open[name]

    def _opened(self, source: Any) -> ShardFile:
        if isinstance(source, str):
            return LocalFile(source)
        if self.sources is None:
            # Disks have no need of it.
            from .local_cache import Sources

            self.sources = Sources()
        return self.sources.open(source)

    def each(self, read: Callable[[int], str | None], number: int, remote: bool) -> Iterator[Any]:
        """What `read` gives for each of so many blocks; those of an object store at once."""
        if not remote:
            return map(read, range(number))
        self.pool = self.pool or ThreadPoolExecutor(_REQUESTS)
        return self.pool.map(read, range(number))


def _unread(source: Any, error: OSError) -> str:
    return f"{source} cannot be read: {error.strerror}"


def read_all(blocks: list[Any], memory: memoryview, files: _Files) -> str:
    """Reads blocks; the answer."""
    opened: list[ShardFile] = []
    for number, (source, *_) in enumerate(blocks):
        try:
            opened.append(files.file(source))
        except OSError as e:
            return json.dumps([number, _unread(source, e)])
        except ValueError as e:
            return json.dumps([number, str(e)])

    def read(number: int) -> str | None:
        """None, or why a block is not there: nothing to say where its checksum does not hold."""
        source, offset, start, size = blocks[number]
        space, crc = memory[start : start + size], bytearray(4)
        views = [space, memoryview(crc)]
        try:
            for fresh in opened[number].tries:
                got = opened[number].read_into(views, offset, fresh=fresh)
                if got == size + 4 and crc32c(space) == int.from_bytes(crc, "little"):
                    return None
        except OSError as e:
            return _unread(source, e)
        except ValueError as e:
            # Of an object store, whose errors are sentences.
            return str(e)
        return ""

    remote = bool(blocks) and not isinstance(blocks[0][0], str)
    for number, why in enumerate(files.each(read, len(blocks), remote)):
        if why is not None:
            return json.dumps([number, why])
    return ""


def main() -> None:
    """Reads until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # The first process ends it.
        signal.signal(number, signal.SIG_IGN)
    memory, files = memoryview(mmap.mmap(int(sys.argv[1]), 0)), _Files()
    for line in sys.stdin:
        sys.stdout.write(read_all(json.loads(line), memory, files) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
