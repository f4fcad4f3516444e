"""A second CUDA stream for small work beside large kernels; nothing at all on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Work put `beside` begins when all that the current stream was given so far is done, and runs
    while that stream goes on.

    Tensors that cross must live until the streams `meet` again.
    """

    def __init__(self, device: torch.device) -> None:
        # Of high priority: its kernels need not wait for a large one's last program.
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Runs the block's device work on the second stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The second stream's work so far, for `wait`."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """The current stream goes on when a mark's work is done, whatever was put beside since."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def meet(self) -> None:
        """The current stream goes on when all work beside it is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
