"""The records of an activation store: small JSON files that tell what is whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from ..config.base import ConfigError, UserError
from ..files import json_text, parse_json, write_text

_OWNER = "owner.json"
# What mends a store that lost something.
AGAIN = "run the same `flash-sae cache` (or `store import`, `store merge`) again"
GEOMETRY, CONFIG, COMPLETE = "geometry.json", "config.json", "complete.json"
# Tells of which config and files the parts of the text are.
TEXT = "text.json"


class DamagedStoreError(UserError):
    """A store whose data are missing, torn or changed."""


# Protocols of fsspec whose content ends with the process.
FLEETING = {"memory"}


def check_lasts(path: str) -> None:
    """Raises ConfigError for a store whose content would end with this process."""
    fleeting = FLEETING & {part.partition(":")[0] for part in path.split("::")}
    if fleeting and "://" in path:
        raise ConfigError(
            f"cache.store={path!r} is kept in {fleeting.pop()} and lost when this process ends; "
            "name a folder or an object store"
        )


def shard_record(shard: int) -> str:
    """Name of a shard's record."""
    return f"shard-{shard:08d}.json"


class Records:
    """Small JSON files beside the arrays, renamed into place on a disk; any fsspec URL works."""

    def __init__(self, path: str) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as e:
            raise ConfigError(f"store {path!r} cannot be reached: {e}") from e
        self.local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)
        # For Zarr a file:// URL is no folder: it would neither make folders nor rename into place.
        self.zarr = self.root if self.local else path

    def where(self, name: str) -> str:
        """Path of a record."""
        return f"{self.root}/records/{name}"

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Writes one record whole or not at all (as a put to an object store is by itself)."""
        self.fs.makedirs(f"{self.root}/records", exist_ok=True)
        text = json_text(record) + "\n"
        if not self.local:
            self.fs.pipe_file(self.where(name), text.encode())
            return
        write_text(Path(self.where(name)), text)

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None where there is none."""
        try:
            return parse_json(self.fs.cat_file(self.where(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise UserError(
                f"{self.where(name)} cannot be read: {e}; check the store's path and rights"
            ) from e
        except ValueError as e:
            raise self.damaged(name, str(e)) from e

    def read_bytes(self, file: str) -> bytes:
        """A small file of the store. Raises OSError."""
        return bytes(self.fs.cat_file(f"{self.root}/{file}"))

    def damaged(self, name: str, why: str) -> DamagedStoreError:
        """The error of a record that cannot be used, with what to do about it."""
        cure = f"delete it and {AGAIN}"
        if name == GEOMETRY:
            # Without it no shard can be told from a torn one.
            cure = f"remove the whole store {self.root} and make it anew"
        return DamagedStoreError(f"{self.where(name)} is damaged: {why}; {cure}")

    def file_sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below a folder of the store, by its path in the store: one listing,
        for a question a file would take minutes on an object store.
        """
        # A listing that was kept may be older than what other processes wrote.
        self.fs.invalidate_cache()
        found = self.fs.find(f"{self.root}/{folder}", detail=True)
        return {path[len(self.root) + 1 :]: info["size"] for path, info in found.items()}

    def remove(self, file: str) -> None:
        """Removes a file of the store where it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{file}")

    def remove_all(self, *folders: str) -> None:
        """Removes folders of the store with all that is in them."""
        for folder in folders:
            with suppress(FileNotFoundError):
                self.fs.rm(f"{self.root}/{folder}", recursive=True)

    def names(self, start: str) -> list[str]:
        """Records whose names begin so and end in .json."""
        self.fs.invalidate_cache()
        if not self.fs.exists(f"{self.root}/records"):
            return []
        names = [n.rsplit("/", 1)[-1] for n in self.fs.ls(f"{self.root}/records", detail=False)]
        return sorted(n for n in names if n.startswith(start) and n.endswith(".json"))

    def shards(self) -> set[int]:
        """Shards that are recorded."""
        return {int(name[6:14]) for name in self.names("shard-")}


class StoreOwner:
    """The record of the process that writes a store where there are no locks: an object store."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def read(self) -> dict[str, Any] | None:
        """See files.OwnerRecord."""
        return self.records.read(_OWNER)

    def write(self, record: dict[str, Any]) -> None:
        """See files.OwnerRecord."""
        self.records.write(_OWNER, record)

    def remove(self) -> None:
        """See files.OwnerRecord."""
        self.records.remove(f"records/{_OWNER}")
