"""SIGTERM and SIGINT at random moments: what was made is kept, the status says so, the same command
goes on. Twenty of each with `-m torture`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dist.jobs import finish, start
from tests.dist.ranks import ROOT, Running, free_port, kill
from tests.tiny_model import config_data, save_text, write_config

pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
TOTAL = 200_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a config of runs that would take minutes."""
    root = tmp_path_factory.mktemp("signals")
    data = config_data(root, shard_mib=0.01, num_tokens=4000)
    save_text(root / "text.jsonl", documents=200)
    data["train"] |= {"num_tokens": 64 * TOTAL, "checkpoint_every": TOTAL}
    finish(start("cache", write_config(root / "c.yaml", data), 1))
    return root


def run_as_a_user(verb: str, *args: str, processes: int = 1) -> subprocess.Popen[str]:
    """A verb in a group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", f"flash_sae_dist.launch.{verb}", *args]
    if processes > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port())]
        command += ["-m", f"flash_sae_dist.launch.{verb}", *args]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        # A shell's background jobs ignore SIGINT, a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )


def ended(process: Running | subprocess.Popen[str]) -> tuple[int | None, str]:
    """Exit code and what was said, within the time that a launcher gives."""
    if isinstance(process, subprocess.Popen):
        said = process.communicate(timeout=60)[0]
        return process.returncode, said
    process.process.join(60)
    return process.process.exitcode, process.text()


def wait_until(there: Callable[[], object], process: Running | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        alive = (
            process.poll() is None
            if isinstance(process, subprocess.Popen)
            else (process.process.is_alive())
        )
        assert alive or there(), ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(job: Path) -> bool:
    return (job / "status.json").exists() and state(job)["state"] == "running"


def send(process: Running, number: signal.Signals) -> None:
    assert process.process.pid is not None
    os.kill(process.process.pid, number)


def state(job: Path) -> dict[str, Any]:
    return json.loads((job / "status.json").read_text())  # type: ignore[no-any-return]


def checkpoints(job: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (job / "checkpoints").glob("step-*[0-9]"))


def assert_stopped(job: Path, said: str) -> None:
    """A checkpoint of the step that the status names, and nothing half-made."""
    status = state(job)
    assert status["state"] == "stopped", said
    if status["step"]:
        assert checkpoints(job)[-1] == status["step"]
    else:
        assert "before the first step" in said
    assert not list(job.rglob("*.partial")) + list(job.rglob("*.tmp"))


def stopped_training(
    root: Path, verb: str, number: signal.Signals, out: Path, rng: random.Random
) -> None:
    job = out / "model.layers.0" / ("k=2" if verb == "grid" else "")
    last = 0
    for _ in range(2):
        args = (f"output={out}", "grid.hookpoints=[model.layers.0]")
        (process,) = start(verb, root / "c.yaml", 1, *args)
        wait_until(lambda: is_running(job), process)
        time.sleep(rng.random() * 0.5)
        send(process, number)
        code, said = ended(process)
        assert code == CODES[number], said
        assert "Traceback" not in said
        assert f"stopped by {number.name}" in said
        assert_stopped(job, said)
        assert state(job)["step"] >= last, "it went on from there"
        last = state(job)["step"]
    assert last > 0


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["train", "grid"])
def test_training_stops_with_a_checkpoint(
    root: Path, tmp_path: Path, verb: str, number: signal.Signals
) -> None:
    stopped_training(root, verb, number, tmp_path / "run", random.Random(0))


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["train", "grid"])
def test_training_stops_with_a_checkpoint_often(
    root: Path, tmp_path: Path, verb: str, number: signal.Signals, seed: int
) -> None:
    stopped_training(root, verb, number, tmp_path / "run", random.Random(seed))


def test_two_processes_stop_at_one_step(root: Path, tmp_path: Path) -> None:
    """Though only the second is told."""
    out = tmp_path / "run"
    job = out / "model.layers.0"
    processes = start("train", root / "c.yaml", 2, f"output={out}")
    wait_until(lambda: is_running(job), processes[0])
    time.sleep(1)
    send(processes[1], signal.SIGTERM)
    outcomes = [ended(process) for process in processes]
    assert [code for code, _ in outcomes] == [143, 143], outcomes
    step = state(job)["step"]
    for _, said in outcomes:
        assert f"stopped by SIGTERM before step {step} of" in said
        assert_stopped(job, said)


@pytest.mark.torture
@pytest.mark.parametrize("number", SIGNALS)
def test_a_launch_of_two_processes_stops_at_one_step(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The launcher is told, a terminal's Ctrl-C all of them at once."""
    out = tmp_path / "run"
    process = run_as_a_user("train", str(root / "c.yaml"), f"output={out}", processes=2)
    job = out / "model.layers.0"
    wait_until(lambda: (job / "metrics.jsonl").exists(), process)
    time.sleep(0.5)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = ended(process)[1]
    assert time.monotonic() - began < 25, "the launcher kills after 30 s"
    assert state(job)["step"] > 0
    assert_stopped(job, said)
    assert f"stopped by {number.name} before step {state(job)['step']} of" in said


def test_a_checkpoint_every_minute(root: Path, tmp_path: Path) -> None:
    args = (f"output={tmp_path}", "train.checkpoint_minutes=0.005", "train.num_tokens=64000")
    processes = start("train", root / "c.yaml", 2, *args)
    folder = tmp_path / "model.layers.0" / "checkpoints"
    wait_until(lambda: len(list(folder.glob("step-*[0-9]"))) > 1, processes[0])
    kill(processes)


def stopped_cache(root: Path, number: signal.Signals, store: Path, rng: random.Random) -> None:
    (process,) = start("cache", root / "c.yaml", 1, f"cache.store={store}")
    wait_until(lambda: list(store.glob("records/shard-*.json")), process)
    time.sleep(rng.random() * 0.1)
    send(process, number)
    code, said = ended(process)
    if code:
        assert code == CODES[number], said
        made = len(list(store.glob("records/shard-*.json")))
        assert f"stopped by {number.name}; {made} of " in said
    assert "Traceback" not in said
    before = {p: p.stat().st_mtime_ns for p in store.glob("records/shard-*.json")}
    finish(start("cache", root / "c.yaml", 1, f"cache.store={store}"))
    assert before == {p: p.stat().st_mtime_ns for p in before}, "none was made again"


@pytest.mark.parametrize("number", SIGNALS)
def test_cache_keeps_finished_shards(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    stopped_cache(root, number, tmp_path / "s.zarr", random.Random(0))


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("number", SIGNALS)
def test_cache_keeps_finished_shards_often(
    root: Path, tmp_path: Path, number: signal.Signals, seed: int
) -> None:
    stopped_cache(root, number, tmp_path / "s.zarr", random.Random(seed))


def test_a_signal_before_the_first_step_says_so(root: Path, tmp_path: Path) -> None:
    """The first process waits for a second one that never comes, below Python."""
    out = f"output={tmp_path / 'run'}"
    (process, other) = start("train", root / "c.yaml", 2, out)
    kill([other])
    time.sleep(3)
    send(process, signal.SIGTERM)
    code, said = ended(process)
    assert code == 143, said
    assert "stopped by SIGTERM before the first step" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_at_once() -> None:
    """Here of a loop that never looks."""
    text = (
        "import time, sys\nfrom flash_sae_dist import ending\n"
        "with ending.listening(print), ending.deferred():\n"
        "    print('there', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
