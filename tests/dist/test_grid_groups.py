"""A grid's groups take jobs as they get free; failing jobs and kills change no other SAE."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.jobs import finish, kill_after, start
from tests.dist.ranks import wait
from tests.dist.test_kill_and_resume import curve, weights
from tests.tiny_model import config_data, write_config

pytestmark = pytest.mark.slow
# Weights that are no numbers after some steps.
DIVERGES = 1e30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    data = config_data(root)
    data["train"] |= {"num_tokens": 64 * 100, "num_shards": 1, "checkpoint_every": 5}
    finish(start("cache", write_config(root / "c.yaml", data), 1))
    return root


def grid(out: Path, rates: list[float]) -> list[str]:
    return [f"output={out}", f"grid.values={{train.lr: {rates}}}"]


def assert_same(job: Path, alone: Path) -> None:
    assert curve(job) == curve(alone)
    ours, theirs = weights(job), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def status(job: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job / "status.json").read_text())
    return found


def killed_and_finished(root: Path, out: Path, rates: list[float], world: int, kills: int) -> None:
    """A grid of which every launch but the last is killed."""
    for number in range(kills):
        job = start("grid", root / "c.yaml", world, *grid(out, rates))
        kill_after(job, out, "*/*/checkpoints/step-*[0-9]", 2 + number, random.Random(number))
    last = start("grid", root / "c.yaml", world, *grid(out, rates))
    assert wait(last, 240) == [1] * world, last[0].text()[-3000:]
    assert f"2 of {2 * len(rates)} SAEs failed" in last[0].text()
    for job in out.glob(f"*/lr={DIVERGES}"):
        assert status(job)["state"] == "failed"
        assert "lower train.lr" in status(job)["error"]
    done = [job for job in out.glob("*/lr=*") if status(job)["state"] == "finished"]
    assert len(done) == 2 * len(rates) - 2


def test_two_groups_make_what_one_process_makes(root: Path, tmp_path: Path) -> None:
    rates = [1e-3, 2e-3, DIVERGES]
    killed_and_finished(root, tmp_path / "groups", rates, 2, 1)
    killed_and_finished(root, tmp_path / "one", rates, 1, 0)
    for job in (tmp_path / "one").glob("*/lr=0*"):
        assert_same(tmp_path / "groups" / job.relative_to(tmp_path / "one"), job)


@pytest.mark.torture
def test_four_groups_make_what_each_job_makes_alone(root: Path, tmp_path: Path) -> None:
    rates = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, DIVERGES]
    killed_and_finished(root, tmp_path / "groups", rates, 4, 3)
    for hookpoint in ("model.layers.0", "model.layers.1.mlp"):
        for rate in rates[:-1]:
            out = tmp_path / f"alone-{hookpoint}-{rate}"
            finish(start("train", root / "c.yaml", 1, f"output={out}", f"train.lr={rate}",
                         f"train.hookpoint={hookpoint}"))  # fmt: skip
            assert_same(tmp_path / "groups" / hookpoint / f"lr={rate}", out / hookpoint)
