"""Processes that make lines of latents: by the first one alone, whose threads share Python's lock,
they took four times as long as the pass over the store (H200, 2026-12-01).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

from ..config.base import UserError
from .line_worker import read_lines, write_json, write_part
from .lines import Line, Part

# More would wait for the thread that packs the lines.
_MOST = 8
# That a process takes about as long for as for its start.
_LATENTS_EACH = 1024

_Process = subprocess.Popen[bytes]


def num_processes(latents: int, together: int) -> int:
    """How many pay for so many latents, where so many launches share the machine's cores."""
    is_linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    # One for the thread that packs the lines.
    fits = min(_MOST, cores // together - 1, latents // _LATENTS_EACH)
    return fits if fits > 1 else 0


@contextmanager
def line_processes(count: int) -> Iterator[LineProcesses]:
    """So many, which load their modules while others do something else; they end with it."""
    # Modules are found where this process finds them, whatever lies in the current folder.
    command = [sys.executable, "-P", "-m", "flash_sae_dist.features.line_worker"]
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    started: list[_Process] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                # A terminal's Ctrl-C is for the first process alone.
                start_new_session=True,
            )
            started.append(process)
        yield LineProcesses(started)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


class LineProcesses:
    """Those that were started; any thread may ask them."""

    def __init__(self, started: Sequence[_Process]) -> None:
        self._started, self._free = started, SimpleQueue[_Process]()

    def __len__(self) -> int:
        return len(self._started)

    def begin(self, table: dict[int, str]) -> None:
        """Tells all of them the text of tokens, once."""
        for process in self._started:
            assert process.stdin is not None
            with _told(process):
                write_json(process.stdin, list(table.items()))
                process.stdin.flush()
            self._free.put(process)

    def lines_of(self, part: Part) -> list[Line]:
        """As `lines.lines_of`; waits while all of them are busy."""
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with _told(process):
                write_part(process.stdin, part)
                return read_lines(process.stdout)
        finally:
            # Where it failed, too: whoever waits for it is told the same.
            self._free.put(process)


@contextmanager
def _told(process: _Process) -> Iterator[None]:
    """Tells in a sentence that it has ended; ends it where anything else fails."""
    try:
        yield
    except (EOFError, BrokenPipeError):
        raise UserError(
            f"a process that makes the text of latents ended with code {process.wait()}; look "
            "above for its last words (a kill for want of memory leaves none)"
        ) from None
    except BaseException:
        # What it answers would be taken for the answer of the next question.
        process.kill()
        raise
