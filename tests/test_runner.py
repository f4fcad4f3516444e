"""Running jobs: failures are recorded and told, trackers get each SAE's own steps, another store is
refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flash_sae_dist import files
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.grid import plan, runner
from flash_sae_dist.grid.plan import train_job
from flash_sae_dist.grid.trackers import Trackers
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.parallel import agree
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.job import Config, parse_config
from flash_sae_dist.training.member import Member
from flash_sae_dist.training.records import (
    DamagedRecordError,
    Job,
    Status,
    read_status,
    write_status,
)
from tests.tiny_model import config_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runner")
    run_cache(parse_config(config_data(root)), Accelerator(cpu=True))
    return root


def config(root: Path, out: Path, **train: Any) -> Config:
    data = config_data(root) | {"output": str(out)}
    data["train"] |= {"num_tokens": 640, **train}
    return parse_config(data)


class FakeTracker:
    """Keeps what accelerate's trackers are given."""

    def __init__(self, name: str) -> None:
        self.name, self.lines = name, []

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, values))


class FakeAccelerator:
    """The trackers' part of an accelerator."""

    is_main_process = True

    def __init__(self, *names: str, error: Exception | None = None) -> None:
        self.log_with, self.trackers, self.error = list(names), [], error

    def init_trackers(self, project: str, config: dict[str, Any]) -> None:
        self.project, self.config = project, config
        self.trackers = [FakeTracker(name) for name in self.log_with]
        if self.error is not None:
            raise self.error


def test_other_trackers_get_one_run_with_every_saes_name() -> None:
    accelerator = FakeAccelerator("trackio")
    trackers = Trackers(accelerator, {"a.0": {"sae": {"k": 2}}, "b": {}})
    for job in ("a.0", "b"):
        trackers.log(job, {"fvu": 0.5}, 10)
    (tracker,) = accelerator.trackers
    assert tracker.lines == [(10, {"a_0/fvu": 0.5}), (10, {"b/fvu": 0.5})]
    assert accelerator.config == {"sae.k": 2}


def test_a_tracker_that_cannot_start_is_told() -> None:
    accelerator = FakeAccelerator("trackio", error=RuntimeError("no API key\nconfigured"))
    with pytest.raises(ConfigError, match="trackers: trackio cannot start: no API key configured"):
        Trackers(accelerator, {})
    assert not accelerator.trackers, "a half-made tracker must not be ended later"


class Failing:
    """A trainer that fails as a full disk or an out-of-memory does."""

    def __init__(self, jobs: list[Any], *_: Any, **__: Any) -> None:
        for job in jobs:
            write_status(job, Status("running", 3, 10))

    def run(self) -> None:
        raise OSError("no space left")


