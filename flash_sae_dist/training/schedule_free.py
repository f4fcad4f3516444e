"""Sign descent with momentum, averaged in place of a schedule: sparsify's default optimizer.

Defazio et al. 2024 (arXiv 2405.15682) around the sign of the gradient: gradients are taken at y
between the average x and the fast z, which moves by lr a step in each coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import schedule_free_

MOMENTUM = 0.95


class ScheduleFreeSign(torch.optim.Optimizer):
    """On dense gradients. Parameters are y while training; `average` gives x."""

    def __init__(
        self, params: Iterable[Tensor] | list[dict[str, Any]], lr: float, momentum: float = MOMENTUM
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.momentum, self.count = momentum, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the parameters' gradients."""
        del closure
        self.count += 1
        for group in self.param_groups:
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.detach().clone())
                schedule_free_(y, z, y.grad, group["lr"], 1 / self.count, self.momentum)

    def average(self, y: Tensor) -> Tensor:
        """x of a parameter that is at y; the same tensor before the first step."""
        state = self.state[y]
        return y.lerp(state["z"], 1 - 1 / self.momentum) if "z" in state else y
