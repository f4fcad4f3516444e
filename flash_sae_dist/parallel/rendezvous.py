"""Processes that come together: minutes for all to come, patience once they are there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]

from ..config.base import ConfigError, UserError
from ..ending import end_now

T = TypeVar("T")
# How long a process waits for the others once all are there. NCCL's ten minutes would end a grid
# whose groups have unequal work, or a cache whose first process tokenises long; the launcher sees
# to dead processes.
PATIENCE = timedelta(days=7)
# What reports a lack with how many came has to come before what only ends the process.
_MARGIN = 0.8


def come_together(make: Callable[[timedelta], T], seconds: float) -> T:
    """What `make` gives, which brings up the group of all processes and is told how long it may
    wait. Raises UserError where not all are there in time, saying how many are; where a wait
    cannot be left otherwise, the process ends with that sentence.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return make(PATIENCE)
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={world} is set without {' and '.join(missing)}; start several processes "
            "by `accelerate launch`, or unset it to run one"
        )
    call = _RollCall(world, seconds)
    timer = threading.Timer(seconds, lambda: end_now(f"error: {call.sentence()}", 1))
    timer.daemon = True
    timer.start()
    try:
        call.answer()
        made = make(call.left())
        if dist.is_initialized():
            # A first exchange: connections are made by now, and nobody has left since.
            dist.all_gather_object([None] * world, os.getpid())
    except (RuntimeError, ValueError) as e:
        told = f" ({' '.join(str(e).split())})" if call.came == world else ""
        raise UserError(f"{call.sentence()}{told}") from e
    finally:
        timer.cancel()
    be_patient(None)
    return made


def be_patient(group: dist.ProcessGroup | None) -> None:
    """Lets collectives of a group that is up wait for unequal work; None is that of all."""
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(PATIENCE, group)


class _RollCall:
    """Counts the processes of a launch, in the store that they meet at."""

    def __init__(self, world: int, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.ends = time.monotonic() + _MARGIN * seconds
        self.store: TCPStore | None = None
        self.came: int | None = None

    def left(self) -> timedelta:
        """Time until this process gives up."""
        return timedelta(seconds=max(1.0, self.ends - time.monotonic()))

    def answer(self) -> None:
        """Says that this process is there and waits for the others. Raises RuntimeError where they
        do not come in time."""
        rank = int(os.environ["RANK"])
        # The launcher's store, or one that the first process serves, which accelerate's own
        # rendezvous then finds.
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world,
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=self.left(),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # Restarted by torchrun, a launch counts anew.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        key = f"flash_sae_dist/came/{attempt}"
        if attempt != "0":
            self._meet_anew(f"flash_sae_dist/port/{attempt}", rank)
        self.came = self.store.add(key, 1)
        while self.came < self.world:
            if time.monotonic() > self.ends:
                raise RuntimeError("not all came")
            time.sleep(0.02)
            self.came = self.store.add(key, 0)

    def _meet_anew(self, key: str, rank: int) -> None:
        """Has the group come up at a new store of the first process: the launcher's, where it has
        one for all of its restarts, still holds the addresses of processes that are gone.
        """
        assert self.store is not None
        if rank == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                self.store.set(key, str(free.getsockname()[1]))
        os.environ["MASTER_PORT"] = self.store.get(key).decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"

    def sentence(self) -> str:
        """Who is missing."""
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cure = (
            "start the launcher on every host with the same address and port, look at what the "
            "missing ones say, or raise train.rendezvous_timeout_s"
        )
        if self.came is None:
            return f"no process answers at {where} within {self.seconds:g} s; {cure}"
        what = f"{self.came} of {self.world} processes came to {where} within {self.seconds:g} s"
        if self.came >= self.world:
            what = f"all {self.world} processes came to {where}, but one ended before they were "
            what += "connected"
        return f"{what}; {cure}"


def make_group(ranks: list[int], seconds: float) -> dist.ProcessGroup | None:
    """A group of some ranks, connected in time or not at all; None on other ranks. Collective over
    all processes."""
    made = dist.new_group(ranks, timeout=timedelta(seconds=seconds))
    if not isinstance(made, dist.ProcessGroup):
        return None
    with suppress(ValueError):
        be_patient(made)
    return made
