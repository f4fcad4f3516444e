"""Two ranks on GPUs train as one does: sharing one through gloo, and on one each through NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.ranks import run_ranks
from tests.dist.test_accelerate_launch import launch
from tests.tiny_model import config_data, write_config

WORKER = "tests.dist.train_worker"


def equal_one(tmp_path: Path, replicas: str, kind: str, variant: str = "auxk") -> None:
    """Two ranks' losses are one's."""
    one, two = (f"float32-{kind}-{r}-{variant}" for r in ("1", replicas))
    (want,) = run_ranks(WORKER, 1, tmp_path / "one", "160", one)
    for got in run_ranks(WORKER, 2, tmp_path / "two", "160", two):
        torch.testing.assert_close(
            got[two]["losses"][:, 0], want[one]["losses"][:, 0], rtol=1e-3, atol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_two_ranks_equal_one_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda:0")
    equal_one(tmp_path, "1", kind)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(
    ("replicas", "kind", "variant"),
    [
        ("1", "autograd", "auxk"),
        *((replicas, "fused", v) for replicas in "12" for v in ("auxk", "ghost", "clipped")),
    ],
)
def test_two_gpus_equal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: str, kind: str, variant: str
) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda")
    monkeypatch.setenv("WORKER_BACKEND", "nccl")
    equal_one(tmp_path, replicas, kind, variant)


@pytest.mark.gpu
@two_gpus
def test_a_failure_ends_a_launch_whose_other_gpus_wait(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", config_data(tmp_path))
    done = launch("tests.dist.fail_worker", str(config), cpu=False)
    assert done.returncode != 0
    assert "RuntimeError: the second's mistake" in done.stderr
