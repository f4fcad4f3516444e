"""Batches from a store: the order is a function of (seed, step) alone, blocks are read ahead by
threads, or for a GPU by processes, checksums verified.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config.train import Preload
from .blocks import REQUESTS, BlockReader, BlockSpace
from .holdout import held_out, served_rows
from .order import BlockOrder, Ints
from .preload import HostRows, choose_preload
from .read_ahead import Plan, ReadAhead
from .read_processes import Piece, ReadProcesses, SharedMemory
from .store import ActivationStore
from .stored_rows import decode_int8, float_dtype

logger = logging.getLogger(__name__)
# Batches read ahead, as far as they come to no more than this, which hides a disk's latency.
_BATCHES_AHEAD = 8
_RING_BYTES = 256 << 20
# Times as many from an object store, which answers after tens of milliseconds.
_REMOTE_AHEAD = 4
# Blocks that are copied to the device and gathered at a time: a batch of more comes in parts.
_PART_BYTES = 16 << 20
_PARTS_AHEAD = 32
READERS = 8


def is_async(device: torch.device) -> bool:
    """Whether copies go to memory of the device's own, and the host goes on meanwhile."""
    return device.type != "cpu"


def copied_event(device: torch.device) -> torch.cuda.Event:
    """An event behind what the current stream was given; a host that waits for it sleeps, since the
    threads need its core.
    """
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def readers_of(store: ActivationStore, hookpoint: str) -> list[BlockReader]:
    """Of a hookpoint's rows, and of their scales where the store has int8."""
    kinds = ["activations", *(["scales"] if store.dtype == "int8" else [])]
    return [BlockReader(store, f"{kind}/{hookpoint}") for kind in kinds]


class _Copy(NamedTuple):
    """Rows of the ring on their way to the memory that batches are gathered from."""

    source: int
    target: int
    rows: int


class _Part(NamedTuple):
    """How a batch, or a part of one, comes out of the blocks of a plan."""

    copies: list[_Copy]
    places: Tensor  # [n] int32, page-locked for a CUDA device: places of its rows


class _Memory:
    """Blocks that batches are gathered from: a ring for each array that threads or processes read
    into, and on a device those that were copied there.
    """

    def __init__(self, readers: list[BlockReader], device: torch.device) -> None:
        """readers: of the rows, and of their scales where the store has int8."""
        self.readers, self.device = readers, device
        self.is_async, self.pin = is_async(device), device.type == "cuda"
        self.shared: SharedMemory | None = None
        self.rings: list[Tensor] = []

    def _rows(
        self, reader: BlockReader, num_blocks: int, device: torch.device | str, pin: bool = False
    ) -> Tensor:
        shape = (num_blocks * reader.chunk_rows, *reader.tail)
        return torch.empty(shape, dtype=reader.torch_dtype, device=device, pin_memory=pin)

    def share(self, num_slots: int) -> None:
        """Makes rings of memory that other processes map."""
        sizes = [num_slots * reader.chunk_bytes for reader in self.readers]
        self.shared = SharedMemory(sum(sizes), self.pin)
        for reader, part in zip(self.readers, torch.split(self.shared.bytes, sizes), strict=True):
            shape = (num_slots * reader.chunk_rows, *reader.tail)
            self.rings.append(part.view(reader.torch_dtype).view(shape))

    def pieces(self, block: int, slot: int) -> list[Piece]:
        """What other processes are to read of a block into a slot of the rings."""
        found, start = [], 0
        for reader, ring in zip(self.readers, self.rings, strict=True):
            at = start + slot * reader.chunk_bytes
            found.append((*reader.place(block), at, reader.chunk_bytes))
            start += ring.nbytes
        return found

    def allocate(self, num_slots: int, num_staged: int, num_index: int) -> None:
        """num_staged: blocks of the device's memory, 0 where batches come out of the ring."""
        if self.shared is None:
            self.rings = [self._rows(r, num_slots, "cpu", self.pin) for r in self.readers]
        spaces = []
        for reader, ring in zip(self.readers, self.rings, strict=True):
            bits = ring.view(torch.uint16) if ring.dtype == torch.bfloat16 else ring
            blocks = bits.numpy().reshape(num_slots, reader.chunk_rows, *reader.tail)
            spaces.append([BlockSpace.of(block) for block in blocks])
        self.spaces = list(zip(*spaces, strict=True))
        self.is_staged, self.staged = num_staged > 0, self.rings
        if self.is_staged:
            self.staged = [self._rows(r, num_staged, self.device) for r in self.readers]
        self.index = torch.empty((_PARTS_AHEAD, num_index), dtype=torch.int32, pin_memory=self.pin)
        self.device_index = torch.empty(num_index, dtype=torch.int32, device=self.device)

    def gather_(self, part: _Part, out: Tensor) -> None:
        """Copies a part's blocks and gathers its rows [n, D] from them, on the current stream."""
        for source, target, rows in part.copies:
            for staged, ring in zip(self.staged, self.rings, strict=True):
                staged[target : target + rows].copy_(
                    ring[source : source + rows], non_blocking=True
                )
        index = part.places
        if self.is_async:
            index = self.device_index[: len(index)].copy_(index, non_blocking=True)
        if len(self.staged) == 1:
            torch.index_select(self.staged[0], 0, index, out=out)
            return
        codes, scales = (staged.index_select(0, index) for staged in self.staged)
        decode_int8(codes, scales, out)


