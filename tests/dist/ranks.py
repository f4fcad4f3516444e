"""Runs a worker script as several processes on a free port and collects what each returns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flash_sae_dist.parallel.mesh import end_groups


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_env(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment that torchrun and accelerate launch give a rank, one thread each."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }


def run_ranks(script: Path, world: int, out: Path, *args: str, timeout: float = 240) -> list[Any]:
    """Runs `script out/rank args...` on `world` processes; returns what each saved, by rank."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out / f"{rank}.pt"), *args],
            env=rank_env(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * world, "\n".join(texts)[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]


def worker(run: Callable[..., Any]) -> None:
    """The body of a worker script: joins the group, runs, saves what `run(*args)` returned."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(os.environ.get("WORKER_BACKEND", "gloo"))
    try:
        torch.save(run(*sys.argv[2:]), sys.argv[1])
    finally:
        end_groups()
