"""Which rows of an import belong together: `flash-sae store import --documents`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config.base import ConfigError
from ..identity import stamp
from .array_files import Source, open_numbers

Array = npt.NDArray[Any]
MAX_DOCUMENT = 2**31


class Documents(NamedTuple):
    """Which rows belong together: a hold-out takes whole documents."""

    rows_each: int  # where they are of one size
    numbers: Array | None = None  # [rows], from a file
    starts: Array | None = None  # first row of each stretch of one number
    stamps: dict[Path, list[int]] = {}  # of that file, from before it was read

    def of(self, rows: Array) -> tuple[Array, Array]:
        """Document and place in it of rows, by their numbers in the files."""
        if self.numbers is None or self.starts is None:
            document, place = np.divmod(rows, self.rows_each)
        else:
            document = self.numbers[rows]
            place = rows - self.starts[np.searchsorted(self.starts, rows, side="right") - 1]
        return document.astype(np.int32), place.astype(np.int32)

    def count(self, rows: int) -> int:
        """How many there are."""
        if self.numbers is not None:
            return int(self.numbers.max()) + 1
        return -(-rows // self.rows_each)


def open_documents(option: str | None, inputs: dict[str, list[Source]]) -> Documents:
    """Which rows are a document: as many beside one another as the option says, those that a file
    numbers alike, those of an item (a sequence) of the files, or each row by itself.

    Raises ConfigError.
    """
    rows = sum(s.rows for s in next(iter(inputs.values())))
    contexts = {s.context for sources in inputs.values() for s in sources} - {1}
    if option is None or option.isdecimal():
        each = int(option) if option else contexts.pop() if len(contexts) == 1 else 1
        if each < 1 or rows // each >= MAX_DOCUMENT:
            raise ConfigError(
                f"--documents={option or each} makes {rows // max(1, each):,} documents of {rows:,}"
                f" rows; give at least {rows // MAX_DOCUMENT + 1} rows a document"
            )
        return Documents(each)
    file = Path(option).expanduser()
    stamps = {file: stamp(file)} if file.is_file() else {}
    numbers = open_numbers(file)
    if len(numbers) != rows:
        raise ConfigError(f"--documents={option!r} numbers {len(numbers):,} rows, not {rows:,}")
    if int(numbers.min()) < 0 or int(numbers.max()) >= MAX_DOCUMENT:
        raise ConfigError(f"--documents={option!r} holds numbers that are not in 0 .. 2**31 - 1")
    starts = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1])
    return Documents(1, numbers, starts, stamps)
