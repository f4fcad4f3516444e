"""Text sources -> documents -> token sequences, the same on every process and for any number of
them.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import google_crc32c
import numpy as np
import numpy.typing as npt

from ..config.base import ConfigError
from ..config.data import TextConfig

logger = logging.getLogger(__name__)
_DOCUMENTS_A_BATCH = 256
# Half of a pair that stands for one character, such as an emoji cut in two: no UTF-8 has it.
_HALF = re.compile("[\ud800-\udfff]")


@dataclass
class TokenTable:
    """S sequences of T tokens, and which of them become rows of the store."""

    ids: npt.NDArray[np.int32]  # [S, T]
    document: npt.NDArray[np.int32]  # [S, T], -1 where no document is behind a token
    position: npt.NDArray[np.int32]  # [S, T], token's place in its document
    attention: npt.NDArray[np.bool_]  # [S, T], False on padding
    keep: npt.NDArray[np.bool_]  # [S, T], True where the activation is stored

    def save(self, folder: Path) -> None:
        """Writes one .npy a field."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    def checksum(self) -> int:
        """crc32c of the token ids."""
        crc = 0
        for start in range(0, len(self.ids), 4096):
            crc = google_crc32c.extend(crc, self.ids[start : start + 4096].tobytes())
        return int(crc)

    @classmethod
    def load(cls, folder: Path) -> TokenTable:
        """Maps what `save` wrote."""
        names = [field.name for field in fields(cls)]
        return cls(
            **{n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
        )


def documents(cfg: TextConfig) -> Iterator[str]:
    """The documents of a source, in a fixed order. Raises ConfigError where there are none."""
    sources = {"pydoc": _pydoc, "files": _files, "hub": _hub}
    empty, mended = True, False
    for text in sources[cfg.source](cfg):
        if text.strip():
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
            yield text
    if empty:
        raise ConfigError(
            f"text.source={cfg.source!r} gave no text; check text.column and the source"
        )


def _pydoc(cfg: TextConfig) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _files(cfg: TextConfig) -> Iterator[str]:
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


def _file(fs: Any, path: str, column: str) -> Iterator[str]:
    if path.endswith(".txt"):
        with fs.open(path, "r", encoding="utf-8-sig") as file:
            yield file.read()
    elif path.endswith(".jsonl"):
        with fs.open(path, "r", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from _text(json.loads(line), column, f"line {number} of {path}")
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
                    yield from _text({column: value}, column, path)
    else:
        raise ConfigError(
            f"text.paths: {path} is no .txt, .jsonl or .parquet file; name files of these kinds"
        )


def _text(record: Any, column: str, where: str) -> Iterator[str]:
    """The text of a record; nothing where it is null. Raises ConfigError where there is no such
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
    if value is not None:
        yield value


def _hub(cfg: TextConfig) -> Iterator[str]:
    from datasets import load_dataset

    try:
        # A stream is asked for its data only as it is read.
        data = load_dataset(cfg.name, cfg.subset, split=cfg.split, streaming=cfg.streaming)
        for record in data:
            yield from _text(record, cfg.column, f"text.name={cfg.name!r}")
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise ConfigError(
            f"text.name={cfg.name!r} cannot be loaded: {' '.join(str(e).split())}; check the "
            "name, text.subset and text.split, and that the hub can be reached"
        ) from e


def token_table(
    cfg: TextConfig,
    tokenizer: Any,
    *,
    context_length: int,
    causal: bool,
    drop_special_tokens: bool,
    num_rows: int,
    advance: Callable[[int], None] = lambda n: None,
) -> TokenTable:
    """Tokenises documents into sequences until they give num_rows stored tokens or the text ends.

    Causal models: documents follow one another, parted by the end-of-sequence token, and each
    sequence begins with the begin token where the tokenizer has one. Others: a document is cut
    into sequences of its own, between the tokenizer's first and last special tokens, the last one
    padded. Padding is never stored. Raises ConfigError where the text gives no whole sequence, or
    none with a token to store.
    """
    parts: list[Sequence] = []
    for sequence in _sequences(cfg, tokenizer, context_length, causal, drop_special_tokens):
        parts.append(sequence)
        rows = int(sequence.keep.sum())
        num_rows -= rows
        advance(rows)
        if num_rows <= 0:
            break
    table = _table(parts, context_length)
    if not table.keep.any():
        raise ConfigError(
            f"text.source={cfg.source!r} gives special tokens alone, such as those of unknown "
            "words; name another text, or set cache.drop_special_tokens=false"
        )
    return table


def held_out_table(
    cfg: TextConfig,
    tokenizer: Any,
    *,
    context_length: int,
    causal: bool,
    drop_special_tokens: bool,
    after_documents: int,
    num_sequences: int,
) -> TokenTable:
    """The first num_sequences sequences of the documents after the first after_documents, which a
    store's rows came from; those are passed over untokenised.

    Where the text ends before that, its last sequences.
    """

    def sequences(skip: int) -> Iterator[Sequence]:
        return _sequences(cfg, tokenizer, context_length, causal, drop_special_tokens, skip)

    parts = list(islice(sequences(after_documents), num_sequences))
    if len(parts) < num_sequences:
        parts = list(deque(sequences(0), maxlen=num_sequences))
    return _table(parts, context_length)


class Sequence(NamedTuple):
    """One row of a TokenTable."""

    ids: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    attention: npt.NDArray[np.bool_]
    keep: npt.NDArray[np.bool_]


def _sequences(
    cfg: TextConfig,
    tokenizer: Any,
    length: int,
    causal: bool,
    drop_special_tokens: bool,
    skip: int = 0,
) -> Iterator[Sequence]:
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int32)
    numbered = enumerate(_tokenised(cfg, tokenizer, skip), start=skip)
    for ids, document, position in (_packed if causal else _separate)(numbered, tokenizer, length):
        attention = position != _PADDING
        keep = attention.copy()
        if drop_special_tokens:
            keep &= (position >= 0) & ~np.isin(ids, special)
        yield Sequence(ids, document, position, attention, keep)


def _table(parts: list[Sequence], length: int) -> TokenTable:
    if not parts:
        raise ConfigError(f"cache.context_length={length} is longer than the whole text; lower it")
    return TokenTable(*(np.stack(column) for column in zip(*parts, strict=True)))


_SPECIAL, _PADDING = -1, -2  # values of `position` where no token of a document stands


def _tokenised(cfg: TextConfig, tokenizer: Any, skip: int) -> Iterator[list[int]]:
    stream = islice(documents(cfg), skip, None)
    while batch := list(islice(stream, _DOCUMENTS_A_BATCH)):
        # Long documents pass model_max_length on purpose: they are cut into sequences afterwards.
        try:
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as e:  # each tokenizer has errors of its own
            told = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            raise ConfigError(
                f"text.source={cfg.source!r}: the model's tokenizer fails on a document ({told}); "
                "leave that document out, or name another model"
            ) from e
        yield from ids


def begin_token(tokenizer: Any, causal: bool) -> int | None:
    """The token that every sequence begins with, or None."""
    if not causal and tokenizer.cls_token_id is not None:
        return int(tokenizer.cls_token_id)
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _packed(
    numbered: Iterator[tuple[int, list[int]]], tokenizer: Any, length: int
) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    first = begin_token(tokenizer, causal=True)
    begin = [] if first is None else [first]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(begin)
    head = np.array([[*begin], [-1] * len(begin), [_SPECIAL] * len(begin)], dtype=np.int32)
    waiting = np.empty((3, 0), dtype=np.int32)
    for number, ids in numbered:
        tokens = np.array([*ids, *end], dtype=np.int32)
        place = np.arange(len(tokens), dtype=np.int32)
        place[len(ids) :] = _SPECIAL
        document = np.full(len(tokens), number, dtype=np.int32)
        waiting = np.concatenate([waiting, np.stack([tokens, document, place])], axis=1)
        while waiting.shape[1] >= body:
            row, waiting = np.concatenate([head, waiting[:, :body]], axis=1), waiting[:, body:]
            yield row[0], row[1], row[2]


def _separate(
    numbered: Iterator[tuple[int, list[int]]], tokenizer: Any, length: int
) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    first = begin_token(tokenizer, causal=False)
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    begin, end = [t for t in [first] if t is not None], [t for t in [last] if t is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    body = length - len(begin) - len(end)
    for number, ids in numbered:
        for start in range(0, len(ids), body):
            part = ids[start : start + body]
            padding = body - len(part)
            row = [*begin, *part, *end, *[pad] * padding]
            place = [*[_SPECIAL] * len(begin), *range(start, start + len(part))]
            place += [*[_SPECIAL] * len(end), *[_PADDING] * padding]
            document = [number if p >= 0 else -1 for p in place]
            yield (
                np.array(row, dtype=np.int32),
                np.array(document, dtype=np.int32),
                np.array(place, dtype=np.int32),
            )
