"""Starts a verb as several processes, kills it at a moment, starts it again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.dist.ranks import free_port, rank_env

ROOT = Path(__file__).parents[2]


def start(verb: str, config: Path, world: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """A verb on `world` ranks, as accelerate launch starts them, each in its own process group."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"flash_sae_dist.launch.{verb}", str(config), *overrides],
            env=rank_env(rank, world, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 180) -> str:
    """Waits for all ranks to succeed; returns what they printed."""
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=timeout)[0])
    finally:
        kill(processes)
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(texts)[-5000:]
    return "\n".join(texts)


def kill(processes: list[subprocess.Popen[str]]) -> None:
    """kill -9 of every rank."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_after(
    processes: list[subprocess.Popen[str]], sign: Path, pattern: str, count: int, rng: random.Random
) -> None:
    """Waits for `count` files of a pattern in a folder and a random moment more, then kills."""
    deadline = time.monotonic() + 120
    while len(list(sign.glob(pattern))) < count:
        assert time.monotonic() < deadline, "the job never got that far"
        if all(p.poll() is not None for p in processes):
            return
        time.sleep(0.01)
    time.sleep(rng.random() * 0.3)
    kill(processes)
