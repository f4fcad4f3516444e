"""A plan in words: a page of at most 100 columns, or plain data for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from ..config.run import RunConfig
from ..grid.plan import Bundle
from .caching import ModelShape, Rows
from .devices import GIB
from .memory import DEAD_SHARE, Work
from .overview import JobFigures, Overview, TrainPlan, rounds
from .search import Choice
from .streaming import StreamPlan
from .timing import StepTime

_SHAPES, _GROUPS, _OTHERS = 6, 8, 8  # shown; the rest are counted
_WIDTH, _COLUMN = 100, 19


def text(found: Overview, config: RunConfig, name: str) -> str:
    """The page that `flash-sae plan` prints."""
    lines = [*_head(found, name), *_cache_lines(found, config)]
    if found.train is not None:
        lines += _train_lines(found, found.train)
    lines += ["", *(f"does not fit: {sentence}" for sentence in found.refused)]
    if not found.refused:
        lines.append("fits")
    return "\n".join(_wrapped(lines))


def _wrapped(lines: Iterable[str]) -> list[str]:
    """Lines broken at spaces; what is broken goes on below its own beginning."""
    out: list[str] = []
    for line in lines:
        indent = _COLUMN if line.startswith("  ") and line[_COLUMN - 1 : _COLUMN] == " " else 2
        out += textwrap.wrap(
            line, _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False,
            break_long_words=False,
        ) or [""]  # fmt: skip
    return out


def _head(found: Overview, name: str) -> list[str]:
    launch = found.launch
    hosts = "" if launch.hosts == 1 else f" on {launch.hosts} hosts"
    started = _count(launch.processes, "process")
    rates = "rates measured" if launch.gpu.measured else "rates not measured"
    each = f"{launch.memory / GIB:,.1f} GiB a process"
    lines = [
        f"plan of {name}: {started}{hosts}, {launch.gpu.name} ({each}, {rates})",
        "predictions from shapes, not measurements: memory about 10%, time about 20%",
    ]
    return lines + ([launch.why] if launch.why else [])


def _model_line(model: ModelShape) -> str:
    flops = f"{model.flops / 1e9:,.2f} GFLOP a token to the last hookpoint"
    return f"  model            {model.parameters / 1e9:,.2f}e9 parameters, {flops}"


def _cache_lines(found: Overview, config: RunConfig) -> list[str]:
    hookpoints = _count(len(found.rows.widths), "hookpoint")
    if isinstance(found.rows, StreamPlan):
        plan = found.rows
        lines = ["", f"stream: the model runs beside the steps, {hookpoints}, {plan.dtype}"]
        lines += [_model_line(plan.model)] if plan.model is not None else []
        return lines + ([f"  left out         {plan.left_out}"] if plan.left_out else [])
    return _store_lines(found, found.rows, hookpoints, config)


def _store_lines(found: Overview, there: Rows, hookpoints: str, config: RunConfig) -> list[str]:
    shape = there.shape
    rows = f"{shape.geometry.rows:,} rows x {hookpoints}, {shape.dtype}"
    store = f"  store            {rows}, {_size(there.bytes)}{_free(found, 'cache.store')}"
    if found.cache is None:
        return ["", "cache: the store is there", store]
    plan, lines = found.cache, ["", "cache", store]
    if plan.model is not None:
        lines.append(_model_line(plan.model))
    if plan.device:
        lines.append(f"  GPU memory       {_parts(plan.device)}")
    lines.append(f"  host memory      {_parts(plan.host)} a process")
    if plan.seconds is not None:
        rate = config.cache.rows_to_store() / plan.seconds if config.cache else 0
        lines.append(f"  time             {_time(plan.seconds)} ({rate:,.0f} tokens/s in all)")
    return lines + ([f"  left out         {plan.left_out}"] if plan.left_out else [])


def _train_lines(found: Overview, plan: TrainPlan) -> list[str]:
    launch = found.launch
    members = _count(plan.num_shards * plan.num_replicas, "process")
    groups = f", {len(plan.groups)} groups" if len(plan.groups) > 1 else ""
    lines = [
        "",
        f"train {_count(plan.num_jobs, 'SAE')}: {_count(plan.num_shards, 'shard')} x "
        f"{_count(plan.num_replicas, 'replica')} ({plan.why}), {members} an SAE{groups}",
    ]
    shapes = sorted(plan.jobs, key=lambda figures: -figures.memory.peak)
    lines += _shape_lines(shapes[0], launch.memory)
    if shapes[1:]:
        lines.append("  the others         latents     k           peak      a step")
    lines += [_shape_line(figures) for figures in shapes[1 : _SHAPES + 1]]
    if len(shapes) > _SHAPES + 1:
        lines.append(f"    and {_count(len(shapes) - _SHAPES - 1, 'smaller shape')} (--json)")
    host = sum(plan.host.values())
    lines += [
        "  in all",
        f"    host memory    {_parts(plan.host)} a process, {_size(host * launch.local)} a host",
        f"    disk           {_parts(plan.disk)}{_free(found, 'output')}",
        f"    time           {_time(plan.seconds)}",
    ]
    if len(plan.groups) > 1:
        lines += _group_lines(plan)
    if len(plan.others) > 1:
        lines += _other_lines(plan)
    return lines


def _shape_lines(figures: JobFigures, memory: int) -> list[str]:
    work, m, t = figures.work, figures.memory, figures.time
    more = f" and {figures.num - 1} more" if figures.num > 1 else ""
    lines = [
        f"  {work.name}{more}: width {work.d_in:,}, {work.d_sae:,} latents, k {work.k}, "
        f"{work.train.batch_tokens:,} tokens x {work.steps:,} steps, {work.engine}",
        f"    kept a rank    {_parts(m.kept)}",
        f"    a step         {_parts(m.step)}",
        f"    batches        {_parts(m.feed)}",
        *([f"    beside it      {_parts(m.model)}"] if m.model else []),
        f"    peak           {_size(m.peak)} of {_size(memory)}; {_size(figures.fresh_peak)} "
        "while no latent is dead",
    ]
    for group in ("shards", "replicas", "members"):
        of = [sent for sent in figures.sent if sent.group == group]
        if of:
            parts = ", ".join(f"{s.what} {_size(s.bytes)}" for s in of if s.bytes >= 1 << 20)
            whole = f"{_size(sum(s.bytes for s in of))} in {sum(s.calls for s in of)} collectives"
            lines.append(f"    over {group:9} {whole}{parts and ': '}{parts}")
    rows, back = _size(figures.to_device), _size(figures.to_host)
    to_device = f"{rows} a step to the device, " if figures.to_device else ""
    lines.append(f"    over the bus   {to_device}{back} a checkpoint to the host")
    return [*lines, _time_line(work, t)]


def _time_line(work: Work, t: StepTime) -> str:
    dead = f", {DEAD_SHARE:.0%} dead" if work.revives else ""
    rate = 1e3 * work.train.batch_tokens / t.ms
    rows = f"beside them the store {t.loader:,.2f}"
    if work.stream is not None:
        rows = f"forward passes {t.model:,.2f}"
    return (
        f"    time a step    {t.ms:,.2f} ms (GPU {t.compute:,.2f}, wire {t.wire:,.2f}, {rows}{dead}"
        f"): {rate:,.0f} tokens/s, bound by {t.bound}"
    )


def _shape_line(figures: JobFigures) -> str:
    work, peak = figures.work, _size(figures.memory.peak)
    return (
        f"    {_count(figures.num, 'SAE'):10} {work.d_sae:>13,} {work.k:>5} {peak:>14} "
        f"{figures.time.ms:>8,.2f} ms"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _group_lines(plan: TrainPlan) -> list[str]:
    lines = [f"  which group trains what: at most {rounds(plan.groups)} after one another"]
    busy = sorted(enumerate(plan.groups), key=lambda g: (-sum(b.cost for b in g[1]), g[0]))
    for number, group in sorted(busy[:_GROUPS]):
        lines.append(
            f"    group {number:<5} {_time(sum(b.cost for b in group)):>8}  {_names(group)}"
        )
    if len(busy) > _GROUPS:
        least = sum(b.cost for b in busy[-1][1])
        more = _count(len(busy) - _GROUPS, "group")
        lines.append(f"    and {more}, the least busy for {_time(least)} (--json has all)")
    return lines


def _names(group: Sequence[Bundle]) -> str:
    told = [
        bundle.jobs[0].name + (f" with {len(bundle.jobs) - 1} beside it" if bundle.jobs[1:] else "")
        for bundle in group
    ]
    shown = "; ".join(told[:3])
    return (shown or "nothing") + (f"; {len(told) - 3} more" if len(told) > 3 else "")


def _other_lines(plan: TrainPlan) -> list[str]:
    lines = ["  shards x replicas that these processes can be, for the largest of the SAEs"]
    lines.append("                       peak      a step")
    for choice in plan.others[:_OTHERS]:
        peak, fits = _size(choice.memory.peak), "" if choice.fits else "  does not fit"
        lines.append(f"    {choice!s:11} {peak:>12} {choice.time.ms:>8,.2f} ms{fits}")
    return lines


def _free(found: Overview, key: str) -> str:
    """Free space, where the disk that a launch writes to is one of this machine's."""
    if not found.launch.is_here or key not in found.free_disk:
        return ""
    return f" of {_size(found.free_disk[key])} free"


