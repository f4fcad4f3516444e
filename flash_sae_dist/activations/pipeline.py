"""Activations from a model's forward passes to the store's files while the model goes on.

Inside a pass rows are put where they belong in a shard's buffers on the model's device. A shard
that is whole is summed up and copied to page-locked memory on a stream of its own; threads compute
checksums and write. Nothing waits for the device but those threads, and the host where it is some
passes ahead of it or all buffers are on their way to the disk. Memory is that of the buffers,
whatever the length of the text.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from queue import Empty, Queue
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy.typing as npt
import torch
from torch import Tensor

from ..config.base import UserError
from ..config.data import CacheConfig
from .host_memory import PageLocked
from .language_model import LanguageModel
from .norm_limits import SAMPLE_ROWS, NormLimits, resolve_ratios, row_norms
from .passes import Passes
from .row_plan import RowPlan
from .stored_rows import StoredRows, float_dtype
from .writer import StoreWriter, row_sums

logger = logging.getLogger(__name__)
Rows = dict[str, Tensor]  # hookpoint -> [shard_rows, D]
# Shards on the device: two that a pass straddles (more, where they are smaller than a pass), one
# that is being copied.
_FILLED = 3
_MOST_WRITTEN = 4
MAX_NORM_RATIO = "cache.max_norm_ratio"
# The rest of cache.memory_gib is for tokens and for threads at work.
_SHARE_OF_MEMORY = 0.75


def most_shard_bytes(memory_gib: float) -> int:
    """What one shard of all hookpoints may take, so that three of them fit into the memory."""
    return int(memory_gib * 2**30 * _SHARE_OF_MEMORY / _FILLED)


def num_buffers(
    cfg: CacheConfig, shard_rows: int, shard_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """Shards of all hookpoints that there is room for on the host, and that lie on the model's
    device, beside which passes fill no others.
    """
    fit = int(cfg.memory_gib * 2**30 * _SHARE_OF_MEMORY) // shard_bytes
    straddled = 2 + cfg.batch_sequences * cfg.context_length // shard_rows
    least = straddled + 1 if on_cpu else 1
    return max(least, min(_MOST_WRITTEN, fit)), 0 if on_cpu else max(_FILLED, straddled)


class Rate(NamedTuple):
    """How fast rows were made."""

    rows: int  # of the passes after the first
    seconds: float  # from the end of the first pass's launch to that of the last shard
    waited: float  # seconds of them in which no buffer was free: the disk is slower than the model

    def __str__(self) -> str:
        return (
            f"{self.rows / max(1e-9, self.seconds):,.0f} rows/s; for the disk it waited "
            f"{self.waited:.1f} of {self.seconds:.1f} s"
        )


class _Written:
    """A shard on its way to the disk."""

    def __init__(self, shard: int, rows: Rows, left: int) -> None:
        self.shard, self.rows, self.left = shard, rows, left
        self.lock = threading.Lock()
        self.crcs: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}
        self.over: dict[str, Tensor] = {}  # hookpoint -> [n] bool
        self.copied: dict[torch.device, torch.cuda.Event] = {}

    def add(self, name: str, crc: int) -> bool:
        """Notes an array that is written; whether it was the last."""
        with self.lock:
            self.crcs[name] = crc
            self.left -= 1
            return self.left == 0


class Pipeline:
    """Makes shards of a store; a context manager, which waits for what is under way when it is
    left.
    """

    def __init__(
        self,
        lm: LanguageModel,
        widths: dict[str, int],  # by hookpoint
        plan: RowPlan,
        cfg: CacheConfig,
        writer: StoreWriter,
    ) -> None:
        self.lm, self.widths, self.plan, self.writer = lm, widths, plan, writer
        self.shard_rows, self.num_tokens = plan.geometry.shard_rows, cfg.rows_to_store()
        # Told of each shard that is whole on the disk, in a thread.
        self.recorded: Callable[[int], None] = lambda shard: None
        self.ratios = resolve_ratios(MAX_NORM_RATIO, cfg.max_norm_ratio, list(widths))
        # Which rows are left out; set before any shard is made.
        self.limits = NormLimits()
        self.stored, self.dtype = cfg.dtype, float_dtype(cfg.dtype)
        self.on_cpu = lm.device.type == "cpu"
        self.open: dict[int, Rows] = {}
        # Filled before; the events say when the device has read them.
        self.idle: deque[tuple[Rows, dict[torch.device, torch.cuda.Event]]] = deque()
        self.num_filled = 0
        self.memory = PageLocked()
        self.host: Queue[Rows] = Queue()
        self._provide(cfg)
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        threads = max(2, min(16, (os.cpu_count() or 2) // 2))
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self.under_way: set[Future[None]] = set()
        self.waited = 0.0

    def _provide(self, cfg: CacheConfig) -> None:
        """As many host buffers as fit; on the CPU passes fill them, as many at once as a pass has
        shards.
        """
        shard_bytes = sum(self.widths.values()) * self.dtype.itemsize * self.shard_rows
        for _ in range(num_buffers(cfg, self.shard_rows, shard_bytes, self.on_cpu)[0]):
            self.host.put({})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.threads.shutdown(wait=True)
        for stream in self.streams.values():
            stream.synchronize()
        self.memory.close()

    def make(self, todo: list[int], rank: int, world: int, advance: Callable[[int], None]) -> Rate:
        """Makes one process's part of the missing shards. advance is told the rows that each pass
        gave. Raises what a thread met.
        """
        start, rows = 0.0, 0
        with Passes(self.lm, list(self.widths), self.dtype, self._put) as passes:
            for batch in self.plan.batches(todo, rank, world):
                self._check()
                passes.run(batch)
                for shard in batch.whole:
                    self._send(shard)
                made = sum(len(part.source) for part in batch.pieces)
                advance(made)
                # The first pass compiles and allocates.
                start, rows = (start, rows + made) if start else (time.perf_counter(), 0)
        self.drain()
        return Rate(rows, time.perf_counter() - start if start else 0.0, self.waited)

    def find_limits(self) -> NormLimits:
        """Which norms are too large: what the first launch found, and recorded before it made a
        shard. One process calls it.
        """
        if not self.ratios:
            return NormLimits()
        records = self.writer.records
        if (before := NormLimits.read(records)) is not None:
            return before
        if records.shards():
            logger.warning("%s has lost its median norms: they are measured again", records.root)
        norms = self.sample_norms(list(self.ratios), SAMPLE_ROWS)
        limits = NormLimits.of(MAX_NORM_RATIO, self.ratios, norms)
        limits.write(records)
        return limits

    def sample_norms(self, hookpoints: list[str], num_rows: int) -> dict[str, Tensor]:
        """Norms [n] of the store's first rows, num_rows or the rest of a pass more, in the passes
        and the type in which `make` makes them. No shard is made.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in hookpoints}

        def put(hookpoint: str, _: int, rows: Tensor, __: Tensor) -> None:
            found[hookpoint].append(row_norms(rows).cpu())

        left, shards = num_rows, range(self.plan.geometry.num_shards)
        with Passes(self.lm, hookpoints, self.dtype, put) as passes:
            for batch in self.plan.batches(list(shards), 0, 1):
                passes.run(batch)
                left -= sum(len(piece.source) for piece in batch.pieces)
                if left <= 0:
                    break
        return {name: torch.cat(norms) for name, norms in found.items()}

    def drain(self) -> None:
        """Waits until every shard that is whole has been recorded. Raises what a thread met."""
        wait(self.under_way)
        self._check()

    def _check(self) -> None:
        """Raises what a thread met, and forgets those that are done."""
        for future in [f for f in self.under_way if f.done()]:
            self.under_way.discard(future)
            future.result()

    def _put(self, hookpoint: str, shard: int, rows: Tensor, target: Tensor) -> None:
        if shard not in self.open:
            self.open[shard] = self._begin()
        self._buffer(self.open[shard], hookpoint, rows.device).index_copy_(0, target, rows)

    def _begin(self) -> Rows:
        """Buffers for a shard to be filled."""
        if self.on_cpu:
            return self._free_host()
        if self.num_filled < _FILLED or not self.idle:
            self.num_filled += 1
            return {}
        rows, copied = self.idle.popleft()
        for device, event in copied.items():
            torch.cuda.current_stream(device).wait_event(event)
        return rows

    def _buffer(self, rows: Rows, hookpoint: str, device: torch.device) -> Tensor:
        if hookpoint not in rows:
            shape = (self.shard_rows, self.widths[hookpoint])
            if device.type == "cpu":
                # Not torch's cache of page-locked memory, which rounds up to powers of two.
                rows[hookpoint] = self.memory.empty(shape, self.dtype, lock=not self.on_cpu)
            else:
                rows[hookpoint] = torch.empty(shape, dtype=self.dtype, device=device)
        return rows[hookpoint]

    def _free_host(self) -> Rows:
        """Host buffers that nothing uses, waited for."""
        start = time.perf_counter()
        while True:
            self._check()
            try:
                rows = self.host.get(timeout=0.2)
            except Empty:
                continue
            self.waited += time.perf_counter() - start
            return rows

    def _send(self, shard: int) -> None:
        """Hands a shard that is whole to the threads."""
        rows, tokens = self.open.pop(shard), self.plan.tokens(shard)
        arrays = len(self.widths) * (2 if self.stored == "int8" else 1)
        written = _Written(shard, rows, arrays + len(tokens))
        start, stop = self.plan.geometry.shard_range(shard)
        if self.on_cpu:
            written.over = self.limits.leave_out({n: r[: stop - start] for n, r in rows.items()})
        else:
            written.rows = self._free_host()
            self._copy(rows, written)
            self.idle.append((rows, written.copied))
        for name, values in tokens.items():
            self.under_way.add(self.threads.submit(self._write_array, written, name, values))
        for name in self.widths:
            self.under_way.add(self.threads.submit(self._write_rows, written, name))

    def _copy(self, rows: Rows, written: _Written) -> None:
        """Sums up and copies a shard's rows, each device's on a stream of its own."""
        start, stop = self.plan.geometry.shard_range(written.shard)
        cpu, devices = torch.device("cpu"), {r.device for r in rows.values()}
        with ExitStack() as current:
            for device in devices:
                if device not in self.streams:
                    self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self.streams[device].wait_stream(torch.cuda.current_stream(device))
                # All are current at once: which rows are left out goes from one to the others.
                current.enter_context(torch.cuda.stream(self.streams[device]))
            over = self.limits.leave_out({n: r[: stop - start] for n, r in rows.items()})
            for name, found in over.items():
                host = torch.empty(found.shape, dtype=torch.bool, pin_memory=True)
                written.over[name] = host.copy_(found, non_blocking=True)
        for device in devices:
            stream = self.streams[device]
            with torch.cuda.stream(stream):
                for name in [n for n, r in rows.items() if r.device == device]:
                    found = rows[name][: stop - start]
                    host = self._buffer(written.rows, name, cpu)[: stop - start]
                    host.copy_(found, non_blocking=True)
                    sums = torch.empty(found.shape[1] + 1, dtype=torch.float64, pin_memory=True)
                    written.sums[name] = sums.copy_(row_sums(found), non_blocking=True)
                copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                copied.record(stream)
            written.copied[device] = copied

    def _write_rows(self, written: _Written, hookpoint: str) -> None:
        for event in written.copied.values():
            event.synchronize()
        start, stop = self.plan.geometry.shard_range(written.shard)
        value = written.rows[hookpoint][: stop - start]
        if self.on_cpu:
            written.sums[hookpoint] = row_sums(value)
        if not bool(written.sums[hookpoint].isfinite().all()):
            raise UserError(
                f"activations of {hookpoint} are not finite in {str(self.dtype)[6:]}; "
                "set cache.dtype=bfloat16 or float32, or model.dtype=float32"
            )
        for name, values in StoredRows.encode(value, self.stored).arrays(hookpoint).items():
            self._write_array(written, name, values)

    def _write_array(self, written: _Written, name: str, values: npt.NDArray[Any]) -> None:
        """Writes a shard of one array, and records the shard where it was the last."""
        crc = self.writer.write_rows(self.plan.geometry, written.shard, name, values)
        if not written.add(name, crc):
            return
        over = {name: rows.nonzero().flatten().tolist() for name, rows in written.over.items()}
        self.writer.record_shard(
            self.plan.geometry, written.shard, written.crcs, written.sums, over
        )
        self.recorded(written.shard)
        self.host.put(written.rows)
