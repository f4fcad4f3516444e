"""Where a step's time goes, measured on the steps that are logged."""

from __future__ import annotations

import time

import torch


class PhaseTimer:
    """Milliseconds between marks: device events on CUDA, the host's clock elsewhere; off it costs
    nothing.
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
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Time of each phase, repeated ones added up. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        phases: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                spent = before.elapsed_time(after)
            else:
                spent = (float(after) - float(before)) * 1e3  # type: ignore[arg-type]
            phases[phase] = phases.get(phase, 0.0) + spent
        return phases
