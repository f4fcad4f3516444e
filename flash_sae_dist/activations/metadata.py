"""Zarr's own metadata of a store, which a store of another's making may hold anything in: opened as
Zarr v3 with our codecs alone, and compared with the checksums that our records hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import zarr
from crc32c import crc32c

from .records import AGAIN, DamagedStoreError, Records

# zstd is of 0.1.0's statistics. Others may run code: numcodecs has one that unpickles.
_CODECS = {"bytes", "crc32c", "sharding_indexed", "zstd"}
_TYPES = {"float16", "float32", "float64", "int8", "uint8", "uint16", "int32", "int64"}
Sums = dict[str, str]  # path in the store -> checksum in hex


def file_sums(records: Records, folder: str) -> Sums:
    """The checksum of every file below a folder of the store, by its path in the store."""
    return _sums(records, records.files.sizes(folder))


def metadata_sums(records: Records) -> Sums:
    """crc32c of every zarr.json of the store."""
    found = records.files.sizes("").items()
    return _sums(records, {n: size for n, size in found if n.rpartition("/")[2] == "zarr.json"})


def _sums(records: Records, sizes: dict[str, int]) -> Sums:
    def sized(name: str, data: bytes) -> str:
        if len(data) != sizes[name]:
            raise _damaged(records, name, f"it has {len(data)} of {sizes[name]} bytes")
        return _sum(name, data)

    return {name: records.files.read(name, partial(sized, name)) for name in sorted(sizes)}


def _sum(name: str, data: bytes) -> str:
    """The crc32c of a file. Chunks end in one of their own, and the crc32c of data with theirs
    behind it is the same whatever the data are: it stands beside that of the data alone.
    """
    if name.endswith("zarr.json"):
        return f"{crc32c(data):08x}"
    return f"{crc32c(data[:-4]):08x}{data[-4:].hex()}"


def check_file(records: Records, name: str, sums: Sums) -> bytes:
    """A file of the store, compared where its checksum is recorded. Raises DamagedStoreError."""

    def compare(data: bytes) -> bytes:
        if name in sums and _sum(name, data) != sums[name]:
            raise _damaged(records, name, "its crc32c changed")
        return data

    try:
        return records.files.read(name, compare)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise _damaged(records, name, "it is missing") from e


def damaged_files(records: Records, sums: Sums) -> Iterator[DamagedStoreError]:
    """Those of the files whose checksums are recorded that do not hold them."""
    for name in sums:
        try:
            check_file(records, name, sums)
        except DamagedStoreError as e:
            yield e


def attributes(records: Records, sums: Sums) -> dict[str, Any]:
    """The attributes of the store's root. Raises DamagedStoreError."""
    found = _parsed(records, "zarr.json", sums).get("attributes", {})
    return found if isinstance(found, dict) else {}


def open_array(records: Records, name: str, sums: Sums, mode: str = "r") -> zarr.Array[Any]:
    """An array of the store, whose metadata and statistics hold what was written. Raises
    DamagedStoreError, also where opening it would need another codec than ours.
    """
    file = f"{name}/zarr.json"
    parsed = _parsed(records, file, sums)
    for other in sums:
        if other.startswith(f"{name}/") and other != file:
            check_file(records, other, sums)
    strange = [c for c in _codec_names(parsed.get("codecs")) if c not in _CODECS]
    # Types of other forms (objects, bytes) are JSON objects.
    kind = str(parsed.get("data_type"))
    if strange or parsed.get("storage_transformers") or kind not in _TYPES:
        what = strange or parsed.get("storage_transformers") or kind
        raise _damaged(records, file, f"it asks for {what}, which this project never writes")
    try:
        return zarr.open_array(records.zarr, path=name, mode=mode, zarr_format=3)
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise _damaged(records, file, " ".join(str(e).split())) from e


def _parsed(records: Records, file: str, sums: Sums) -> dict[str, Any]:
    try:
        parsed = json.loads(check_file(records, file, sums).decode())
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise _damaged(records, file, str(e)) from e
    if not isinstance(parsed, dict) or parsed.get("zarr_format") != 3:
        raise _damaged(records, file, "it is no metadata of Zarr v3")
    return parsed


def _codec_names(codecs: Any) -> list[str]:
    """The names of codecs, those inside shards too; whatever is no codec is a name that is not
    ours.
    """
    names: list[str] = []
    for codec in codecs if isinstance(codecs, list) else [codecs]:
        if not isinstance(codec, dict) or not isinstance(codec.get("name"), str):
            return [*names, repr(codec)[:80]]
        names.append(codec["name"])
        if codec["name"] == "sharding_indexed":
            own = codec.get("configuration")
            own = own if isinstance(own, dict) else {}
            names += _codec_names(own.get("codecs")) + _codec_names(own.get("index_codecs"))
    return names


def _damaged(records: Records, name: str, why: str) -> DamagedStoreError:
    return DamagedStoreError(f"{records.root}/{name} is damaged: {why}; {cure(name)}")


def cure(name: str) -> str:
    """What mends a damaged file of a store that is no shard of rows."""
    # All are made again from the shards' records and sums.
    if name.startswith("left_out/"):
        return f"{AGAIN}, which makes it anew"
    if name.startswith("statistics/") and {"mean", "mean_squared_norm"} & set(name.split("/")[2:]):
        return f"{AGAIN}, which makes it anew"
    return "restore it from a copy, or remove the whole store and make it anew"
