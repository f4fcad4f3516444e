"""A process that reads blocks into memory that it shares with the one that started it:

    python -m flash_sae_dist.activations.read_worker DESCRIPTOR

DESCRIPTOR is that of the memory. Each line of standard input is a JSON list of [file, offset,
start, size]: a block with its crc32c behind it, to be read to that byte of the memory. Each is
answered by a line: empty, or the first of the list that failed, as [number, sentence], where a
checksum that does not hold has an empty sentence. It ends when its standard input does. It imports
next to nothing, so that it starts at once.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from collections import OrderedDict
from typing import Any

from crc32c import crc32c

# A process may often have 1024 files open; a store has thousands of shards.
_OPEN_FILES = 64


class _Files:
    """The files that were used last, open."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, int] = OrderedDict()

    def descriptor(self, path: str) -> int:
        """Of a file, opened where it is not."""
        if path not in self.open:
            self.open[path] = os.open(path, os.O_RDONLY)
            if len(self.open) > _OPEN_FILES:
                os.close(self.open.popitem(last=False)[1])
        self.open.move_to_end(path)
        return self.open[path]


def read_all(blocks: list[Any], memory: memoryview, files: _Files) -> str:
    """Reads blocks; the answer."""
    crc = bytearray(4)
    for number, (path, offset, start, size) in enumerate(blocks):
        space = memory[start : start + size]
        try:
            got = os.preadv(files.descriptor(path), [space, crc], offset)
        except OSError as e:
            return json.dumps([number, f"{path} cannot be read: {e.strerror}"])
        if got != size + 4 or crc32c(space) != int.from_bytes(crc, "little"):
            return json.dumps([number, ""])
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
