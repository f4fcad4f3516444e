"""A process that is killed or stopped, or a host that is cut off, ends the launch everywhere with
one sentence; the same command goes on from the last checkpoint.

Two hosts are two network namespaces joined by a wire, which needs Linux, `ip` and the rights of an
administrator.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.jobs import finish, start
from tests.dist.ranks import Running, free_port, kill, rank_env, start_module
from tests.dist.test_kill_and_resume import curve
from tests.tiny_model import config_data, write_config

pytestmark = pytest.mark.slow
HEARTBEAT_S = 4
STEPS, RESTARTED_STEPS = 3000, 600


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lost")
    data = config_data(root)
    data["train"] |= {"num_tokens": STEPS * 64, "heartbeat_s": HEARTBEAT_S, "log_every": 10}
    finish(start("cache", write_config(root / "c.yaml", data), 1))
    return root


def newest(job: Path) -> int:
    """The step of the newest checkpoint; -1 where there is none."""
    found = job.glob("checkpoints/step-????????/manifest.json")
    return max((int(file.parent.name[5:]) for file in found), default=-1)


def wait_for_checkpoint(processes: list[Running], job: Path, rng: random.Random) -> None:
    """Waits for a checkpoint and a random moment more."""
    deadline = time.monotonic() + 120
    while newest(job) < 0:
        assert time.monotonic() < deadline, "\n".join(p.text() for p in processes)
        time.sleep(0.02)
    time.sleep(rng.random())


def ends(process: Running, within: float) -> str:
    """The sentence that a process ends with."""
    began = time.monotonic()
    process.process.join(within)
    took, code, said = time.monotonic() - began, process.process.exitcode, process.text()
    assert code == 1, f"{code} after {took:.1f} s: {said}"
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "checkpoint" in line, line
    return line


def goes_on(root: Path, job: Path) -> None:
    """Some steps more, behind which the curve holds every tenth once."""
    steps = newest(job) + 50
    finish(start("train", root / "c.yaml", 2, f"output={job.parent}",
                 f"train.num_tokens={64 * steps}"))  # fmt: skip
    assert [line["step"] for line in curve(job)] == list(range(10, steps + 1, 10))
    assert json.loads((job / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("how", "victim"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)],
    ids=["first killed", "second killed", "second stopped"],
)
def test_one_process_goes(root: Path, tmp_path: Path, how: signal.Signals, victim: int) -> None:
    job = tmp_path / "run" / "model.layers.0"
    processes = start("train", root / "c.yaml", 2, f"output={job.parent}")
    try:
        wait_for_checkpoint(processes, job, random.Random(victim))
        pid = processes[victim].process.pid
        assert pid is not None
        os.kill(pid, how)
        line = ends(processes[1 - victim], 30)
    finally:
        kill(processes)
    assert f"process {victim} on host" in line
    assert ("died" if how == signal.SIGKILL else "not been heard of for 4 s") in line
    if how == signal.SIGSTOP:
        goes_on(root, job)


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[str, str]]:
    """Two hosts, 10.213.7.1 and .2, and a wire between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs `ip` and the rights of an administrator")
    one, two = hosts = (f"fsd{os.getpid()}a", f"fsd{os.getpid()}b")
    try:
        for host in hosts:
            if ip("netns", "add", host).returncode:
                pytest.skip("this system lets nobody make network namespaces")
            ip("-n", host, "link", "set", "lo", "up")
        ip("link", "add", "wire", "netns", one, "type", "veth", "peer", "wire", "netns", two)
        for number, host in enumerate(hosts, 1):
            ip("-n", host, "addr", "add", f"10.213.7.{number}/24", "dev", "wire")
            assert ip("-n", host, "link", "set", "wire", "up").returncode == 0
        yield hosts
    finally:
        for host in hosts:
            ip("netns", "del", host)


def ip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True)


def start_on(hosts: tuple[str, str], root: Path, *overrides: str) -> list[Running]:
    """`train` with a process on each host."""
    port = free_port()
    processes = []
    for rank, host in enumerate(hosts):
        env = rank_env(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "10.213.7.1", "GLOO_SOCKET_IFNAME": "wire"}
        env |= {"HOST": host, "VERB": "train"}
        log = root / f"{host}-{port}.log"
        args = [str(root / "c.yaml"), *overrides]
        processes.append(start_module("tests.dist.host_worker", args, env, log))
    return processes


