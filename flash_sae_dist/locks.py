"""One process at a time in a folder: a command started twice must not write the same files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import ConfigError

# A launcher that was killed takes its processes along within a second; who starts the same command
# again at once waits for that.
_WAIT_S = 15.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, which ends with this process whatever happens; the folder is made.

    Raises ConfigError where another process goes on holding it. On systems or file systems without
    locks nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        last = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise ConfigError(
                        f"another process is at work in {folder}; wait for it, or name another "
                        "folder"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
