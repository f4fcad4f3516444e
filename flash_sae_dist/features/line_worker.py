"""A process that makes lines of latents for the one that started it:

    python -m flash_sae_dist.features.line_worker

Standard input is a line of JSON, the text of tokens, and then Parts as `write_part` writes them;
each is answered as `read_lines` reads it. It ends when its standard input does. It imports next to
nothing, so that it starts at once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from contextlib import suppress
from typing import IO, Any

import numpy as np

from .lines import Examples, Line, Part, lines_of
from .words import Words


def write_json(file: IO[bytes], value: Any) -> None:
    """A line of JSON."""
    file.write(json.dumps(value).encode() + b"\n")


def _read_json(file: IO[bytes]) -> Any:
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _read_bytes(file: IO[bytes], size: int) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise EOFError
    return found


def write_part(file: IO[bytes], part: Part) -> None:
    """A line of JSON, with types and shapes in the arrays' place, and the arrays."""
    values = [*part[:-1], *part.examples]
    told = [[v.dtype.str, v.shape] if isinstance(v, np.ndarray) else [v] for v in values]
    write_json(file, told)
    for value in values:
        if isinstance(value, np.ndarray):
            file.write(value.tobytes())
    file.flush()


def _read_part(file: IO[bytes]) -> Part:
    values: list[Any] = []
    for what, *shape in _read_json(file):
        if shape:
            dtype = np.dtype(what)
            data = _read_bytes(file, dtype.itemsize * math.prod(*shape))
            what = np.frombuffer(data, dtype).reshape(*shape)
        values.append(what)
    first = len(Part._fields) - 1
    return Part._make([*values[:first], Examples(*values[first:])])


def _write_lines(file: IO[bytes], lines: list[Line]) -> None:
    write_json(file, [[len(line.json), line.row] for line in lines])
    file.write(b"".join(line.json for line in lines))
    file.flush()


def read_lines(file: IO[bytes]) -> list[Line]:
    """The answer to a part. Raises EOFError where it is not whole."""
    return [Line(_read_bytes(file, size), row) for size, row in _read_json(file)]


def main() -> None:
    """Makes lines until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # The process that started it ends it.
        signal.signal(number, signal.SIG_IGN)
    # What others print must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    parts = sys.stdin.buffer
    with suppress(EOFError, BrokenPipeError):
        words = Words(None, dict(_read_json(parts)))
        while True:
            _write_lines(answers, lines_of(_read_part(parts), words))


if __name__ == "__main__":
    main()
