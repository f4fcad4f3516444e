"""Metrics are read when the next log is due, and none is lost: at a checkpoint, at the end, as a
job fails or is killed.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.grid import runner
from flash_sae_dist.training.checkpoint import TrainingState
from flash_sae_dist.training.checkpoint_writer import CheckpointWriter
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.member import Member
from flash_sae_dist.training.metrics import HostCopy, PhaseTimer, StepMetrics, read_metrics
from flash_sae_dist.training.records import read_status
from flash_sae_dist.training.trainer import Trainer
from tests.tiny_model import config_data

# Steps 3, 6, 9 and the last are logged; checkpoints are of steps 4, 8 and the last.
STEPS, LOG_EVERY, CHECKPOINT_EVERY = 10, 3, 4
LOGGED = [3, 6, 9, 10]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metrics")
    run_cache(parse_config(config_data(root)), Accelerator(cpu=True))
    return root


def train(root: Path, out: Path, *, grid: bool = False) -> None:
    data = config_data(root) | {"output": str(out)}
    data["train"] |= {
        "num_tokens": STEPS * 64,
        "log_every": LOG_EVERY,
        "checkpoint_every": CHECKPOINT_EVERY,
    }
    runner.run_jobs(parse_config(data), Accelerator(cpu=True), grid=grid)


def folder(out: Path) -> Path:
    return out / "model.layers.0"


def lines(job: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock said, the keys in their order."""
    found = []
    for line in read_metrics(job / "metrics.jsonl"):
        assert list(line)[:9] == [
            *(
                "step",
                "tokens",
                "fvu",
                "aux",
                "l0",
                "penalty",
                "dead_fraction",
                "lr",
                "tokens_per_s",
            )
        ]
        assert list(line)[9] == "ms/data"
        assert all(value > 0 for key, value in line.items() if key.startswith("ms/"))
        assert line["tokens_per_s"] > 0
        found.append({k: v for k, v in line.items() if k[:3] != "ms/" and k != "tokens_per_s"})
    return found


def steps(job: Path) -> list[int]:
    return [int(line["step"]) for line in lines(job)]


@pytest.fixture(scope="module")
def curve(root: Path) -> list[dict[str, float]]:
    """The lines of a run whose metrics are read at the step that they are of."""
    log = Trainer._log

    def eager(self: Trainer, *args: Any) -> None:
        log(self, *args)
        self._read_logged()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", eager)
        train(root, root / "eager")
    assert steps(folder(root / "eager")) == LOGGED
    return lines(folder(root / "eager"))


def test_late_metrics_are_the_same_lines(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: list[dict[str, float]]
) -> None:
    on_disk: dict[str, dict[int, list[int]]] = {"step": {}, "checkpoint": {}}
    step, begin = Member.step, CheckpointWriter.begin

    def stepping(self: Member, *args: Any) -> StepMetrics:
        on_disk["step"][self.training.step_index + 1] = steps(self.job.folder)
        return step(self, *args)

    def beginning(self: CheckpointWriter, state: TrainingState) -> None:
        on_disk["checkpoint"][state.info["step"]] = steps(self.folder.parent)
        begin(self, state)

    monkeypatch.setattr(Member, "step", stepping)
    monkeypatch.setattr(CheckpointWriter, "begin", beginning)
    train(root, tmp_path)
    assert lines(folder(tmp_path)) == curve
    assert on_disk["step"][4] == [], "step 3 is read when step 6 is logged, or a checkpoint is due"
    assert on_disk["step"][8] == [3]
    assert on_disk["step"][10] == [3, 6]
    assert on_disk["checkpoint"] == {4: [3], 8: [3, 6], 10: LOGGED}


@pytest.mark.parametrize("at", [4, 7, 8, 10])
def test_a_killed_run_goes_on_with_the_same_lines(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    curve: list[dict[str, float]],
    at: int,
) -> None:
    step = Member.step

    def stepping(self: Member, *args: Any) -> StepMetrics:
        if self.training.step_index + 1 == at:
            # What kill -9 would leave on the disk.
            self.writer.wait()
            shutil.copytree(tmp_path / "first", tmp_path / "killed")
        return step(self, *args)

    monkeypatch.setattr(Member, "step", stepping)
    train(root, tmp_path / "first")
    monkeypatch.undo()
    made = len(list(folder(tmp_path / "killed").glob("checkpoints/step-*")))
    assert made == (at - 1) // CHECKPOINT_EVERY
    train(root, tmp_path / "killed")
    assert lines(folder(tmp_path / "killed")) == curve


