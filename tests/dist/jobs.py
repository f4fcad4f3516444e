"""Starts a verb as several processes, kills it at a moment, starts it again."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.dist.ranks import Running, free_port, kill, rank_env, start_module, wait


def start(verb: str, config: Path, world: int, *overrides: str) -> list[Running]:
    """A verb on `world` ranks, as accelerate launch starts them."""
    port = free_port()
    return [
        start_module(
            f"flash_sae_dist.launch.{verb}",
            [str(config), *overrides],
            rank_env(rank, world, port),
            config.with_name(f"{verb}-{port}-{rank}.log"),
        )
        for rank in range(world)
    ]


def finish(processes: Sequence[Running], timeout: float = 180) -> str:
    """Waits for all ranks to succeed; returns what they printed."""
    codes = wait(processes, timeout)
    text = "\n".join(running.text() for running in processes)
    assert codes == [0] * len(processes), text[-5000:]
    return text


def kill_after(
    processes: Sequence[Running], sign: Path, pattern: str, count: int, rng: random.Random
) -> None:
    """Waits for `count` files of a pattern in a folder and a random moment more, then kills."""
    deadline = time.monotonic() + 120
    while len(list(sign.glob(pattern))) < count:
        assert time.monotonic() < deadline, "the job never got that far"
        if not any(running.process.is_alive() for running in processes):
            return
        time.sleep(0.01)
    time.sleep(rng.random() * 0.3)
    kill(processes)
