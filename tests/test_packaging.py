"""A built wheel imports with its linked folders and installs no other top-level package."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.slow
def test_wheel_holds_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"flash_sae_dist"}
    for needed in ("kernels/ops.py", "launch/cli.py", "py.typed", "training/trainer.py"):
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
