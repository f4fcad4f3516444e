"""The activation store: a Zarr v3 group that any Zarr reader opens, and our own record of what is
whole.

`activations/<hookpoint>` [rows, D] (bfloat16 as uint16 bits with the attribute `dtype: bfloat16`),
`tokens/ids`, `tokens/document` and `tokens/position` [rows], `statistics/<hookpoint>/mean` [D] and
`.../mean_squared_norm`; the attributes tell model, text and versions. Shards are written whole by
one process each and then recorded under `records/`: Zarr reads a missing shard as zeros without an
error, so what is complete is known from the records alone.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

import fsspec
import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ..config import ConfigError, UserError, nearest_name

Array = npt.NDArray[Any]
FORMAT = 1
_CHUNK_BYTES = 1 << 20
_MIN_SHARDS = 16
_MIN_CHUNKS = 64
TOKEN_ARRAYS = ("ids", "document", "position")


class DamagedStoreError(UserError):
    """A store whose data are missing, torn or changed."""


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

    def _where(self, name: str) -> str:
        return f"{self.root}/records/{name}"

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Writes one record whole or not at all (as a put to an object store is by itself)."""
        self.fs.makedirs(f"{self.root}/records", exist_ok=True)
        text = json.dumps(record)
        if not self.local:
            self.fs.pipe_file(self._where(name), text.encode())
            return
        partial = f"{self._where(name)}.{os.getpid()}.tmp"
        with open(partial, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, self._where(name))

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None where there is none."""
        try:
            data: dict[str, Any] = json.loads(self.fs.cat_file(self._where(name)))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as e:
            raise DamagedStoreError(f"{self._where(name)} is damaged: {e}; delete it") from e
        return data

    def whole_shards(self, names: list[str]) -> set[int]:
        """Shards that are recorded and whose files are there in every array."""
        whole = self.shards()
        for name in names:
            folder = f"{self.root}/{name}/c"
            tail = "/0" if name.startswith("activations/") else ""
            # One listing an array: a question a file would take minutes on an object store.
            files = [f[len(folder) + 1 :] for f in self.fs.find(folder)]
            whole &= {
                int(n) for f in files if f.endswith(tail) and (n := f.removesuffix(tail)).isdigit()
            }
        return whole

    def shards(self) -> set[int]:
        """Shards that are recorded."""
        if not self.fs.exists(f"{self.root}/records"):
            return set()
        names = [n.rsplit("/", 1)[-1] for n in self.fs.ls(f"{self.root}/records", detail=False)]
        return {int(n[6:14]) for n in names if n.startswith("shard-") and n.endswith(".json")}


def array_names(widths: dict[str, int]) -> list[str]:
    """The arrays that have a file a shard."""
    return [f"activations/{h}" for h in widths] + [f"tokens/{n}" for n in TOKEN_ARRAYS]


def shard_record(shard: int) -> str:
    """Name of a shard's record."""
    return f"shard-{shard:08d}.json"


def difference(path: str, before: dict[str, Any], asked: dict[str, Any]) -> ConfigError | None:
    """The first key in which a store's config differs from the one asked for."""
    for key in sorted(before.keys() | asked.keys()):
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
        if create:
            self._check_or_create()

    def _check_or_create(self) -> None:
        before = self.records.read("config.json")
        if before is not None:
            error = difference(self.path, before, self.config)
            if error is not None:
                raise error

    def is_complete(self) -> bool:
        """Whether nothing is left to do: all was recorded, and no file has been lost since."""
        shape = self.records.read("geometry.json")
        if shape is None or self.records.read("complete.json") is None:
            return False
        geometry = Geometry(shape["rows"], shape["shard_rows"], shape["chunk_rows"])
        return not self.missing(geometry, shape["widths"])

    def check_origin(self, geometry: Geometry, origin: Origin) -> None:
        """Raises ConfigError where a store that was begun holds rows of another text or model,
        though the config is the same. Stores made before one of these was recorded pass.
        """
        before = self.records.read("geometry.json")
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
        attributes: dict[str, Any],
        origin: Origin | None = None,
    ) -> None:
        """Makes the empty arrays, once; on a store that exists it changes nothing. One process
        calls it.
        """
        if self.records.read("geometry.json") is None:
            group = zarr.open_group(self.records.zarr, mode="a", zarr_format=3)
            group.attrs.update(attributes)
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
            self.records.write("config.json", self.config)
            shape = {"format": FORMAT, "dtype": dtype, "widths": widths, **geometry._asdict()}
            if origin is not None:
                shape |= origin._asdict()
            self.records.write("geometry.json", shape)

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

    def missing(self, geometry: Geometry, widths: dict[str, int]) -> list[int]:
        """Shards that are not recorded yet or have lost a file, ascending."""
        done = self.records.whole_shards(array_names(widths))
        return [s for s in range(geometry.num_shards) if s not in done]

    def write_shard(self, geometry: Geometry, shard: int, arrays: dict[str, Array]) -> None:
        """Writes a shard of every array whole, and its sums, then records it with checksums.

        arrays: name (`activations/...`, `tokens/...`) -> the shard's rows.
        """
        start, stop = geometry.shard_range(shard)
        record: dict[str, Any] = {"rows": stop - start, "crc32c": {}}
        # Zarr leaves out chunks and files of nothing but zeros, such as the number of the first
        # document: to us they would be lost.
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(self.records.zarr, mode="r+")
            for name, rows in arrays.items():
                assert len(rows) == stop - start
                target = group[name]
                assert isinstance(target, zarr.Array)
                target[start:stop] = rows
                record["crc32c"][name] = google_crc32c.value(np.ascontiguousarray(rows).tobytes())
                if name.startswith("activations/"):
                    sums = group[f"{name.replace('activations', 'statistics', 1)}/shard_sums"]
                    assert isinstance(sums, zarr.Array)
                    wide = as_float64(rows, str(target.attrs["dtype"]))
                    sums[shard] = np.append(wide.sum(axis=0), np.square(wide).sum())
        self.records.write(shard_record(shard), record)

    def finish(
        self, geometry: Geometry, hookpoints: list[str], num_documents: int | None = None
    ) -> None:
        """Writes mean and mean squared norm of each hookpoint from the shards' sums, and then the
        record that the store is complete, with the number of documents that its text came from.
        One process calls it."""
        group = zarr.open_group(self.records.zarr, mode="r+")
        for hookpoint in hookpoints:
            sums = group[f"statistics/{hookpoint}/shard_sums"]
            assert isinstance(sums, zarr.Array)
            total = np.asarray(sums[:]).sum(axis=0) / geometry.rows
            where = f"statistics/{hookpoint}"
            group.create_array(f"{where}/mean", data=total[:-1], overwrite=True)
            norm = total[-1:].reshape(())
            group.create_array(f"{where}/mean_squared_norm", data=norm, overwrite=True)
        record = {"rows": geometry.rows, "shards": geometry.num_shards}
        if num_documents is not None:
            record["documents"] = num_documents
        self.records.write("complete.json", record)


