"""Where text comes from: datasets of the hub and of folders, the manual pages; what a row of one
holds; what is done where a connection breaks.
"""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config.base import ConfigError, UserError, shown
from ..config.data import TextSource

logger = logging.getLogger(__name__)
# Between tries to go on with a broken connection.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
# Packages whose errors are those of a network, whatever their class.
_NETWORK = frozenset(("httpx", "httpcore", "requests", "urllib3", "aiohttp", "botocore"))


class Record(NamedTuple):
    """What one row of a source holds: text, or token ids; neither where it holds a null."""

    text: str | None
    ids: list[int] | None = None
    continues: bool = False  # a further piece of the record before it


# A record is read only where it is wanted: passing over it costs no parsing.
Row = Callable[[], Record]


@dataclass(frozen=True)
class Source:
    """A source of text with what its rows are read with."""

    cfg: TextSource
    tokenizer: Any
    at: str  # its keys' section: text, or text.mixture.0

    @property
    def column(self) -> tuple[str, str]:
        """The key that names the column, and its name."""
        for key in ("tokens_column", "messages_column"):
            if (name := getattr(self.cfg, key)) is not None:
                return f"{self.at}.{key}", name
        return f"{self.at}.column", self.cfg.column

    def check_column(self, known: Any, where: str) -> None:
        """Raises ConfigError where the column is not among those known."""
        key, column = self.column
        if column not in known:
            names = ", ".join(map(str, known)) or "no columns"
            raise ConfigError(f"{key}={column!r} is not in {where}; it has {names}")

    def record(self, row: Any, where: str) -> Record:
        """What a row's column holds. Raises ConfigError where there is no such column or it holds
        something else.
        """
        key, column = self.column
        if not isinstance(row, dict) or column not in row:
            self.check_column(sorted(row, key=str) if isinstance(row, dict) else (), where)
        value = row[column]
        if value is None:
            return Record(None)
        if self.cfg.tokens_column is not None:
            return Record(None, _checked_ids(value, self.tokenizer, f"{key}={column!r}", where))
        if self.cfg.messages_column is not None:
            return Record(_chat(value, self.tokenizer, f"{key}={column!r}", where))
        if not isinstance(value, str):
            raise ConfigError(
                f"{key}={column!r} holds a {type(value).__name__} in {where}, not text; name "
                f"another column{_another_key(value, self.at)}"
            )
        return Record(value)


def _another_key(value: Any, at: str) -> str:
    """The key that reads such a value, as the end of a sentence."""
    first = value[0] if isinstance(value, list | np.ndarray) and len(value) else None
    if isinstance(first, dict):
        return f", or give {at}.messages_column for chats"
    if isinstance(first, int | np.integer):
        return f", or give {at}.tokens_column for token ids"
    return ""


def _checked_ids(value: Any, tokenizer: Any, told: str, where: str) -> list[int]:
    try:
        ids = np.asarray(value if isinstance(value, list | np.ndarray) else None)
    except ValueError:  # lists of several lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(
            f"{told} holds something else than a list of token ids in {where}; name another column"
        )
    wrong = ids[(ids < 0) | (ids >= len(tokenizer))] if ids.size else ids
    if wrong.size:
        raise ConfigError(
            f"{told} holds the token id {wrong[0]} in {where}, but the model's tokenizer has ids "
            f"0 .. {len(tokenizer) - 1} alone; use the model that the text was tokenised for"
        )
    found: list[int] = ids.tolist()
    return found


def check_template(source: Source) -> None:
    """Raises ConfigError where chats are to be read with a tokenizer that has no template."""
    name = source.cfg.messages_column
    if name is not None and not getattr(source.tokenizer, "chat_template", None):
        raise ConfigError(
            f"{source.at}.messages_column={name!r} needs a tokenizer with a chat template, which "
            "the model's has not; name a model that has one, such as its Instruct version, or put "
            "a chat_template.jinja into the model's folder"
        )