class ActivationLoader:
    """Iterates over this rank's rows [batch_tokens / num_ranks, D] of num_steps batches from
    start_step on, on a device; `fill_` writes them where they are to be.

    Batch i is rows i * batch_tokens .. (i + 1) * batch_tokens of a stream that `BlockOrder`
    defines; rank r of n takes its r-th n-th. So the batches depend neither on the number of ranks
    nor on `preload`, and a run resumes exactly at any step. Blocks are read whole into a ring, from
    there copied whole to the device, and the rows of a batch gathered there: rows that are held out
    stay behind. A context manager: reading begins where it is entered and ends where it is left.
    """

    def __init__(
        self,
        store: ActivationStore,
        hookpoint: str,
        *,
        batch_tokens: int,
        seed: int | None,
        start_step: int = 0,
        num_steps: int,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
        holdout: float = 0.0,
        only_held_out: bool = False,
        preload: Preload = "none",
    ) -> None:
        """seed: None for rows in the order of their numbers. holdout: the share of rows, in whole
        documents, that the stream leaves out (see `held_out`), or holds alone. Raises ValueError
        for a batch that the ranks cannot split and for a stream without rows, UserError where rows
        that are to be preloaded do not fit.
        """
        if batch_tokens % num_ranks:
            raise ValueError(
                f"batch_tokens={batch_tokens} is not divisible by the {num_ranks} ranks reading it"
            )
        self._readers = readers_of(store, hookpoint)
        self.reader = self._readers[0]
        self.device, self.rank = torch.device(device), rank
        self.dtype = float_dtype(store.dtype)
        self.shape = (batch_tokens // num_ranks, store.width(hookpoint))
        self.batch_tokens, self.steps = batch_tokens, range(start_step, start_step + num_steps)
        self.left_out = held_out(store, holdout)
        self.kept = served_rows(store, self.left_out, alone=only_held_out)
        if not self.kept.counts.any():
            raise ValueError(f"no row of the store is held out by holdout={holdout}")
        self.order = BlockOrder(self.kept.counts, seed)
        if rank == 0 and holdout and not only_held_out:
            logger.info("train.holdout=%g %s", holdout, self.left_out.told())
        epochs, told = num_steps * batch_tokens / self.order.rows, rank == 0
        self.preload = choose_preload(preload, self.reader, epochs, self.device, tell=told)
        self._host = [HostRows(r) for r in self._readers] if self.preload == "host" else None
        self._memory = _Memory(self._readers, self.device)
        self._ahead = self._allocate()
        self._unreleased: deque[tuple[Plan, torch.cuda.Event]] = deque()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """See BatchSource."""
        return [self.shape]

    def _by_processes(self) -> bool:
        """Where the thread that takes batches launches work on a GPU, and memory can be shared."""
        is_plain = self._host is None
        return is_plain and self.device.type == "cuda" and hasattr(os, "memfd_create")

    def _allocate(self) -> ReadAhead | ReadProcesses:
        """Memory that does not grow, whatever the store and the batch."""
        size, rows, share = self.reader.chunk_bytes, self.reader.chunk_rows, self.shape[0]
        a_batch = -(-share // rows) + 2
        self._part_blocks = max(1, min(_PART_BYTES // size, a_batch))
        ahead = _BATCHES_AHEAD * (_REMOTE_AHEAD if self.reader.remote else 1)
        fitting = min(_RING_BYTES // size, ahead * a_batch)
        # A part beside the block that it has from the one before, while another is read.
        self._slots = max(2 * self._part_blocks + 2, fitting)
        self._staged = self._slots
        if self.preload == "device":
            self._staged = self.reader.num_blocks
        elif self._memory.is_async:
            self._staged = self._part_blocks + 1
        own = self.preload == "device" or self._memory.is_async
        num_index = min(share, self._part_blocks * rows)
        by_processes = self._by_processes()
        if by_processes:
            self._memory.share(self._slots)
        try:
            self._memory.allocate(self._slots, self._staged if own else 0, num_index)
        except BaseException:
            if self._memory.shared is not None:
                self._memory.shared.close()
            raise
        if self._memory.shared is not None:
            return ReadProcesses(
                self._plans(),
                lambda block, slot: self._memory.pieces(block, slot),
                self.reader.damaged,
                memory=self._memory.shared,
                num_slots=self._slots,
                num_plans=_PARTS_AHEAD,
            )
        return ReadAhead(
            self._plans(),
            self._read,
            num_slots=self._slots,
            num_plans=_PARTS_AHEAD,
            num_threads=REQUESTS if self.reader.remote else READERS,
        )

    def __enter__(self) -> Self:
        self._ahead.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ahead.close()
        self._unreleased.clear()
        for reader in self._readers:
            reader.close()
        # Gives back what copies that are under way still read only when they are done: torch's
        # allocators know of them.
        if self._memory.shared is not None:
            self._memory.shared.close(failed=kind is not None)
        del self._memory, self._host

    def _read(self, block: int, slot: int) -> None:
        readers: Sequence[HostRows | BlockReader] = self._host or self._readers
        for reader, space in zip(readers, self._memory.spaces[slot], strict=True):
            reader.read_into(block, space)

    def _plans(self) -> Iterator[Plan]:
        if self._memory.shared is not None:
            for reader in self._readers:
                reader.place_all()
        share, slot, last, number = self.shape[0], 0, -1, 0
        resident = np.zeros(self.reader.num_blocks, dtype=bool)
        for step in self.steps:
            start = step * self.batch_tokens + self.rank * share
            (first, skip), (end, _) = self.order.locate(start), self.order.locate(start + share - 1)
            left = share
            for low in range(first, end + 1, self._part_blocks):
                numbers = np.arange(low, min(low + self._part_blocks, end + 1))
                blocks = self.order.blocks(low, int(numbers[-1]) + 1)
                # The last block of the part before is still there.
                again = int(low == last)
                if self.preload == "device":
                    fresh = _first_seen(blocks, resident)
                    starts, keeps = blocks * self.reader.chunk_rows, slot + len(fresh)
                else:
                    fresh = blocks[again:]
                    at = (slot - again + np.arange(len(blocks))) % self._staged
                    starts, keeps = at * self.reader.chunk_rows, slot + len(fresh) - 1
                places = self.kept.places(blocks, starts)[skip : skip + left]
                part = _Part(self._copies(slot, fresh), self._index(number, places))
                yield Plan(fresh.tolist(), slot, keeps, part)
                left, skip, last = left - len(places), 0, int(numbers[-1])
                slot, number = slot + len(fresh), number + 1

    def _index(self, number: int, places: Ints) -> Tensor:
        # The plan that had this row of the ring of indices before is released.
        index = self._memory.index[number % _PARTS_AHEAD, : len(places)]
        index.numpy()[:] = places
        return index

    def _copies(self, slot: int, blocks: Ints) -> list[_Copy]:
        """What is copied from the ring for blocks that were read into the slots from one on."""
        if not self._memory.is_staged:
            return []
        slots = slot + np.arange(len(blocks))
        targets = blocks if self.preload == "device" else slots % self._staged
        return _runs(slots % self._slots, targets, self.reader.chunk_rows)

    def fill_(self, out: Tensor) -> None:
        """Writes the next batch into out [share, D], on the loader's device. On CUDA the host does
        not wait for that: it is work of the current stream, which must be the same for all batches.
        Raises DamagedStoreError where a checksum of a block of this batch does not hold.
        """
        done = 0
        while done < len(out):
            plan = self._take()
            stop = done + len(plan.payload.places)
            self._memory.gather_(plan.payload, out[done:stop])
            done = stop
            if self._memory.is_async:
                self._unreleased.append((plan, copied_event(self.device)))
            else:
                self._ahead.release(plan)

    def _take(self) -> Plan:
        """The next plan. Gives back the slots of those that were copied; while the next one is not
        there, it may be for want of slots, and the oldest copy is waited for.
        """
        while self._unreleased:
            plan, copied = self._unreleased[0]
            if not copied.query():  # type: ignore[no-untyped-call]
                if self._ahead.is_ready():
                    break
                copied.synchronize()
            self._ahead.release(plan)
            self._unreleased.popleft()
        return self._ahead.take()

    def __iter__(self) -> Iterator[Tensor]:
        for _ in self.steps:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.fill_(out)
            yield out


def _first_seen(blocks: Ints, resident: npt.NDArray[np.bool_]) -> Ints:
    """Blocks that are not resident yet, each once; from now on they are."""
    fresh = blocks[~resident[blocks]]
    if len(fresh):
        fresh = fresh[np.sort(np.unique(fresh, return_index=True)[1])]
        resident[fresh] = True
    return fresh


def _runs(sources: Ints, targets: Ints, rows: int) -> list[_Copy]:
    """Copies of blocks of so many rows, neighbours on both sides in one."""
    if not len(sources):
        return []
    ends = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    firsts = [0, *ends.tolist()]
    stops = [*firsts[1:], len(sources)]
    return [
        _Copy(int(sources[a]) * rows, int(targets[a]) * rows, (b - a) * rows)
        for a, b in zip(firsts, stops, strict=True)
    ]
