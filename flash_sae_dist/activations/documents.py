"""The documents of a text source, in a fixed order, long ones in pieces."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import fsspec

from ..config.base import ConfigError
from ..config.data import TextConfig

logger = logging.getLogger(__name__)
# Half of a pair that stands for one character, such as an emoji cut in two: no UTF-8 has it.
_HALF = re.compile("[\ud800-\udfff]")
# Characters of a piece of a long document: a tokenizer takes a hundred bytes for each.
PIECE = 1 << 16


class Document(NamedTuple):
    """A document, or a piece of a long one: text, or token ids."""

    text: str | None
    ids: list[int] | None  # of a source that holds tokens: as they stand there
    continues: bool  # a further piece of the document before it
    records: int  # of the source read up to this one: skip=records goes on behind it


def documents(cfg: TextConfig, tokenizer: Any, skip: int = 0) -> Iterator[Document]:
    """The documents of a source behind its first `skip` records, in a fixed order.

    Records count what is no document, too: blank text, nulls. Raises ConfigError where the source
    has no document.
    """
    del tokenizer
    sources = {"pydoc": _pydoc, "files": _files, "hub": _hub}
    empty, mended = skip == 0, False
    for records, (text, continues) in enumerate(
        islice(sources[cfg.source](cfg), skip, None), start=skip + 1
    ):
        if not continues and not text.strip():
            continue
        if _HALF.search(text):
            if not mended:
                logger.warning(
                    "text.source=%r has halves of characters (lone surrogates, as of an emoji "
                    "cut in two), in %r first; each is read as U+FFFD",
                    cfg.source,
                    _HALF.sub("\ufffd", text)[:40],
                )
            text, mended = _HALF.sub("\ufffd", text), True
        empty = False
        yield Document(text, None, continues, records)
    if empty:
        raise ConfigError(
            f"text.source={cfg.source!r} gave no text; check text.column and the source"
        )


class _Record(NamedTuple):
    """What a source gives; no text where it holds a null."""

    text: str
    continues: bool = False


def _pydoc(cfg: TextConfig) -> Iterator[_Record]:
    from pydoc_data.topics import topics

    yield from (_Record(topics[name]) for name in sorted(topics))


def _files(cfg: TextConfig) -> Iterator[_Record]:
    for pattern in cfg.paths:
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
        except (ImportError, ValueError) as e:
            raise ConfigError(f"text.paths: {pattern!r} cannot be reached: {e}") from e
        # A file whose own name has brackets is no pattern.
        found = [path] if fs.isfile(path) else sorted(f for f in fs.glob(path) if fs.isfile(f))
        if not found:
            raise ConfigError(f"text.paths: {pattern!r} names no file; check the path")
        for name in found:
            try:
                yield from _file(fs, name, cfg.column)
            except (UnicodeDecodeError, json.JSONDecodeError, OSError) as e:
                raise ConfigError(
                    f"text.paths: {name} cannot be read: {e}; mend it or leave it out"
                ) from e


def _file(fs: Any, path: str, column: str) -> Iterator[_Record]:
    if path.endswith(".txt"):
        with fs.open(path, "r", encoding="utf-8-sig") as file:
            yield from _pieces(file)
    elif path.endswith(".jsonl"):
        with fs.open(path, "r", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(json.loads(line), column, f"line {number} of {path}")
    elif path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        with fs.open(path, "rb") as file:
            try:
                table = pq.ParquetFile(file)
            except pa.ArrowInvalid as e:
                raise OSError(str(e)) from e
            if column not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ConfigError(f"text.column={column!r} is not in {path}; it has {names}")
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text({column: value}, column, path)
    else:
        raise ConfigError(
            f"text.paths: {path} is no .txt, .jsonl or .parquet file; name files of these kinds"
        )


# Byte-level BPE and WordPiece cut ahead of white space behind a letter or a digit in any case,
# so a piece's ids are those of the whole; behind a mark they may join the two, and SentencePiece
# adds a token at most.
_BREAKS = (re.compile(r"(?<=[^\W_])\s"), re.compile(r"(?<=\S)\s"))


def _pieces(file: Any) -> Iterator[_Record]:
    """A file's text in pieces, cut ahead of white space where there is some."""
    held, continues = "", False
    while True:
        text = file.read(PIECE)
        held += text
        at = _cut(held) if text else len(held)
        piece, held = held[:at], held[at:]
        if piece:
            yield _Record(piece, continues)
            continues = continues or not piece.isspace()
        if not text:
            return


def _cut(text: str) -> int:
    """Where to cut a text that goes on: in its second half, or at its end without white space."""
    for pattern in _BREAKS:
        found = [m.start() for m in pattern.finditer(text, len(text) // 2)]
        if found:
            return found[-1]
    return len(text)


def _text(record: Any, column: str, where: str) -> _Record:
    """The text of a record; none where it is null. Raises ConfigError where there is no such
    column or no text in it.
    """
    if not isinstance(record, dict) or column not in record:
        known = ", ".join(sorted(record)) if isinstance(record, dict) else "no columns"
        raise ConfigError(f"text.column={column!r} is not in {where}; it has {known}")
    value = record[column]
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"text.column={column!r} holds a {type(value).__name__} in {where}, not text; "
            "name another column"
        )
    return _Record(value or "")


def _hub(cfg: TextConfig) -> Iterator[_Record]:
    from datasets import load_dataset

    try:
        # A stream is asked for its data only as it is read.
        data = load_dataset(cfg.name, cfg.subset, split=cfg.split, streaming=cfg.streaming)
        for record in data:
            yield _text(record, cfg.column, f"text.name={cfg.name!r}")
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise ConfigError(
            f"text.name={cfg.name!r} cannot be loaded: {' '.join(str(e).split())}; check the "
            "name, text.subset and text.split, and that the hub can be reached"
        ) from e
