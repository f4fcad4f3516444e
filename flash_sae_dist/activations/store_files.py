"""The files of a store, in a local folder; `remote.py` has those in an object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..config.base import ConfigError
from ..files import replacing
from .open_file import LocalFile, ShardFile

Piece = bytes | memoryview
T = TypeVar("T")
# What obstore calls the object stores of Amazon (and all that speak S3), Google and Microsoft.
REMOTE = ("s3", "gs", "az")
# What one writev takes at most (IOV_MAX of Linux and macOS).
_PIECES_A_CALL = 1024


class StoreFiles(Protocol):
    """The files below a store's root, by their paths in it."""

    root: str
    local: bool

    def zarr(self) -> Any:
        """The root as Zarr takes it."""
        ...

    def read(self, file: str, parse: Callable[[bytes], T]) -> T:
        """What a small file holds. Raises OSError, and ValueError where parse does."""
        ...

    def write(self, file: str, pieces: Sequence[Piece]) -> None:
        """Writes a file whole or not at all."""
        ...

    def open(self, file: str) -> ShardFile:
        """A file to read parts of. Raises OSError where it is not there."""
        ...

    def remove(self, file: str) -> None:
        """Removes a file where it is there."""
        ...

    def remove_all(self, folder: str) -> None:
        """Removes a folder with all that is below it, where it is there."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below a folder: one listing, for a question a file would take minutes
        on an object store.
        """
        ...

    def names(self, folder: str) -> list[str]:
        """The files that lie in a folder, not below it."""
        ...

    def modified(self, file: str) -> datetime:
        """When a file was written."""
        ...


def open_files(path: str) -> StoreFiles:
    """The files of the store at a path or URL. Raises ConfigError for a URL of another kind."""
    scheme, is_url, rest = path.partition("://")
    if not is_url or scheme == "file":
        return LocalFiles(rest if is_url else path)
    if scheme in REMOTE:
        # Others need not have its library.
        from .remote import Objects

        return Objects(path)
    raise ConfigError(
        f"store {path!r} cannot be reached: {scheme}:// is no folder and none of "
        f"{', '.join(f'{name}://' for name in REMOTE)}; name one of those"
    )


class LocalFiles:
    """See StoreFiles: a folder, whose files are renamed into place."""

    local = True

    def __init__(self, folder: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(folder))

    def zarr(self) -> str:
        """See StoreFiles. A path: for Zarr a file:// URL is no folder, it would neither make
        folders nor rename into place.
        """
        return self.root

    def _path(self, file: str) -> Path:
        return Path(self.root, file)

    def read(self, file: str, parse: Callable[[bytes], T]) -> T:
        """See StoreFiles."""
        return parse(self._path(file).read_bytes())

    def write(self, file: str, pieces: Sequence[Piece]) -> None:
        """See StoreFiles."""
        with replacing(self._path(file)) as partial:
            descriptor = os.open(partial, os.O_WRONLY)
            try:
                _write_all(descriptor, pieces)
            finally:
                os.close(descriptor)

    def open(self, file: str) -> LocalFile:
        """See StoreFiles."""
        return LocalFile(f"{self.root}/{file}")

    def remove(self, file: str) -> None:
        """See StoreFiles."""
        with suppress(FileNotFoundError):
            self._path(file).unlink()

    def remove_all(self, folder: str) -> None:
        """See StoreFiles."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """See StoreFiles."""
        found = {}
        for place, _, files in os.walk(self._path(folder)):
            for name in files:
                path = os.path.join(place, name)
                # Another process may rename or remove it meanwhile.
                with suppress(FileNotFoundError):
                    found[os.path.relpath(path, self.root)] = os.stat(path).st_size
        return found

    def names(self, folder: str) -> list[str]:
        """See StoreFiles."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(self._path(folder))
        return []

    def modified(self, file: str) -> datetime:
        """See StoreFiles."""
        return datetime.fromtimestamp(self._path(file).stat().st_mtime, tz=UTC)


def _write_all(descriptor: int, pieces: Sequence[Piece]) -> None:
    waiting = [memoryview(piece) for piece in reversed(pieces)]
    while waiting:
        some = waiting[: -_PIECES_A_CALL - 1 : -1]
        written = os.writev(descriptor, some)
        # A disk that is nearly full, or a signal, may cut a call short.
        while waiting and written >= len(waiting[-1]):
            written -= len(waiting.pop())
        if written:
            waiting[-1] = waiting[-1][written:]
