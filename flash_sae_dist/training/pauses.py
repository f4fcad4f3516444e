"""What the members of a mesh agree on between two steps: to stop for a signal that any of them
got, that a checkpoint is due by the first one's clock, and that one could not be written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import ending
from ..parallel import collectives
from ..parallel.mesh import Mesh
from .metrics import HostCopy

# Seconds between two looks, in steps as they come; at most so many, since steps may become slower.
_LOOK_S, _MAX_STEPS = 0.5, 100


class Pause(NamedTuple):
    """What is to be done before a step, the same on every member."""

    signal: int = 0
    """Stop, for this signal; 0 goes on."""
    checkpoint: bool = False
    failed: bool = False
    """Some member could not write a checkpoint."""


class Pauses:
    """Asked before each step. One member looks at its own flag and clock; several send theirs in
    one small all-reduce about every half second, which is read at the next look, so that the host
    waits for no device: under 0.1% of the steps between two looks.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        minutes: float | None,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.mesh, self.device, self._failed = mesh, device, failed
        self._period = None if minutes is None else 60 * minutes
        self._saved = self._looked = time.monotonic()
        self._next, self._steps = -1, 1
        self._sent: HostCopy | None = None

    def before(self, step: int) -> Pause:
        """What all members do before a step. Collective over the members."""
        if self.mesh.members == 1:
            return self._noted(Pause(ending.requested(), self._is_due(), self._failed()))
        if step < self._next:
            return Pause()
        first = self._next < 0
        found = self._read()
        if found.signal or found.failed:
            return found
        self._send()
        # Before the first step nothing is on its way; slow steps, and a host that computes, lose
        # nothing by waiting.
        if first or self.device.type != "cuda" or self._steps == 1:
            later = self._read()
            found = Pause(later.signal, found.checkpoint or later.checkpoint, later.failed)
        self._next = step + self._steps
        return found

    def _noted(self, pause: Pause) -> Pause:
        if pause.checkpoint:
            self._saved = time.monotonic()
        return pause

    def _is_due(self) -> bool:
        return (
            self._period is not None
            and self.mesh.is_lead
            and time.monotonic() - self._saved >= self._period
        )

    def _send(self) -> None:
        now = time.monotonic()
        pace = (now - self._looked) / self._steps
        self._looked = now
        wanted = min(_MAX_STEPS, max(1, int(_LOOK_S / max(pace, 1e-6))))
        told = [ending.requested(), int(self._is_due()), int(self._failed()), wanted]
        words = torch.tensor(told, dtype=torch.int32)
        if self.device.type == "cuda":
            # From page-locked memory: any other copy would wait for the device.
            words = words.pin_memory().to(self.device, non_blocking=True)
        mesh = self.mesh
        collectives.all_reduce_(words, mesh.member_group, mesh.members, dist.ReduceOp.MAX)
        self._sent = HostCopy(words.unbind())

    def _read(self) -> Pause:
        if self._sent is None:
            return Pause()
        number, due, failed, steps = (int(word) for word in self._sent.read())
        self._sent, self._steps = None, steps
        return self._noted(Pause(number, bool(due), bool(failed)))
