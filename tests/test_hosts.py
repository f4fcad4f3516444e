"""The files under launch/hosts/, with stand-ins for Slurm's commands, ssh and the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "launch" / "hosts"
# Writes its arguments down and ends with the code in CODE; SIGTERM ends it with 143.
LAUNCHER = f"""#!{sys.executable}
import json, os, signal, sys, time
def stop(*_):
    open(os.environ["OUT"] + "/stopped", "a").write("x")
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
if os.environ["CODE"] == "2":  # as a verb marks it and the launcher hides it
    open(os.environ["FLASH_SAE_MISTAKE"], "w")
rank = sys.argv[sys.argv.index("--machine_rank") + 1]
json.dump(sys.argv[1:], open(os.environ["OUT"] + f"/{{rank}}.json", "w"))
time.sleep(float(os.environ.get("SLEEP", "0")))
sys.exit(min(1, int(os.environ["CODE"])))
"""
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit
pids=()
trap 'kill -KILL "${pids[@]}"; exit 137' TERM # as srun does
echo > "$OUT/pids"
for SLURM_NODEID in 0 1; do
  export SLURM_NODEID
  "$@" &
  pids+=($!)
  echo $! >> "$OUT/pids"
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf 'node7\\nnode8\\n' ;;
  requeue) echo "$2" >> "$OUT/requeued" ;;
esac
"""
SCANCEL = """#!/usr/bin/env bash
[ "$1" = --signal=TERM ] && kill -TERM $(cat "$OUT/pids")
"""
SSH = """#!/usr/bin/env bash
echo "$1" >> "$OUT/hosts"
exec bash -c "$2"
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    stand_ins = {"accelerate": LAUNCHER, "srun": SRUN, "scontrol": SCONTROL, "fakessh": SSH}
    stand_ins["scancel"] = SCANCEL
    for name, text in stand_ins.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    # ssh.sh works in the checkout that it lies in; this one has no .venv.
    (tmp_path / "checkout/launch/hosts").mkdir(parents=True)
    shutil.copy(HOSTS / "ssh.sh", tmp_path / "checkout/launch/hosts")
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "CODE": "0",
        "SSH_SH": str(tmp_path / "checkout/launch/hosts/ssh.sh"),
        "SLURM_SUBMIT_DIR": str(tmp_path / "checkout"),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "40123",
    }


def arguments(out: Path) -> list[list[str]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def value(args: list[str], option: str) -> str:
    return args[args.index(option) + 1]


def test_slurm_starts_a_launcher_a_host(tmp_path: Path, env: dict[str, str]) -> None:
    args = ["bash", str(HOSTS / "slurm.sbatch"), "grid", "c.yaml", "grid.values={sae.k: [1, 2]}"]
    assert subprocess.run(args, env=env, timeout=60).returncode == 0
    for rank, got in enumerate(arguments(tmp_path)):
        assert value(got, "--machine_rank") == str(rank)
        assert value(got, "--num_machines") == "2"
        assert value(got, "--num_processes") == "8"
        assert value(got, "--main_process_ip") == "node7"
        assert value(got, "--main_process_port") == "20123"
        assert got[-4:] == ["-m", "flash_sae_dist.launch.grid", *args[-2:]]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "before", "again"), [(1, 0, True), (1, 5, False), (2, 0, False)])
def test_slurm_requeues_failures_but_not_mistakes(
    tmp_path: Path, env: dict[str, str], code: int, before: int, again: bool
) -> None:
    env |= {"CODE": str(code), "SLURM_RESTART_COUNT": str(before)}
    done = subprocess.run(["bash", str(HOSTS / "slurm.sbatch"), "train", "c.yaml"], env=env)
    assert done.returncode == (0 if again else code)
    assert (tmp_path / "requeued").exists() == again


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_slurm_stops_and_requeues_before_its_time_ends(tmp_path: Path, env: dict[str, str]) -> None:
    env |= {"SLEEP": "60"}
    script = subprocess.Popen(["bash", str(HOSTS / "slurm.sbatch"), "train", "c.yaml"], env=env)
    for rank in (0, 1):
        wait_for(tmp_path / f"{rank}.json")
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 0
    assert (tmp_path / "stopped").read_text() == "xx"
    assert (tmp_path / "requeued").read_text() == "40123\n"


def test_ssh_starts_a_launcher_a_host_and_gives_the_worst_code(
    tmp_path: Path, env: dict[str, str]
) -> None:
    env |= {"HOSTS": "node1 node2", "GPUS": "3", "PORT": "1234", "SSH": "fakessh", "CODE": "1"}
    args = [
        "bash",
        str(tmp_path / "checkout/launch/hosts/ssh.sh"),
        "grid",
        "c d.yaml",
        "grid.values={sae.k: [1, 2]}",
    ]
    assert subprocess.run(args, env=env, timeout=60).returncode == 1
    assert sorted((tmp_path / "hosts").read_text().split()) == ["node1", "node2"]
    for rank, got in enumerate(arguments(tmp_path)):
        assert value(got, "--machine_rank") == str(rank)
        assert value(got, "--num_processes") == "6"
        assert value(got, "--main_process_ip") == "node1"
        assert value(got, "--main_process_port") == "1234"
        assert got[-4:] == ["-m", "flash_sae_dist.launch.grid", *args[-2:]]


def test_ssh_stops_all_hosts(tmp_path: Path, env: dict[str, str]) -> None:
    port = str(40_000 + os.getpid() % 20_000)
    env |= {"HOSTS": "node1 node2", "SSH": "fakessh", "PORT": port, "SLEEP": "60"}
    script = subprocess.Popen(["bash", env["SSH_SH"], "train", "c.yaml"], env=env)
    for rank in (0, 1):
        wait_for(tmp_path / f"{rank}.json")
    script.send_signal(signal.SIGINT)
    assert script.wait(30) == 143
    assert (tmp_path / "stopped").read_text() == "xx"


def test_accelerates_files_say_what_they_must() -> None:
    for file in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        data = yaml.safe_load(file.read_text())
        assert data["distributed_type"] == "MULTI_GPU"
        assert data["mixed_precision"] == "no"
        assert data["num_processes"] % data["num_machines"] == 0
