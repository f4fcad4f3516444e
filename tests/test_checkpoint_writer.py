"""Checkpoints are written beside training: of one consistent state, one at a time, published whole
or not at all, and what a writer fails of ends the training in one sentence.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from flash_sae_dist import ending
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.base import UserError
from flash_sae_dist.grid.plan import train_job
from flash_sae_dist.launch.cli import build
from flash_sae_dist.parallel import agree
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training import checkpoint, checkpoint_writer, host_memory, trainer
from flash_sae_dist.training.checkpoint import TrainingState
from flash_sae_dist.training.checkpoint_writer import CheckpointWriter
from flash_sae_dist.training.host_memory import HostMemory, HostShare
from flash_sae_dist.training.job import load_config
from tests.dist.ranks import ROOT, free_port, rank_env
from tests.tiny_model import config_data, write_config

RUNNER = CliRunner()
CPU = torch.device("cpu")
ALONE = Mesh.single()
JOB = "model.layers.0"
Pwrite = Callable[[int, Any, int], int]
# Writing shards is slow once there is a checkpoint.
SLOW = """
import glob, os, time
pwrite = os.pwrite
def slowly(descriptor, data, at):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if ".partial/shard-" in name and glob.glob(name.partition("/step-")[0] + "/step-*[0-9]"):
        time.sleep(0.1)
    return pwrite(descriptor, data, at)
os.pwrite = slowly
from flash_sae_dist.launch.cli import main
main()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a config of 20 steps, checkpoints of steps 10 and 20."""
    root = tmp_path_factory.mktemp("writer")
    data = config_data(root, num_tokens=600)
    data["train"] |= {"num_tokens": 1280, "log_every": 5}
    write_config(root / "c.yaml", data)
    assert run("cache", root).exit_code == 0
    return root


def run(verb: str, root: Path, *args: str) -> Any:
    return RUNNER.invoke(build(), [verb, str(root / "c.yaml"), *args], catch_exceptions=False)


def on_shards(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], object]) -> None:
    """Calls something with the path of a checkpoint's file before each write into it."""
    pwrite: Pwrite = os.pwrite

    def write(descriptor: int, data: Any, at: int) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".partial/shard-" in name:
            before(name)
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", write)


def state(step: int, value: float, rows: int = 12) -> TrainingState:
    weights = torch.full((rows, 3), value)
    return TrainingState(
        {"W": weights, "flags": weights[:, 0] > 2}, {"b": torch.full((5,), value)},
        {"step": step, "d_sae": rows},
    )  # fmt: skip


def writer(
    folder: Path, mesh: Mesh = ALONE, rows: int = 12, memory: int = 1 << 30
) -> CheckpointWriter:
    share = HostShare(memory)
    return CheckpointWriter("job", folder, state(0, 0.0, rows), mesh, CPU, 2, share)


