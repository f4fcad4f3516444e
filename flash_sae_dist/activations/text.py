"""Documents -> token sequences, the same on every process and for any number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from ..config.base import ConfigError
from ..config.data import TextConfig
from .documents import Document, documents

_DOCUMENTS_A_BATCH, _CHARACTERS_A_BATCH = 256, 1 << 18


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
    pieces = _tokenised(cfg, tokenizer, skip)
    for ids, document, position in (_packed if causal else _separate)(pieces, tokenizer, length):
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


class Tokens(NamedTuple):
    """Token ids of a document, or of a piece of a long one."""

    number: int  # of the document
    start: int  # place in its document of the first
    ids: list[int]
    last: bool  # no further piece follows


def _tokenised(cfg: TextConfig, tokenizer: Any, skip: int) -> Iterator[Tokens]:
    """The documents after the first `skip`, which are passed over untokenised."""
    start = 0
    stream = (entry for entry in _numbered(cfg, tokenizer) if entry[0] >= skip)
    while batch := list(_batch(stream)):
        texts = [d.text for _, d, _ in batch if d.text is not None]
        ids = iter(_ids(texts, cfg, tokenizer))
        for number, document, last in batch:
            tokens = next(ids) if document.ids is None else document.ids
            start = start if document.continues else 0
            yield Tokens(number, start, tokens, last)
            start += len(tokens)


def _numbered(cfg: TextConfig, tokenizer: Any) -> Iterator[tuple[int, Document, bool]]:
    """Each document or piece with its document's number, and whether it is the last of it."""
    number = -1
    for document, after in pairwise(chain(documents(cfg, tokenizer), [None])):
        assert document is not None
        number += not document.continues
        yield number, document, after is None or not after.continues


def _batch(
    stream: Iterator[tuple[int, Document, bool]],
) -> Iterator[tuple[int, Document, bool]]:
    """So many documents as are tokenised at once; few long ones, so that a short text is not
    waited for."""
    size = 0
    for entry in islice(stream, _DOCUMENTS_A_BATCH):
        yield entry
        size += len(entry[1].text or "")
        if size >= _CHARACTERS_A_BATCH:
            return


def _ids(texts: list[str], cfg: TextConfig, tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    # Long documents pass model_max_length on purpose: they are cut into sequences afterwards.
    try:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    except Exception as e:  # each tokenizer has errors of its own
        told = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ConfigError(
            f"text.source={cfg.source!r}: the model's tokenizer fails on a document ({told}); "
            "leave that document out, or name another model"
        ) from e
    return ids


def begin_token(tokenizer: Any, causal: bool) -> int | None:
    """The token that every sequence begins with, or None."""
    if not causal and tokenizer.cls_token_id is not None:
        return int(tokenizer.cls_token_id)
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _packed(
    pieces: Iterator[Tokens], tokenizer: Any, length: int
) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    first = begin_token(tokenizer, causal=True)
    begin = [] if first is None else [first]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(begin)
    head = np.array([[*begin], [-1] * len(begin), [_SPECIAL] * len(begin)], dtype=np.int32)
    waiting = np.empty((3, 0), dtype=np.int32)
    for number, start, ids, last in pieces:
        tokens = np.array([*ids, *(end if last else [])], dtype=np.int32)
        place = np.arange(start, start + len(tokens), dtype=np.int32)
        place[len(ids) :] = _SPECIAL
        document = np.full(len(tokens), number, dtype=np.int32)
        waiting = np.concatenate([waiting, np.stack([tokens, document, place])], axis=1)
        while waiting.shape[1] >= body:
            row, waiting = np.concatenate([head, waiting[:, :body]], axis=1), waiting[:, body:]
            yield row[0], row[1], row[2]


def _separate(
    pieces: Iterator[Tokens], tokenizer: Any, length: int
) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    first = begin_token(tokenizer, causal=False)
    ending = (
        tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    )
    begin, end = [t for t in [first] if t is not None], [t for t in [ending] if t is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    body = length - len(begin) - len(end)
    waiting: list[int] = []
    for number, place_, ids, last in pieces:
        start, waiting = place_ - len(waiting), waiting + ids
        stop = len(waiting) if last else len(waiting) // body * body
        for at in range(0, stop, body):
            part = waiting[at : at + body]
            padding = body - len(part)
            row = [*begin, *part, *end, *[pad] * padding]
            place = [*[_SPECIAL] * len(begin), *range(start + at, start + at + len(part))]
            place += [*[_SPECIAL] * len(end), *[_PADDING] * padding]
            document = [number if p >= 0 else -1 for p in place]
            yield (
                np.array(row, dtype=np.int32),
                np.array(document, dtype=np.int32),
                np.array(place, dtype=np.int32),
            )
        waiting = waiting[stop:]