def _parts(parts: dict[str, int]) -> str:
    whole = _size(sum(parts.values()))
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"{whole}: {told}" if len(parts) > 1 else told


def _size(size: int) -> str:
    """Bytes in the unit that leaves a few digits."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def data(found: Overview) -> dict[str, Any]:
    """The same as plain values: bytes, milliseconds, seconds."""
    launch, cache, train = found.launch, found.cache, found.train
    return {
        "fits": not found.refused,
        "refused": found.refused,
        "launch": {
            "processes": launch.processes,
            "hosts": launch.hosts,
            "gpu": launch.gpu._asdict(),
            "memory": launch.memory,
            "is_here": launch.is_here,
        },
        **_rows_data(found.rows),
        "free": {"host": found.free_host, "disk": found.free_disk},
        "cache": cache
        and {
            "model": cache.model and cache.model._asdict(),
            "device": cache.device,
            "host": cache.host,
            "seconds": cache.seconds,
            "left_out": cache.left_out,
        },
        "train": train and _train_data(train),
    }


def _rows_data(rows: Rows | StreamPlan) -> dict[str, Any]:
    if isinstance(rows, StreamPlan):
        told = {**rows._asdict(), "model": rows.model and rows.model._asdict()}
        return {"store": None, "stream": told}
    store = {"is_there": rows.is_there, "bytes": rows.bytes, "rows": rows.shape.geometry.rows}
    return {"store": store | {"widths": rows.widths, "dtype": rows.dtype}, "stream": None}


def _train_data(plan: TrainPlan) -> dict[str, Any]:
    return {
        "num_shards": plan.num_shards,
        "num_replicas": plan.num_replicas,
        "why": plan.why,
        "jobs": [_job_data(figures) for figures in plan.jobs],
        "groups": [
            [{"jobs": [job.name for job in b.jobs], "seconds": b.cost} for b in group]
            for group in plan.groups
        ],
        "host": plan.host,
        "disk": plan.disk,
        "seconds": plan.seconds,
        "others": [_choice_data(choice) for choice in plan.others],
    }


def _job_data(figures: JobFigures) -> dict[str, Any]:
    work = figures.work
    return {
        "name": work.name,
        "count": figures.num,
        "d_in": work.d_in,
        "d_sae": work.d_sae,
        "k": work.k,
        "engine": work.engine,
        "steps": work.steps,
        "memory": {**figures.memory._asdict(), "peak": figures.memory.peak},
        "peak_while_none_is_dead": figures.fresh_peak,
        "sent": [sent._asdict() for sent in figures.sent],
        "to_device": figures.to_device,
        "to_host": figures.to_host,
        "step_ms": {**figures.time._asdict(), "all": figures.time.ms},
    }


def _choice_data(choice: Choice) -> dict[str, Any]:
    return {
        "num_shards": choice.num_shards,
        "num_replicas": choice.num_replicas,
        "peak": choice.memory.peak,
        "step_ms": choice.time.ms,
        "fits": choice.fits,
    }
