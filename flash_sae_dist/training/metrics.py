"""What training measures: a step's metrics, where its time goes, and `metrics.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import write_text

LogMetrics = Callable[[str, dict[str, float], int], None]  # job, values, step


class StepMetrics(NamedTuple):
    """What a step measured, left on the device."""

    fvu: Tensor  # scalar, over all replicas
    aux: Tensor  # scalar, AuxK or ghost loss over all replicas; 0 while no latent is dead
    l0: Tensor  # scalar, mean active latents a token


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
    scalars: HostCopy  # those of StepMetrics, then the number of dead latents
    phases: tuple[PhaseTimer, ...]  # of this step
    pace: Pace  # since the step logged before

    def values(self) -> dict[str, float]:
        """What is logged, by name. Waits for this step where the device has not made it yet."""
        *metrics, dead = self.scalars.read()
        values = dict(zip(StepMetrics._fields, metrics, strict=True))
        values |= {"dead_fraction": dead / self.d_sae, "lr": self.lr}
        values |= {"tokens_per_s": self.pace.tokens_per_s()}
        for timer in self.phases:
            values |= {f"ms/{phase}": ms for phase, ms in timer.milliseconds().items()}
        return values


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`; a resumed run drops the lines after its
    checkpoint first.
    """

    def __init__(self, path: Path, resume_step: int, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled:
            kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line and hands it to the operating system, so that a killed run keeps it."""
        if self.enabled:
            with self.path.open("a") as f:
                f.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
