"""Rows in Arrow's formats: folders that `datasets` saved, SAELens's cached activations among them,
and parquet files. A column's items are rows (lists of numbers) or sequences of rows (lists of
those).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..config.base import ConfigError
from .array_files import Part, Source, check_rows, choose

Array = npt.NDArray[Any]
# SAELens's column beside those of its hooks.
_IDS = "token_ids"
_ITEMS_AT_ONCE = 256


def open_folder(path: Path, key: str | None, name: str) -> Source:
    """A folder that `datasets` saved, its Arrow files mapped: the column `key`, or that of the
    hookpoint's name, or the only one. Raises ConfigError.
    """
    files = _data_files(path)
    parts: list[Part] = []
    context = 1
    for file in files:
        first = 0
        for batch in _batches(file):
            key = choose(path, [c for c in batch.schema.names if c != _IDS], key, name)
            rows, context_here = unnest(batch.column(key), f"{file} after row {first}")
            if parts and context_here != context:
                raise ConfigError(f"{file} has items of {context_here} rows, others of {context}")
            ids = _ids(batch, len(rows), file)
            parts.append(Part(file, first, rows, rows.dtype.name, ids))
            context, first = context_here, first + len(rows)
    if not parts:
        raise ConfigError(f"{path} holds no rows; name another folder")
    widths, kinds = {p.array.shape[1] for p in parts}, {p.dtype for p in parts}
    if len(widths) > 1 or len(kinds) > 1:
        raise ConfigError(f"{path} holds rows of widths {sorted(widths)}, types {sorted(kinds)}")
    total = sum(len(p.array) for p in parts)
    width, kind = widths.pop(), kinds.pop()
    check_rows(path, (total, width), kind)
    return Source(path, total, width, kind, tuple(files), key, context, tuple(parts))


def _data_files(path: Path) -> list[Path]:
    """The Arrow files of a folder in their order, as its state tells. Raises ConfigError."""
    if (path / "dataset_dict.json").is_file():
        raise ConfigError(f"{path} holds several splits; name the folder of one, as {path}/train")
    try:
        state = json.loads((path / "state.json").read_text())
        files = [path / Path(entry["filename"]).name for entry in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("it keeps rows in an order of their own, as old versions of datasets")
    except FileNotFoundError as e:
        raise ConfigError(
            f"{path} is a folder without the state.json of `datasets`; name its files, "
            f"as in '{path}/*.npy'"
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}/state.json cannot be used: {e}; save the folder anew") from e
    return files


def _batches(file: Path) -> Iterator[Any]:
    """The record batches of a file, mapped. Raises ConfigError."""
    try:
        yield from pa.ipc.open_stream(pa.memory_map(str(file)))
    except (pa.ArrowInvalid, OSError) as e:
        raise ConfigError(
            f"{file} is no whole Arrow file ({' '.join(str(e).split())}); copy it anew"
        ) from e


def _ids(batch: Any, rows: int, file: Path) -> Array | None:
    if _IDS not in batch.schema.names:
        return None
    column = batch.column(_IDS)
    column = getattr(column, "storage", column)
    values = column.flatten() if pa.types.is_nested(column.type) else column
    if len(values) != rows or values.null_count or not pa.types.is_integer(values.type):
        raise ConfigError(f"{file}: {_IDS} has {len(values)} whole numbers for {rows} rows")
    return np.asarray(values.to_numpy(zero_copy_only=False))


def unnest(column: Any, where: str) -> tuple[Array, int]:
    """A column's rows [rows, width], which lie where the column does, and the rows an item.

    Raises ConfigError where items have gaps or are not all of one size.
    """
    sizes: list[int] = []
    values = getattr(column, "storage", column)
    while pa.types.is_nested(values.type):
        if values.null_count:
            raise ConfigError(f"{where}: an item is null; leave such items out")
        if pa.types.is_fixed_size_list(values.type):
            sizes.append(int(values.type.list_size))
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            lengths = np.unique(np.diff(values.offsets.to_numpy()))
            if len(lengths) > 1:
                raise ConfigError(
                    f"{where}: items have {lengths[0]} to {lengths[-1]} numbers or rows; all have "
                    "to be of one size"
                )
            sizes += [int(n) for n in lengths]
        else:
            break
        values = values.flatten()
    if not 1 <= len(sizes) <= 2 or 0 in sizes or not pa.types.is_floating(values.type):
        raise ConfigError(
            f"{where}: a column of {column.type} has no rows of floats; name another, "
            "as in NAME=PATH::COLUMN"
        )
    if values.null_count:
        raise ConfigError(f"{where}: a number is null; leave such rows out")
    rows = values.to_numpy(zero_copy_only=True).reshape(-1, sizes[-1])
    return np.asarray(rows), sizes[0] if len(sizes) == 2 else 1


def open_parquet(path: Path, key: str | None, name: str) -> Source:
    """A parquet file's column, a stream. Raises ConfigError."""
    file = pq.ParquetFile(path)
    columns = [c for c in file.schema_arrow.names if c != _IDS]
    column = choose(path, columns, key, name)
    if not file.metadata.num_rows:
        raise ConfigError(f"{path} holds no rows; leave it out")
    peek = next(file.iter_batches(batch_size=1, columns=[column]))
    first, context = unnest(peek.column(column), str(path))
    rows, width = file.metadata.num_rows * context, first.shape[1]
    check_rows(path, (rows, width), first.dtype.name)
    blocks = partial(_parquet_blocks, path, column)
    kind = first.dtype.name
    return Source(path, rows, width, kind, (path,), column, context, blocks=blocks)


def _parquet_blocks(path: Path, column: str) -> Iterator[Array]:
    file, at = pq.ParquetFile(path), 0
    for batch in file.iter_batches(batch_size=_ITEMS_AT_ONCE, columns=[column]):
        rows, _ = unnest(batch.column(column), f"{path} after row {at}")
        at += len(rows)
        yield rows
