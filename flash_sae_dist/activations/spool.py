"""Streams (parquet, compressed .npz) written out once as plain rows, to be mapped: a shuffle over
all rows asks for rows in no order, which a stream cannot give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config.base import UserError
from ..files import checksum, read_json, replacing, write_json
from ..identity import digest, stamp
from .array_files import Part, Source


def mapped_stream(source: Source, folder: Path, advance: Callable[[int], None]) -> list[Part]:
    """A stream's rows as one mapped part. What an interrupted import left is taken where it is
    whole. Raises UserError where the stream holds other rows than its head tells.
    """
    assert source.blocks is not None
    # A file of another content has another stamp.
    about = [[*stamp(file), str(file)] for file in source.files]
    file = folder / f"{digest([about, source.key])}.npy"
    if _is_whole(file):
        advance(source.rows)
    else:
        _write(source, file, advance)
        write_json(file.with_suffix(".json"), {"crc32c": checksum(file)})
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return [Part(source.path, 0, array, source.dtype)]


def _is_whole(file: Path) -> bool:
    try:
        return bool(read_json(file.with_suffix(".json"))["crc32c"] == checksum(file))
    except (OSError, ValueError, KeyError):
        return False


def _blocks(source: Source) -> Iterator[Any]:
    """The blocks of a stream. Raises UserError where its file is damaged."""
    assert source.blocks is not None
    try:
        yield from source.blocks()
    except UserError:
        raise
    except Exception as e:  # each library has errors of its own for a torn file
        told = " ".join(str(e).split())[:200]
        raise UserError(f"{source.path} cannot be read ({told}); copy it anew") from e


def _write(source: Source, file: Path, advance: Callable[[int], None]) -> None:
    shape = (source.rows, source.width)
    with replacing(file) as partial:
        written = np.lib.format.open_memmap(partial, "w+", np.dtype(source.dtype), shape)
        at = 0
        for block in _blocks(source):
            if block.shape[1] != source.width or at + len(block) > source.rows:
                raise UserError(
                    f"{source.path} has items of another size after row {at}; all have to be alike"
                )
            written[at : at + len(block)] = block
            at += len(block)
            advance(len(block))
        if at != source.rows:
            raise UserError(f"{source.path} ends after {at} of {source.rows} rows; copy it anew")
        written.flush()
