"""Batches from a model that runs while they are trained on: a buffer on the device, refilled by
forward passes, from which batches are gathered.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .. import ending
from ..config.base import UserError
from ..parallel import collectives
from ..parallel.mesh import Mesh
from .language_model import LanguageModel
from .passes import Passes, to_device
from .stream_order import StreamOrder, Window
from .writer import row_sums

logger = logging.getLogger(__name__)
_Turn = tuple[Window, int]


class StreamedBatches:
    """This rank's rows of each batch, [batch_tokens / members, D] for each of several hookpoints,
    whose rows one forward pass gives. A batch source of `BatchFeed`; a context manager, which gives
    back the buffer.

    All passes and gathers are work of the stream that is current where batches are asked for; the
    host waits for none of it but where it is four passes ahead. What is passed next is worked out
    by a thread.
    """

    def __init__(
        self,
        lm: LanguageModel,
        widths: dict[str, int],  # by hookpoint
        order: StreamOrder,
        dtype: torch.dtype,
        *,
        rows: int,
        start_step: int,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        """rows: of a batch of this rank, of which start_step batches have been read before."""
        self.lm, self.widths, self.order, self.dtype = lm, widths, order, dtype
        self.shapes = [(rows, width) for width in widths.values()]
        self.mesh, self.device, self.start_step = mesh, device, start_step
        self._windows = order.windows(start_step * rows)
        self._rings: dict[str, Tensor] = {}
        self._places = torch.empty(0, dtype=torch.int64)
        self._at, self._epoch = 0, -1
        self._sums: dict[str, Tensor] = {}  # [D + 1] float64, of the first rows
        self._num_summed = 0
        self.num_passes, self._spent = 0, _Spent(device)
        self._passes = Passes(lm, list(widths), dtype, self._put)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next: Future[_Turn] | None = None

    def __enter__(self) -> Self:
        size = self.order.shape.rows
        for hookpoint, width in self.widths.items():
            self._rings[hookpoint] = torch.empty(
                (size, width), dtype=self.dtype, device=self.device
            )
        self._passes.__enter__()
        self._next = self._thread.submit(next, self._windows)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.order.leave()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._passes.__exit__(kind, error, trace)
        self._rings.clear()
        self._sums.clear()
        if error is None and self.mesh.is_lead:
            logger.info("forward passes: %d, %.1f s", self.num_passes, self._spent.seconds())

    def _rows_of(self, chunk: int, hookpoint: str) -> Tensor:
        rows = self.order.shape.chunk_rows
        return self._rings[hookpoint][chunk * rows : (chunk + 1) * rows]

    def _put(self, hookpoint: str, chunk: int, rows: Tensor, target: Tensor) -> None:
        # The model may be spread over several GPUs.
        device = self.device
        self._rows_of(chunk, hookpoint).index_copy_(0, target.to(device), rows.to(device))

    def fill_(self, *outs: Tensor) -> None:
        """Writes the next batch into outs, [rows, D] for each hookpoint, as work of the current
        stream. Raises what the text or the model met.
        """
        done, rows = 0, len(outs[0])
        while done < rows:
            while self._at == len(self._places):
                self._turn()
            index = self._places[self._at : self._at + rows - done]
            for out, ring in zip(outs, self._rings.values(), strict=True):
                torch.index_select(ring, 0, index, out=out[done : done + len(index)])
            self._at, done = self._at + len(index), done + len(index)

    def _turn(self) -> None:
        """Runs the passes of the next window."""
        assert self._next is not None
        window, skip = self._waited(self._next)
        self._next = self._thread.submit(next, self._windows)
        is_first = self._epoch < 0
        self._tell(window)
        with self._spent:
            for batch in window.batches:
                self._passes.run(batch)
        self.num_passes += len(window.batches)
        self._places, self._at = to_device(window.places, self.device), skip
        if is_first and not self.start_step:
            self._sum_up(window.fresh)

    def _waited(self, window: Future[tuple[Window, int]]) -> tuple[Window, int]:
        """A window whose text may still be made. Raises StopAsked where a signal asks for it
        meanwhile; members of a mesh stop together, between two steps.
        """
        while self.mesh.members == 1:
            with suppress(TimeoutError):
                return window.result(timeout=0.5)
            if ending.requested():
                raise ending.StopAsked
        return window.result()

    def _tell(self, window: Window) -> None:
        before, self._epoch = self._epoch, window.epoch
        if not self.mesh.is_lead:
            return
        if before < 0:
            logger.info("filling the buffer: %d forward passes", len(window.batches))
        elif before == 0 < window.epoch:
            logger.info(
                "the text is over after %d tokens to train on: it is read again, in another order "
                "each time",
                self.order.rows_found,
            )

    def _sum_up(self, chunks: list[tuple[int, int]]) -> None:
        for hookpoint in self.widths:
            parts = [self._rows_of(c, hookpoint)[:rows] for c, rows in chunks]
            self._sums[hookpoint] = torch.stack([row_sums(part) for part in parts]).sum(dim=0)
        self._num_summed = sum(rows for _, rows in chunks)

    def root_mean_square(self, hookpoint: str) -> float | None:
        """Of the elements of the rows that the buffers of all members held when they were full for
        the first time; None in a stream that began elsewhere than at its start. A host sync;
        collective over the members. Raises UserError where they are not finite.
        """
        if not self._sums:
            return None
        total = self._sums[hookpoint][-1:].clone()
        count = torch.full_like(total, self._num_summed * self.widths[hookpoint])
        both = torch.cat([total, count])
        collectives.all_reduce_(both, self.mesh.member_group, self.mesh.members)
        square, elements = both.tolist()
        rms = math.sqrt(max(0.0, square) / max(1.0, elements))
        if not math.isfinite(rms):
            raise UserError(
                f"activations of {hookpoint} are not finite in {str(self.dtype)[6:]}; "
                "set cache.dtype=bfloat16 or float32, or model.dtype=float32"
            )
        return rms


class _Spent:
    """Seconds of what is inside of it: the device's, as far as it has one, else the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._seconds = device, 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = 0.0

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._first = self._event()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._pairs.append((self._first, self._event()))
        else:
            self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """So far; waits for the device."""
        for first, last in self._pairs:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        self._pairs.clear()
        return self._seconds