def test_a_state_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that come change it while it is being written."""
    go = threading.Event()
    on_shards(monkeypatch, lambda name: go.wait(10))
    made, now = writer(tmp_path), state(7, 1.0)
    made.begin(now)
    for tensor in (*now.rows.values(), *now.whole.values()):
        tensor.zero_()
    go.set()
    made.wait()
    found = checkpoint.load(tmp_path, 7, 0, 12)
    assert torch.equal(found.rows["W"], torch.ones(12, 3))
    assert torch.equal(found.whole["b"], torch.ones(5))
    made.begin(state(8, 2.0))
    made.close()
    assert float(checkpoint.load(tmp_path, 8, 0, 12).rows["W"].mean()) == 2
    assert checkpoint.newest_step(tmp_path, ALONE) == 8


def test_without_memory_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, now = writer(tmp_path, memory=1000), state(7, 1.0)
    made.begin(now)
    assert checkpoint.newest_step(tmp_path, ALONE) == 7, "it is whole at once"
    assert "training waits while one is written" in caplog.text
    made.close()


def test_memory_is_used_again_and_holds_every_type() -> None:
    like = {
        "wide": torch.randn(700_000), "half": torch.randn(3, 5).bfloat16(),
        "flag": torch.tensor([True, False]), "none": torch.empty(0, 4), "one": torch.tensor(5),
    }  # fmt: skip
    memory = HostMemory("job", like, CPU, HostShare(1 << 30))
    first = memory.copy(like)
    assert first is not None
    assert first.wait() == 0
    assert all(torch.equal(first.tensors[name], t) for name, t in like.items())
    again = memory.copy({name: t.clone().zero_() for name, t in like.items()})
    assert again is not None
    assert again.tensors["wide"].data_ptr() == first.tensors["wide"].data_ptr()
    assert not any(t.any() for t in again.tensors.values())
    memory.close()
    assert memory.copy(like) is None


def test_memory_that_cannot_be_had_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(host_memory.mmap, "mmap", refuse)
    memory = HostMemory("job", {"x": torch.ones(3)}, CPU, HostShare(1 << 30))
    assert memory.copy({"x": torch.ones(3)}) is None
    assert "training waits while a checkpoint is written: " in caplog.text
    memory.close()


def test_shares_of_a_host_are_alike_whoever_takes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank has as much as the others, of what was free before any took it."""
    here = socket.gethostname()
    told = [(here, 1000), (here, 900), ("another host", 10)]
    monkeypatch.setattr(host_memory.agree, "from_all", lambda own: told)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    share = HostShare.agreed()
    assert share.left == int(0.8 * 900) // 2
    # A process's own memories share it, and what is closed can be had again.
    like = {"x": torch.ones(3)}
    share = HostShare(4096)
    first, second = (HostMemory(name, like, CPU, share) for name in ("a", "b"))
    found = [memory.copy(like) is not None for memory in (first, second)]
    assert sorted(found) == [False, True]
    for memory in (first, second):
        memory.close()
    assert share.left == 4096
    third = HostMemory("c", like, CPU, share)
    assert third.copy(like) is not None
    third.close()


def test_the_hosts_memory_is_told() -> None:
    assert 1 << 26 < host_memory.free_bytes() < 1 << 50


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_large_shards_are_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_FILE_BYTES", size)
    made, now = writer(tmp_path), state(3, 0.0)
    now.rows["W"].copy_(torch.arange(36.0).view(12, 3))
    made.begin(now)
    made.wait()
    count = {1: 12, 100: 2, 10_000: 1}[size]
    assert len(list(tmp_path.glob("step-00000003/shard-*.safetensors"))) == count
    assert checkpoint.newest_step(tmp_path, ALONE) == 3
    for first, rows in ((0, 12), (5, 3), (11, 1)):
        found = checkpoint.load(tmp_path, 3, first, rows)
        assert torch.equal(found.rows["W"], now.rows["W"][first : first + rows])
        assert torch.equal(found.whole["b"], now.whole["b"])


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CheckpointWriter]:
    """Writers of 2 shards x 2 replicas in one process: their threads meet in no collective."""
    monkeypatch.setattr(agree, "from_lead", lambda found, mesh: "0" * 32)
    places = [(replica, shard) for replica in range(2) for shard in range(2)]
    meshes = [Mesh(0, 1, replica, 2, shard, 2, None, None, None) for replica, shard in places]
    return [writer(tmp_path, mesh, rows=6) for mesh in meshes]


def begin(ranks: list[CheckpointWriter], step: int) -> None:
    for made in ranks:
        now = state(step, float(made.mesh.shard), 6)
        made.begin(now._replace(info={"step": step, "d_sae": 12}))


def test_ranks_publish_together(ranks: list[CheckpointWriter], tmp_path: Path) -> None:
    published: list[int] = []
    for step in (1, 2, 3):
        for made in ranks:
            made._published = published.append
        begin(ranks, step)
        for made in ranks:
            made.wait()
            assert checkpoint.newest_step(tmp_path, ALONE) == step, "whoever waits may read it"
    assert published == [1] * 4 + [2] * 4 + [3] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = checkpoint.load(tmp_path, 3, 0, 12).rows["W"]
    assert torch.equal(found, torch.cat([torch.zeros(6, 3), torch.ones(6, 3)]))
    assert len(list((tmp_path / "step-00000003").iterdir())) == 3, "no record is left"


