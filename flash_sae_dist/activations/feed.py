"""Batches on the device, copied and gathered over shards while the step before them runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..parallel import collectives
from ..parallel.mesh import Mesh

# One that the consumer reads, one that is filled meanwhile.
_BUFFERS = 2
# Copies that may wait for the device. Nothing else stops the host, which would fill its memory with
# page-locked batches; a device that has 8 steps to make is never idle for it.
_COPIES_AHEAD = 8


class _Buffer(NamedTuple):
    batch: Tensor  # [N, D]
    used: torch.cuda.Event  # recorded on the consumer's stream after its last use


class BatchFeed:
    """Iterates once over a replica's batches [N, D] on a device, made from the rows [N/P, D] that
    each of its P shards has read.

    On CUDA the rows must lie in page-locked memory. They are copied, and gathered over the shards,
    on a stream of the feed's own, a batch ahead, into two buffers that it owns: a batch may be
    changed in place, and is overwritten once the next is asked for. The stream that is current
    where a batch is asked for waits for it; the host does not, unless it is 8 batches ahead of the
    device. On other devices a batch is made when it is asked for.

    Each shard issues its gathers in the order of batches, on a group that nothing else uses, and
    as many as the others where all ask for as many batches. What reading a batch raises is raised
    where that batch is asked for. A context manager: leaving it gives back the buffers. Collective
    over the shard group.
    """

    def __init__(
        self,
        batches: Iterable[Tensor],  # [N/P, D] each, at least num_batches
        num_batches: int,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.batches, self.num_batches = iter(batches), num_batches
        self.mesh, self.device = mesh, device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[_Buffer] = []
        self._filled: deque[torch.cuda.Event] = deque()  # by batch, the newest last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            # A batch may be under way still, into memory that this stream may use from here on.
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._buffers.clear()

    def __iter__(self) -> Iterator[Tensor]:
        if self._stream is not None:
            yield from self._ahead(self._stream)
            return
        for _ in range(self.num_batches):
            rows = next(self.batches).to(self.device)
            if self.mesh.num_shards > 1:
                batch = self._empty(rows)
                self._own_rows(batch).copy_(rows)
                collectives.gather_batch_(batch, self.mesh)
                rows = batch
            yield rows

    def _ahead(self, stream: torch.cuda.Stream) -> Iterator[Tensor]:
        error: Exception | None = None
        if self.num_batches:
            self._fetch(0, stream)
        for number in range(self.num_batches):
            if error is not None:
                try:
                    raise error
                finally:
                    # Its traceback holds this frame, and so the memory of both.
                    error = None
            batch, used = self._buffers[number % _BUFFERS]
            torch.cuda.current_stream(self.device).wait_event(self._filled[-1])
            if number + 1 < self.num_batches:
                try:
                    self._fetch(number + 1, stream)
                except Exception as e:
                    error = e
            yield batch
            used.record(torch.cuda.current_stream(self.device))

    def _fetch(self, number: int, stream: torch.cuda.Stream) -> None:
        """Issues the copy and the gather of a batch."""
        while len(self._filled) >= _COPIES_AHEAD:
            self._filled.popleft().synchronize()
        rows = next(self.batches)
        if number < _BUFFERS:
            used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            batch = self._empty(rows)
            # The memory may have been another tensor's, which work on this stream still reads.
            used.record(torch.cuda.current_stream(self.device))
            self._buffers.append(_Buffer(batch, used))
        batch, used = self._buffers[number % _BUFFERS]
        # The host sleeps where it waits for this event: the loader's threads need its core.
        filled = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(used)
            self._own_rows(batch).copy_(rows, non_blocking=True)
            collectives.gather_batch_(batch, self.mesh)
            filled.record(stream)
        self._filled.append(filled)

    def _empty(self, rows: Tensor) -> Tensor:
        shape = (rows.shape[0] * self.mesh.num_shards, rows.shape[1])
        return torch.empty(shape, dtype=rows.dtype, device=self.device)

    def _own_rows(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.mesh.num_shards)[self.mesh.shard]
