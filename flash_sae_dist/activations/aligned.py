"""Batches of several hookpoints of a store, of the same rows: a transcoder's input and target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .loader import ActivationLoader


class AlignedLoaders:
    """One loader a hookpoint. The order of rows is a function of the store, seed and step alone, so
    that row n of a batch is of the same token for all.
    """

    def __init__(self, loader: Callable[[str], ActivationLoader], hookpoints: list[str]) -> None:
        self.loaders = [loader(hookpoint) for hookpoint in hookpoints]
        self._open = ExitStack()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """See BatchSource."""
        return [loader.shape for loader in self.loaders]

    @property
    def dtype(self) -> torch.dtype:
        """See BatchSource."""
        return self.loaders[0].dtype

    def fill_(self, *out: Tensor) -> None:
        """See BatchSource."""
        for loader, rows in zip(self.loaders, out, strict=True):
            loader.fill_(rows)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for loader in self.loaders:
                stack.enter_context(loader)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from zip(*self.loaders, strict=True)
