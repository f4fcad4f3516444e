"""The files of a store in an object store (S3 and what speaks it, Google, Azure), by obstore.

obstore repeats a request that met a 5xx, a reset connection or a time limit, with growing waits
and jitter, and goes on inside a body that broke off; a large object is sent in parts, each repeated
by itself. What remains is done here: a body that came short or does not parse is asked for again,
and an end of the tries is one sentence. Where the store is and who asks comes from the environment,
as obstore reads it (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import uuid4

from ..config.base import ConfigError, UserError
from .store_files import Piece

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

T = TypeVar("T")
# About half a minute in all: a wait is drawn between the first one and `base` times the one
# before.
RETRIES: RetryConfig = {
    "max_retries": 15,
    "backoff": {
        "init_backoff": timedelta(seconds=0.1),
        "max_backoff": timedelta(seconds=10),
        "base": 3,
    },
    "retry_timeout": timedelta(minutes=2),
}
_CLIENT: Any = {
    # Said by the endpoint itself, which is https where it is left out.
    "allow_http": True,
    "connect_timeout": timedelta(seconds=10),
    "timeout": timedelta(minutes=2),
}
# How often a body is asked for that comes as if whole, but short or not as it was written, and the
# longest wait before the second time; it doubles.
READS, _WAIT_S = 6, 0.1
# A large object is sent in parts of so many bytes, so many at once; S3 takes 10,000 parts.
_PART_BYTES, _PARTS_AT_ONCE, _MOST_PARTS = 8 << 20, 8, 10_000


class RemoteError(UserError):
    """An object store that does not answer, or not with what was asked for."""


class Listed(NamedTuple):
    """What a listing tells of an object."""

    size: int
    tag: str  # another content has another one


class Objects:
    """See StoreFiles: the objects under a URL. Any thread may use it; requests hold no GIL."""

    local = False

    def __init__(self, url: str) -> None:
        """Raises ConfigError without obstore, and for a URL that names no bucket."""
        self.root = url.rstrip("/")
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as e:
            raise ConfigError(
                f"store {url!r} is in an object store, which needs obstore: "
                "pip install 'flash_sae_dist[objects]'"
            ) from e
        self._error = BaseError
        try:
            self.store: ObjectStore = from_url(
                self.root, client_options=_CLIENT, retry_config=RETRIES
            )
        except (BaseError, ValueError) as e:
            raise ConfigError(f"store {url!r} cannot be reached: {_first_line(e)}") from e
        self.listed: dict[str, Listed] = {}

    def zarr(self) -> Any:
        """See StoreFiles."""
        from .zarr_objects import ZarrObjects

        return ZarrObjects(self)

    @contextmanager
    def asking(self, file: str, *, absent: bool = False) -> Iterator[None]:
        """What obstore raises as RemoteError with the object's URL; FileNotFoundError, too, but
        where an object may be absent.
        """
        try:
            yield
        except FileNotFoundError as e:
            if absent:
                raise
            raise self.failure(file, e) from e
        except self._error as e:
            raise self.failure(file, e) from e

    def failure(self, file: str, error: Exception | str) -> RemoteError:
        """The error of an object that cannot be reached."""
        return RemoteError(
            f"{self.root}/{file} cannot be reached: {_first_line(error)}; check the network, the "
            "endpoint and the credentials (environment variables such as AWS_ENDPOINT_URL), and "
            "run the same command again"
        )

    def read(self, file: str, parse: Callable[[bytes], T]) -> T:
        """See StoreFiles. An object that does not parse is read again, lest a connection garbled
        it.
        """
        import obstore

        for left in reversed(range(READS)):
            with self.asking(file, absent=True):
                data = obstore.get(self.store, file).bytes().to_bytes()
            try:
                return parse(data)
            except ValueError:
                if not left:
                    raise
                time.sleep(wait_s(READS - left))
        raise AssertionError

    def write(self, file: str, pieces: Sequence[Piece]) -> None:
        """See StoreFiles: an object is there when it is whole."""
        import obstore

        size = sum(len(piece) for piece in pieces)
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        with self.asking(file):
            if size <= part:
                obstore.put(self.store, file, b"".join(pieces), use_multipart=False)
                return
            obstore.put(
                self.store, file, iter(pieces), chunk_size=part, max_concurrency=_PARTS_AT_ONCE
            )

    def create(self, file: str, data: bytes) -> bool:
        """Writes an object that is not there yet; False where it is."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self.asking(file):
            try:
                obstore.put(self.store, file, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def check_writable(self) -> None:
        """Writes an object and removes it. Raises RemoteError."""
        file = f"records/{uuid4().hex}.tmp"
        self.write(file, [b"?"])
        self.remove(file)

    def open(self, file: str) -> ObjectFile:
        """See StoreFiles. What a listing told of it is taken as it was then."""
        import obstore

        if (listed := self.listed.get(file)) is None:
            with self.asking(file, absent=True):
                listed = _listed(obstore.head(self.store, file))
        return ObjectFile(self, file, listed)

    def remove(self, file: str) -> None:
        """See StoreFiles."""
        import obstore

        try:
            with self.asking(file, absent=True):
                obstore.delete(self.store, file)
        except FileNotFoundError:
            pass

    def remove_all(self, folder: str) -> None:
        """See StoreFiles."""
        for file in self.sizes(folder):
            self.remove(file)

    def sizes(self, folder: str) -> dict[str, int]:
        """See StoreFiles."""
        import obstore

        found: dict[str, Listed] = {}
        with self.asking(folder):
            for page in obstore.list(self.store, folder or None):
                found |= {about["path"]: _listed(about) for about in page}
        self.listed |= found
        return {path: about.size for path, about in found.items()}

    def names(self, folder: str) -> list[str]:
        """See StoreFiles."""
        import obstore

        with self.asking(folder):
            found = obstore.list_with_delimiter(self.store, folder)["objects"]
        return [about["path"].rsplit("/", 1)[-1] for about in found]

    def modified(self, file: str) -> datetime:
        """See StoreFiles."""
        import obstore

        with self.asking(file, absent=True):
            return obstore.head(self.store, file)["last_modified"]


class ObjectFile:
    """See ShardFile: an object, read by ranges."""

    tries = (False, *[True] * (READS - 1))

    def __init__(self, objects: Objects, file: str, listed: Listed) -> None:
        self.objects, self.file, self.listed = objects, file, listed
        self.size = listed.size

    @property
    def source(self) -> Any:
        """See ShardFile: for `local_cache.Sources`."""
        return [self.objects.root, self.file, *self.listed]

    def read_into(self, views: list[memoryview], offset: int, *, fresh: bool = False) -> int:
        """See ShardFile."""
        import obstore

        wanted = sum(len(view) for view in views)
        if (wanted := min(wanted, self.size - offset)) <= 0:
            return 0
        for number in range(1, READS + 1):
            with self.objects.asking(self.file):
                data = obstore.get_range(self.objects.store, self.file, start=offset, length=wanted)
            if len(data) == wanted:
                return _scatter(memoryview(data), views)
            time.sleep(wait_s(number))
        raise self.objects.failure(
            self.file, f"it ends after {offset + len(data)} of {self.size} bytes"
        )


def wait_s(number: int) -> float:
    """Seconds to wait before a body is asked for again that came wrong so many times."""
    return random.random() * _WAIT_S * float(2 ** (number - 1))


def _scatter(data: memoryview, views: list[memoryview]) -> int:
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at


def _listed(about: Any) -> Listed:
    return Listed(about["size"], str(about["e_tag"] or about["last_modified"]))


def _first_line(error: Exception | str) -> str:
    """What obstore says, without the structure that it prints below."""
    return " ".join(str(error).split("\n\n")[0].split())
