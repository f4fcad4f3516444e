"""Batches on the device, copied and gathered over shards while the steps before them run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ..parallel import collectives
from ..parallel.mesh import Mesh

# One that the consumer reads, the others are filled meanwhile; of large batches, whose steps take
# tens of milliseconds, one.
_BUFFERS = 4
_LARGE_BYTES, _LARGE_BUFFERS = 48 << 20, 2
# Copies that may wait for the device. Nothing else stops the host, which would fill its memory with
# page-locked batches; a device that has 8 steps to make is never idle for it.
_COPIES_AHEAD = 8


def num_buffers(batch_bytes: int) -> int:
    """Batches of a size that a feed has room for on a GPU."""
    return _BUFFERS if batch_bytes <= _LARGE_BYTES else _LARGE_BUFFERS


class BatchSource(Protocol):
    """What a feed takes batches from: a loader of a store, or a model that runs meanwhile."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Of each batch's tensors, one a hookpoint: [N/P, D]."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""

    @property
    def fill_(self) -> Callable[..., None]:
        """Called with a tensor of each shape, on the feed's device: writes the next batch into
        them, as work of the stream that is current there. Raises what makes that batch impossible.
        """


Batch = tuple[Tensor, ...]  # [N, D] of each hookpoint


class _Buffer(NamedTuple):
    batch: Batch
    used: torch.cuda.Event  # recorded on the consumer's stream after its last use


class BatchFeed:
    """Iterates once over a replica's batches on a device, each a tensor [N, D] of every hookpoint
    of the source, made from the rows [N/P, D] that each of its P shards has read.

    On CUDA they are copied, and gathered over the shards, on a stream of the feed's own, up to
    three batches ahead, into buffers that it owns: a batch may be changed in place, and is
    overwritten once the next is asked for. The stream that is current where a batch is asked for
    waits for it; the host does not, unless it is 8 batches ahead of the device. On other devices a
    batch is made when it is asked for.

    Each shard issues its gathers in the order of batches, on a group that nothing else uses, and
    as many as the others where all ask for as many batches. What making a batch raises is raised
    where that batch is asked for. A context manager: leaving it gives back the buffers. Collective
    over the shard group.
    """

    def __init__(
        self,
        source: BatchSource,  # of at least num_batches
        num_batches: int,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.source, self.num_batches = source, num_batches
        self.mesh, self.device = mesh, device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        elements = sum(rows * width for rows, width in source.shapes)
        size = elements * source.dtype.itemsize * mesh.num_shards
        self._num_buffers = num_buffers(size)
        self._buffers: list[_Buffer] = []
        self._filled: deque[torch.cuda.Event] = deque()  # of copies that the host may wait for
        self._error: Exception | None = None

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
        self._error = None

    def __iter__(self) -> Iterator[Batch]:
        if self._stream is not None:
            yield from self._ahead(self._stream)
            return
        for _ in range(self.num_batches):
            batch = self._empty()
            self._make(batch)
            yield batch

    def _ahead(self, stream: torch.cuda.Stream) -> Iterator[Batch]:
        filled: deque[torch.cuda.Event] = deque()  # by batch, of those not given out
        fetched = 0
        for number in range(self.num_batches):
            # The same number ahead on every shard, as gathers must not change places with steps.
            while self._error is None and fetched < min(
                number + self._num_buffers, self.num_batches
            ):
                self._fetch(fetched, stream, filled)
                fetched += 1
            if not filled:
                self._raise()
            torch.cuda.current_stream(self.device).wait_event(filled.popleft())
            batch, used = self._buffers[number % self._num_buffers]
            yield batch
            used.record(torch.cuda.current_stream(self.device))

    def _raise(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        try:
            raise error
        finally:
            # Its traceback holds this frame, and so the memory of both.
            error = None

    def _fetch(
        self, number: int, stream: torch.cuda.Stream, filled: deque[torch.cuda.Event]
    ) -> None:
        """Issues the copy and the gather of a batch; an error is kept for where it is asked for."""
        while len(self._filled) >= _COPIES_AHEAD:
            self._filled.popleft().synchronize()
        if number < self._num_buffers:
            used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            batch = self._empty()
            # The memory may have been another tensor's, which work on this stream still reads.
            used.record(torch.cuda.current_stream(self.device))
            self._buffers.append(_Buffer(batch, used))
        batch, used = self._buffers[number % self._num_buffers]
        # The host sleeps where it waits for this event: the loader's threads need its core.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(used)
            try:
                self._make(batch)
            except Exception as e:
                self._error = e
                return
            event.record(stream)
        self._filled.append(event)
        filled.append(event)

    def _make(self, batch: Batch) -> None:
        """Writes a batch, on the current stream."""
        self.source.fill_(*(x.chunk(self.mesh.num_shards)[self.mesh.shard] for x in batch))
        for x in batch:
            collectives.gather_batch_(x, self.mesh)

    def _empty(self) -> Batch:
        return tuple(
            torch.empty(
                (rows * self.mesh.num_shards, width), dtype=self.source.dtype, device=self.device
            )
            for rows, width in self.source.shapes
        )
