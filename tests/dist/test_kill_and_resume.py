"""kill -9 at random moments, the same command again: nothing is lost and nothing differs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from flash_sae_dist.activations.store import ActivationStore, array_names
from tests.dist.jobs import finish, kill_after, start
from tests.dist.ranks import wait
from tests.tiny_model import config_data, save_text, write_config

pytestmark = pytest.mark.slow
STEPS = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cached store, made by one uninterrupted process."""
    root = tmp_path_factory.mktemp("jobs")
    data = config_data(root, shard_mib=0.01, num_tokens=4000)
    # Long enough that a kill in its first quarter cannot come after its end, however busy the
    # machine.
    data["train"]["num_tokens"] = STEPS * 64
    save_text(root / "text.jsonl", documents=200)
    finish(start("cache", write_config(root / "one.yaml", data), 1))
    return root


def rows(path: str) -> dict[str, np.ndarray[Any, Any]]:
    store = ActivationStore.open(path)
    store.verify()
    return {name: store.read(name, 0, store.rows) for name in array_names(store.widths)}


def assert_same_rows(a: str, b: str) -> None:
    left, right = rows(a), rows(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert np.array_equal(value, right[name]), name


def with_store(root: Path, name: str) -> Path:
    data = yaml.safe_load((root / "one.yaml").read_text())
    data["cache"]["store"] = str(root / name)
    return write_config(root / f"{name}.yaml", data)


def test_two_processes_write_the_same_store(root: Path) -> None:
    finish(start("cache", with_store(root, "two.zarr"), 2))
    assert_same_rows(str(root / "store.zarr"), str(root / "two.zarr"))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_cache_job_goes_on(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    name = f"killed{seed}.zarr"
    config = with_store(root, name)
    for count in (1, 8):
        job = start("cache", config, 2)
        kill_after(job, root / name / "records", "shard-*.json", count, rng)
    finish(start("cache", config, 2))
    assert_same_rows(str(root / "store.zarr"), str(root / name))


def curve(output: Path) -> list[dict[str, float]]:
    """The lines of a loss curve without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "checksum")
    return [{k: v for k, v in x.items() if k[:3] != "ms/" and k not in clock} for x in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "sae" / "sae.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Path:
    out = root / "whole"
    finish(start("train", root / "one.yaml", 2, f"output={out}"))
    return out / "model.layers.0"


def test_loss_curve_is_whole_and_falls(uninterrupted: Path) -> None:
    lines = curve(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["fvu"] < lines[0]["fvu"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_train_job_goes_on_bit_for_bit(root: Path, uninterrupted: Path, seed: int) -> None:
    rng = random.Random(seed)
    out = root / f"killed{seed}"
    job_folder = out / "model.layers.0"
    for _ in range(2):
        job = start("train", root / "one.yaml", 2, f"output={out}", "train.keep_checkpoints=99")
        done = len(list((job_folder / "checkpoints").glob("step-*[0-9]")))
        kill_after(job, job_folder / "checkpoints", "step-*[0-9]", done + 2, rng)
    assert not (job_folder / "sae").exists(), "it was killed before the end"
    finish(start("train", root / "one.yaml", 2, f"output={out}"))
    assert curve(job_folder) == curve(uninterrupted)
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(job_folder)[name]), name


def test_killed_architectures_go_on_bit_for_bit(root: Path) -> None:
    """Thresholds that are trained, and those of a moving average, calibrated at the end."""
    keys = "{d_sae: 64, k: 4, initial_threshold: 0.3, bandwidth: 0.5, threshold_start: 20}"
    args = [f"sae={keys}", "train.num_tokens=7680", "grid.hookpoints=[model.layers.0]"]
    args += ["grid.values={sae.architecture: [batch_topk, jumprelu]}", "train.holdout=0.1"]
    args += ["train.keep_checkpoints=99"]
    whole, killed = root / "architectures", root / "killed-architectures"
    finish(start("grid", root / "one.yaml", 2, f"output={whole}", *args))
    jobs = sorted(p.parent.relative_to(whole) for p in whole.glob("*/*/sae"))
    assert [job.name for job in jobs] == ["architecture=batch_topk", "architecture=jumprelu"]
    job = start("grid", root / "one.yaml", 2, f"output={killed}", *args)
    kill_after(job, killed / jobs[1] / "checkpoints", "step-*[0-9]", 2, random.Random(5))
    assert not (killed / jobs[1] / "sae").exists(), "it was killed before the end"
    finish(start("grid", root / "one.yaml", 2, f"output={killed}", *args))
    for name in jobs:
        assert curve(killed / name) == curve(whole / name)
        for key, value in weights(whole / name).items():
            assert torch.equal(value, weights(killed / name)[key]), key


def test_another_number_of_shards_goes_on(root: Path, uninterrupted: Path) -> None:
    out = root / "elastic"
    folder = out / "model.layers.0"
    job = start("train", root / "one.yaml", 2, f"output={out}")
    kill_after(job, folder / "checkpoints", "step-*[0-9]", 1, random.Random(3))
    finish(start("train", root / "one.yaml", 1, f"output={out}"))
    got, want = curve(folder), curve(uninterrupted)
    for a, b in zip(got, want, strict=True):
        assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)


def test_grid_on_several_groups_and_again(root: Path) -> None:
    """Two processes, one shard each: two groups share the list; a second run finds all done."""
    out = root / "grid"
    args = (f"output={out}", "train.num_shards=1", "train.num_tokens=1280")
    finish(start("grid", root / "one.yaml", 2, *args))
    made = sorted(p.parent.name for p in out.glob("*/*/sae"))
    assert made == ["k=2", "k=2", "k=4", "k=4"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    finish(start("grid", root / "one.yaml", 2, *args))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_one_failing_sae_does_not_stop_the_others(root: Path) -> None:
    out = root / "failing"
    args = [f"output={out}", "train.num_tokens=1280", "grid.hookpoints=[model.layers.0]"]
    processes = start(
        "grid", root / "one.yaml", 1, *args, "grid.values={train.lr: [1.0e-3, 1.0e+30]}"
    )
    assert wait(processes, timeout=120) == [1]
    assert "1 of 2 SAEs failed" in processes[0].text()
    states = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/*/status.json")}
    assert states["lr=0.001"]["state"] == "finished"
    assert states["lr=1e+30"]["state"] == "failed"
    assert "train.lr" in states["lr=1e+30"]["error"]
    assert (out / "model.layers.0" / "lr=0.001" / "sae").is_dir()
