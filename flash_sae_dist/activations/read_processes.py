"""Processes that read blocks ahead, for a thread that launches work on a GPU.

Threads would take Python's lock from it several times a block, and wait for it: a step of half a
millisecond came to two (H200, 2026-11-30). Here one thread makes plans and sends each as a line to
the next process, which reads its blocks into memory that both share; whoever takes a plan reads the
process's answer.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor

from .. import page_lock
from ..config.base import UserError
from .read_ahead import Plan

_PROCESSES = 6


# A file's `source`, where it begins there, where in the memory, bytes.
Piece = tuple[Any, int, int, int]


class SharedMemory:
    """Memory of this process that others can map, page-locked for a GPU."""

    def __init__(self, num_bytes: int, lock: bool) -> None:
        self.descriptor = os.memfd_create("flash_sae_dist blocks")
        # Also where the memory cannot be had, or whoever made it fails before closing it.
        self._give_back = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, num_bytes)
        self.bytes: Tensor = torch.frombuffer(
            mmap.mmap(self.descriptor, num_bytes), dtype=torch.uint8
        )
        self._is_locked = False
        if lock:
            self._is_locked = page_lock.lock(self.bytes.data_ptr(), num_bytes) == 0

    def close(self, *, failed: bool = False) -> None:
        """Gives it back, once copies that are under way have ended; where something failed they may
        wait for ranks that have gone, and it is left to the end of the process.
        """
        if self._is_locked and not failed:
            torch.cuda.synchronize()
            page_lock.unlock(self.bytes.data_ptr())
            self._is_locked = False
        self._give_back()
        self.descriptor = -1


class ReadProcesses:
    """As `ReadAhead`, with processes in place of threads: `take` and `release` are one thread's,
    what a block raises is raised where its plan is taken.
    """

    def __init__(
        self,
        plans: Iterator[Plan],
        locate: Callable[[int, int], list[Piece]],  # what to read of a block into a slot
        damaged: Callable[[int], Exception],  # the error of a block
        *,
        memory: SharedMemory,
        num_slots: int,
        num_plans: int,
    ) -> None:
        self._plans, self._locate, self._damaged = plans, locate, damaged
        self._memory = memory
        self.num_slots, self.num_plans = num_slots, num_plans
        self._changed = Condition()
        self._sent: deque[tuple[Plan, subprocess.Popen[bytes] | None]] = deque()
        self._unreleased = self._freed = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._planner = Thread(target=self._run, name="plans", daemon=True)

    def start(self) -> None:
        """Starts the processes."""
        command = [sys.executable, "-P", "-m", "flash_sae_dist.activations.read_worker"]
        command.append(str(self._memory.descriptor))
        # Modules are found where this process finds them, whatever lies in the current folder.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        for _ in range(_PROCESSES):
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=[self._memory.descriptor],
                    env={**os.environ, "PYTHONPATH": paths},
                )
            )
        self._planner.start()

    def close(self) -> None:
        """Ends the processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        if self._planner.ident is not None:
            self._planner.join()
        for process in self._processes:
            process.communicate()

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        with self._changed:
            if self._failure is not None or not self._sent:
                return self._failure is not None
            process = self._sent[0][1]
        if process is None:
            return True
        assert process.stdout is not None
        # Not select, which takes no descriptor beyond 1023.
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        return bool(poll.poll(0))

    def take(self) -> Plan:
        """The next plan, its blocks read. Raises what reading them raised."""
        with self._changed:
            while not self._sent and self._failure is None:
                assert not self._closed, "plans are taken while the processes run"
                self._changed.wait()
            if not self._sent:
                assert self._failure is not None
                raise self._failure
            plan, process = self._sent.popleft()
        if process is not None and (answer := self._answer(process)):
            number, sentence = json.loads(answer)
            a_block = len(self._locate(plan.blocks[0], 0))
            raise UserError(sentence) if sentence else self._damaged(plan.blocks[number // a_block])
        if plan.error is not None:
            raise plan.error
        return plan

    def _answer(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise UserError(
                f"a process that reads the store ended with code {process.wait()}; look above for "
                "its last words (a kill for want of memory leaves none)"
            )
        return line.strip()

    def release(self, plan: Plan) -> None:
        """Lets the slots of a plan be used again, but what it keeps. In the order of plans."""
        with self._changed:
            self._unreleased -= 1
            self._freed = plan.keeps
            self._changed.notify()

    def _run(self) -> None:
        try:
            for number in count():
                # A plan's payload may use what the one num_plans before it used.
                if not self._awaited(lambda: self._unreleased < self.num_plans):
                    return
                plan = next(self._plans, None)
                if plan is None or not self._awaited(self._fits(plan)):
                    return
                process = self._send(plan, self._processes[number % _PROCESSES])
                with self._changed:
                    self._unreleased += 1
                    self._sent.append((plan, process))
                    self._changed.notify()
        except BaseException as e:
            # Of a plan's making. Whoever waits for it would wait for ever.
            with self._changed:
                self._failure = e
                self._changed.notify()

    def _awaited(self, is_so: Callable[[], bool]) -> bool:
        """Waits for what `release` changes; False where all ends meanwhile."""
        with self._changed:
            while not (self._closed or is_so()):
                self._changed.wait()
            return not self._closed

    def _fits(self, plan: Plan) -> Callable[[], bool]:
        last = plan.first + len(plan.blocks)
        return lambda: last - self._freed <= self.num_slots

    def _send(self, plan: Plan, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
        """Asks a process for a plan's blocks; None where nothing is to be read."""
        if not plan.blocks:
            return None
        try:
            pieces = [
                piece
                for slot, block in enumerate(plan.blocks, plan.first)
                for piece in self._locate(block, slot % self.num_slots)
            ]
        except Exception as e:
            plan.error = e
            return None
        assert process.stdin is not None
        line = memoryview(json.dumps(pieces).encode() + b"\n")
        # One that has ended is told of where its answer is read.
        with suppress(BrokenPipeError):
            while line:
                line = line[process.stdin.write(line) :]
        return process
