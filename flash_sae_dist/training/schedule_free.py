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


class ScheduleFreeSign(torch.optim.Optimizer):
    """Parameters are y while training; `eval()` puts x in their place, `train()` y again."""

    def __init__(
        self, params: Iterable[Tensor] | list[dict[str, Any]], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.momentum, self.count, self.at_average = momentum, 0, False

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

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the average in the parameters' place."""
        self._swap(to_average=True, weight=1 - 1 / self.momentum)

    @torch.no_grad()
    def train(self) -> None:
        """Undoes `eval`."""
        self._swap(to_average=False, weight=1 - self.momentum)

    def _swap(self, *, to_average: bool, weight: float) -> None:
        if self.at_average == to_average:
            return
        self.at_average = to_average
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)
