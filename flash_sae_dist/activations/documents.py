"""The documents of a text source, in a fixed order, long ones in pieces; mixtures of sources."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from ..config.base import ConfigError
from ..config.data import TextConfig
from .sources import Record, Source, check_template, hub, pydoc, unbroken
from .text_files import files

logger = logging.getLogger(__name__)
# Half of a pair that stands for one character, such as an emoji cut in two: no UTF-8 has it.
_HALF = re.compile("[\ud800-\udfff]")
_READERS = {"pydoc": pydoc, "files": files, "hub": hub}
# What the tokens a character of a part of a mixture are measured on.
_SAMPLE_RECORDS, _SAMPLE_CHARACTERS = 64, 1 << 17


class Document(NamedTuple):
    """A document, or a piece of a long one: text, or token ids."""

    text: str | None
    ids: list[int] | None  # of a source that holds tokens: as they stand there
    continues: bool  # a further piece of the document before it
    records: int  # of the source read up to this one: skip=records goes on behind it


def documents(cfg: TextConfig, tokenizer: Any, skip: int = 0) -> Iterator[Document]:
    """The documents of a source behind its first `skip` records, in a fixed order.

    Records count what is no document, too: blank text, nulls, empty lines. Those that are passed
    over are not parsed; a mixture's are, since lengths decide what follows what. Special tokens
    are in a text where a chat's template puts them. Raises ConfigError where the source has no
    document, UserError where its connection breaks again and again.
    """
    source = Source(cfg, tokenizer, "text")
    parts = [Source(p, tokenizer, f"text.mixture.{i}") for i, p in enumerate(cfg.mixture or ())]
    for checked in parts or [source]:
        check_template(checked)
    records: Iterator[Record]
    if cfg.mixture:
        records = islice(_mixture(parts, [part.weight for part in cfg.mixture]), skip, None)
    else:
        records = _records(source, skip)
    empty, mended = skip == 0, False
    for number, record in enumerate(records, start=skip + 1):
        if not (_is_document(record) or record.continues):
            continue
        text = record.text
        if text is not None and _HALF.search(text):
            if not mended:
                logger.warning(
                    "text.source=%r has halves of characters (lone surrogates, as of an emoji "
                    "cut in two), in %r first; each is read as U+FFFD",
                    cfg.source,
                    _HALF.sub("\ufffd", text)[:40],
                )
            text, mended = _HALF.sub("\ufffd", text), True
        empty = False
        yield Document(text, record.ids, record.continues, number)
    if empty:
        raise _no_text(source)


def _is_document(record: Record) -> bool:
    """Whether a record holds anything: text that is not blank, or token ids."""
    return bool(record.ids or (record.text and record.text.strip()))


def _no_text(source: Source) -> ConfigError:
    key, column = source.column
    return ConfigError(
        f"{source.at}.source={source.cfg.source!r} gave no text; check {key}={column!r} and the "
        "source"
    )


def _records(source: Source, skip: int = 0) -> Iterator[Record]:
    return unbroken(_READERS[source.cfg.source], source, skip)


class _Part:
    """A source of a mixture, and how much of it has been drawn."""

    def __init__(self, source: Source, weight: float) -> None:
        self.source, self.weight = source, weight
        self.records, self.drawn, self.documents = _records(source), 0.0, 0
        head, size = [], 0
        for record in islice(self.records, _SAMPLE_RECORDS):
            head.append(record)
            size += len(record.text or "")
            if size >= _SAMPLE_CHARACTERS:
                break
        self.rate = _tokens_a_character(head, source.tokenizer)
        self.records = chain(head, self.records)
        self.next: Record | None = next(self.records, None)

    def draw(self) -> Record:
        """The next record, and the one after it made ready."""
        assert self.next is not None
        # The pieces of a long file are documents of their own: else all of it came at once.
        record = self.next._replace(continues=False)
        characters = len(record.text or "")
        self.drawn += characters * self.rate if record.ids is None else len(record.ids)
        self.documents += _is_document(record)
        self.next = next(self.records, None)
        return record


def _mixture(sources: list[Source], weights: list[float]) -> Iterator[Record]:
    """Records of several sources, the next one always of the source that has given the fewest
    tokens for its weight: no chance, and the shares hold at each point to within a document.

    Tokens are counted as characters times those a character in a part's first records.
    """
    parts = [_Part(source, weight) for source, weight in zip(sources, weights, strict=True)]
    while parts:
        part = min(parts, key=lambda p: p.drawn / p.weight)
        if part.next is not None:
            yield part.draw()
            continue
        parts.remove(part)
        if not part.documents:
            raise _no_text(part.source)
        if parts:
            logger.info("%s ends after %d documents; the other parts share its weight",
                        part.source.at, part.documents)  # fmt: skip


def _tokens_a_character(records: list[Record], tokenizer: Any) -> float:
    """1 where there is no text. What a tokenizer raises is told where the text is tokenised."""
    texts = [_HALF.sub("\ufffd", r.text) for r in records if r.text and _is_document(r)]
    try:
        ids = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
    except Exception:
        return 1.0
    return sum(map(len, ids)) / sum(map(len, texts)) if ids and any(ids) else 1.0
