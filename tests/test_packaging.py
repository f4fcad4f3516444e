"""A built wheel imports with its linked folders and installs no other top-level package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # A copy without the checkout's build leftovers; links stay links.
    subprocess.run(
        ["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True
    )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


# Import name -> the distribution that brings it, where the two differ.
_DISTRIBUTIONS = {"yaml": "pyyaml", "pydantic_core": "pydantic", "pyarrow": "datasets"}


def test_what_is_imported_is_declared() -> None:
    """A package that only another one brings is gone when that one drops it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("gpu", "interop", "adapters", "objects", "deepspeed")
    needs = [*project["dependencies"], *(need for name in used for need in extras[name])]
    declared = {re.split(r"[<>=;\[ ]", need, maxsplit=1)[0].replace("-", "_") for need in needs}
    declared = {name.removeprefix("eai_") for name in declared}
    imported: set[str] = set()
    for folder in ("flash_sae_dist", "kernels", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    imported.add(node.module.split(".")[0])
    third = {_DISTRIBUTIONS.get(m, m) for m in imported - sys.stdlib_module_names}
    assert third <= declared


@pytest.mark.slow
def test_wheel_holds_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"flash_sae_dist"}
    pages = ("features/page.html", "evaluation/report.html")
    for needed in ("kernels/ops.py", "launch/cli.py", "py.typed", "training/trainer.py", *pages):
        assert f"flash_sae_dist/{needed}" in names


@pytest.mark.slow
def test_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    code = (
        "import flash_sae_dist, flash_sae_dist.kernels.ops, flash_sae_dist.launch.cli as cli; "
        "print(flash_sae_dist.__file__, flash_sae_dist.kernels.ops.__file__, cli.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.count(str(site)) == 3


def test_nothing_needs_triton_without_a_gpu() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from flash_sae_dist import TopKSAE\n"
        "from flash_sae_dist.compat.recipe import FusedTraining, Recipe\n"
        "import flash_sae_dist.launch.cli, flash_sae_dist.training.trainer\n"
        "sae = TopKSAE(8, 32, 4)\n"
        "training = FusedTraining(sae, Recipe(1e-3, 'fvu'), torch.float32)\n"
        "print(float(training.step(torch.randn(9, 8)).fvu))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 0


def test_windows_is_refused_when_it_is_built() -> None:
    code = "import sys; sys.platform = 'win32'; sys.argv = ['setup.py', '--version']\n"
    code += "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 1
    assert "WSL 2" in run.stderr.splitlines()[-1]
    code = "import sys; sys.platform = 'win32'; import flash_sae_dist"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "ImportError: flash_sae_dist runs on Linux and macOS" in run.stderr
