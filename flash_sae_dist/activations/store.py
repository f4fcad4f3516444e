"""The activation store: a Zarr v3 group that any Zarr reader opens, and our own record of what is
whole.

`activations/<hookpoint>` [rows, D] (bfloat16 as uint16 bits with the attribute `dtype: bfloat16`;
int8 with `scales/<hookpoint>` [rows] float32, a row being its codes times its scale),
`tokens/ids`, `tokens/document` and `tokens/position` [rows], `statistics/<hookpoint>/mean` [D] and
`.../mean_squared_norm`; of what `cache` made also `text/ids`, `.../document`, `.../position`,
`.../keep` and `.../row` [sequences, context_length], the token table with the row of each token or
-1; with `cache.max_norm_ratio` also `left_out` [n, 2], rows that hold zeros and belong to nothing,
with the number of the hookpoint (in its attribute `hookpoints`) whose limit each is above; the
attributes tell model, text and versions. Shards are written whole by
one process each and then recorded under `records/`: Zarr reads a missing shard as zeros without an
error, so what is complete is known from the records alone.
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zarr
from torch import Tensor

from ..config.base import ConfigError, UserError, check_hookpoint, nearest_name
from ..config.run import RunConfig
from ..identity import digest
from .local_cache import LocalCache, local_cache
from .metadata import Sums, attributes, open_array
from .norm_limits import union
from .open_file import ShardFile
from .records import AGAIN, COMPLETE, CONFIG, GEOMETRY, Records
from .records import DamagedStoreError as DamagedStoreError
from .remote import ObjectFile, RemoteError
from .stored_rows import StoredRows

logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
FORMAT = 1
# Rows that are left out: [n, 2] int64, row and number of the hookpoint whose limit it is above.
LEFT_OUT = "left_out"
_CHUNK_BYTES = 1 << 20
_MIN_SHARDS = 16
_MIN_CHUNKS = 64
_LISTINGS_AT_ONCE = 16
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

    @property
    def enough_rows(self) -> int:
        """Rows from which on more of them change no other size."""
        return max(_MIN_SHARDS * self.shard_rows, _MIN_CHUNKS * self.chunk_rows)

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

    model_commit: str | None
    model_dtype: str
    model_crc32c: int


def make_geometry(
    rows: int, widest: int, itemsize: int, shard_mib: float, most_shard_rows: int | None = None
) -> Geometry:
    """Chunks of at most 1 MiB, shards of about shard_mib at the widest hookpoint, or of
    most_shard_rows; at least 16 shards and 64 chunks where there are rows enough.

    A small store would otherwise be one shard, which one process writes while the others wait. The
    number of processes has no part in it: a store's content is a function of its config alone.
    """
    row_bytes = widest * itemsize
    wanted = min(_CHUNK_BYTES / row_bytes, rows / _MIN_CHUNKS)
    chunk = 1 << max(4, math.floor(math.log2(max(1, wanted))))
    by_size = max(1, round(shard_mib * 2**20 / (chunk * row_bytes)))
    by_count = max(1, -(-rows // (_MIN_SHARDS * chunk)))
    by_memory = by_size if most_shard_rows is None else max(1, most_shard_rows // chunk)
    return Geometry(rows, chunk * min(by_size, by_count, by_memory), chunk)


class TextShape(NamedTuple):
    """How the text of a store is cut; `text_parts` and `row_plan` say what for."""

    part_sequences: int
    context_length: int
    shards_a_unit: int


class ArraySpec(NamedTuple):
    """An array of a store, for Zarr."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None


def array_specs(geometry: Geometry, dtype: str, widths: dict[str, int]) -> list[ArraySpec]:
    """The arrays that have a chunk or a file a shard."""
    rows, shard, chunk = geometry
    specs = []
    for hookpoint, width in widths.items():
        name = f"activations/{hookpoint}"
        specs.append(ArraySpec(name, dtype, (rows, width), (chunk, width), (shard, width)))
        if dtype == "int8":
            specs.append(ArraySpec(f"scales/{hookpoint}", "float32", (rows,), (chunk,), (shard,)))
        # A row a shard, so that processes write their own and nobody reads all again: the sum of
        # its activations, then the sum of their squares.
        name, sums = f"statistics/{hookpoint}/shard_sums", (geometry.num_shards, width + 1)
        specs.append(ArraySpec(name, "float64", sums, (1, width + 1)))
    for token in TOKEN_ARRAYS:
        specs.append(ArraySpec(f"tokens/{token}", "int32", (rows,), (chunk,), (shard,)))
    return specs