class ActivationStore:
    """A complete store, open for reading."""

    def __init__(self, path: str, shape: dict[str, Any], config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.records = Records(path)
        self.geometry = Geometry(shape["rows"], shape["shard_rows"], shape["chunk_rows"])
        self.dtype: str = shape["dtype"]
        self.widths: dict[str, int] = shape["widths"]

    @classmethod
    def open(cls, path: str) -> ActivationStore:
        """Opens a store whose every shard is recorded and there.

        Raises ConfigError where there is no store or it is unfinished, DamagedStoreError where a
        shard is missing.
        """
        records = Records(path)
        shape, config = records.read("geometry.json"), records.read("config.json")
        if shape is None or config is None:
            raise ConfigError(f"store={path!r} is no activation store; run `flash-sae cache` first")
        if shape["format"] != FORMAT:
            raise ConfigError(
                f"store={path!r} has format {shape['format']}, not {FORMAT}; cache anew"
            )
        store = cls(path, shape, config)
        absent = set(range(store.geometry.num_shards)) - records.shards()
        if absent or records.read("complete.json") is None:
            raise ConfigError(
                f"store={path!r} is unfinished: {len(absent)} of {store.geometry.num_shards} "
                "shards are missing; run the same `flash-sae cache` again"
            )
        store._check_files()
        return store

    def _check_files(self) -> None:
        for name in array_names(self.widths):
            lost = set(range(self.geometry.num_shards)) - self.records.whole_shards([name])
            if lost:
                raise DamagedStoreError(
                    f"{self.shard_file(name, min(lost))} is missing from the store, and Zarr would "
                    "read it as zeros; run the same `flash-sae cache` again"
                )

    def begins_with_token(self) -> bool:
        """Whether every sequence of the text began with the tokenizer's begin token."""
        return bool(zarr.open_group(self.records.zarr, mode="r").attrs.get("begin_token", True))

    def num_documents(self) -> int:
        """How many documents of the text the rows came from: 0 .. num_documents - 1."""
        record = self.records.read("complete.json") or {}
        if "documents" in record:
            return int(record["documents"])
        return int(self.read("tokens/document", 0, self.rows).max()) + 1

    def shard_file(self, name: str, shard: int) -> str:
        """Where a shard of an array lives."""
        tail = "/0" if name.startswith("activations/") else ""
        return f"{self.records.root}/{name}/c/{shard}{tail}"

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
        """An array through Zarr; opening it reads its metadata once."""
        array = zarr.open_group(self.records.zarr, mode="r")[name]
        assert isinstance(array, zarr.Array)
        return array

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows of an array through Zarr, checksums verified: [stop - start, ...], bfloat16 as
        uint16 bits.
        """
        return np.asarray(self.array(name)[start:stop])

    def mean(self, hookpoint: str) -> Array:
        """Mean activation [D] float64."""
        return self.read(f"statistics/{hookpoint}/mean", 0, self.width(hookpoint))

    def verify(self) -> None:
        """Compares all data with the recorded checksums. Raises DamagedStoreError."""
        for shard in range(self.geometry.num_shards):
            record = self.records.read(shard_record(shard))
            assert record is not None
            start, stop = self.geometry.shard_range(shard)
            for name, expected in record["crc32c"].items():
                try:
                    found = google_crc32c.value(self.read(name, start, stop).tobytes())
                except ValueError as e:
                    raise DamagedStoreError(
                        f"{self.shard_file(name, shard)} is damaged: {e}; delete that file and "
                        "run the same `flash-sae cache` again"
                    ) from e
                if found != expected:
                    raise DamagedStoreError(
                        f"{self.shard_file(name, shard)} does not hold what was written; "
                        "delete that file and run the same `flash-sae cache` again"
                    )
