"""An architecture that one file defines and one line registers goes through the ordinary commands
on the fused engine, on one process and sharded over two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.models import ARCHITECTURES, load_sae
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engines.autograd import AutogradEngine
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.dist.ranks import free_port, rank_env, start_module, wait
from tests.groupmax import GroupMax, GroupMaxConfig
from tests.tiny_model import config_data, write_config


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line, undone afterwards."""
    monkeypatch.setitem(ARCHITECTURES, "groupmax", GroupMax)


def curve(engine: str, batches: list[torch.Tensor], **options: Any) -> list[tuple[float, ...]]:
    cfg = ENGINES[engine](
        num_tokens=10**4, batch_tokens=32, lr=1e-2, warmup_steps=0, engine=engine,
        precision="float64", dead_after_tokens=32 * 20, **options,
    )  # fmt: skip
    sae = GroupMaxConfig(architecture="groupmax", group=8, d_sae=64)
    training = SAETraining(sae, cfg, 12, Mesh.single(), torch.device("cpu"))
    kind = FusedEngine if engine == "fused" else AutogradEngine
    assert isinstance(training.engine, kind)
    timer = PhaseTimer(training.device, enabled=False)
    return [tuple(float(m) for m in training.step(x, timer)) for x in batches]


@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05, "micro_batches": 3}])
def test_the_fused_engine_trains_it_as_autograd_does(options: dict[str, Any]) -> None:
    batches = [torch.randn(32, 12, dtype=torch.float64) for _ in range(110)]
    fused, autograd = (curve(engine, batches, **options) for engine in ("fused", "autograd"))
    assert fused[-1][0] < fused[0][0]
    for got, want in zip(fused, autograd, strict=True):
        assert got == pytest.approx(want, rel=1e-8, abs=1e-12)


def run(verb: str, processes: int, config: Path, *overrides: str) -> tuple[list[Any], str]:
    """Exit codes and words of a verb on so many processes."""
    port = free_port()
    running = [
        start_module(
            "tests.groupmax",
            [verb, str(config), *overrides],
            rank_env(rank, processes, port),
            config.parent / f"{verb}{rank}.log",
        )
        for rank in range(processes)
    ]
    codes = wait(running, timeout=120)
    return codes, "".join(r.text() for r in running)


@pytest.mark.slow
def test_it_goes_through_the_commands(tmp_path: Path) -> None:
    data = config_data(tmp_path) | {
        "sae": {"architecture": "groupmax", "group": 8, "d_sae": 64},
    }
    data["train"] |= {"engine": "fused", "num_tokens": 64 * 30}
    del data["grid"]
    config = write_config(tmp_path / "c.yaml", data)
    lines = {}
    for processes in (1, 2):
        out = f"output={tmp_path / str(processes)}"
        for verb in ("cache", "train", "evaluate"):
            codes, said = run(verb, processes, config, out)
            assert codes == [0] * processes, said[-3000:]
        job = tmp_path / str(processes) / "model.layers.0"
        lines[processes] = [json.loads(x) for x in (job / "metrics.jsonl").read_text().splitlines()]
        sae = load_sae(job / "sae")
        assert isinstance(sae, GroupMax)
        assert sae.spec() == {"architecture": "groupmax", "d_in": 16, "d_sae": 64, "group": 8}
        assert (job / "checkpoints/step-00000030/manifest.json").exists()
        (record,) = json.loads((job.parent / "evaluation.json").read_text())
        assert 0 < record["fvu"] < 2
    one, two = ([line["fvu"] for line in lines[n]] for n in (1, 2))
    assert len(one) == 30
    assert two == pytest.approx(one, rel=1e-4)
    codes, said = run("export", 1, config, f"output={tmp_path / '2'}")
    assert codes == [2], said
    assert "is of architecture 'groupmax', which SAELens cannot hold" in said
    assert not (tmp_path / "2/export").exists()
    codes, said = run("train", 1, config, f"output={tmp_path / '3'}", "sae.group=seven")
    assert codes == [2]
    assert "sae.group='seven'" in said