def _chat(messages: Any, tokenizer: Any, told: str, where: str) -> str:
    """The text of a chat, with the template's own special tokens in it."""
    wrong = messages if not isinstance(messages, list) else None
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            wrong = message
    if wrong is not None:
        has = ", ".join(wrong) if isinstance(wrong, dict) else f"a {type(wrong).__name__}"
        raise ConfigError(
            f"{told} holds something else than a list of messages with role and content in {where} "
            f"({has}); name another column, or rename those keys"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as e:  # templates are programs and raise what they like
        raise ConfigError(
            f"{told}: the tokenizer's chat template fails in {where} ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}); leave that chat out, or mend it"
        ) from e
    return text


def pydoc(source: Source, skip: int) -> Iterator[Record]:
    """The manual pages inside Python."""
    from pydoc_data.topics import topics

    del source
    yield from (Record(topics[name]) for name in sorted(topics)[skip:])


def hub(source: Source, skip: int) -> Iterator[Record]:
    """The rows of a dataset of the hub or of a folder, behind the first `skip`."""
    told, read = f"{source.at}.name={source.cfg.name!r}", skip
    try:
        data = _dataset(source, told)
        # Streams that come as files of JSON know their columns once they are read.
        if (known := data.column_names) is not None:
            source.check_column(known, told)
            data = data.select_columns([source.column[1]])
        for row in data.skip(skip) if skip else data:
            yield source.record(row, told)
            read += 1
    except Exception as e:  # datasets and its file systems have errors of their own
        if isinstance(e, UserError) or is_transient(e):
            raise
        what = f"cannot be read on after {read:,} rows" if read > skip else "cannot be loaded"
        raise ConfigError(
            f"{told} {what}: {_told(e)}; check the name, {source.at}.subset, {source.at}.split and "
            f"{source.at}.revision"
        ) from e


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _dataset(source: Source, told: str) -> Any:
    from datasets import load_dataset, load_from_disk

    cfg, folder = source.cfg, Path(str(source.cfg.name)).expanduser()
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if folder.is_dir() and cfg.revision is not None:
        raise ConfigError(
            f"{source.at}.revision={cfg.revision!r}: {told} is a folder, which has none; drop it"
        )
    if not saved:
        # A stream is asked for its data only as it is read.
        how = {"revision": cfg.revision, "split": cfg.split, "streaming": cfg.streaming}
        return load_dataset(cfg.name, cfg.subset, **how)
    data = load_from_disk(str(folder))
    if saved[0] == "state.json":
        if cfg.split not in ("train", str(data.split)):
            raise ConfigError(
                f"{told} was saved without splits, so {source.at}.split={cfg.split!r} is none of "
                "them; drop that key"
            )
        return data
    if cfg.split not in data:
        raise ConfigError(
            f"{told} has no {source.at}.split={cfg.split!r}; it has {', '.join(sorted(data))}"
        )
    return data[cfg.split]


def unbroken(
    read: Callable[[Source, int], Iterator[Record]], source: Source, skip: int
) -> Iterator[Record]:
    """read(source, skip), opened again where its connection broke. Raises UserError where it breaks
    again and again.
    """
    at, tries = skip, 0
    while True:
        try:
            for record in read(source, at):
                yield record
                at, tries = at + 1, 0
            return
        except Exception as e:
            if isinstance(e, UserError) or not is_transient(e):
                raise
            key = f"{source.at}.name" if source.cfg.name else f"{source.at}.paths"
            name = source.cfg.name or shown(source.cfg.paths)
            if at == skip == 0:
                raise ConfigError(
                    f"{key}={name!r} cannot be reached: {_told(e)}; check the name and the network"
                ) from e
            if tries == len(WAITS_S):
                raise UserError(
                    f"{key}={name!r}: the connection broke after {at:,} documents, and at each of "
                    f"{tries} tries to go on ({_told(e)}); run the same command again when it can "
                    "be reached"
                ) from e
            logger.warning("%s: the connection broke after %d documents (%s); opening it again",
                           key, at, _told(e))  # fmt: skip
            time.sleep(WAITS_S[tries])
            tries += 1


def is_transient(error: BaseException | None) -> bool:
    """Whether an error is one of a connection, which may hold the next time."""
    while error is not None:
        packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if packages & _NETWORK or isinstance(
            error, ConnectionError | TimeoutError | http.client.HTTPException
        ):
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", getattr(error, "status", None))
            return not isinstance(status, int) or status in (408, 429) or status >= 500
        error = error.__cause__ or error.__context__
    return False
