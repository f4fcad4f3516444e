"""Every byte of a store, read and compared with what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from crc32c import crc32c

from .metadata import cure, damaged_files, open_array
from .norm_limits import NormLimits
from .records import AGAIN, TEXT, DamagedStoreError, shard_record
from .remote import RemoteError
from .store import ActivationStore, shard_path
from .text_parts import TextParts, digest_of


def row_bytes(store: ActivationStore) -> dict[str, int]:
    """Bytes of a row of each array."""
    return {name: store.shape.row_bytes(name) for name in store.shape.arrays()}


def damages(
    store: ActivationStore, advance: Callable[[int], None] = lambda n: None
) -> Iterator[DamagedStoreError]:
    """What of a store does not hold, file by file. advance is told the bytes of rows that were
    read.
    """
    yield from damaged_files(store.records, store.sums)
    for hookpoint in store.hookpoints:
        for name in ("shard_sums", "mean", "mean_squared_norm"):
            yield from _read(store, f"statistics/{hookpoint}/{name}", None, None)
    try:
        NormLimits.read(store.records)
    except DamagedStoreError as e:
        yield e
    yield from _damages_of_text(store)
    sizes = row_bytes(store)
    for shard in range(store.geometry.num_shards):
        start, stop = store.geometry.shard_range(shard)
        try:
            sums = _recorded_sums(store, shard)
        except DamagedStoreError as e:
            yield e
            sums = {}
        for name, size in sizes.items():
            yield from _read(store, name, shard, sums.get(name))
            advance((stop - start) * size)


def _damages_of_text(store: ActivationStore) -> Iterator[DamagedStoreError]:
    """What of the token table does not hold; imported stores and those of 0.1.0 have none."""
    if (shape := store.text_shape()) is None:
        return
    try:
        store.records.read(TEXT)
    except DamagedStoreError as e:
        yield e
    parts = TextParts(store.records, shape.context_length, shape.part_sequences)
    try:
        known = parts.known()
    except DamagedStoreError as e:
        yield e
        return
    sequences = 0
    for number, part in enumerate(known):
        try:
            parts.load(number)
        except DamagedStoreError as e:
            yield e
        rows = slice(sequences, sequences + part.sequences)
        yield from _read(store, "text/row", None, None, rows)
        sequences = rows.stop
    told = store.made_of()["parts"].get("text")
    if told is not None and told != digest_of(known):
        why = "one of the records of the text is missing, or of another text"
        yield store.records.damaged("text-00000000.json", why)


def _recorded_sums(store: ActivationStore, shard: int) -> dict[str, int]:
    record = store.records.read(shard_record(shard)) or {}
    sums = record.get("crc32c")
    if not isinstance(sums, dict) or sums.keys() != row_bytes(store).keys():
        raise store.records.damaged(shard_record(shard), "it has not the arrays' checksums")
    return sums


def _read(
    store: ActivationStore,
    name: str,
    shard: int | None,
    expected: int | None,
    some: slice = slice(None),  # of an array that has no shards
) -> Iterator[DamagedStoreError]:
    """Reads a shard of an array, or all of an array of statistics, where each chunk has a checksum
    of its own.
    """
    file = name if shard is None else shard_path(name, shard)
    rows = slice(*store.geometry.shard_range(shard)) if shard is not None else some
    try:
        # What its metadata do not hold has been told.
        array = open_array(store.records, name, {})
        data = np.ascontiguousarray(array[rows] if array.ndim else array[()])
    except RemoteError:
        raise
    except (ValueError, RuntimeError, FileNotFoundError) as e:
        why = " ".join(str(e).split())
    else:
        if expected is None or crc32c(data.tobytes()) == expected:
            return
        why = "it does not hold what was written"
    mend = f"delete that file and {AGAIN}"
    yield DamagedStoreError(
        f"{store.records.root}/{file} is damaged: {why}; {cure(name) if shard is None else mend}"
    )
