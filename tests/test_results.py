"""One record a job, whatever was done with it; the report in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from accelerate import Accelerator

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.evaluation.results import results, write_results
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.features.runner import run_features
from flash_sae_dist.files import read_json
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.training.job import parse_config
from tests.test_features import browser
from tests.tiny_model import config_data

NAMES = [f"model.layers.{h}/k={k}" for h in ("0", "1.mlp") for k in (2, 4)]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A grid's config, its four SAEs trained."""
    root = tmp_path_factory.mktemp("results")
    data = config_data(root)
    run_cache(parse_config(data), Accelerator(cpu=True))
    data["train"] |= {"num_tokens": 640, "holdout": 0.1}
    del data["train"]["hookpoint"]
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=True)
    return data


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_trained_grid_has_its_results(grid: dict[str, Any]) -> None:
    output = Path(grid["output"])
    jobs = read_json(output / "results.json")["jobs"]
    assert [job["job"] for job in jobs] == NAMES
    rows = rows_of(output)
    assert [row["job"] for row in rows] == NAMES
    for job, row in zip(jobs, rows, strict=True):
        last = json.loads((output / job["job"] / "metrics.jsonl").read_text().split("\n")[-2])
        assert (job["state"], job["step"], job["tokens"]) == ("finished", 10, 640)
        assert job["values"] == {"sae.k": job["k"]}
        assert job["training"]["fvu"] == last["fvu"] == float(row["train_fvu"])
        assert job["curve"][-1] == [640, pytest.approx(last["fvu"], rel=1e-3)]
        assert (job["evaluation"], job["features"]) == (None, None)
        assert row["eval_fvu"] == row["features"] == ""
    assert (output / "report.html").is_file()


def test_evaluations_and_features_come_to_it(grid: dict[str, Any], tmp_path: Path) -> None:
    output = shutil.copytree(grid["output"], tmp_path / "run")
    data = grid | {"output": str(output)}
    records = run_evaluation(parse_config(data), Accelerator(cpu=True))
    data["features"] = {"saes": [NAMES[1]], "latents": [1, 2]}
    run_features(parse_config(data), Accelerator(cpu=True))
    jobs = results(output)
    for job, record, row in zip(jobs, records, rows_of(output), strict=True):
        assert job["evaluation"]["fvu"] == record["fvu"] == float(row["eval_fvu"])
        assert row["loss_kl_recovered"] == str(record["loss"]["kl_recovered"] or "")
    assert [job["features"] for job in jobs] == [
        None, f"{NAMES[1]}/features/index.html", None, None,
    ]  # fmt: skip
    assert (output / jobs[1]["features"]).is_file()


def test_what_is_damaged_or_of_no_job_is_told(
    grid: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = shutil.copytree(grid["output"], tmp_path / "run")
    (output / NAMES[0] / "job.yaml").write_bytes(b"\xff")
    given = {"job": "theirs</script>", "hookpoint": "h", "k": 3, "d_sae": 9, "fvu": 0.5, "l0": 3.0}
    write_results(output, [given])
    jobs = read_json(output / "results.json")["jobs"]
    assert [job["job"] for job in jobs] == [*NAMES[1:], "theirs</script>"]
    assert f"{NAMES[0]} is left out of the report: " in caplog.text
    assert (output / "report.html").read_text().count("</script>") == 1


def test_damaged_files_are_told_with_a_cure(
    grid: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = shutil.copytree(grid["output"], tmp_path / "run")
    (output / NAMES[0] / "sae" / "config.json").write_text("{")
    (output / NAMES[1] / "evaluation.json").write_text("{")
    write_results(output)
    told = [record.getMessage() for record in caplog.records]
    assert any(NAMES[0] in one and one.endswith("; train it anew") for one in told)
    assert any(NAMES[1] in one and one.endswith("; run evaluate again") for one in told)


def test_a_curve_that_diverged_is_still_json(grid: dict[str, Any], tmp_path: Path) -> None:
    output = shutil.copytree(grid["output"], tmp_path / "run")
    with (output / NAMES[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tokens": 704, "fvu": NaN, "l0": Infinity}\n')
    write_results(output)
    text = (output / "results.json").read_text()
    jobs = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["jobs"]
    assert jobs[0]["training"]["fvu"] is None
    assert jobs[0]["curve"][-1][0] == 640


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_the_report_works_from_the_disk_in_a_browser(grid: dict[str, Any], tmp_path: Path) -> None:
    output = shutil.copytree(grid["output"], tmp_path / "run")
    data = grid | {"output": str(output)}
    run_evaluation(parse_config(data), Accelerator(cpu=True))
    data["features"] = {"saes": [NAMES[1]], "latents": [1, 2]}
    run_features(parse_config(data), Accelerator(cpu=True))
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command += [(output / "report.html").as_uri()]
    body = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "4 SAEs: 4 finished" in body
    assert body.count("<section>") == 2, "a row of charts a layer"
    assert body.count('class="sae"') == body.count('class="curve"') == 4
    assert body.count('class="density"') == 4
    assert body.count('class="tick"') >= 6 * 2 * 3, "an axis has three numbers at least"
    (link,) = re.findall(r'href="(\./[^"]*/features/index.html)"', body)
    assert unquote(link) == f"./{NAMES[1]}/features/index.html"
    assert ":" not in link, "what stands before one is taken for a scheme"
    assert "nothing was measured</figcaption>" not in body
    assert "http" not in body.replace("http://www.w3.org/2000/svg", ""), "nothing from elsewhere"