def test_ranks_that_train_together_end_together(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on to the next jobs would leave the other ranks of this one in a collective."""
    monkeypatch.setattr(runner, "Trainer", Failing)
    # There is no other rank to agree with.
    monkeypatch.setattr(agree, "from_lead", lambda found, mesh: found)
    cfg = config(root, tmp_path)
    store = ActivationStore.open(cfg.store_path())
    job = train_job(cfg, store.hookpoints)
    trackers = Trackers(FakeAccelerator(), {})
    together = Mesh(0, 2, 0, 1, 1, 2, None, None, None)
    with pytest.raises(OSError, match="no space left"):
        runner._train_bundle([job], store, together, CPU, trackers, HostShare(0), only=False)
    status = Status("failed", 3, 10, "OSError: no space left")
    assert read_status(job.folder) == status
    alone = Mesh(1, 2, 0, 1, 0, 1, None, None, None)
    runner._train_bundle([job], store, alone, CPU, trackers, HostShare(0), only=False)
    assert read_status(job.folder) == status


def grid_config(root: Path, out: Path) -> Config:
    data = config_data(root) | {"output": str(out)}
    data["train"] |= {"num_tokens": 640}
    data["grid"] = {"hookpoints": ["*"], "values": {"sae.k": [2, 3]}}
    return parse_config(data)


def test_saes_that_do_not_fit_together_are_trained_one_by_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(runner.Trainer):
        def run(self) -> None:
            if len(self.members) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().run()

    monkeypatch.setattr(runner, "Trainer", Crowded)
    jobs = runner.run_jobs(grid_config(root, tmp_path), Accelerator(cpu=True), grid=True)
    assert len(jobs) > 1
    for job in jobs:
        status = read_status(job.folder)
        assert status is not None
        assert status.state == "finished"


def test_an_sae_that_does_not_fit_leaves_the_others_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job a bundle, one group: the first's failure must not end the grid."""

    class Small(runner.Trainer):
        def run(self) -> None:
            if any("k=2" in member.job.name for member in self.members):
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().run()

    monkeypatch.setattr(runner, "Trainer", Small)
    monkeypatch.setattr(plan, "bundle_memory", lambda launch: 0)
    cfg = grid_config(root, tmp_path)
    with pytest.raises(runner.JobsFailedError, match=r"k=2: OutOfMemoryError"):
        runner.run_jobs(cfg, Accelerator(cpu=True), grid=True)
    states = {
        path.parent.name: json.loads(path.read_text())["state"]
        for path in tmp_path.glob("*/*/status.json")
    }
    assert states == {"k=2": "failed", "k=3": "finished"}


def test_one_that_fails_in_a_bundle_leaves_the_others_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails: as it begins, at a step, or as its SAE is written."""
    begin, step, save = Member.__init__, Member.step, TopKSAE.save

    def fails(name: str, job: Job) -> None:
        if job.name == name:
            raise KeyError("a mistake")

    def beginning(self: Member, job: Job, *args: Any) -> None:
        fails("model.layers.0/k=2", job)
        begin(self, job, *args)

    def stepping(self: Member, *args: Any) -> Any:
        fails("model.layers.0/k=3", self.job)
        return step(self, *args)

    def saving(self: TopKSAE, folder: Path, weights: Any) -> None:
        if "model.layers.1.mlp/k=2" in str(folder):
            raise OSError("no space left")
        save(self, folder, weights)

    monkeypatch.setattr(Member, "__init__", beginning)
    monkeypatch.setattr(Member, "step", stepping)
    monkeypatch.setattr(TopKSAE, "save", saving)
    cfg = grid_config(root, tmp_path)
    with pytest.raises(runner.JobsFailedError) as raised:
        runner.run_jobs(cfg, Accelerator(cpu=True), grid=True)
    told = str(raised.value)
    assert "3 of 4 SAEs failed" in told
    assert "model.layers.0/k=2: KeyError: 'a mistake'" in told
    assert "model.layers.1.mlp/k=2: OSError: no space left" in told
    states = {
        f"{path.parent.parent.name}/{path.parent.name}": json.loads(path.read_text())["state"]
        for path in tmp_path.glob("*/*/status.json")
    }
    assert states == {
        "model.layers.0/k=2": "failed",
        "model.layers.0/k=3": "failed",
        "model.layers.1.mlp/k=2": "failed",
        "model.layers.1.mlp/k=3": "finished",
    }
    monkeypatch.undo()
    # The same command again makes what is missing.
    jobs = runner.run_jobs(cfg, Accelerator(cpu=True), grid=True)
    assert [getattr(read_status(job.folder), "state", None) for job in jobs] == ["finished"] * 4


def test_what_became_of_a_job_is_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(root, tmp_path)
    (job,) = runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    last = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])
    said = capsys.readouterr().out
    assert f"model.layers.0: trained; fvu {last['fvu']:.4g}, l0 " in said
    assert str(job.folder / "sae") in said
    runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    assert "model.layers.0: was trained before, nothing to do; fvu" in capsys.readouterr().out
    # An SAE that was cut short is written anew.
    weights = job.folder / "sae" / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    assert weights.read_bytes() == whole


def test_the_same_command_twice_at_once_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(root, tmp_path)
    monkeypatch.setattr(files, "_WAIT_S", 0.3)
    with files.locked(tmp_path / "model.layers.0"):
        with pytest.raises(runner.JobsFailedError, match=r"another process is at work in .*rs\.0;"):
            runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
        assert [p.name for p in (tmp_path / "model.layers.0").iterdir()] == [".lock"]
    runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)


def test_a_grid_goes_on_beside_a_job_that_another_launch_holds(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = grid_config(root, tmp_path)
    monkeypatch.setattr(files, "_WAIT_S", 0.3)
    monkeypatch.setattr(plan, "bundle_memory", lambda launch: 0)  # a bundle a job
    held = tmp_path / "model.layers.0" / "k=2"
    with files.locked(held):
        write_status(Job("held", held, cfg), Status("failed", 1, 2, "the other's reason"))
        with pytest.raises(runner.JobsFailedError, match=r"1 of 4 .*another process is at work"):
            runner.run_jobs(cfg, Accelerator(cpu=True), grid=True)
    assert getattr(read_status(held), "error", None) == "the other's reason"
    assert len(list(tmp_path.glob("*/*/sae"))) == 3


def test_a_damaged_status_is_made_anew(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path)
    (job,) = runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    shutil.rmtree(job.folder / "sae")
    (job.folder / "status.json").write_text("")
    with (job.folder / "metrics.jsonl").open("ab") as f:
        f.write(b'7\n\xff\n{"step"')
    runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    assert getattr(read_status(job.folder), "state", None) == "finished"


def test_another_versions_job_is_not_called_damaged(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path)
    (job,) = runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    # As 0.1.0 or a hand wrote it.
    lines = (job.folder / "job.yaml").read_text().splitlines()
    (job.folder / "job.yaml").write_text("\n".join([*lines[1:], "new_section: {}"]))
    with pytest.raises(ConfigError, match=r"new_section") as raised:
        runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("name", ["store.json", "job.yaml"])
def test_a_damaged_record_is_told(root: Path, tmp_path: Path, name: str) -> None:
    cfg = config(root, tmp_path)
    (job,) = runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    shutil.rmtree(job.folder / "sae")
    (job.folder / name).write_text("{")
    with pytest.raises(DamagedRecordError, match=rf"{name} is damaged .* restore it"):
        runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)


def test_a_failed_job_ends_the_launch_in_a_sentence(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path, lr=1e30)
    with pytest.raises(runner.JobsFailedError, match=r"1 of 1 SAEs failed \(model.layers.0: .*lr"):
        runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)


def test_damage_in_the_store_is_told_with_its_file(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "store.zarr", tmp_path / "store.zarr")
    data = config_data(root) | {"output": str(tmp_path / "out")}
    data["store"] = str(tmp_path / "store.zarr")
    for file in (tmp_path / "store.zarr/activations/model.layers.0/c").glob("*/0"):
        torn = bytearray(file.read_bytes())
        torn[11] ^= 1
        file.write_bytes(torn)
    with pytest.raises(DamagedStoreError, match="damaged in chunk 0"):
        runner.run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    (status,) = (tmp_path / "out").glob("*/status.json")
    assert "DamagedStoreError" in json.loads(status.read_text())["error"]


def test_another_store_is_not_taken_for_this_one(root: Path, tmp_path: Path) -> None:
    """The same hookpoint of another text: its rows are not what the SAE was trained on."""
    cfg = config(root, tmp_path / "out")
    runner.run_jobs(cfg, Accelerator(cpu=True), grid=False)
    data = config_data(root, store=str(tmp_path / "other.zarr"), seed=7)
    run_cache(parse_config(data), Accelerator(cpu=True))
    data |= {"output": str(tmp_path / "out"), "train": cfg.model_dump(mode="json")["train"]}
    with pytest.raises(ConfigError, match=r"cache\.seed=7 differs from 0, .*name another output"):
        runner.run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    # Where it lies does not matter, what it holds does.
    (root / "store.zarr").rename(tmp_path / "moved.zarr")
    moved = cfg.model_copy(update={"store": str(tmp_path / "moved.zarr")})
    assert runner.run_jobs(moved, Accelerator(cpu=True), grid=False)
    (tmp_path / "moved.zarr").rename(root / "store.zarr")


def test_an_output_that_is_a_file_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"output='.*/file/run': .*/file is a file; name a folder"
    ):
        runner.run_jobs(config(root, tmp_path / "file" / "run"), Accelerator(cpu=True), grid=False)
