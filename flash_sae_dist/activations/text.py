"""Documents -> token sequences, the same on every process and for any number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

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
    keep: npt.NDArray[np.bool_]  # [S, T], True where the activation is stored

    @property
    def attention(self) -> npt.NDArray[np.bool_]:
        """[S, T], False on padding."""
        return np.asarray(self.position != _PADDING)


class Place(NamedTuple):
    """A place in a text from which its sequences go on."""

    records: int = 0  # of the source that are behind it
    number: int = -1  # of the document behind it
    start: int = 0  # tokens of that document behind it, should it go on
    offset: int = 0  # tokens that are used up of the piece ahead


class Making(NamedTuple):
    """How sequences are made of documents."""

    cfg: TextConfig
    tokenizer: Any
    context_length: int
    causal: bool
    drop_special_tokens: bool
    skip_first_tokens: int = 0


def token_table(
    making: Making, *, num_rows: int, advance: Callable[[int], None] = lambda n: None
) -> TokenTable:
    """Tokenises documents into sequences until they give num_rows stored tokens or the text ends.

    Causal models: documents follow one another, parted by the end-of-sequence token, and each
    sequence begins with the begin token where the tokenizer has one. Others: a document is cut
    into sequences of its own, between the tokenizer's first and last special tokens, the last one
    padded. Padding is never stored. Raises ConfigError where the text gives no whole sequence, or
    none with a token to store.
    """
    parts: list[Sequence] = []
    for sequence, _ in sequences(making):
        parts.append(sequence)
        rows = int(sequence.keep.sum())
        num_rows -= rows
        advance(rows)
        if num_rows <= 0:
            break
    table = table_of(parts, making)
    if not table.keep.any():
        raise no_rows(making.cfg)
    return table


def no_rows(cfg: TextConfig) -> ConfigError:
    """The error of a text that gives no token to store."""
    return ConfigError(
        f"text.source={cfg.source!r} gives special tokens alone, such as those of unknown "
        "words; name another text, or set cache.drop_special_tokens=false"
    )


def held_out_table(making: Making, *, after_documents: int, num_sequences: int) -> TokenTable:
    """The first num_sequences sequences of the documents after the first after_documents, which a
    store's rows came from; those are passed over untokenised.

    Where the text ends before that, its last sequences.
    """

    def found(skip: int) -> Iterator[Sequence]:
        return (sequence for sequence, _ in sequences(making, skip_documents=skip))

    parts = list(islice(found(after_documents), num_sequences))
    if len(parts) < num_sequences:
        parts = list(deque(found(0), maxlen=num_sequences))
    return table_of(parts, making)


class Sequence(NamedTuple):
    """One row of a TokenTable."""

    ids: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    keep: npt.NDArray[np.bool_]


def sequences(
    making: Making, place: Place | None = None, skip_documents: int = 0
) -> Iterator[tuple[Sequence, Place]]:
    """The sequences of a text from a place on, each with the place behind it. The documents
    before skip_documents are passed over untokenised.
    """
    special = np.array(sorted(making.tokenizer.all_special_ids), dtype=np.int32)
    pieces = _tokenised(making.cfg, making.tokenizer, place or Place(), skip_documents)
    cut = _packed if making.causal else _separate
    for (ids, document, position), behind in cut(pieces, making.tokenizer, making.context_length):
        keep = position != _PADDING
        if making.drop_special_tokens:
            keep &= (position >= 0) & ~np.isin(ids, special)
        keep[: making.skip_first_tokens] = False
        yield Sequence(ids, document, position, keep), behind


def table_of(parts: list[Sequence], making: Making) -> TokenTable:
    """Sequences in one table. Raises ConfigError where there is none."""
    if not parts:
        raise ConfigError(
            f"cache.context_length={making.context_length} is longer than the whole text; lower it"
        )
    return TokenTable(*(np.stack(column) for column in zip(*parts, strict=True)))


_SPECIAL, _PADDING = -1, -2  # values of `position` where no token of a document stands


class Tokens(NamedTuple):
    """Token ids of a document, or of a piece of a long one."""

    before: Place  # where it begins
    number: int  # of the document
    start: int  # place in its document of the first
    ids: list[int]
    last: bool  # no further piece follows
    used: int  # tokens of it that earlier sequences hold


def _tokenised(cfg: TextConfig, tokenizer: Any, place: Place, skip: int) -> Iterator[Tokens]:
    """The documents from a place on, and after the first `skip`, which are passed over
    untokenised.
    """
    start, used = place.start, place.offset
    before = place._replace(offset=0)
    stream = (e for e in _numbered(cfg, tokenizer, place) if e[0] >= skip)
    while batch := list(_batch(stream)):
        texts = [d.text for _, d, _ in batch if d.text is not None]
        ids = iter(_ids(texts, cfg, tokenizer))
        for number, document, last in batch:
            tokens = next(ids) if document.ids is None else document.ids
            start = start if document.continues else 0
            yield Tokens(before, number, start, tokens, last, used)
            start, used = start + len(tokens), 0
            before = Place(document.records, number, start)


def _numbered(
    cfg: TextConfig, tokenizer: Any, place: Place
) -> Iterator[tuple[int, Document, bool]]:
    """Each document or piece with its document's number, and whether it is the last of it."""
    number = place.number
    found = documents(cfg, tokenizer, skip=place.records)
    for document, after in pairwise(chain(found, [None])):
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


