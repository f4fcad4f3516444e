"""Tokens as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

# SentencePiece's mark of a space.
_SPACE = "\u2581"
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Words:
    """The text of token ids, each looked up once; without a tokenizer, and where another's table
    does not tell it, their numbers.
    """

    def __init__(self, tokenizer: Any | None, table: dict[int, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {-1: ""} | (table or {})
        # By number, that of no token (-1) first; which of them were asked for.
        self._json = np.full(1, "", dtype=object)
        self._has = np.zeros(1, dtype=bool)
        self._joins_words = tokenizer is not None and _joins_words(tokenizer)

    def of(self, ids: Iterable[int]) -> list[str]:
        """The text of each id; of -1, no token, an empty one."""
        known, wanted = self._known, list(ids)
        for number in wanted:
            if number not in known:
                known[number] = self._text(number)
        return [known[number] for number in wanted]

    def as_json(
        self,
        ids: npt.NDArray[np.integer[Any]],  # of any shape
    ) -> npt.NDArray[np.object_]:
        """The text of each id as a list in JSON has it, quoted and with a comma behind it."""
        places = ids + 1
        most = int(places.max(initial=0))
        if most >= len(self._json):
            self._json = np.resize(self._json, 2 * most + 2)
            self._has = np.append(self._has, np.zeros(len(self._json) - len(self._has), bool))
        fresh = np.unique(places[~self._has[places]])
        self._json[fresh] = [f"{_quoted(text)}," for text in self.of((fresh - 1).tolist())]
        self._has[fresh] = True
        texts: npt.NDArray[np.object_] = self._json[places]
        return texts

    def table(self, ids: Iterable[npt.NDArray[np.integer[Any]]]) -> dict[int, str]:
        """The text of all of them that has to be looked up, for Words elsewhere."""
        if self.tokenizer is not None:
            for some in ids:
                self.of((np.flatnonzero(np.bincount(some.reshape(-1) + 1)) - 1).tolist())
        return self._known

    def _text(self, number: int) -> str:
        if self.tokenizer is None:
            return f"[{number}]"
        text: str = self.tokenizer.decode([number])
        piece = self.tokenizer.convert_ids_to_tokens(number)
        if isinstance(piece, str) and piece.startswith(_SPACE):
            return text if text.startswith(" ") else f" {text}"
        if self._joins_words:
            # WordPiece marks what goes on a word, others begin each token anew.
            return text.removeprefix("##") if text.startswith("##") else f" {text}"
        return text


def _joins_words(tokenizer: Any) -> bool:
    """Whether the text of two tokens has a space between them that neither has."""
    number = next((n for n in range(len(tokenizer)) if n not in tokenizer.all_special_ids), 0)
    one, two = tokenizer.decode([number]), tokenizer.decode([number, number])
    piece = tokenizer.convert_ids_to_tokens(number)
    return bool(two == f"{one} {one}" and not (isinstance(piece, str) and _SPACE in piece))
