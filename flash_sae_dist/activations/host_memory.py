"""Host memory of exact size, page-locked for copies to and from a GPU."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from .. import page_lock

logger = logging.getLogger(__name__)


class PageLocked:
    """Owns tensors on the host; `close` unlocks them, and nothing may use them from then on."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._locked: list[int] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, lock: bool) -> Tensor:
        """A tensor [shape], page-locked where asked for and where the system lets us; a copy to
        pageable memory is right too, but the host waits for it.
        """
        size = math.prod(shape) * dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8)
        self._tensors.append(raw)
        if lock and size:
            code = page_lock.lock(raw.data_ptr(), size)
            if code == 0:
                self._locked.append(raw.data_ptr())
            else:
                logger.warning(
                    "%.1f GiB of host memory could not be page-locked (CUDA error %d; see "
                    "ulimit -l): copies from the GPU are slower",
                    size / 2**30,
                    code,
                )
        return raw.view(dtype).view(shape)

    def close(self) -> None:
        """Unlocks and forgets the memory. No copy may be under way."""
        for address in self._locked:
            page_lock.unlock(address)
        self._locked.clear()
        self._tensors.clear()