Cut = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]


def _packed(pieces: Iterator[Tokens], tokenizer: Any, length: int) -> Iterator[tuple[Cut, Place]]:
    """Sequences (ids, document, position) of documents one after another."""
    first = begin_token(tokenizer, causal=True)
    begin = [] if first is None else [first]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(begin)
    head = np.array([[*begin], [-1] * len(begin), [_SPECIAL] * len(begin)], dtype=np.int32)
    waiting = np.empty((3, 0), dtype=np.int32)
    for before, number, start, ids, last, used in pieces:
        tokens = np.array([*ids, *(end if last else [])], dtype=np.int32)
        position = np.arange(start, start + len(tokens), dtype=np.int32)
        position[len(ids) :] = _SPECIAL
        document = np.full(len(tokens), number, dtype=np.int32)
        fresh = np.stack([tokens, document, position])[:, used:]
        waiting = np.concatenate([waiting, fresh], axis=1)
        while waiting.shape[1] >= body:
            row, waiting = np.concatenate([head, waiting[:, :body]], axis=1), waiting[:, body:]
            # What waits is the end of this piece: a sequence uses up all that waited before it.
            yield (row[0], row[1], row[2]), before._replace(offset=len(tokens) - waiting.shape[1])


def _separate(pieces: Iterator[Tokens], tokenizer: Any, length: int) -> Iterator[tuple[Cut, Place]]:
    """Sequences (ids, document, position) of one document each, the last one padded."""
    first = begin_token(tokenizer, causal=False)
    ending = (
        tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    )
    begin, end = [t for t in [first] if t is not None], [t for t in [ending] if t is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    body = length - len(begin) - len(end)
    waiting: list[int] = []
    for before, number, start, ids, last, used in pieces:
        old = len(waiting)
        at_first, waiting = start + used - old, waiting + ids[used:]
        stop = len(waiting) if last else len(waiting) // body * body
        for at in range(0, stop, body):
            part = waiting[at : at + body]
            padding = body - len(part)
            row = [*begin, *part, *end, *[pad] * padding]
            position = [*[_SPECIAL] * len(begin)]
            position += range(at_first + at, at_first + at + len(part))
            position += [*[_SPECIAL] * len(end), *[_PADDING] * padding]
            document = [number if p >= 0 else -1 for p in position]
            cut = (np.array(values, dtype=np.int32) for values in (row, document, position))
            behind = before._replace(offset=used + at + len(part) - old)
            yield (next(cut), next(cut), next(cut)), behind
        waiting = waiting[stop:]
