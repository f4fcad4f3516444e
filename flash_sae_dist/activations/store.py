"""The activation store: a Zarr v3 group that any Zarr reader opens, and our own record of what is
whole.

`activations/<hookpoint>` [rows, D] (bfloat16 as uint16 bits with the attribute `dtype: bfloat16`),
`tokens/ids`, `tokens/document` and `tokens/position` [rows], `statistics/<hookpoint>/mean` [D] and
`.../mean_squared_norm`; the attributes tell model, text and versions. Shards are written whole by
one process each and then recorded under `records/`: Zarr reads a missing shard as zeros without an
error, so what is complete is known from the records alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ..config.base import ConfigError, UserError, check_hookpoint, nearest_name
from ..identity import NAMING_KEYS, digest
from ..identity import difference as first_difference
from .metadata import Sums, attributes, file_sums, metadata_sums, open_array
from .records import COMPLETE, CONFIG, GEOMETRY, Records, shard_record
from .records import DamagedStoreError as DamagedStoreError

Array = npt.NDArray[Any]
FORMAT = 1
_CHUNK_BYTES = 1 << 20
_MIN_SHARDS = 16
_MIN_CHUNKS = 64
TOKEN_ARRAYS = ("ids", "document", "position")


class Geometry(NamedTuple):
    """How rows are cut: the same for every hookpoint, so that one process writes a shard of all of
    them.
    """

    rows: int
    shard_rows: int
    chunk_rows: int

    @property
    def num_shards(self) -> int:
        """Shards of each array; the last may be short."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row and row after the last of a shard."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def file_bytes(self, shard: int, row_bytes: int) -> int:
        """Size of a shard's file: whole chunks, then the index (16 bytes a chunk), a checksum
        behind each.
        """
        start, stop = self.shard_range(shard)
        chunks = -(-(stop - start) // self.chunk_rows)
        index = 16 * (self.shard_rows // self.chunk_rows)
        return chunks * (self.chunk_rows * row_bytes + 4) + index + 4


class Origin(NamedTuple):
    """What the rows come from and no config tells: a folder's files and a hub's branch change."""

    text_crc32c: int  # of the token ids
    model_commit: str | None
    model_dtype: str
    model_crc32c: int


def make_geometry(rows: int, widest: int, itemsize: int, shard_mib: float) -> Geometry:
    """Chunks of at most 1 MiB, shards of about shard_mib at the widest hookpoint; at least 16
    shards and 64 chunks where there are rows enough.

    A small store would otherwise be one shard, which one process writes while the others wait. The
    number of processes has no part in it: a store's content is a function of its config alone.
    """
    row_bytes = widest * itemsize
    wanted = min(_CHUNK_BYTES / row_bytes, rows / _MIN_CHUNKS)
    chunk = 1 << max(4, math.floor(math.log2(max(1, wanted))))
    by_size = max(1, round(shard_mib * 2**20 / (chunk * row_bytes)))
    by_count = max(1, -(-rows // (_MIN_SHARDS * chunk)))
    return Geometry(rows, chunk * min(by_size, by_count), chunk)


def storage_dtype(name: str) -> np.dtype[Any]:
    """The numpy type that holds a stored dtype's bits."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def as_float64(rows: Array, dtype: str) -> Array:
    """Stored bits as float64 numbers; bfloat16 is float32's upper half."""
    if dtype == "bfloat16":
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float64)


class Shape(NamedTuple):
    """What the arrays of a store look like."""

    geometry: Geometry
    dtype: str
    widths: dict[str, int]
    metadata: Sums = {}  # of each zarr.json that `create` wrote; stores of 0.1.0 recorded none

    @classmethod
    def read(cls, records: Records) -> Shape | None:
        """From a store's record, None where there is none. Raises ConfigError for another format,
        DamagedStoreError where something is missing from it.
        """
        record = records.read(GEOMETRY)
        if record is None:
            return None
        try:
            if record["format"] != FORMAT:
                raise ConfigError(
                    f"store={records.root!r} has format {record['format']}, not {FORMAT}; "
                    "cache anew"
                )
            geometry = Geometry(record["rows"], record["shard_rows"], record["chunk_rows"])
            for hookpoint in record["widths"]:
                # Folders are named after them.
                check_hookpoint(hookpoint)
            sums = record.get("metadata", {})
            return cls(geometry, record["dtype"], record["widths"], sums)
        except KeyError as e:
            raise records.damaged(GEOMETRY, f"{e} is missing") from e
        except UserError:
            raise
        except ValueError as e:
            raise records.damaged(GEOMETRY, str(e)) from e

    def row_bytes(self, name: str) -> int:
        """Bytes of a row of an array."""
        kind, _, hookpoint = name.partition("/")
        if kind != "activations":
            return np.dtype("int32").itemsize
        return storage_dtype(self.dtype).itemsize * self.widths[hookpoint]

    def whole_shards(self, records: Records, names: list[str]) -> set[int]:
        """Shards that are recorded and whose files are there, none cut short, in every array."""
        whole = {s for s in records.shards() if s < self.geometry.num_shards}
        for name in names:
            sizes, row_bytes = records.file_sizes(f"{name}/c"), self.row_bytes(name)
            whole = {
                s
                for s in whole
                if sizes.get(shard_path(name, s), -1) >= self.geometry.file_bytes(s, row_bytes)
            }
        return whole


def shard_path(name: str, shard: int) -> str:
    """Where a shard of an array lives in the store."""
    tail = "/0" if name.startswith("activations/") else ""
    return f"{name}/c/{shard}{tail}"


def array_names(widths: dict[str, int]) -> list[str]:
    """The arrays that have a file a shard."""
    return [f"activations/{h}" for h in widths] + [f"tokens/{n}" for n in TOKEN_ARRAYS]


def difference(
    path: str, before: dict[str, Any], asked: dict[str, Any], free: Collection[str] = ()
) -> ConfigError | None:
    """The first key in which a store's config differs from the one asked for, but those in free."""
    for key in sorted((before.keys() | asked.keys()) - set(free)):
        if before.get(key) != asked.get(key):
            return ConfigError(
                f"{key}={asked.get(key)!r} differs from {before.get(key)!r} in the store {path}; "
                "name another cache.store, or remove that one"
            )
    return None


class StoreWriter:
    """Creates a store or goes on with one; `write_shard` may be called for any shard by any one
    process.
    """

    def __init__(self, path: str, config: dict[str, Any], create: bool) -> None:
        self.path, self.config = path, config
        self.records = Records(path)
        self._sums: Sums | None = None
        if create:
            self._check()

    def _check(self) -> None:
        before, shape = self.records.read(CONFIG), Shape.read(self.records)
        if shape is None and self.records.shards():
            # Making the arrays anew would remove what is in them.
            raise self.records.damaged(GEOMETRY, "it is gone, though shards are recorded")
        if before is None and shape is not None:
            before = attributes(self.records, shape.metadata).get("config")
        if before is not None:
            # What lies there is compared in place of its name.
            free = {*NAMING_KEYS, "text.streaming"} if self.identity() is not None else ()
            error = difference(self.path, before, self.config, free)
            if error is not None:
                raise error

    def restore_config(self) -> None:
        """Writes the record of the config where a store has lost it. One process calls it."""
        if self.records.read(CONFIG) is None and self.records.read(GEOMETRY) is not None:
            self.records.write(CONFIG, self.config)

    def is_complete(self) -> bool:
        """Whether nothing is left to do: all was recorded, and no file has been lost or cut short
        since. What the files hold is not read: ActivationStore.verify does that.
        """
        shape = Shape.read(self.records)
        if shape is None or self.records.read(COMPLETE) is None:
            return False
        return not self.missing(shape)

    def identity(self) -> dict[str, Any] | None:
        """What `create` recorded of what the rows are made of; None for a store that was not begun
        or is older.
        """
        return (self.records.read(GEOMETRY) or {}).get("identity")

    def check_identity(self, parts: dict[str, Any]) -> None:
        """Raises ConfigError where a store's rows are made of other things than these."""
        before = self.identity()
        if before is not None and (other := first_difference(before["parts"], parts)):
            raise ConfigError(
                f"cache.store={self.path!r} is made of other things: {other}; name another store, "
                "or remove that one"
            )

    def check_origin(self, geometry: Geometry, origin: Origin) -> None:
        """Raises ConfigError where a store that was begun holds rows of another text or model,
        though the config is the same. Stores made before one of these was recorded pass.
        """
        before = self.records.read(GEOMETRY)
        if before is None:
            return
        end = "though under the same config; name another store, or remove that one"
        begun = f"cache.store={self.path!r} was begun with"
        asked = {**geometry._asdict(), **origin._asdict()}
        other = [key for key, value in asked.items() if before.get(key, value) != value]
        if "model_dtype" in other:
            raise ConfigError(
                f"{begun} a model in {before['model_dtype']}, which is {origin.model_dtype} here, "
                f"{end}"
            )
        if "model_crc32c" in other:
            commits = (before.get("model_commit"), origin.model_commit)
            told = f" (commit {commits[0]}, now {commits[1]})" if commits[0] != commits[1] else ""
            raise ConfigError(f"{begun} other weights of the model than these{told}, {end}")
        if set(other) - {"model_commit"}:
            raise ConfigError(f"{begun} another text than this one, {end}")

    def create(
        self,
        geometry: Geometry,
        widths: dict[str, int],
        dtype: str,
        about: dict[str, Any],
        origin: Origin | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """Makes the empty arrays, once; on a store that exists it changes nothing. One process
        calls it.
        """
        if self.records.read(GEOMETRY) is None:
            group = zarr.open_group(self.records.zarr, mode="a", zarr_format=3)
            group.attrs.update(about)
            for hookpoint, width in widths.items():
                self._array(group, f"activations/{hookpoint}", geometry, dtype, width)
                # A row a shard, so that processes write their own and nobody reads all again:
                # the sum of its activations, then the sum of their squares.
                group.create_array(
                    f"statistics/{hookpoint}/shard_sums",
                    shape=(geometry.num_shards, width + 1),
                    chunks=(1, width + 1),
                    dtype="float64",
                    compressors=[Crc32cCodec()],
                    overwrite=True,
                )
            for name in TOKEN_ARRAYS:
                self._array(group, f"tokens/{name}", geometry, "int32", None)
            self.records.write(CONFIG, self.config)
            shape = {"format": FORMAT, "dtype": dtype, "widths": widths, **geometry._asdict()}
            shape["metadata"] = metadata_sums(self.records)
            if origin is not None:
                shape |= origin._asdict()
            if identity is not None:
                shape["identity"] = identity
            self.records.write(GEOMETRY, shape)

    def _array(
        self, group: zarr.Group, name: str, geometry: Geometry, dtype: str, width: int | None
    ) -> None:
        tail = () if width is None else (width,)
        array = group.create_array(
            name,
            shape=(geometry.rows, *tail),
            chunks=(geometry.chunk_rows, *tail),
            shards=(geometry.shard_rows, *tail),
            dtype=storage_dtype(dtype),
            compressors=[Crc32cCodec()],
            overwrite=True,
        )
        array.attrs["dtype"] = dtype

    def missing(self, shape: Shape) -> list[int]:
        """Shards that are not recorded yet or have a file lost or cut short, ascending."""
        done = shape.whole_shards(self.records, array_names(shape.widths))
        return [s for s in range(shape.geometry.num_shards) if s not in done]

    def _writable(self, name: str) -> zarr.Array[Any]:
        """An array of the store to write rows of, whose metadata hold."""
        if self._sums is None:
            shape = Shape.read(self.records)
            self._sums = shape.metadata if shape is not None else {}
        return open_array(self.records, name, self._sums, mode="r+")

    def write_shard(self, geometry: Geometry, shard: int, arrays: dict[str, Array]) -> None:
        """Writes a shard of every array whole, and its sums, then records it with checksums.

        arrays: name (`activations/...`, `tokens/...`) -> the shard's rows.
        """
        start, stop = geometry.shard_range(shard)
        record: dict[str, Any] = {"rows": stop - start, "crc32c": {}}
        # Zarr leaves out chunks and files of nothing but zeros, such as the number of the first
        # document: to us they would be lost.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, rows in arrays.items():
                assert len(rows) == stop - start
                target = self._writable(name)
                # Zarr reads what it finds before it writes, which a torn file would fail.
                self.records.remove(shard_path(name, shard))
                target[start:stop] = rows
                record["crc32c"][name] = google_crc32c.value(np.ascontiguousarray(rows).tobytes())
                if name.startswith("activations/"):
                    hookpoint = name.removeprefix("activations/")
                    sums = self._writable(f"statistics/{hookpoint}/shard_sums")
                    wide = as_float64(rows, str(target.attrs["dtype"]))
                    sums[shard] = np.append(wide.sum(axis=0), np.square(wide).sum())
        self.records.write(shard_record(shard), record)

    def finish(
        self, geometry: Geometry, hookpoints: list[str], num_documents: int | None = None
    ) -> None:
        """Writes mean and mean squared norm of each hookpoint from the shards' sums, and then the
        record that the store is complete, with the number of documents that its text came from.
        One process calls it."""
        group = zarr.open_group(self.records.zarr, mode="r+", zarr_format=3)
        written: Sums = {}
        for hookpoint in hookpoints:
            where = f"statistics/{hookpoint}"
            sums = self._writable(f"{where}/shard_sums")
            total = np.asarray(_readable(sums, slice(None), self.path)).sum(axis=0) / geometry.rows
            for name, value in (("mean", total[:-1]), ("mean_squared_norm", total[-1])):
                group.create_array(
                    f"{where}/{name}",
                    data=np.asarray(value),
                    compressors=[Crc32cCodec()],
                    overwrite=True,
                )
                written |= file_sums(self.records, f"{where}/{name}")
        record: dict[str, Any] = {"rows": geometry.rows, "shards": geometry.num_shards}
        record["files"] = written
        if num_documents is not None:
            record["documents"] = num_documents
        record["content"] = self._content(geometry)
        self.records.write(COMPLETE, record)

    def _content(self, geometry: Geometry) -> dict[str, str]:
        """A digest of each array's rows, from the checksums in the shards' records."""
        sums: dict[str, list[int]] = {}
        for shard in range(geometry.num_shards):
            for name, value in (self.records.read(shard_record(shard)) or {})["crc32c"].items():
                sums.setdefault(name, []).append(value)
        return {name: digest(values) for name, values in sums.items()}


def _readable(array: zarr.Array[Any], rows: slice, path: str) -> Any:
    """Rows of an array, checksums verified. Raises DamagedStoreError."""
    try:
        return array[rows] if array.ndim else array[()]
    except (ValueError, RuntimeError, FileNotFoundError) as e:
        raise DamagedStoreError(
            f"{array.path} of {path} is damaged in rows {rows.start}..{rows.stop}: "
            f"{' '.join(str(e).split())}; run `flash-sae verify {path}`, which names the file"
        ) from e


class ActivationStore:
    """A complete store, open for reading."""

    def __init__(self, path: str, shape: Shape, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.records, self.shape = Records(path), shape
        self.geometry, self.dtype, self.widths, self.sums = shape

    @classmethod
    def open(cls, path: str) -> ActivationStore:
        """Opens a store whose every shard is recorded and there.

        Raises ConfigError where there is no store or it is unfinished, DamagedStoreError where a
        shard is missing or cut short, or a record damaged.
        """
        records = Records(path)
        shape, config = Shape.read(records), records.read(CONFIG)
        if shape is None:
            raise ConfigError(f"store={path!r} is no activation store; run `flash-sae cache` first")
        if config is None:
            raise DamagedStoreError(
                f"{records.where(CONFIG)} is missing from the store; run the same "
                "`flash-sae cache` again"
            )
        store = cls(path, shape, config)
        absent = set(range(store.geometry.num_shards)) - records.shards()
        if absent or records.read(COMPLETE) is None:
            raise ConfigError(
                f"store={path!r} is unfinished: {len(absent)} of {store.geometry.num_shards} "
                "shards are missing; run the same `flash-sae cache` again"
            )
        store.sums = store.sums | (records.read(COMPLETE) or {}).get("files", {})
        store._check_files()
        return store

    def _check_files(self) -> None:
        for name in array_names(self.widths):
            whole = self.shape.whole_shards(self.records, [name])
            lost = set(range(self.geometry.num_shards)) - whole
            if lost:
                raise DamagedStoreError(
                    f"{self.shard_file(name, min(lost))} is missing from the store or cut short; "
                    "run the same `flash-sae cache` again"
                )

    @cached_property
    def _identity(self) -> tuple[dict[str, Any], dict[str, str]]:
        geometry, complete = (self.records.read(name) or {} for name in (GEOMETRY, COMPLETE))
        return geometry.get("identity") or {}, complete.get("content") or {}

    def made_of(self, hookpoint: str | None = None) -> dict[str, Any]:
        """What the rows of a hookpoint are: `parts` (empty for a store that is older than their
        record, or was not made by `cache`), a checksum of the rows themselves, the versions of the
        libraries; without a hookpoint, of all.
        """
        identity, content = self._identity
        parts = identity.get("parts", {})
        rows = digest(content) if content else None
        if hookpoint is not None:
            if parts:
                parts = parts | {"hookpoints": {hookpoint: self.widths[hookpoint]}}
            rows = content.get(f"activations/{hookpoint}")
        return {"parts": parts, "rows": rows, "versions": identity.get("versions", {})}

    def begins_with_token(self) -> bool:
        """Whether every sequence of the text began with the tokenizer's begin token."""
        return bool(attributes(self.records, self.sums).get("begin_token", True))

    def num_documents(self) -> int:
        """How many documents of the text the rows came from: 0 .. num_documents - 1."""
        record = self.records.read(COMPLETE) or {}
        if "documents" in record:
            return int(record["documents"])
        return int(self.read("tokens/document", 0, self.rows).max()) + 1

    def shard_file(self, name: str, shard: int) -> str:
        """Where a shard of an array lives."""
        return f"{self.records.root}/{shard_path(name, shard)}"

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints that are stored."""
        return list(self.widths)

    @property
    def rows(self) -> int:
        """Rows (tokens) of each hookpoint."""
        return self.geometry.rows

    def width(self, hookpoint: str) -> int:
        """d_in of a hookpoint. Raises ConfigError naming the nearest one where it is not stored."""
        if hookpoint not in self.widths:
            near = nearest_name(hookpoint, self.hookpoints)
            raise ConfigError(f"hookpoint {hookpoint!r} is not in the store {self.path}{near}")
        return self.widths[hookpoint]

    def array(self, name: str) -> zarr.Array[Any]:
        """An array through Zarr; opening it reads its metadata once. Raises DamagedStoreError where
        they do not hold.
        """
        array = open_array(self.records, name, self.sums)
        kind, _, hookpoint = name.partition("/")
        if kind in ("activations", "tokens"):
            tail = (self.width(hookpoint),) if kind == "activations" else ()
            shapes = (self.rows, *tail), (self.geometry.shard_rows, *tail)
            if (array.shape, array.shards) != shapes:
                raise self.records.damaged(GEOMETRY, f"{name}/zarr.json has {array.shape}")
        return array

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows of an array through Zarr, checksums verified: [stop - start, ...], bfloat16 as
        uint16 bits.
        """
        return np.asarray(_readable(self.array(name), slice(start, stop), self.path))

    def mean(self, hookpoint: str) -> Array:
        """Mean activation [D] float64."""
        return self.read(f"statistics/{hookpoint}/mean", 0, self.width(hookpoint))

    def root_mean_square(self, hookpoint: str) -> float | None:
        """Root mean square of a hookpoint's elements, by which training gets its units; None in a
        store that has no such statistics.
        """
        name = f"statistics/{hookpoint}/mean_squared_norm"
        if not self.records.file_sizes(name):
            return None
        found = np.asarray(_readable(self.array(name), slice(None), self.path))
        return math.sqrt(max(0.0, float(found)) / self.width(hookpoint))

    def verify(self) -> None:
        """Compares all data with the recorded checksums. Raises the first DamagedStoreError."""
        from .damage import damages

        for damage in damages(self):
            raise damage
