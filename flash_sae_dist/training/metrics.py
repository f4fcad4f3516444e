"""What training measures: a step's metrics, where its time goes, and `metrics.jsonl`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import json_text, parse_json, write_text

logger = logging.getLogger(__name__)
LogMetrics = Callable[[str, dict[str, float], int], None]  # job, values, step


class StepMetrics(NamedTuple):
    """What a step measured, left on the device."""

    fvu: Tensor  # scalar, over all replicas
    aux: Tensor  # scalar, AuxK or ghost loss over all replicas; 0 while none is listed as dead
    l0: Tensor  # scalar, mean active latents a token
    penalty: Tensor  # scalar, what sparsity costs beside FVU; 0 for the TopK family


class PhaseTimer:
    """Milliseconds between marks: events on the current stream of a CUDA device, the host's clock
    elsewhere; disabled, it costs nothing.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("start")

    def mark(self, phase: str) -> None:
        """Ends a phase that began at the mark before."""
        if not self.enabled:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Time of each phase, repeated ones added up. Waits for the last mark, not for the
        device.
        """
        phases: dict[str, float] = {}
        if self.marks and isinstance(last := self.marks[-1][1], torch.cuda.Event):
            last.synchronize()
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                spent = before.elapsed_time(after)
            else:
                spent = (float(after) - float(before)) * 1e3  # type: ignore[arg-type]
            phases[phase] = phases.get(phase, 0.0) + spent
        return phases


class Pace:
    """Tokens trained on between two logs, by the clock of a `PhaseTimer`."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = 0
        self._timer = PhaseTimer(device, enabled=True)

    def stop(self) -> None:
        """Ends the interval with what the device was given so far."""
        self._timer.mark("steps")

    def tokens_per_s(self) -> float:
        """Mean over the interval. Waits for its end."""
        return self.tokens * 1e3 / self._timer.milliseconds()["steps"]


class HostCopy:
    """Scalars on their way from a device to the host.

    On CUDA they are packed on the current stream, so that what is written into them later does no
    harm, and copied into page-locked memory behind an event. Elsewhere they are read at once.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        self._ready: torch.cuda.Event | None = None
        if not scalars or not scalars[0].is_cuda:
            self._host = torch.tensor([float(s) for s in scalars], dtype=torch.float64)
            return
        # Exact for float32 and for counts below 2^53.
        packed = torch.stack([s.detach().to(torch.float64) for s in scalars])
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        self._ready = torch.cuda.current_stream(packed.device).record_event()

    def read(self) -> list[float]:
        """The values, in order. Waits for the work that came before the copy, no later work."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()


class LoggedStep(NamedTuple):
    """A step of one SAE that is logged, its measurements on their way to the host."""

    step: int
    lr: float
    d_sae: int
    # Those of StepMetrics, those beside them, then the number of dead latents.
    scalars: HostCopy
    beside: tuple[str, ...]  # names, as of `Member.beside`
    phases: tuple[PhaseTimer, ...]  # of this step
    pace: Pace  # since the step logged before

    def values(self) -> dict[str, float]:
        """What is logged, by name. Waits for this step where the device has not made it yet."""
        *metrics, dead = self.scalars.read()
        values = dict(zip([*StepMetrics._fields, *self.beside], metrics, strict=True))
        values |= {"dead_fraction": dead / self.d_sae, "lr": self.lr}
        values |= {"tokens_per_s": self.pace.tokens_per_s()}
        for timer in self.phases:
            values |= {f"ms/{phase}": ms for phase, ms in timer.milliseconds().items()}
        return values


class MetricsLog:
    """Appends one sealed JSON object a line to `metrics.jsonl`; a resumed run drops the lines after
    its checkpoint first.
    """

    def __init__(self, path: Path, resume_step: int, logged: int, *, enabled: bool) -> None:
        """logged: the last step that had a line when the checkpoint was written."""
        self.path, self.enabled, self.last = path, enabled, logged
        if enabled:
            kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
            if (last := kept[-1]["step"] if kept else 0) < logged:
                logger.warning(
                    "%s was cut short: its lines of steps %d to %d stay out of the curve",
                    path, last + 1, logged,
                )  # fmt: skip
            write_text(path, "".join(json_text(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line and hands it to the operating system, so that a killed run keeps it."""
        self.last = line["step"]
        if self.enabled:
            with self.path.open("a") as f:
                f.write(json_text(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file. A last line cut short by a kill is left out; other damaged
    ones too, with a warning.
    """
    if not path.exists():
        return []
    whole, bad = split_metrics(path.read_bytes())
    if bad:
        logger.warning(
            "%s is damaged in line %s; left out of the curve", path, ", ".join(map(str, bad))
        )
    return whole


def split_metrics(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The values of the whole lines of a metrics file, and the numbers of those that do not hold
    what was written.
    """
    *texts, torn = data.split(b"\n")
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    # A line without its end is one that a kill cut short, however much of it is there.
    del torn
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            if type(line.get("step")) is not int:
                raise ValueError("it has no step")
        except ValueError:
            bad.append(number)
            continue
        lines.append(line)
    return lines, bad
