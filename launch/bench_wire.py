"""What a step sends: torch.distributed's collectives counted and timed one by one."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# The argument of each collective that holds what this rank contributes.
_CONTRIBUTED = {
    "all_reduce": (0, "tensor"),
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_single": (1, "input_tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),
    "all_to_all": (1, "input_tensor_list"),
    "all_to_all_single": (1, "input"),
    "broadcast": (0, "tensor"),
    "reduce": (0, "tensor"),
}
Mark = float | torch.cuda.Event


class _Call(NamedTuple):
    what: str
    bytes: int
    begin: Mark
    end: Mark


class Collective(NamedTuple):
    """One kind of collective in a step."""

    what: str  # its name, type and shape
    calls: float  # a step
    bytes: float  # that this rank contributes a step
    ms: float  # a step, the wait for slower ranks included


class Sent(NamedTuple):
    """What steps took and sent, each collective waited for at once."""

    ms: float  # a step, median
    compute_ms: float  # outside of collectives
    collectives: list[Collective]  # in the order of their first calls

    @property
    def bytes(self) -> float:
        """That this rank contributes a step."""
        return sum(c.bytes for c in self.collectives)


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _ms(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end))
    return 1e3 * (float(end) - float(begin))  # type: ignore[arg-type]


@contextmanager
def _replaced(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Collectives are wrapped, under whatever name a module of ours has them, too."""
    originals = {name: getattr(dist, name, None) for name in _CONTRIBUTED}
    names = {id(fn): name for name, fn in originals.items() if fn is not None}
    wrapped = {name: wrap(name, originals[name]) for name in names.values()}  # type: ignore[arg-type]
    changed: list[tuple[Any, str, Any]] = []
    for module in list(sys.modules.values()):
        if module is not dist and not getattr(module, "__name__", "").startswith("flash_sae_dist"):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in names and value is originals[names[id(value)]]:
                changed.append((module, attribute, value))
                setattr(module, attribute, wrapped[names[id(value)]])
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def measure_sent(step: Callable[[], Any], device: torch.device, steps: int) -> Sent:
    """Runs steps that launch their collectives from Python, not by a graph's replay, and measures
    them: by CUDA events, or the host's clock on a CPU. Collective over the ranks that step.
    """
    calls: list[_Call] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        place, keyword = _CONTRIBUTED[name]

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else kwargs[keyword]
            tensors: list[Tensor] = list(given) if isinstance(given, (list, tuple)) else [given]
            sent = sum(t.numel() * t.element_size() for t in tensors)
            kind = str(tensors[0].dtype).removeprefix("torch.")
            begin = _mark(device)
            work = original(*args, **kwargs)
            if isinstance(work, dist.Work):
                work.wait()
            what = f"{name} {kind}{[*tensors[0].shape]}"
            calls.append(_Call(what, sent, begin, _mark(device)))
            return work

        return timed

    marks, firsts = [], []
    with _replaced(wrap):
        for _ in range(steps):
            firsts.append(len(calls))
            begin = _mark(device)
            step()
            marks.append((begin, _mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    bounds = zip(firsts, [*firsts[1:], len(calls)], strict=True)
    return _summary([_ms(*pair) for pair in marks], [calls[low:high] for low, high in bounds])


def _summary(whole: list[float], steps: list[list[_Call]]) -> Sent:
    """Medians of steps that took `whole` ms each, and of their collectives by kind."""
    each = [[(c, _ms(c.begin, c.end)) for c in calls] for calls in steps]
    compute = [ms - sum(t for _, t in of) for ms, of in zip(whole, each, strict=True)]
    calls = [c for of in steps for c in of]
    return Sent(
        statistics.median(whole),
        statistics.median(compute),
        [
            Collective(
                what,
                sum(c.what == what for c in calls) / len(steps),
                sum(c.bytes for c in calls if c.what == what) / len(steps),
                statistics.median(sum(t for c, t in of if c.what == what) for of in each),
            )
            for what in dict.fromkeys(c.what for c in calls)
        ],
    )
