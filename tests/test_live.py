"""What a grid shows while it is trained: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.files import json_text
from flash_sae_dist.grid import live
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.records import Job, Status, write_status
from tests.tiny_model import config_data


def make_jobs(folder: Path, count: int) -> list[Job]:
    data = {
        "output": str(folder),
        "sae": {"k": 2, "d_sae": 8},
        "train": {"num_tokens": 1000, "batch_tokens": 10, "hookpoint": "h"},
    }
    return [Job(f"h/k={n}", folder / f"h/k={n}", parse_config(data)) for n in range(count)]


def log_step(job: Job, step: int, fvu: float) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    values = {"step": step, "tokens": 10 * step, "fvu": fvu, "l0": 2.0, "dead_fraction": 0.25}
    with (job.folder / "metrics.jsonl").open("a") as file:
        file.write(json_text(values | {"tokens_per_s": 100.0}) + "\n")


def test_a_job_goes_from_waiting_to_its_end(tmp_path: Path) -> None:
    waiting, running, failed = make_jobs(tmp_path, 3)
    watch = live.Watch([waiting, running, failed])
    assert {row.state for row in watch.rows()} == {"waiting"}
    log_step(running, 10, 0.5)
    log_step(running, 20, 0.4)
    write_status(running, Status("running", 0, 100))
    write_status(failed, Status("failed", 3, 100, "OSError: no space left"))
    rows = watch.rows()
    assert [row.state for row in rows] == ["waiting", "running", "failed"]
    assert (rows[1].step, rows[1].total, rows[1].values["fvu"]) == (20, 100, 0.4)
    assert live.line(rows[1], 10) == (
        "h/k=1: step 20/100, 100 tokens/s, fvu 0.4000, l0 2.0, dead 25.0%, 0:08 left"
    )
    assert live.line(rows[2], 10) == "h/k=2: failed, step 0/100"
    write_status(running, Status("finished", 100, 100))
    assert watch.rows()[1].state == "finished"


def test_what_an_earlier_launch_left_is_not_at_work(tmp_path: Path) -> None:
    (job,) = make_jobs(tmp_path, 1)
    log_step(job, 10, 0.5)
    write_status(job, Status("running", 10, 100))
    watch = live.Watch([job])
    watch.began = time.time() + 100
    assert watch.rows()[0].state == "waiting"


def test_a_long_grid_shows_what_is_at_work(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 60)
    log_step(jobs[7], 5, 0.125)
    sizes = {job.name: 10 for job in jobs}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(live.table(live.Watch(jobs).rows(), sizes))
    text = console.export_text()
    assert "h/k=7" in text
    assert "0.1250" in text
    assert "h/k=8" not in text
    assert "59 waiting, 1 running" in text
    console.print(live.table(live.Watch(jobs[:9]).rows(), sizes))
    assert "h/k=8" in console.export_text(), "a short one shows all"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live")
    run_cache(parse_config(config_data(root)), Accelerator(cpu=True))
    return root


class Terminal(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_a_grid_tells_of_each_job(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    data = config_data(root) | {"output": str(tmp_path / "run")}
    data["train"] |= {"num_tokens": 640}
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=True)
    told = stream.getvalue()
    last = json.loads(
        (tmp_path / "run/model.layers.0/k=4/metrics.jsonl").read_text().split("\n")[-2]
    )
    for hookpoint in ("model.layers.0", "model.layers.1.mlp"):
        for k in (2, 4):
            assert f"{hookpoint}/k={k}" in told
    assert f"{last['fvu']:.4f}" in told
    assert ("4 finished" in told) == terminal
    assert ("model.layers.0/k=4: finished, step 10/10, " in told) == (not terminal)
    assert "train model.layers.0" not in told, "no bar beside it"
    assert not [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is stream]
