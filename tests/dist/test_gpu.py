"""Two ranks share one GPU through gloo: the sharded fused step on its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.ranks import run_ranks

SCRIPT = Path(__file__).with_name("train_worker.py")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_two_ranks_equal_one_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TRAIN_WORKER_DEVICE", "cuda:0")
    args = ("float32", "60", "1", "96", kind)
    (one,) = run_ranks(SCRIPT, 1, tmp_path / "one", *args)
    for run in run_ranks(SCRIPT, 2, tmp_path / "two", *args):
        torch.testing.assert_close(run["losses"][:, 0], one["losses"][:, 0], rtol=1e-3, atol=0)
