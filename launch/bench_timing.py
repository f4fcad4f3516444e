"""What the benchmarks share: medians of CUDA event times, a table, and the same as JSON."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# Written before each timed call, so that no call finds its inputs in the L2 cache.
_FLUSH_BYTES = 256 << 20


# Such writes last over three milliseconds, in which the host launches the timed call's kernels.
_FLUSHES_AHEAD = 40


def median_ms(
    fn: Callable[[], Any], repeats: int = 20, warmup: int = 3, *, ahead: bool = False
) -> float:
    """Median time of a call on the current CUDA device, the L2 cache emptied before each.

    With `ahead` the device is kept busy while the host launches the call's kernels, so that the
    time is the device's alone; `host_ms` tells the host's.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        fn()
    times: list[float] = []
    for _ in range(repeats):
        for _ in range(_FLUSHES_AHEAD if ahead else 1):
            flush.zero_()
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def host_ms(fn: Callable[[], Any], repeats: int = 20) -> float:
    """Median time that a call keeps the host, its kernels' execution aside."""
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def kernel_us(fn: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Mean microseconds of each kernel that a call launches, the longest first, by the profiler;
    the one that empties the L2 cache is among them.
    """
    from torch.profiler import ProfilerActivity, profile

    fn()
    torch.cuda.synchronize()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush.zero_()
            fn()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.events() or []:
        if str(event.device_type).endswith("CUDA"):
            spent[event.name] = spent.get(event.name, 0.0) + event.device_time / repeats
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def device_name() -> str:
    """The GPU's name, or CPU where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def print_table(title: str, rows: list[dict[str, Any]], width: int = 120) -> None:
    """Rows by column name; a column that some row lacks stays empty there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name == "remark")  # the longest stands last
    table = Table(*columns, title=f"{title}, {device_name()}")
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        table.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=width).print(table)


def write_json(path: Path, title: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """The table with what it was measured on, and whatever more there is."""
    about = {
        "title": title,
        "device": device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        **more,
    }
    path.write_text(json.dumps(about, indent=2) + "\n")
