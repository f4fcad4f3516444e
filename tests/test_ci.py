"""The public CI and the hooks before a commit check what tests/run.sh checks, and no more hosts."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RUN = (ROOT / "tests/run.sh").read_text()
WORKFLOW = ROOT / ".github/workflows/ci.yml"


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return found


def lines_of(job: dict[str, Any]) -> list[str]:
    """The shell lines of a job."""
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_hooks_are_local_and_those_of_the_test_command() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"], "others are fetched"
    hooks = repos[0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    assert entries == ["ruff check .", "ruff format --check .", "mypy"]
    lines = [line.strip() for line in RUN.splitlines()]
    assert all(entry in lines for entry in entries)
    # Each looks at the whole tree: types of a file depend on the others.
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}


def test_the_matrix_is_of_the_pythons_that_are_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = jobs()["cpu"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={pythons[0]}"
    environment = (ROOT / "launch/environment.sh").read_text()
    assert all(f"python{python}" in environment for python in pythons)


def test_the_cpu_jobs_run_the_parts_of_the_test_command() -> None:
    lines = lines_of(jobs()["cpu"])
    (environment,) = re.findall(r"^ensure_environment .*$", RUN, re.MULTILINE)
    for part in (environment, "ruff check .", "ruff format --check .", "mypy"):
        assert part in lines
    (tests,) = re.findall(r"^(python -m pytest .*) \|\|", RUN, re.MULTILINE)
    without_number = re.compile(r"--numprocesses \d+")
    assert without_number.sub("", tests) in [without_number.sub("", line) for line in lines]
    variables = jobs()["cpu"]["steps"][-1]["env"]
    exported = re.findall(r"([A-Z_]+)=", re.findall(r"^export .*$", RUN, re.MULTILINE)[0])
    assert sorted(variables) == sorted(exported)


def test_the_gpu_job_waits_for_a_label() -> None:
    job = jobs()["gpu"]
    assert "github.event.label.name == 'gpu'" in job["if"]
    assert "github.event.action == 'labeled'" in job["if"], "else later commits run unseen"
    assert "gpu" in job["runs-on"]
    assert "bash tests/gpu.sh" in lines_of(job)


def test_the_workflow_has_no_secrets_and_rights_to_read_alone() -> None:
    text = WORKFLOW.read_text()
    assert "secrets" not in text.replace("No job has a secret", "")
    assert "pull_request_target" not in text
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for job in jobs().values():
        assert "permissions" not in job
        (checkout,) = (s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout@"))
        assert checkout["with"]["persist-credentials"] is False
        for step in job["steps"]:
            subprocess.run(["bash", "-n"], input=step.get("run", ""), text=True, check=True)
