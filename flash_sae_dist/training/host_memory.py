"""Host memory that an SAE's state is copied into between two steps, made once and used again."""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .. import page_lock
from ..parallel import agree
from ..parallel.mesh import local_processes as local_processes
from ..parallel.mesh import with_index
from ..tensor_files import Spec
from .metrics import PhaseTimer
from .side_stream import SideStream

logger = logging.getLogger(__name__)
# No two tensors share a page: each is page-locked by itself.
_PAGE, _HUGE_PAGE = 1 << 12, 1 << 21
# Memory that is page-locked, and copied, at a time: while it is locked a device waits for what it
# is to be given, and no copy may cross from one piece to the next.
_PIECE = 1 << 26
# Left to others: the loader's buffers, the page cache of what is read.
_SHARE = 0.8
# One at a time, so that each sees what those before it took.
_MAKING = threading.Lock()


class HostShare:
    """What this process may take of its host's memory: measured before any process takes of it, for
    what others have taken since is not to be divided again.
    """

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes
        self._lock = threading.Lock()

    @classmethod
    def agreed(cls) -> Self:
        """An equal share of what is free now. Collective over all processes."""
        here = socket.gethostname()
        free = min(n for host, n in agree.from_all((here, free_bytes())) if host == here)
        return cls(int(_SHARE * free) // local_processes())

    def take(self, num_bytes: int) -> bool:
        """Takes memory, or all that there is left is too little."""
        with self._lock:
            if num_bytes > self.left:
                return False
            self.left -= num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """Lets others of this process take it."""
        with self._lock:
            self.left += num_bytes


class Copied(NamedTuple):
    """A state of one moment on the host, once its copy is through."""

    tensors: dict[str, Tensor]
    timer: PhaseTimer

    def wait(self) -> float:
        """Waits for the copy; returns the seconds for which a device's steps had to."""
        return self.timer.milliseconds().get("copied", 0.0) / 1e3


class HostMemory:
    """Room on the host for tensors of a device, page-locked where that is a GPU: a copy then runs
    at the bus's speed.

    It is made by a thread, since locking takes a second per 10 GB or more; between two pieces it
    sleeps for as long as one took, until the memory is asked for. Where the host has not enough of
    it there is none, and one log line says so.
    """

    def __init__(
        self, name: str, like: Mapping[str, Tensor], device: torch.device, share: HostShare
    ) -> None:
        # A thread's own current device is the first.
        self.device, self._side = with_index(device), SideStream(device)
        self._specs = {key: Spec.of(tensor) for key, tensor in like.items()}
        self._views: dict[str, Tensor] | None = None
        self._locked: list[int] = []
        self._is_wanted = threading.Event()
        self._share, self._taken = share, 0
        self._maker = threading.Thread(target=self._make, args=(name,), daemon=True)
        self._maker.start()

    def copy(self, tensors: Mapping[str, Tensor]) -> Copied | None:
        """Copies tensors of the shapes that the memory was made for, as they are when all work that
        the current stream was given is done; what it is given from here on waits for the copy.
        None where there is no memory. Waits until the memory is made, and for no device.
        """
        self._is_wanted.set()
        self._maker.join()
        if self._views is None:
            return None
        assert {key: Spec.of(tensor) for key, tensor in tensors.items()} == self._specs
        timer = PhaseTimer(self.device, enabled=self.device.type == "cuda")
        with self._side.beside():
            for key, tensor in tensors.items():
                elements = _PIECE // tensor.element_size()
                targets, sources = (
                    torch.split(t.detach().reshape(-1), elements)
                    for t in (self._views[key], tensor)
                )
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source, non_blocking=True)
        self._side.meet()
        timer.mark("copied")
        return Copied(self._views, timer)

    def close(self) -> None:
        """Gives the memory back; no copy may be under way."""
        self._is_wanted.set()
        self._maker.join()
        for address in self._locked:
            page_lock.unlock(address)
        self._locked, self._views = [], None
        self._share.give_back(self._taken)
        self._taken = 0

    def _make(self, name: str) -> None:
        try:
            with _MAKING:
                self._make_alone(name)
        except (OSError, MemoryError, RuntimeError) as e:
            logger.warning("%s: training waits while a checkpoint is written: %s", name, e)

    def _make_alone(self, name: str) -> None:
        sizes = [_rounded(spec.bytes) for spec in self._specs.values()]
        needed = sum(sizes)
        if not self._share.take(needed):
            logger.warning(
                "%s: a checkpoint takes %.1f GB of host memory, of which this process's share has "
                "%.1f GB left: training waits while one is written",
                name, needed / 1e9, self._share.left / 1e9,
            )  # fmt: skip
            return
        self._taken = needed
        room = mmap.mmap(-1, max(needed, _PAGE))
        with suppress(OSError, AttributeError):
            room.madvise(mmap.MADV_HUGEPAGE)
        whole, views, at = torch.frombuffer(room, dtype=torch.uint8), {}, 0
        for (key, spec), size in zip(self._specs.items(), sizes, strict=True):
            views[key] = whole[at : at + spec.bytes].view(spec.dtype).view(spec.shape)
            at += size
        whole[::_PAGE].zero_()
        if self.device.type == "cuda":
            self._lock(name, [(view.data_ptr(), view.nbytes) for view in views.values()])
        self._views = views

    def _lock(self, name: str, places: list[tuple[int, int]]) -> None:
        """Page-locks memory, which ordinary memory may stand in for: copies then take longer."""
        torch.cuda.set_device(self.device)
        pieces = [
            (address + at, min(_PIECE, size - at))
            for address, size in places
            for at in range(0, size, _PIECE)
        ]
        try:
            for piece in pieces:
                began = time.perf_counter()
                if code := page_lock.lock(*piece):
                    raise RuntimeError(f"cudaHostRegister: error {code}")
                self._locked.append(piece[0])
                self._is_wanted.wait(time.perf_counter() - began)
        except RuntimeError as e:
            told = " ".join(str(e).split())[:120]
            logger.warning(
                "%s: memory cannot be page-locked (%s): checkpoints take longer", name, told
            )


def _rounded(size: int) -> int:
    page = _HUGE_PAGE if size >= _HUGE_PAGE else _PAGE
    return -(-size // page) * page


def free_bytes() -> int:
    """Host memory that can be had without swapping: the system's, or what this container's limit
    leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line)
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        stat = {key: int(value) for key, value in pairs}
        # Pages of files are given back, but not those that live in memory alone.
        free = min(free, limit - used + stat["file"] - stat["shmem"])
    return max(0, free)
