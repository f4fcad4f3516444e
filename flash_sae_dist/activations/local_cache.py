"""What was read of an object store, kept on a disk of this host.

Each shard has a file of its size, sparse, which fills up with the chunks that are read. A chunk
carries its own checksum, so nothing else says what is there: a hole never holds, and neither does a
chunk that is torn or damaged; both are fetched again. Processes of one host share the folder
without further ado, since whoever writes a chunk writes the same bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..config.run import StoreCacheConfig
from ..files import check_writable
from .open_file import ShardFile
from .remote import Listed, ObjectFile, Objects

logger = logging.getLogger(__name__)
_SUFFIX = ".shard"
# A file that was read within so many seconds is not given up for another: where all that a job
# reads does not fit, a part of it stays and the rest passes by, in place of each pushing out the
# next to be read.
BUSY_S = 300.0
_TOUCH_S = 60.0


class LocalCache:
    """A folder of at most num_bytes. Any process may share it."""

    def __init__(self, folder: str, num_bytes: int) -> None:
        self.folder, self.num_bytes = Path(folder), num_bytes
        self._failed = False

    def over(self, file: ObjectFile) -> ShardFile:
        """A file read through the cache."""
        return CachedFile(self, file)

    def take_in(self, path: Path, size: int) -> int | None:
        """A descriptor of a file of the cache, made where it is missing; None where it has no room
        now. Those that were read longest ago make room.
        """
        if self._failed:
            return None
        try:
            with suppress(FileNotFoundError):
                return self._opened(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    if not self._make_room(size):
                        return None
                    made = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                    os.ftruncate(made, size)
                    return made
                return self._opened(path)
            finally:
                os.close(lock)
        except OSError as e:
            self.fail(e)
            return None

    def fail(self, error: OSError) -> None:
        """Goes on without the cache, and says so once."""
        if not self._failed:
            logger.warning(
                "store_cache.folder=%s fails (%s); rows are read without it", self.folder, error
            )
        self._failed = True

    def _opened(self, path: Path) -> int:
        found = os.open(path, os.O_RDWR)
        os.utime(found)
        return found

    def _make_room(self, size: int) -> bool:
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            # A user may remove some.
            with suppress(FileNotFoundError):
                about = path.stat()
                files.append((about.st_mtime, about.st_size, path))
        total = sum(number for _, number, _ in files) + size
        idle = [f for f in sorted(files) if f[0] < time.time() - BUSY_S]
        if total - sum(number for _, number, _ in idle) > self.num_bytes:
            return False
        for _, number, path in idle:
            if total <= self.num_bytes:
                break
            path.unlink(missing_ok=True)
            total -= number
        return True


def local_cache(cfg: StoreCacheConfig | None) -> LocalCache | None:
    """The cache of a config. Raises ConfigError where its folder cannot be written."""
    if cfg is None:
        return None
    check_writable("store_cache.folder", cfg.folder)
    return LocalCache(cfg.folder, int(cfg.gib * 2**30))


class CachedFile:
    """See ShardFile: an object, of which chunks that were read before come from the cache."""

    tries = ObjectFile.tries

    def __init__(self, cache: LocalCache, file: ObjectFile) -> None:
        self.cache, self.file, self.size = cache, file, file.size
        name = "\0".join([file.objects.root, file.file, *map(str, file.listed)])
        self.path = cache.folder / (sha256(name.encode()).hexdigest()[:40] + _SUFFIX)
        self._descriptor: int | None = None
        self._looked = -_TOUCH_S
        self._lock = threading.Lock()

    @property
    def source(self) -> Any:
        """See ShardFile: for `Sources`."""
        return [*self.file.source, str(self.cache.folder), self.cache.num_bytes]

    def read_into(self, views: list[memoryview], offset: int, *, fresh: bool = False) -> int:
        """See ShardFile. What is read ends in a checksum, which is never zero but once in 2**32:
        zeros there are a hole.
        """
        descriptor = self._file()
        if descriptor is None:
            return self.file.read_into(views, offset)
        if not fresh:
            try:
                got = os.preadv(descriptor, views, offset)
            except OSError as e:
                logger.warning("%s cannot be read (%s); it is fetched again", self.path, e)
            else:
                if got == sum(len(view) for view in views) and any(views[-1][-4:]):
                    return got
        got = self.file.read_into(views, offset)
        try:
            os.pwritev(descriptor, views, offset)
        except OSError as e:
            self.cache.fail(e)
        return got

    def _file(self) -> int | None:
        """The file in the cache; now and then another process may have given it up, or there may
        be room for it by now.
        """
        with self._lock:
            if time.monotonic() - self._looked > _TOUCH_S:
                self._looked = time.monotonic()
                if self._descriptor is not None and os.fstat(self._descriptor).st_nlink:
                    os.utime(self._descriptor)
                else:
                    self._let_go()
                    self._descriptor = self.cache.take_in(self.path, self.size)
            return self._descriptor

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self._let_go()


class Sources:
    """Opens what other processes have as `source`."""

    def __init__(self) -> None:
        self._objects, self._caches = cache(Objects), cache(LocalCache)

    def open(self, source: list[Any]) -> ShardFile:
        """Raises ConfigError without obstore."""
        root, file, size, tag, *kept = source
        found = ObjectFile(self._objects(root), file, Listed(size, tag))
        return self._caches(*kept).over(found) if kept else found