def text_specs(num_sequences: int, text: TextShape) -> list[ArraySpec]:
    """The arrays that have a chunk a part of the text."""
    shape = (num_sequences, text.context_length)
    shards = (text.part_sequences, text.context_length)
    chunks = (text_chunk(text.part_sequences), text.context_length)
    types = {"ids": "int32", "document": "int32", "position": "int32", "keep": "uint8"}
    types["row"] = "int64"
    return [ArraySpec(f"text/{name}", kind, shape, chunks, shards) for name, kind in types.items()]


def text_chunk(part_sequences: int) -> int:
    """Sequences of a chunk of the token table: a part that is not full takes few of them."""
    return math.gcd(part_sequences, 16)


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

    def arrays(self) -> list[str]:
        """The arrays that have a file a shard."""
        return array_names(self.widths, self.dtype)

    def row_bytes(self, name: str) -> int:
        """Bytes of a row of an array."""
        kind, _, hookpoint = name.partition("/")
        if kind != "activations":
            # Scales are float32, tokens int32.
            return np.dtype("int32").itemsize
        return storage_dtype(self.dtype).itemsize * self.widths[hookpoint]

    def sound(self, records: Records, names: list[str]) -> dict[str, set[int]]:
        """By array, the shards whose files are there, none cut short."""
        # An object store answers each in its own time.
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
            listings = list(pool.map(records.files.sizes, [f"{name}/c" for name in names]))
        return {
            name: {
                s
                for s in range(self.geometry.num_shards)
                if sizes.get(shard_path(name, s), -1)
                >= self.geometry.file_bytes(s, self.row_bytes(name))
            }
            for name, sizes in zip(names, listings, strict=True)
        }

    def whole_shards(self, records: Records, names: list[str]) -> set[int]:
        """Shards that are recorded and sound in every array."""
        whole = {s for s in records.shards() if s < self.geometry.num_shards}
        return whole.intersection(*self.sound(records, names).values())


def shard_path(name: str, shard: int) -> str:
    """Where a shard of an array lives in the store."""
    tail = "/0" if name.startswith("activations/") else ""
    return f"{name}/c/{shard}{tail}"


def array_names(widths: dict[str, int], dtype: str = "bfloat16") -> list[str]:
    """The arrays that have a file a shard."""
    scales = [f"scales/{h}" for h in widths] if dtype == "int8" else []
    return [*(f"activations/{h}" for h in widths), *scales, *(f"tokens/{n}" for n in TOKEN_ARRAYS)]


def readable(array: zarr.Array[Any], rows: slice, path: str) -> Any:
    """Rows of an array, checksums verified. Raises DamagedStoreError."""
    try:
        return array[rows] if array.ndim else array[()]
    except RemoteError:
        raise
    except (ValueError, RuntimeError, FileNotFoundError) as e:
        raise DamagedStoreError(
            f"{array.path} of {path} is damaged in rows {rows.start}..{rows.stop}: "
            f"{' '.join(str(e).split())}; run `flash-sae verify {path}`, which names the file"
        ) from e


