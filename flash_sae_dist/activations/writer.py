"""Writing an activation store: empty arrays once, whole shards by one process each, and the records
of what is whole; store.py says what a store is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from ..config.base import ConfigError, StrictModel, UserError
from ..config.data import CacheConfig, ModelConfig, TextConfig
from ..identity import NAMING_KEYS, digest, plain
from ..identity import difference as first_difference
from .metadata import (
    Sums,
    attributes,
    damaged_files,
    file_sums,
    metadata_sums,
    open_array,
)
from .norm_limits import union
from .records import COMPLETE, CONFIG, GEOMETRY, Records, shard_record
from .shard_files import shard_pieces, with_checksum
from .store import (
    FORMAT,
    LEFT_OUT,
    Array,
    Geometry,
    Origin,
    Shape,
    TextShape,
    array_specs,
    readable,
    shard_path,
    storage_dtype,
    text_specs,
)
from .stored_rows import StoredRows

_SUM_ROWS = 4096
NUM_TOKENS = "cache.num_tokens"
# An object store answers each in its own time.
_RECORDS_AT_ONCE = 16


def difference(
    path: str, before: dict[str, Any], asked: dict[str, Any], free: Collection[str] = ()
) -> ConfigError | None:
    """The first key in which a store's config differs from the one asked for, but those in free. A
    key that is newer than the store stands for its default.
    """
    for key in sorted((before.keys() | asked.keys()) - set(free)):
        if key not in before and asked[key] == _default(key):
            continue
        if before.get(key) != asked.get(key):
            cure = "name another store, or remove that one"
            if key == "cache.hookpoints":
                cure = "cache others into another store, and `flash-sae store merge` both"
            return ConfigError(
                f"{key}={asked.get(key)!r} differs from {before.get(key)!r} in the store {path}; "
                f"{cure}"
            )
    return None


def _default(key: str) -> Any:
    """What a config has where a key is left out, as JSON has it; None for other keys."""
    section, _, name = key.partition(".")
    models: dict[str, type[StrictModel]] = {
        "model": ModelConfig,
        "text": TextConfig,
        "cache": CacheConfig,
    }
    field = models[section].model_fields.get(name) if section in models else None
    return None if field is None or field.is_required() else plain(field.get_default())


def row_sums(rows: Tensor) -> Tensor:  # [n, D] -> [D + 1] float64
    """The sum of rows, then that of their squares, computed where the rows are."""
    total = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for block in torch.split(rows, _SUM_ROWS):
        wide = block.double()
        total[:-1] += wide.sum(dim=0)
        total[-1] += wide.square().sum()
    return total


class StoreWriter:
    """Creates a store or goes on with one; `write_shard` may be called for any shard by any one
    process.
    """

    def __init__(self, path: str, config: dict[str, Any], create: bool) -> None:
        self.path, self.config = path, config
        self.records = Records(path)
        # Whether the store is to hold more tokens of its text than it was begun for.
        self.grows = False
        if create:
            self._check()

    def _check(self) -> None:
        before, shape = self.records.read(CONFIG), Shape.read(self.records)
        if shape is None and self.records.shards():
            # Making the arrays anew would remove what is in them.
            raise self.records.damaged(GEOMETRY, "it is gone, though shards are recorded")
        if before is None and shape is not None:
            about = (self.records.read(GEOMETRY) or {}).get("about")
            before = (about or attributes(self.records, shape.metadata)).get("config")
        if before is not None:
            # What lies there is compared in place of its name.
            free = {*NAMING_KEYS, "text.streaming"} if self.identity() is not None else ()
            error = difference(self.path, before, self.config, free)
            if error is not None:
                others = difference(self.path, before, self.config, {*free, NUM_TOKENS})
                had, asked = before.get(NUM_TOKENS), self.config.get(NUM_TOKENS)
                self.grows = others is None and bool(had and asked and asked > had)
                if not self.grows:
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
        complete = self.records.read(COMPLETE)
        if (
            self.grows
            or shape is None
            or complete is None
            or any(damaged_files(self.records, complete.get("files", {})))
            or len(self.records.names("text-")) < complete.get("text_parts", 0)
        ):
            return False
        return not self.missing(shape)

    def reopen(self) -> None:
        """Takes back that a store is complete, before rows are written into it again: until
        `finish`, its statistics and its content may be those of other rows. One process calls it.
        """
        self.records.files.remove(f"records/{COMPLETE}")

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

    def check_origin(self, origin: Origin) -> None:
        """Raises ConfigError where a store that was begun holds rows of another model, though the
        config is the same. Stores made before one of these was recorded pass.
        """
        before = self.records.read(GEOMETRY)
        if before is None:
            return
        end = "though under the same config; name another store, or remove that one"
        begun = f"cache.store={self.path!r} was begun with"
        other = [key for key, value in origin._asdict().items() if before.get(key, value) != value]
        if "model_dtype" in other:
            raise ConfigError(
                f"{begun} a model in {before['model_dtype']}, which is {origin.model_dtype} here, "
                f"{end}"
            )
        if "model_crc32c" in other:
            commits = (before.get("model_commit"), origin.model_commit)
            told = f" (commit {commits[0]}, now {commits[1]})" if commits[0] != commits[1] else ""
            raise ConfigError(f"{begun} other weights of the model than these{told}, {end}")

    def begun(self) -> dict[str, Any] | None:
        """The record that `create` wrote; None for a store that is not begun."""
        return self.records.read(GEOMETRY)

    def create(
        self,
        geometry: Geometry,
        widths: dict[str, int],
        dtype: str,
        about: dict[str, Any],
        origin: Origin | None = None,
        identity: dict[str, Any] | None = None,
        text: TextShape | None = None,
    ) -> None:
        """Begins a store, once; on one that was begun it changes nothing. One process calls it.

        The geometry may have more rows than `finish` tells in the end. Zarr's own metadata come
        with it: until then no Zarr reader takes a part for the whole.
        """
        if self.records.read(GEOMETRY) is not None:
            return
        self.records.write(CONFIG, self.config)
        record = {"format": FORMAT, "dtype": dtype, "widths": widths, **geometry._asdict()}
        record["about"] = about
        if origin is not None:
            record |= origin._asdict()
        if identity is not None:
            record["identity"] = identity
        if text is not None:
            record["text"] = text._asdict()
        self.records.write(GEOMETRY, record)

    def missing(self, shape: Shape) -> list[int]:
        """Shards that are not recorded yet or have a file lost or cut short, ascending."""
        done = shape.whole_shards(self.records, shape.arrays())
        return [s for s in range(shape.geometry.num_shards) if s not in done]

    def write_shard(self, geometry: Geometry, shard: int, arrays: dict[str, Array]) -> None:
        """Writes a shard of every array whole, and its sums, then records it with checksums.

        arrays: name (`activations/...`, `tokens/...`) -> the shard's rows, in the store's dtype.
        """
        sums = {}
        for name, rows in arrays.items():
            kind, _, hookpoint = name.partition("/")
            if kind == "activations":
                stored = StoredRows(rows, arrays.get(f"scales/{hookpoint}"))
                sums[hookpoint] = row_sums(stored.tensor())
        crcs = {name: self.write_rows(geometry, shard, name, a) for name, a in arrays.items()}
        self.record_shard(geometry, shard, crcs, sums)

    def write_rows(self, geometry: Geometry, shard: int, name: str, rows: Array) -> int:
        """Writes a shard of one array whole; the crc32c of its rows. Any thread may, of any
        array.
        """
        start, stop = geometry.shard_range(shard)
        assert len(rows) == stop - start
        chunks = geometry.shard_rows // geometry.chunk_rows
        pieces, crc = shard_pieces(np.ascontiguousarray(rows), geometry.chunk_rows, chunks)
        self.records.files.write(shard_path(name, shard), pieces)
        return crc

    def record_shard(
        self,
        geometry: Geometry,
        shard: int,
        crcs: dict[str, int],  # by array
        sums: dict[str, Tensor],  # hookpoint -> [D + 1], as `row_sums` gives them
        over: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Records a shard whose every array has been written, with the sums of its rows. over: the
        rows of the shard that are left out, by the hookpoint whose limit they are above.
        """
        for hookpoint, values in sums.items():
            data = values.numpy().astype("<f8").tobytes()
            file = f"statistics/{hookpoint}/shard_sums/c/{shard}/0"
            self.records.files.write(file, [data, with_checksum(data)])
        start, stop = geometry.shard_range(shard)
        record = {"rows": stop - start, "crc32c": crcs}
        self.records.write(shard_record(shard), record | ({"left_out": over} if over else {}))

    def finish(
        self,
        geometry: Geometry,
        hookpoints: list[str],
        num_documents: int | None = None,
        text: tuple[int, str | None] | None = None,  # sequences, digest if it is of the identity
    ) -> None:
        """Writes Zarr's metadata, mean and mean squared norm of each hookpoint from the shards'
        sums, and then the record that the store is complete, with the number of documents that its
        text came from. One process calls it.
        """
        record = self._arrays(geometry, 0 if text is None else text[0])
        if text is not None and text[1] is not None and "identity" in record:
            record["identity"]["parts"]["text"] = text[1]
        record |= {"metadata": metadata_sums(self.records), **record, **geometry._asdict()}
        self.records.write(GEOMETRY, record)
        shards, written = self._shards(geometry), Sums()
        over = self.left_out(geometry, shards)
        kept = geometry.rows - len(union(over))
        for hookpoint in hookpoints:
            written |= self._statistics(geometry, hookpoint, record["metadata"], kept)
        written |= self._left_out(over)
        whole: dict[str, Any] = {"rows": geometry.rows, "shards": geometry.num_shards}
        whole["files"] = written
        if over:
            whole["left_out"] = {name: len(rows) for name, rows in over.items()}
        if num_documents is not None:
            whole["documents"] = num_documents
        whole["text_parts"] = len(self.records.names("text-"))
        whole["content"] = self._content(shards)
        self.records.write(COMPLETE, whole)

    def _arrays(self, geometry: Geometry, num_sequences: int) -> dict[str, Any]:
        """Writes Zarr's metadata of every array but those that `_statistics` writes, where they are
        not there; the record of the store.
        """
        record = self.records.read(GEOMETRY) or {}
        if damaged_metadata := list(damaged_files(self.records, record.get("metadata", {}))):
            raise damaged_metadata[0]
        if "metadata" in record:
            return record
        about = record.pop("about", {})
        # Those of a launch that ended in here.
        for file in self.records.files.sizes(""):
            if file.endswith("zarr.json"):
                self.records.files.remove(file)
        group = zarr.open_group(self.records.zarr, mode="a", zarr_format=3)
        group.attrs.update(about)
        specs = array_specs(geometry, record["dtype"], record["widths"])
        if num_sequences:
            specs += text_specs(num_sequences, TextShape(**record["text"]))
        for spec in specs:
            array = group.create_array(
                spec.name,
                shape=spec.shape,
                chunks=spec.chunks,
                shards=spec.shards,
                dtype=storage_dtype(spec.dtype),
                compressors=[Crc32cCodec()],
            )
            array.attrs["dtype"] = spec.dtype
        return record

    def left_out(
        self, geometry: Geometry, shards: list[dict[str, Any]] | None = None
    ) -> dict[str, list[int]]:
        """Rows that are left out, by the hookpoint whose limit they are above; empty without
        limits. shards: their records, where they have been read. Raises UserError where no row is
        left.
        """
        over: dict[str, list[int]] = {}
        for shard, record in enumerate(self._shards(geometry) if shards is None else shards):
            start = shard * geometry.shard_rows
            for name, rows in record.get("left_out", {}).items():
                over.setdefault(name, []).extend(start + row for row in rows)
        if len(union(over)) == geometry.rows:
            raise UserError(
                f"{self.path}: max_norm_ratio leaves out every row; raise it, and make the store "
                "anew"
            )
        return over

    def _shards(self, geometry: Geometry) -> list[dict[str, Any]]:
        names = map(shard_record, range(geometry.num_shards))
        with ThreadPoolExecutor(_RECORDS_AT_ONCE) as pool:
            return [record or {} for record in pool.map(self.records.read, names)]

    def _left_out(self, over: Mapping[str, Sequence[int]]) -> Sums:
        """Writes which rows are left out, and for which hookpoints; the checksums of the files."""
        if not any(over.values()):
            return {}
        pairs = [(row, number) for number, name in enumerate(over) for row in over[name]]
        group = zarr.open_group(self.records.zarr, mode="r+", zarr_format=3)
        array = group.create_array(
            LEFT_OUT,
            data=np.array(sorted(pairs), dtype=np.int64),
            compressors=[Crc32cCodec()],
            overwrite=True,
        )
        array.attrs["hookpoints"] = list(over)
        return file_sums(self.records, LEFT_OUT)

    def _statistics(self, geometry: Geometry, hookpoint: str, metadata: Sums, kept: int) -> Sums:
        """Writes mean and mean squared norm of the rows that are kept, so many; the checksums of
        their files.
        """
        where = f"statistics/{hookpoint}"
        written: Sums = {}
        sums = open_array(self.records, f"{where}/shard_sums", metadata)
        chunks = self.records.files.sizes(f"{where}/shard_sums")
        if sum(not name.endswith("zarr.json") for name in chunks) < geometry.num_shards:
            # Zarr reads a lost chunk as zeros.
            raise self.records.damaged(f"{where}/shard_sums", "a file of it is missing")
        total = np.asarray(readable(sums, slice(None), self.path)).sum(axis=0) / kept
        group = zarr.open_group(self.records.zarr, mode="r+", zarr_format=3)
        for name, value in (("mean", total[:-1]), ("mean_squared_norm", total[-1])):
            group.create_array(
                f"{where}/{name}",
                data=np.asarray(value),
                compressors=[Crc32cCodec()],
                overwrite=True,
            )
            written |= file_sums(self.records, f"{where}/{name}")
        return written

    def _content(self, shards: list[dict[str, Any]]) -> dict[str, str]:
        """A digest of each array's rows, from the checksums in the shards' records."""
        sums: dict[str, list[int]] = {}
        for record in shards:
            for name, value in record["crc32c"].items():
                sums.setdefault(name, []).append(value)
        return {name: digest(values) for name, values in sums.items()}
