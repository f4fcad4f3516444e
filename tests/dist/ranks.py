"""Runs modules as several processes on a free port and collects what each returns.

Without a GPU a process is a fork of one that has imported what the verbs import, which is most of
what a short job of its own does. `test_accelerate_launch.py` starts them as users do.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from flash_sae_dist.parallel.mesh import end_groups

ROOT = Path(__file__).parents[2]
# A fork of a process that has used CUDA cannot; imports might.
CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
CONTEXT.set_forkserver_preload(["tests.dist.preload"])


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


class Running(NamedTuple):
    """A process and the files that hold what it says."""

    process: BaseProcess
    out: Path
    err: Path

    def text(self) -> str:
        """What it said."""
        return self.out.read_text() + self.err.read_text()


def start_module(module: str, args: Sequence[str], env: dict[str, str], log: Path) -> Running:
    """`python -m module args...` in an environment, from the root; it says it to log.out, .err."""
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    process = CONTEXT.Process(target=_run_module, args=(module, args, env, str(out), str(err)))
    process.start()
    return Running(process, out, err)


def _run_module(module: str, args: Sequence[str], env: dict[str, str], out: str, err: str) -> None:
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [module, *args]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # A fork ends without its interpreter's end, which is where threads left behind abort.
    ctypes.pythonapi.Py_Exit(code)


def wait(processes: Sequence[Running], timeout: float) -> list[int | None]:
    """Waits for all to end, by themselves or at the time's end; returns their exit codes."""
    try:
        for running in processes:
            running.process.join(timeout)
    finally:
        kill(processes)
    return [running.process.exitcode for running in processes]


def kill(processes: Sequence[Running]) -> None:
    """kill -9 of all that still run."""
    for running in processes:
        running.process.kill()
        running.process.join()


def run_ranks(module: str, world: int, out: Path, *args: str, timeout: float = 240) -> list[Any]:
    """Runs `module out/rank args...` on `world` processes; returns what each saved, by rank."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        start_module(
            module,
            [str(out / f"{rank}.pt"), *args],
            rank_env(rank, world, port),
            out / f"{rank}.log",
        )
        for rank in range(world)
    ]
    codes = wait(processes, timeout)
    assert codes == [0] * world, "\n".join(p.text() for p in processes)[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]


def worker(run: Callable[..., Any]) -> None:
    """The body of a worker's module: joins the group, runs, saves what `run(*args)` returned."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(os.environ.get("WORKER_BACKEND", "gloo"))
    try:
        torch.save(run(*sys.argv[2:]), sys.argv[1])
    finally:
        end_groups()
