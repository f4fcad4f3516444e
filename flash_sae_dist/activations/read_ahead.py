"""Threads that read blocks, in the order of the plans that name them, into a ring of slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any


@dataclass(slots=True)
class Plan:
    """Blocks to read into consecutive slots, counted without end from 0, and what for."""

    blocks: list[int]
    first: int  # slot of the first of these blocks; those of the plan before end there
    keeps: int  # first slot that later plans may still ask for, once this one is done with
    payload: Any
    left: int = 0  # blocks that are not read yet
    error: Exception | None = field(default=None)


class ReadAhead:
    """Reads ahead of `take` as far as the slots and the number of plans allow.

    Plans are made by the threads, one at a time and in order. What reading a block raises is raised
    where its plan is taken. `take` and `release` are one thread's.
    """

    def __init__(
        self,
        plans: Iterator[Plan],
        read: Callable[[int, int], None],  # a block, into a slot (below num_slots)
        *,
        num_slots: int,
        num_plans: int,
        num_threads: int,
    ) -> None:
        """A plan's slots, and those that it keeps, must be at most num_slots together. num_plans:
        those made and not released.
        """
        self._plans, self._read = plans, read
        self.num_slots, self.num_plans = num_slots, num_plans
        self._lock = Lock()
        self._work, self._done = Condition(self._lock), Condition(self._lock)
        self._next: Plan | None = None  # made, but there is no room for it yet
        self._jobs: deque[tuple[Plan, int, int]] = deque()
        self._made: deque[Plan] = deque()
        self._unreleased = self._freed = 0
        self._failure: BaseException | None = None
        self._is_planning = self._is_at_end = self._closed = False
        self._threads = [
            Thread(target=self._run, name=f"block-{i}", daemon=True) for i in range(num_threads)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads, after the blocks that they are reading."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        with self._lock:
            return self._is_ready()

    def _is_ready(self) -> bool:
        return bool(self._made and not self._made[0].left) or self._failure is not None

    def take(self) -> Plan:
        """The next plan, its blocks read. Raises what reading them raised."""
        with self._lock:
            while not self._is_ready():
                assert not self._closed, "plans are taken while the threads run"
                self._done.wait()
            if self._failure is not None:
                raise self._failure
            plan = self._made.popleft()
        if plan.error is not None:
            raise plan.error
        return plan

    def release(self, plan: Plan) -> None:
        """Lets the slots of a plan be used again, but what it keeps. In the order of plans."""
        with self._lock:
            self._unreleased -= 1
            self._freed = plan.keeps
            self._work.notify()

    def _run(self) -> None:
        try:
            while (job := self._take_job()) is not None:
                plan, block, slot = job
                try:
                    self._read(block, slot % self.num_slots)
                except Exception as e:
                    plan.error = plan.error or e
                with self._lock:
                    plan.left -= 1
                    if not plan.left:
                        self._done.notify()
        except BaseException as e:
            # Of a plan's making. Whoever waits for it would wait for ever.
            with self._lock:
                self._failure = e
                self._done.notify()

    def _take_job(self) -> tuple[Plan, int, int] | None:
        """The next block to read, None where the threads are to end."""
        while True:
            with self._lock:
                while not (self._closed or self._jobs or self._may_plan()):
                    self._work.wait()
                if self._closed:
                    return None
                if self._jobs:
                    return self._jobs.popleft()
                self._is_planning = True
            # Without the lock, which the thread that takes plans needs.
            plan = self._next or next(self._plans, None)
            with self._lock:
                self._is_planning, self._next = False, plan
                self._is_at_end = plan is None
                if plan is not None and self._fits(plan):
                    self._add(plan)

    def _may_plan(self) -> bool:
        """Whether a plan is to be made, or one that was made has room by now."""
        busy = self._is_planning or self._is_at_end or self._failure is not None
        if busy or self._unreleased == self.num_plans:
            return False
        return self._next is None or self._fits(self._next)

    def _fits(self, plan: Plan) -> bool:
        return plan.first + len(plan.blocks) - self._freed <= self.num_slots

    def _add(self, plan: Plan) -> None:
        self._next = None
        self._unreleased += 1
        plan.left = len(plan.blocks)
        self._made.append(plan)
        self._jobs.extend((plan, b, slot) for slot, b in enumerate(plan.blocks, plan.first))
        if not plan.left:
            self._done.notify()
        # Few are woken for a plan: while there is room, those that are awake make the next one and
        # wake more.
        self._work.notify(1 + len(self._jobs) // 4)