def test_a_replica_that_looks_first_waits(ranks: list[CheckpointWriter], tmp_path: Path) -> None:
    """Before the one that writes has made the folder."""
    for made in ranks:
        made.folder = tmp_path / "later"
    begin(ranks[2:], 1)
    time.sleep(0.05)
    begin(ranks[:2], 1)
    for made in ranks:
        made.wait()


@pytest.mark.parametrize("shard", [0, 1])
def test_what_one_rank_fails_of_all_raise(
    ranks: list[CheckpointWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    begin(ranks, 1)
    for made in ranks:
        made.wait()

    def fail(name: str) -> None:
        if f"shard-{shard:05d}" in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    on_shards(monkeypatch, fail)
    begin(ranks, 2)
    for made in ranks:
        with pytest.raises((OSError, UserError)) as raised:
            made.wait()
        said = str(ending.sentence_of(raised.value))
        assert f"shard-{shard:05d}-of-00002.safetensors" in said
        assert "No space left on device; free space there" in said
        assert not made.failed, "it is raised once"
    assert checkpoint.newest_step(tmp_path, ALONE) == 1


def test_records_of_another_launch_are_not_taken(
    ranks: list[CheckpointWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_PATIENCE_S", 0.2)
    begin(ranks, 1)
    for made in ranks:
        made.wait()
    # As a kill would leave it: whole records of another launch, and the other rank never comes.
    (tmp_path / "step-00000001").rename(tmp_path / f"step-00000002.{'1' * 32}.partial")
    begin(ranks[:1], 2)
    with pytest.raises(UserError, match="does every process see that folder"):
        ranks[0].wait()


def curve(job: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["fvu"]) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    assert run("train", root, f"output={root / 'undisturbed'}").exit_code == 0
    return root / "undisturbed" / JOB


def assert_same(job: Path, want: Path) -> None:
    assert curve(job) == curve(want)
    got, expected = (load_file(path / "sae/sae.safetensors") for path in (job, want))
    assert all(torch.equal(got[name], t) for name, t in expected.items())
    assert not list(job.rglob("*.partial")) + list(job.rglob("*.tmp"))


def test_one_that_falls_due_waits_and_says_so(
    root: Path, tmp_path: Path, undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "flash_sae_dist")
    on_shards(monkeypatch, lambda name: time.sleep(0.02))
    keys = ("train.checkpoint_every=1", "train.keep_checkpoints=99")
    assert run("train", root, f"output={tmp_path}", *keys).exit_code == 0
    waits = [m for m in caplog.messages if "which is being written" in m]
    assert f"{JOB}: the checkpoint of step 2 waits for that of step 1, which" in waits[0]
    assert 15 < len(waits) < 20
    assert len(list(tmp_path.glob("*/checkpoints/step-*"))) == 20
    assert_same(tmp_path / JOB, undisturbed)
    (line,) = (m for m in caplog.messages if "checkpoints held up" in m)
    assert float(line.rpartition("held up ")[2].split()[0]) > 1
    for step in range(1, 20):
        checkpoint._verify(tmp_path / JOB / f"checkpoints/step-{step:08d}")


def test_writers_that_hang_are_waited_for_together(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three SAEs of a bundle, one grace."""
    go = threading.Event()
    on_shards(monkeypatch, lambda name: go.wait(30))
    monkeypatch.setattr(trainer, "GRACE_S", 1.0)
    config = load_config(str(root / "c.yaml"), [f"output={tmp_path}"])
    store = ActivationStore.open(config.store_path())
    job = train_job(config, store.hookpoints)
    jobs = [job._replace(name=name, folder=tmp_path / name) for name in ("a", "b", "c")]
    made = trainer.Trainer(jobs, store, ALONE, CPU, lambda *_: None, HostShare(1 << 30))
    for member in made.members:
        member.save_checkpoint()
    began = time.monotonic()
    with pytest.raises(KeyError, match="ours"), made._ends_writers():
        raise KeyError("ours")
    assert 0.9 < time.monotonic() - began < 2
    go.set()


@pytest.mark.parametrize("at", [5, 20])
def test_a_full_disk_ends_the_job_with_what_is_kept(
    root: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Behind training, and behind its last step."""

    def fail(name: str) -> None:
        if f"step-{at:08d}" in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    args = (f"output={tmp_path}", "train.checkpoint_every=5")
    with monkeypatch.context() as patch:
        on_shards(patch, fail)
        done = run("train", root, *args)
    assert done.exit_code == 1
    (said,) = (line for line in done.output.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.output
    assert "No space left on device; free space there, or name" in said
    job = tmp_path / JOB
    newest = checkpoint.newest_step(job / "checkpoints", ALONE)
    if at == 20:
        assert newest == 15
        assert f"{job}/checkpoints/step-00000015 is kept" in said
    else:
        assert newest is None
        assert "has no checkpoint yet" in said
        assert len(curve(job)) < 4, "it ended soon after"
    status = json.loads((job / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space" in status["error"]
    assert run("train", root, *args).exit_code == 0
    assert_same(job, undisturbed)


def test_the_autograd_engine_has_room_before_its_first_step(root: Path, tmp_path: Path) -> None:
    """torch.optim.Adam has no moments by then."""
    args = (f"output={tmp_path}", "train.engine=autograd")
    assert run("train", root, *args).exit_code == 0
    assert checkpoint.newest_step(tmp_path / JOB / "checkpoints", ALONE) == 20


def test_a_quick_lead_does_not_leave_a_slow_rank_waiting(
    ranks: list[CheckpointWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that write nothing hold nothing up: a later checkpoint may have come."""
    for made in ranks:
        made.keep = 1
    for step in (1, 2):
        begin(ranks[:2], step)
        for made in ranks[:2]:
            made.wait()
    begin(ranks[2:], 1)
    for made in ranks[2:]:
        made.wait(10)
        assert not made._thread or not made._thread.is_alive()


@pytest.mark.gpu
def test_a_gpus_state_is_of_one_moment_and_nothing_waits_but_the_device(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    device = torch.device("cuda")
    weights = torch.zeros(4096, 65536, device=device)
    now = TrainingState({"W": weights}, {}, {"step": 1, "d_sae": 4096})
    made = CheckpointWriter("job", tmp_path, now, ALONE, device, 2, HostShare(1 << 30))
    # Memory that stayed page-locked would fail tests that come after.
    request.addfinalizer(made.close)
    assert made._memory is not None
    made._memory._maker.join()
    assert made._memory._views is not None
    assert made._memory._views["rows.W"].is_pinned()
    # Kernels are loaded at their first call, which may wait for the device.
    weights.add_(0).sub_(0)
    for step in range(1, 4):
        torch.cuda._sleep(200_000_000)
        began = time.perf_counter()
        weights.add_(1)
        made.begin(now._replace(info={"step": step, "d_sae": 4096}))
        if step == 1:
            assert time.perf_counter() - began < 0.05, "the host waits for no copy"
        # Steps that come at once.
        for _ in range(20):
            weights.add_(1)
        weights.sub_(20)
        made.wait()
        found = checkpoint.load(tmp_path, step, 0, 4096).rows["W"]
        assert bool((found == step).all())
    assert 0 < made.blocked_s < 1
    made.close()
    assert torch.cuda.is_available()


def test_in_a_grid_only_the_job_fails_whose_checkpoint_did(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if "k=2" in name and "step-00000010" in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    args = (f"output={tmp_path}", f"grid.hookpoints=[{JOB}]")
    with monkeypatch.context() as patch:
        on_shards(patch, fail)
        assert run("grid", root, *args).exit_code == 1
    states = {k: json.loads((tmp_path / JOB / f"k={k}/status.json").read_text()) for k in (2, 4)}
    assert {k: s["state"] for k, s in states.items()} == {2: "failed", 4: "finished"}
    assert "No space" in states[2]["error"]
    assert run("grid", root, *args).exit_code == 0


def slowed(root: Path, *args: str) -> subprocess.Popen[str]:
    """`train` whose checkpoints after the first take seconds."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", str(root / "c.yaml"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def while_writing(process: subprocess.Popen[str], folder: Path, number: signal.Signals) -> str:
    """Sends a signal in the midst of writing the second checkpoint; what the process said."""
    deadline = time.monotonic() + 120
    while not (any(folder.glob("step-*[0-9]")) and any(folder.glob("*.partial/shard-*"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


@pytest.mark.slow
def test_kill_9_while_one_is_written(root: Path, tmp_path: Path, undisturbed: Path) -> None:
    job = tmp_path / JOB
    process = slowed(root, f"output={tmp_path}")
    while_writing(process, job / "checkpoints", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list((job / "checkpoints").glob("*.partial"))
    assert checkpoint.newest_step(job / "checkpoints", ALONE) == 10
    assert not (job / "sae/made_of.json").exists()
    assert run("train", root, f"output={tmp_path}").exit_code == 0
    assert_same(job, undisturbed)


@pytest.mark.slow
def test_sigterm_while_one_is_written_publishes_it(root: Path, tmp_path: Path) -> None:
    job = tmp_path / JOB
    process = slowed(root, f"output={tmp_path}", "train.num_tokens=64000000")
    said = while_writing(process, job / "checkpoints", signal.SIGTERM)
    assert process.returncode == 143, said
    status = json.loads((job / "status.json").read_text())
    assert status["state"] == "stopped"
    assert checkpoint.newest_step(job / "checkpoints", ALONE) == status["step"]
    assert f"step-{status['step']:08d} is kept" in said
    assert len(list(job.glob("checkpoints/step-*"))) == 2, "and that which was being written"
    assert not list(job.rglob("*.partial"))


# The second rank's disk is full at a later step.
FULL = """
import os
pwrite = os.pwrite
def write(descriptor, data, at):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if "step-00000020." in name and "/shard-00001" in name:
        raise OSError(28, "No space left on device")
    return pwrite(descriptor, data, at)
os.pwrite = write
from flash_sae_dist.launch.entry import verb_main
from flash_sae_dist.launch.train import run
verb_main(run)
"""


@pytest.mark.slow
def test_all_ranks_end_with_the_sentence_of_the_one_that_failed(root: Path, tmp_path: Path) -> None:
    port = free_port()
    args = [str(root / "c.yaml"), f"output={tmp_path}", "train.num_tokens=64000000"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FULL, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=rank_env(rank, 2, port),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    for text in said:
        assert "Traceback" not in text
        assert "shard-00001-of-00002.safetensors: No space left on device; free space" in text
        assert f"{tmp_path / JOB}/checkpoints/step-00000010 is kept" in text
    steps = curve(tmp_path / JOB)[-1][0]
    assert steps < 20_000, "long before the end"
    status = json.loads((tmp_path / JOB / "status.json").read_text())
    assert status["state"] == "failed"


def test_a_folder_that_is_published_meanwhile_tells_of_no_failure(tmp_path: Path) -> None:
    """Other ranks look into it while the lead renames it."""
    stop, moves = threading.Event(), [tmp_path / "a.partial", tmp_path / "a"]
    moves[0].mkdir()

    def rename() -> None:
        while not stop.is_set():
            moves[0].rename(moves[1])
            moves[1].rename(moves[0])

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        assert {checkpoint_writer._failure(moves[0]) for _ in range(3000)} == {None}
    finally:
        stop.set()
        thread.join()
    (tmp_path / "a.partial/failed-1.json").write_text('{"error": "the disk is full"}')
    assert checkpoint_writer._failure(moves[0]) == "the disk is full"
