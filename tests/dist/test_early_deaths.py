"""A process that dies before or while the group comes up, or a host that never comes: the others
end in time with a sentence.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.dist.early_death_worker import MOMENTS
from tests.dist.jobs import finish, start
from tests.dist.ranks import Running, free_port, kill, rank_env, start_module
from tests.tiny_model import config_data, write_config

pytestmark = pytest.mark.slow
TIMEOUT_S = 6
# What importing and tearing down take on a busy machine.
MARGIN_S = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deaths")
    data = config_data(root)
    data["train"]["rendezvous_timeout_s"] = TIMEOUT_S
    finish(start("cache", write_config(root / "c.yaml", data), 1))
    return root


def launch(root: Path, rank: int, world: int, port: int, out: Path, **env: str) -> Running:
    args = [str(root / "c.yaml"), f"output={out}"]
    return start_module(
        "tests.dist.early_death_worker",
        args,
        rank_env(rank, world, port) | env,
        out.with_name(f"{out.name}-{rank}.log"),
    )


def ends(process: Running, began: float) -> str:
    process.process.join(TIMEOUT_S + MARGIN_S - (time.monotonic() - began))
    code, said = process.process.exitcode, process.text()
    kill([process])
    assert code == 1, f"{code}: {said}"
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line


MOMENTS_BY_DEFAULT = ("start", "called", "connected", "group", "plan", "step")


def one_dies(root: Path, out: Path, moment: str, victim: int) -> None:
    port, began = free_port(), time.monotonic()
    processes = [
        launch(root, rank, 2, port, out, **({"DIE_AT": moment} if rank == victim else {}))
        for rank in range(2)
    ]
    try:
        line = ends(processes[1 - victim], began)
    finally:
        kill(processes)
    assert "process" in line
    if moment == "start" and victim == 1:
        assert "1 of 2 processes came" in line


@pytest.mark.parametrize("moment", MOMENTS_BY_DEFAULT)
def test_a_process_that_dies_early_ends_the_other(root: Path, tmp_path: Path, moment: str) -> None:
    one_dies(root, tmp_path / "run", moment, victim=1)


@pytest.mark.torture
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_early_ends_the_other_always(
    root: Path, tmp_path: Path, moment: str, victim: int
) -> None:
    one_dies(root, tmp_path / "run", moment, victim)


@pytest.mark.parametrize("missing", [0, 1])
def test_two_hosts_of_which_one_never_comes(root: Path, tmp_path: Path, missing: int) -> None:
    """Hosts of two processes each; the one that serves the meeting point is missing, or is not."""
    port, began = free_port(), time.monotonic()
    there = [rank for rank in range(4) if rank // 2 != missing]
    env = {"LOCAL_WORLD_SIZE": "2"}
    processes = [launch(root, rank, 4, port, tmp_path / "run", **env) for rank in there]
    try:
        lines = [ends(process, began) for process in processes]
    finally:
        kill(processes)
    for line in lines:
        assert ("2 of 4 processes came" if missing else "no process answers at") in line


def test_a_process_that_hangs_while_the_group_comes_up_ends_the_other(
    root: Path, tmp_path: Path
) -> None:
    port, began = free_port(), time.monotonic()
    hanging = {"DIE_AT": "called", "DIE_BY": "hanging"}
    processes = [
        launch(root, rank, 2, port, tmp_path / "run", **(hanging if rank else {}))
        for rank in range(2)
    ]
    try:
        assert "all 2 processes came" in ends(processes[0], began)
    finally:
        kill(processes)