def test_an_error_leaves_the_lines_before_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: list[dict[str, float]]
) -> None:
    step = Member.step

    def stepping(self: Member, *args: Any) -> StepMetrics:
        if self.training.step_index + 1 == 8:
            raise KeyError("a mistake")
        return step(self, *args)

    monkeypatch.setattr(Member, "step", stepping)
    with pytest.raises(KeyError, match="a mistake"):
        train(root, tmp_path)
    assert lines(folder(tmp_path)) == curve[:2]
    reading = [t.name for t in threading.enumerate() if t.name.startswith(("block_", "batch_"))]
    assert not reading, "whatever ends the loop closes the loader"


def test_a_job_that_fails_alone_leaves_the_lines_before_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Member.step
    at_failure: list[list[int]] = []

    def stepping(self: Member, *args: Any) -> StepMetrics:
        if self.training.step_index + 1 == 8 and self.job.name.endswith("k=2"):
            raise KeyError("a mistake")
        if self.training.step_index + 1 == 8:
            at_failure.append(steps(self.job.folder.with_name("k=2")))
        return step(self, *args)

    monkeypatch.setattr(Member, "step", stepping)
    with pytest.raises(runner.JobsFailedError, match="2 of 4 SAEs failed"):
        train(root, tmp_path, grid=True)
    for hookpoint in ("model.layers.0", "model.layers.1.mlp"):
        assert steps(tmp_path / hookpoint / "k=2") == [3, 6]
        assert steps(tmp_path / hookpoint / "k=4") == LOGGED
    assert at_failure == [[3, 6], [3, 6]], "they are written as the job fails, not later"


@pytest.mark.parametrize(("at", "checkpoints"), [(6, [4]), (3, []), (9, [4, 8]), (10, [4, 8])])
def test_a_loss_that_is_not_finite_fails_the_job_at_its_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, checkpoints: list[int]
) -> None:
    """Though steps were made after it: no line and no checkpoint is of those."""
    step = Member.step

    def stepping(self: Member, *args: Any) -> StepMetrics:
        metrics = step(self, *args)
        bad = self.training.step_index == at and self.job.name.endswith("k=2")
        return metrics._replace(fvu=metrics.fvu * torch.nan) if bad else metrics

    monkeypatch.setattr(Member, "step", stepping)
    with pytest.raises(runner.JobsFailedError, match="2 of 4 SAEs failed"):
        train(root, tmp_path, grid=True)
    failed, other = (tmp_path / "model.layers.0" / k for k in ("k=2", "k=4"))
    status = read_status(failed)
    assert status is not None
    assert (status.state, status.step, status.total_steps) == ("failed", at, STEPS)
    assert status.error == f"fvu is nan at step {at}; lower train.lr, check the rows"
    text = (failed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == LOGGED[: LOGGED.index(at) + 1]
    made = sorted(int(path.name[5:]) for path in failed.glob("checkpoints/step-*"))
    assert made == checkpoints
    assert steps(other) == LOGGED
    assert getattr(read_status(other), "state", None) == "finished"


def test_trackers_get_the_steps_in_order(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: list[dict[str, float]]
) -> None:
    told: list[tuple[str, int, float]] = []

    def log(_: runner.Trackers, job: str, values: dict[str, float], step: int) -> None:
        told.append((job, step, values["fvu"]))

    monkeypatch.setattr(runner.Trackers, "log", log)
    train(root, tmp_path)
    assert told == [("model.layers.0", int(line["step"]), line["fvu"]) for line in curve]


def test_scalars_are_those_of_their_step() -> None:
    scalar, count = torch.tensor(0.1), torch.tensor(3)
    copy = HostCopy([scalar, count])
    scalar.zero_()
    count.zero_()
    assert copy.read() == [float(torch.tensor(0.1)), 3.0]


@pytest.mark.gpu
def test_scalars_of_a_busy_device() -> None:
    """Nothing waits for the device until they are read, and what is written later does no harm."""
    device = torch.device("cuda")
    scalar, count = torch.tensor(0.1, device=device), torch.tensor(2**40 + 1, device=device)
    large = torch.randn(4096, 4096, device=device)
    HostCopy([scalar, count]).read()
    timer = PhaseTimer(device, enabled=True)
    for _ in range(100):
        large = large @ large
        large /= large.norm()
    timer.mark("work")
    copy = HostCopy([scalar, count])
    scalar.zero_()
    count.zero_()
    assert copy._ready is not None
    assert not copy._ready.query(), "the device still works"
    for _ in range(100):
        large = large @ large
        large /= large.norm()
    end = torch.cuda.current_stream().record_event()
    assert copy.read() == [float(torch.tensor(0.1)), 2.0**40 + 1]
    assert timer.milliseconds()["work"] > 0
    assert not end.query(), "later work is not waited for"
