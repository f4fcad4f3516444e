"""Forward passes whose rows go straight where they belong, on the model's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .language_model import LanguageModel, Pass, tapped
from .probe import check_ids
from .row_plan import Batch

_PASSES_AHEAD = 4
# Takes rows [n, D] of a hookpoint and a shard, and the places [n] in the shard that they go to.
Put = Callable[[str, int, Tensor, Tensor], None]


class _Part(NamedTuple):
    """Where rows of a pass go, on the device that has them."""

    shard: int
    source: Tensor  # [n] int64
    target: Tensor  # [n] int64


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device, for which the host does not wait."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Passes:
    """Runs a model on batches; the rows of each piece, in a dtype, are given to `put` inside of the
    pass, as tensors of their own. The model's hooks are there while this context manager is open.
    On a GPU the host goes on meanwhile, four passes ahead at most.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hookpoints: list[str],
        dtype: torch.dtype,
        put: Put,
    ) -> None:
        self.lm, self.hookpoints, self.dtype, self.put = lm, hookpoints, dtype, put
        self._batch: Batch | None = None
        self._parts: dict[torch.device, list[_Part]] = {}
        self._ahead: deque[torch.cuda.Event] = deque()
        self._hooks = ExitStack()
        self._run: Pass | None = None

    def __enter__(self) -> Self:
        self._run = self._hooks.enter_context(tapped(self.lm, self.hookpoints, self._take))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()
        self._parts.clear()

    def run(self, batch: Batch) -> None:
        """One pass, as work of the current stream. Raises ConfigError for ids that the model has
        no embeddings for.
        """
        assert self._run is not None
        self._batch = batch
        self._parts.clear()
        # Known of the first parts of the text alone; on a GPU the model would end the process.
        check_ids(self.lm, int(batch.ids.max()))
        device = self.lm.device
        attention = None if batch.attention.all() else to_device(batch.attention, device)
        self._run(to_device(batch.ids.astype(np.int64), device), attention)
        if device.type == "cpu":
            return
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
        self._ahead.append(done)
        if len(self._ahead) > _PASSES_AHEAD:
            self._ahead.popleft().synchronize()

    def _take(self, hookpoint: str, value: Tensor) -> None:
        flat = value.reshape(-1, value.shape[-1])
        for shard, source, target in self._parts_on(value.device):
            self.put(hookpoint, shard, flat.index_select(0, source).to(self.dtype), target)

    def _parts_on(self, device: torch.device) -> list[_Part]:
        assert self._batch is not None
        if device not in self._parts:
            self._parts[device] = [
                _Part(p.shard, *(to_device(v, device) for v in (p.source, p.target)))
                for p in self._batch.pieces
            ]
        return self._parts[device]