def cut(wire: tuple[str, str], root: Path, out: Path, seed: int) -> None:
    """Cuts the wire at a random moment of a run; both sides end, and the run goes on."""
    job = out / "model.layers.0"
    processes = start_on(wire, root, f"output={out}")
    try:
        wait_for_checkpoint(processes, job, random.Random(seed))
        ip("-n", wire[seed % 2], "link", "set", "wire", "down")
        began = time.monotonic()
        lines = [ends(process, 60) for process in processes]
        assert time.monotonic() - began < 60
    finally:
        kill(processes)
        ip("-n", wire[seed % 2], "link", "set", "wire", "up")
    for line, other in zip(lines, (1, 0), strict=True):
        assert f"process {other} on host {wire[other]} has not been heard of" in line
    goes_on(root, job)


def test_a_cut_wire_ends_both_hosts(wire: tuple[str, str], root: Path, tmp_path: Path) -> None:
    cut(wire, root, tmp_path / "run", 0)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1, 10))
def test_any_cut_of_the_wire_ends_both_hosts(
    wire: tuple[str, str], root: Path, tmp_path: Path, seed: int
) -> None:
    cut(wire, root, tmp_path / "run", seed)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_any_kill_ends_the_other(root: Path, tmp_path: Path, seed: int) -> None:
    job, victim = tmp_path / "run" / "model.layers.0", seed % 2
    processes = start("train", root / "c.yaml", 2, f"output={job.parent}")
    try:
        wait_for_checkpoint(processes, job, random.Random(seed))
        processes[victim].process.kill()
        assert f"process {victim} on host" in ends(processes[1 - victim], 60)
    finally:
        kill(processes)
    goes_on(root, job)


def launched(root: Path, out: Path, *options: str, **env: str) -> Running:
    """`accelerate launch --max_restarts 1` of a short run."""
    args = ["--multi_gpu", "--max_restarts", "1", "--monitor_interval", "0.2"]
    args += ["--mixed_precision", "no", "--dynamo_backend", "no", *options]
    args += ["-m", "flash_sae_dist.launch.train", str(root / "c.yaml"), f"output={out}"]
    args += [f"train.num_tokens={64 * RESTARTED_STEPS}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"} | env
    module = "tests.dist.host_worker" if "HOST" in env else "accelerate.commands.launch"
    return start_module(module, args, environ, out.with_name(f"{env.get('HOST', 'launch')}.log"))


def rank_process(rank: int, out: Path) -> int:
    """The pid of a rank that a launcher started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in env and f"output={out}".encode() in words:
            return int(folder.name)
    raise AssertionError(f"no process is rank {rank} of {out}")


def restarted(launchers: list[Running], job: Path) -> None:
    """The launchers end well, and the curve holds every tenth step once."""
    for launcher in launchers:
        launcher.process.join(120)
        assert launcher.process.exitcode == 0, launcher.text()[-5000:]
    assert [x["step"] for x in curve(job)] == list(range(10, RESTARTED_STEPS + 1, 10))


def test_a_launcher_that_restarts_goes_on(root: Path, tmp_path: Path) -> None:
    job = tmp_path / "run" / "model.layers.0"
    port = str(free_port())
    launcher = launched(
        root, job.parent, "--num_processes", "2", "--num_machines", "1", "--main_process_port", port
    )
    try:
        wait_for_checkpoint([launcher], job, random.Random(0))
        os.kill(rank_process(1, job.parent), signal.SIGKILL)
        restarted([launcher], job)
    finally:
        kill([launcher])
    assert "process 1 on host" in launcher.text()


@pytest.mark.torture
@pytest.mark.parametrize("victim", [0, 1])
def test_launchers_on_two_hosts_that_restart_go_on(
    wire: tuple[str, str], root: Path, tmp_path: Path, victim: int
) -> None:
    job, port = tmp_path / "run" / "model.layers.0", str(free_port())
    options = ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "10.213.7.1"]
    options += ["--main_process_port", port]
    launchers = [
        launched(root, job.parent, *options, "--machine_rank", str(rank),
                 HOST=host, VERB="launcher", GLOO_SOCKET_IFNAME="wire")
        for rank, host in enumerate(wire)
    ]  # fmt: skip
    try:
        wait_for_checkpoint(launchers, job, random.Random(victim))
        os.kill(rank_process(victim, job.parent), signal.SIGKILL)
        restarted(launchers, job)
    finally:
        kill(launchers)
