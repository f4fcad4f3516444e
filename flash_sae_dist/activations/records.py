"""The records of an activation store: small JSON files that tell what is whole."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..config.base import UserError
from ..files import json_text, locked, owned, parse_json
from .remote import Objects
from .store_files import open_files

_OWNER = "owner.json"
# What mends a store that lost something.
AGAIN = "run the same `flash-sae cache` (or `store import`, `store merge`) again"
GEOMETRY, CONFIG, COMPLETE = "geometry.json", "config.json", "complete.json"
# Tells of which config and files the parts of the text are.
TEXT = "text.json"


class DamagedStoreError(UserError):
    """A store whose data are missing, torn or changed."""


def shard_record(shard: int) -> str:
    """Name of a shard's record."""
    return f"shard-{shard:08d}.json"


class Records:
    """Small JSON files beside the arrays, each written whole or not at all."""

    def __init__(self, path: str) -> None:
        self.files = open_files(path)
        self.root, self.local = self.files.root, self.files.local
        self.zarr = self.files.zarr()

    def where(self, name: str) -> str:
        """Path of a record."""
        return f"{self.root}/records/{name}"

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Writes one record whole or not at all (as a put to an object store is by itself)."""
        self.files.write(f"records/{name}", [(json_text(record) + "\n").encode()])

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None where there is none."""
        try:
            return self.files.read(f"records/{name}", parse_json)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise UserError(
                f"{self.where(name)} cannot be read: {e}; check the store's path and rights"
            ) from e
        except UserError:
            raise
        except ValueError as e:
            raise self.damaged(name, str(e)) from e

    def damaged(self, name: str, why: str) -> DamagedStoreError:
        """The error of a record that cannot be used, with what to do about it."""
        cure = f"delete it and {AGAIN}"
        if name == GEOMETRY:
            # Without it no shard can be told from a torn one.
            cure = f"remove the whole store {self.root} and make it anew"
        return DamagedStoreError(f"{self.where(name)} is damaged: {why}; {cure}")

    def names(self, start: str) -> list[str]:
        """Records whose names begin so and end in .json."""
        names = self.files.names("records")
        return sorted(n for n in names if n.startswith(start) and n.endswith(".json"))

    def shards(self) -> set[int]:
        """Shards that are recorded."""
        return {int(name[6:14]) for name in self.names("shard-")}


def held(records: Records, place: str) -> AbstractContextManager[None]:
    """Holds a store for one launch: by a lock on its folder, whose temporary files are swept (see
    `files.sweep`), or by a record in an object store. Raises ConfigError where another has it.
    """
    if isinstance(records.files, Objects):
        return owned(_Owner(records, records.files), place)
    return locked(Path(records.root), deep=True)


class _Owner:
    """The record of the process that writes a store in an object store, where there are no locks.
    See files.OwnerRecord.
    """

    def __init__(self, records: Records, objects: Objects) -> None:
        self.records, self.objects = records, objects

    def read(self) -> dict[str, Any] | None:
        return self.records.read(_OWNER)

    def create(self, record: dict[str, Any]) -> None:
        self.objects.create(f"records/{_OWNER}", (json_text(record) + "\n").encode())

    def write(self, record: dict[str, Any]) -> None:
        self.records.write(_OWNER, record)

    def remove(self) -> None:
        self.objects.remove(f"records/{_OWNER}")
