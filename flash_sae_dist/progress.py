"""Progress of anything long: a bar with rate and time left on a terminal, a line now and then in a
log.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0


def process_seconds() -> float | None:
    """Seconds since this process began; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return None


def count(number: float) -> str:
    """A number in three digits, such as 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Bar:
    """Counts work done; `advance(n)` after each part."""

    description: str
    total: int
    unit: str
    show: Callable[[int, str], None]
    done: int = 0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(1e-9, time.perf_counter() - self.start)

    def advance(self, amount: int) -> None:
        """Adds finished units, never beyond the total."""
        self.done = min(self.total, self.done + amount)
        self.show(self.done, f"{count(self.rate())} {self.unit}/s")


class _Lines:
    """Progress as plain lines: the first result, then one every few seconds, then the last."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.last = description, total, 0.0
        self.start = time.perf_counter()

    def __call__(self, done: int, rate: str) -> None:
        now = time.perf_counter()
        if done < self.total and now - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.last = now
        left = (now - self.start) * (self.total - done) / max(1, done)
        share = f"{done / max(1, self.total):4.0%}"
        print(
            f"{self.description}: {share}, {rate}, {clock(left)} left", file=sys.stderr, flush=True
        )


@contextmanager
def progress_bar(
    description: str, total: int, unit: str, enabled: bool, *, shared: bool = False
) -> Iterator[Bar]:
    """A bar over `total` units with its rate and time left; disabled (on all ranks but one) it
    shows nothing. Where other processes show theirs on the same terminal (shared), all print
    lines: live bars would overwrite one another.
    """
    if not enabled:
        yield Bar(description, total, unit, lambda done, rate: None)
        return
    if shared or not sys.stderr.isatty():
        yield Bar(description, total, unit, _Lines(description, total))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, rate="")
        yield Bar(
            description,
            total,
            unit,
            lambda done, rate: progress.update(task, completed=done, rate=rate),
        )
