"""A grid while it is trained: a line a job, from the files that every process leaves, on whatever
host it runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..config.base import UserError
from ..progress import clock, count
from ..training.member import is_finished
from ..training.metrics import split_metrics
from ..training.records import Job, read_status

_SECONDS_ON_A_TERMINAL, _SECONDS_BETWEEN_LINES = 1.0, 10.0
# Far more than the last two lines of a metrics file.
_TAIL_BYTES = 1 << 14
# Jobs that wait or are done are counted, not listed, where there are more than fit a screen.
_MOST_ROWS = 40


class Row(NamedTuple):
    """What there is to say of a job."""

    name: str
    state: str  # waiting, running, finished or failed
    step: int = 0
    total: int = 0
    values: dict[str, Any] = {}  # the last line of its metrics

    def seconds_left(self, batch_tokens: int) -> float | None:
        """None where its speed is not known."""
        rate = self.values.get("tokens_per_s")
        return (self.total - self.step) * batch_tokens / rate if rate else None


class Watch:
    """The jobs of a launch, read again each time."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.began = list(jobs), time.time()
        self._done: dict[str, Row] = {}

    def rows(self) -> list[Row]:
        """One a job, in their order."""
        return [self._done.get(job.name) or self._read(job) for job in self.jobs]

    def _read(self, job: Job) -> Row:
        assert job.config.train is not None
        total = -(-job.config.train.num_tokens // job.config.train.batch_tokens)
        line, fresh = _last_line(job.folder / "metrics.jsonl", self.began)
        step = int(line.get("step", 0))
        state = "running" if fresh else "waiting"
        # Files may change while they are read, or be another launch's: they only inform.
        with suppress(OSError, UserError):
            if _is_fresh(job.folder / "status.json", self.began):
                status = read_status(job.folder)
                state = status.state if status is not None else state
            elif is_finished(job):
                state = "finished"
        row = Row(job.name, state, step, total, line if state != "waiting" else {})
        if state in ("finished", "failed"):
            self._done[job.name] = row
        return row


def _is_fresh(path: Path, since: float) -> bool:
    # File systems keep times to seconds, and other hosts' clocks are not ours.
    return path.exists() and path.stat().st_mtime >= since - 2


def _last_line(path: Path, since: float) -> tuple[dict[str, Any], bool]:
    """The last whole line of a metrics file, and whether this launch wrote it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines, _ = split_metrics(file.read())
        return (lines[-1] if lines else {}), bool(lines) and _is_fresh(path, since)
    except OSError:
        return {}, False


_COLUMNS = ("SAE", "state", "step", "tokens/s", "FVU", "L0", "dead", "left")


def _cells(row: Row, batch_tokens: int) -> list[str]:
    def number(name: str, form: str) -> str:
        value = row.values.get(name)
        return "" if value is None else f"{value:{form}}"

    rate, left = row.values.get("tokens_per_s"), row.seconds_left(batch_tokens)
    return [
        row.name,
        row.state,
        f"{row.step}/{row.total}",
        "" if rate is None else count(rate),
        number("fvu", ".4f"),
        number("l0", ".1f"),
        number("dead_fraction", ".1%"),
        clock(left) if left is not None and row.state == "running" else "",
    ]


def table(rows: list[Row], batch_tokens: dict[str, int]) -> Table:
    """All jobs, or where they are many those at work and those that failed."""
    shown = rows
    if len(rows) > _MOST_ROWS:
        shown = [row for row in rows if row.state not in ("waiting", "finished")][:_MOST_ROWS]
    states = [row.state for row in rows]
    counts = [f"{states.count(s)} {s}" for s in dict.fromkeys(states)]
    out = Table(box=None, pad_edge=False, caption=", ".join(counts), caption_justify="left")
    out.add_column(_COLUMNS[0], overflow="fold")
    for column in _COLUMNS[1:]:
        out.add_column(column, justify="right", no_wrap=True)
    for row in shown:
        out.add_row(*(Text(cell) for cell in _cells(row, batch_tokens[row.name])))
    return out


def line(row: Row, batch_tokens: int) -> str:
    """The same of one job as a line of a log."""
    name, state, step, rate, fvu, l0, dead, left = _cells(row, batch_tokens)
    parts = [] if state == "running" else [state]
    parts += [f"step {step}"]
    if rate:
        parts += [f"{rate} tokens/s"]
    if fvu:
        parts += [f"fvu {fvu}", f"l0 {l0}", f"dead {dead}"]
    if left:
        parts += [f"{left} left"]
    return f"{name}: {', '.join(parts)}"


@contextmanager
def shown(jobs: Sequence[Job], *, enabled: bool) -> Iterator[None]:
    """Shows the jobs while the block runs: a table on a terminal, else lines now and then."""
    if not enabled or not jobs:
        yield
        return
    watch, ended = Watch(jobs), threading.Event()
    sizes = {j.name: j.config.train.batch_tokens for j in jobs if j.config.train is not None}
    show = _in_table if sys.stderr.isatty() else _in_lines
    thread = threading.Thread(target=show, args=(watch, sizes, ended), name="live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_lines(watch: Watch, sizes: dict[str, int], ended: threading.Event) -> None:
    told: dict[str, Row] = {}
    while True:
        last = ended.wait(_SECONDS_BETWEEN_LINES if told else _SECONDS_ON_A_TERMINAL)
        for row in watch.rows():
            if row.state != "waiting" and row != told.get(row.name):
                print(line(row, sizes[row.name]), file=sys.stderr, flush=True)
                told[row.name] = row
        if last:
            return


def _in_table(watch: Watch, sizes: dict[str, int], ended: threading.Event) -> None:
    with Live(console=Console(stderr=True), auto_refresh=False) as live, _logs_above():
        while True:
            last = ended.wait(_SECONDS_ON_A_TERMINAL)
            live.update(table(watch.rows(), sizes), refresh=True)
            if last:
                return


@contextmanager
def _logs_above() -> Iterator[None]:
    """Logs go through what a live table has put in standard error's place, above it."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