class ActivationStore:
    """A complete store, open for reading."""

    where = "the store"

    def __init__(
        self, path: str, shape: Shape, config: dict[str, Any], cache: LocalCache | None = None
    ) -> None:
        self.path, self.config, self.cache = path, config, cache
        self.records, self.shape = Records(path), shape
        self.geometry, self.dtype, self.widths, self.sums = shape

    @classmethod
    def open(cls, path: str, cache: LocalCache | None = None) -> ActivationStore:
        """Opens a store whose every shard is recorded and there. cache: where rows of an object
        store are kept as they are read.

        Raises ConfigError where there is no store or it is unfinished, DamagedStoreError where a
        shard is missing or cut short, or a record damaged.
        """
        records = Records(path)
        shape, config = Shape.read(records), records.read(CONFIG)
        if shape is None:
            raise ConfigError(
                f"store={path!r} is no activation store; run `flash-sae cache` or "
                "`flash-sae store import` first"
            )
        if config is None:
            raise DamagedStoreError(f"{records.where(CONFIG)} is missing from the store; {AGAIN}")
        store = cls(path, shape, config, cache)
        absent = set(range(store.geometry.num_shards)) - records.shards()
        if absent or records.read(COMPLETE) is None:
            raise ConfigError(
                f"store={path!r} is unfinished: {len(absent)} of {store.geometry.num_shards} "
                f"shards are missing; {AGAIN}"
            )
        store.sums = store.sums | (records.read(COMPLETE) or {}).get("files", {})
        store._check_files()
        return store

    def _check_files(self) -> None:
        for name, sound in self.shape.sound(self.records, self.shape.arrays()).items():
            if lost := set(range(self.geometry.num_shards)) - sound:
                raise DamagedStoreError(
                    f"{self.shard_file(name, min(lost))} is missing from the store or cut short; "
                    f"{AGAIN}"
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
            if self.dtype == "int8" and rows is not None:
                rows = digest([rows, content.get(f"scales/{hookpoint}")])
        return {"parts": parts, "rows": rows, "versions": identity.get("versions", {})}

    def text_shape(self) -> TextShape | None:
        """How the store's token table is cut; None in one that has none."""
        found = (self.records.read(GEOMETRY) or {}).get("text")
        return None if found is None else TextShape(**found)

    def knows_model(self) -> bool:
        """Whether it tells of which language model its rows are; imported rows do not."""
        return any(key.startswith("model.") for key in self.config)

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

    @cached_property
    def over(self) -> dict[str, Ints]:
        """Rows that are left out, ascending, by the hookpoint at which their norm is above its
        limit; of no hookpoint in a store without limits. Raises DamagedStoreError.
        """
        counts = (self.records.read(COMPLETE) or {}).get("left_out", {})
        if not any(counts.values()):
            return {name: np.empty(0, np.int64) for name in counts}
        array = self.array(LEFT_OUT)
        pairs = np.asarray(readable(array, slice(None), self.path))
        names: Any = array.attrs["hookpoints"]
        return {name: pairs[pairs[:, 1] == names.index(name), 0] for name in counts}

    @cached_property
    def left_out(self) -> Ints:
        """Rows that belong to nothing, ascending: zeros stand in their place."""
        return union(self.over)

    @property
    def kept_rows(self) -> int:
        """Rows that training and evaluation see."""
        return self.rows - len(self.left_out)

    def open_shard(self, name: str, shard: int) -> ShardFile:
        """A shard's file, to read parts of. Raises OSError where it is not there."""
        file = self.records.files.open(shard_path(name, shard))
        if self.cache is not None and isinstance(file, ObjectFile):
            return self.cache.over(file)
        return file

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
        if kind in ("activations", "scales", "tokens"):
            tail = (self.width(hookpoint),) if kind == "activations" else ()
            shapes = (self.rows, *tail), (self.geometry.shard_rows, *tail)
            if (array.shape, array.shards) != shapes:
                raise self.records.damaged(GEOMETRY, f"{name}/zarr.json has {array.shape}")
        return array

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows of an array through Zarr, checksums verified: [stop - start, ...], bfloat16 as
        uint16 bits, activations of an int8 store as the float32 numbers that they stand for.
        """
        rows = self.read_stored(name, start, stop)
        kind, _, hookpoint = name.partition("/")
        if kind != "activations" or self.dtype != "int8":
            return rows
        scales = self.read_stored(f"scales/{hookpoint}", start, stop)
        return StoredRows(rows, scales).tensor().numpy()

    def tensor(self, hookpoint: str, start: int, stop: int) -> Tensor:
        """Rows of a hookpoint [stop - start, d_in] on the CPU: of the store's dtype, float32 of an
        int8 store. Raises ConfigError where there is no such hookpoint.
        """
        self.width(hookpoint)
        return StoredRows(self.read(f"activations/{hookpoint}", start, stop)).tensor()

    def read_stored(self, name: str, start: int, stop: int) -> Array:
        """`read` without decoding: of an int8 store's activations the codes."""
        return np.asarray(readable(self.array(name), slice(start, stop), self.path))

    def mean(self, hookpoint: str) -> Array:
        """Mean activation [D] float64."""
        return self.read(f"statistics/{hookpoint}/mean", 0, self.width(hookpoint))

    def root_mean_square(self, hookpoint: str) -> float | None:
        """Root mean square of a hookpoint's elements, by which training gets its units; None in a
        store that has no such statistics.
        """
        name = f"statistics/{hookpoint}/mean_squared_norm"
        if not self.records.files.sizes(name):
            return None
        found = np.asarray(readable(self.array(name), slice(None), self.path))
        return math.sqrt(max(0.0, float(found)) / self.width(hookpoint))

    def verify(self) -> None:
        """Compares all data with the recorded checksums. Raises the first DamagedStoreError."""
        from .damage import damages

        for damage in damages(self):
            raise damage


def store_of(config: RunConfig) -> ActivationStore:
    """The store that a config trains from and measures on, read through its `store_cache`."""
    store = ActivationStore.open(config.store_path(), local_cache(config.store_cache))
    if store.cache is not None and store.records.local:
        logger.info("store_cache is not used: %s is a folder", store.path)
    return store
