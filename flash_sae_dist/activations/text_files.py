"""Text in files: .txt in pieces, .jsonl, .csv and .parquet row by row, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import fsspec

from ..config.base import ConfigError, UserError
from .sources import Record, Row, Source, is_transient

# Characters of a piece of a long document: a tokenizer takes a hundred bytes for each.
PIECE = 1 << 16
# Byte-level BPE and WordPiece cut ahead of white space behind a letter or a digit in any case,
# so a piece's ids are those of the whole; behind a mark they may join the two, and SentencePiece
# adds a token at most.
_BREAKS = (re.compile(r"(?<=[^\W_])\s"), re.compile(r"(?<=\S)\s"))


def files(source: Source, skip: int) -> Iterator[Record]:
    """The records of all files, behind the first `skip`."""
    for fs, path in _found(source):
        try:
            with _open(fs, path, source.at) as (file, kind):
                # Whole files are passed over unread where they say how much they hold.
                if skip and 0 < (count := _known_rows(file, kind)) <= skip:
                    skip -= count
                    continue
                for row in _KINDS[kind](file, source, path):
                    if skip:
                        skip -= 1
                    else:
                        yield row()
        except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zlib.error) as e:
            if isinstance(e, UserError) or is_transient(e):
                raise
            raise ConfigError(
                f"{source.at}.paths: {path} cannot be read: {' '.join(str(e).split())}; "
                f"{_cure(e)} or leave it out"
            ) from e


def _cure(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "save it as UTF-8"
    return "fetch it again" if isinstance(error, EOFError) else "mend it"


def matches(pattern: str) -> tuple[Any, list[str]]:
    """The file system and the files that a path or a pattern means, sorted."""
    fs, path = fsspec.core.url_to_fs(pattern)
    # A file whose own name has brackets is no pattern.
    found = [path] if fs.isfile(path) else sorted(f for f in fs.glob(path) if fs.isfile(f))
    return fs, found


def _found(source: Source) -> Iterator[tuple[Any, str]]:
    """The file system and path of each file that a pattern means, sorted within a pattern."""
    key = f"{source.at}.paths"
    for pattern in source.cfg.paths:
        try:
            fs, found = matches(pattern)
            folder = not found and fs.isdir(fs._strip_protocol(pattern))
        except Exception as e:  # each file system has errors of its own
            told = " ".join(str(e).split()) or type(e).__name__
            raise ConfigError(f"{key}: {pattern!r} cannot be reached: {told}") from e
        if folder:
            raise ConfigError(
                f"{key}: {pattern!r} is a folder; name its files, such as "
                f"{pattern.rstrip('/') + '/*.jsonl'!r}, or, for one that datasets' save_to_disk "
                f"wrote, set {source.at}.source=hub and {source.at}.name"
            )
        if not found:
            raise ConfigError(f"{key}: {pattern!r} names no file; check the path")
        yield from ((fs, name) for name in found)


@contextmanager
def _open(fs: Any, path: str, at: str) -> Iterator[tuple[BinaryIO, str]]:
    """A file's bytes, decompressed, and its kind. Raises ConfigError for an unknown kind."""
    stem, _, end = path.lower().rpartition(".")
    packing = end if end in _PACKINGS else ""
    kind = "." + (stem.rpartition(".")[2] if packing else end)
    if kind not in _KINDS:
        raise ConfigError(
            f"{at}.paths: {path} is no .txt, .jsonl, .csv or .parquet file (or one of these as "
            ".gz, .bz2, .xz, .zst); name files of these kinds"
        )
    if packing and kind == ".parquet":
        raise ConfigError(f"{at}.paths: {path} cannot be read by parts; decompress it")
    with fs.open(path, "rb") as raw:
        if not packing:
            yield raw, kind
            return
        with _PACKINGS[packing](raw) as file:
            yield file, kind


def _zstd(raw: Any) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


_PACKINGS: dict[str, Callable[[Any], Any]] = {
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zst": _zstd,
}


def _lines(file: Any, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _txt(file: Any, source: Source, path: str) -> Iterator[Row]:
    """A file is one document, in pieces that are cut ahead of white space where there is some."""
    del source, path
    text, held, continues = _lines(file), "", False
    while True:
        read = text.read(PIECE)
        held += read
        at = _cut(held) if len(read) == PIECE else len(held)
        piece, held = held[:at], held[at:]
        if piece:
            yield partial(Record, piece, None, continues)
            continues = continues or not piece.isspace()
        if len(read) < PIECE:
            return


def _cut(text: str) -> int:
    """Where to cut a text that goes on: in its second half, or at its end without white space."""
    for pattern in _BREAKS:
        found = [m.start() for m in pattern.finditer(text, len(text) // 2)]
        if found:
            return found[-1]
    return len(text)


def _jsonl(file: Any, source: Source, path: str) -> Iterator[Row]:
    def parsed(line: str, number: int) -> Record:
        if not line.strip():
            return Record(None)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"line {number}: {e.msg} at column {e.colno}") from e
        return source.record(value, f"line {number} of {path}")

    for number, line in enumerate(_lines(file), 1):
        yield partial(parsed, line, number)


# A quotation mark that is never closed makes one field of all that follows it.
_MOST_CSV_CHARACTERS = 1 << 28


def _csv(file: Any, source: Source, path: str) -> Iterator[Row]:
    csv.field_size_limit(_MOST_CSV_CHARACTERS)  # the module's own limit is 131,072
    rows = csv.reader(_lines(file, newline=""), strict=True)
    names: list[str] = []

    def parsed(row: list[str], number: int) -> Record:
        if not row:
            return Record(None)
        if len(row) != len(names):
            raise ValueError(f"line {number} has {len(row)} fields, the first row {len(names)}")
        return source.record(dict(zip(names, row, strict=True)), f"line {number} of {path}")

    try:
        names += next(rows, [])
        source.check_column(names, f"the first row of {path}")
        for row in rows:
            yield partial(parsed, row, rows.line_num)
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num}: {e}") from e


def _parquet(file: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file)


def _known_rows(file: Any, kind: str) -> int:
    """Rows of a file that tells their number without being read, else 0."""
    return int(_parquet(file).metadata.num_rows) if kind == ".parquet" else 0


def _parquet_rows(file: Any, source: Source, path: str) -> Iterator[Row]:
    table, column = _parquet(file), source.column[1]
    source.check_column(table.schema_arrow.names, path)
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield partial(source.record, {column: value}, path)


_KINDS: dict[str, Callable[[Any, Source, str], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet_rows,
}
