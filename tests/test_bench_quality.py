"""`flash-sae bench quality`: what it measures, its table, and trainings."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from flash_sae_dist.launch import bench_quality as bench
from flash_sae_dist.launch.bench_quality_data import Size, mixture
from flash_sae_dist.launch.bench_quality_peers import batches

SIZE = Size(d_sae=48, k=3, steps=20, batch=64)


def weights(features: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of an SAE whose latents are the features."""
    count, width = features.shape
    zeros = {"b_enc": torch.zeros(count), "b_dec": torch.zeros(width)}
    return {"W_enc": features, "W_dec": features, **zeros, **more}


def test_fvu_is_of_exactly_k_latents() -> None:
    x = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 5.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    of = weights(torch.eye(4))
    total = (x - x.mean(0)).square().sum()
    assert bench.fvu_at(of, x, 1, per_token=True) == pytest.approx(float((4 + 16) / total))
    # Of three tokens the three largest: 5, 4 and 3.
    assert bench.fvu_at(of, x, 1, per_token=False) == pytest.approx(float((4 + 1) / total))
    # The third latent has to exceed a threshold by more than the others do: 4, 3, 2 are kept.
    above = of | {"threshold": torch.tensor([0.0, 0.0, 4.5, 0.0])}
    assert bench.fvu_at(above, x, 1, per_token=False) == pytest.approx(float((25 + 1) / total))


def test_features_are_matched() -> None:
    features = torch.eye(3)
    best, one_to_one = bench.matched(features, torch.eye(3)[[2, 0, 1]] * -2)
    assert best == pytest.approx(1)
    # Two features that only one latent points at.
    best, one_to_one = bench.matched(
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert best == pytest.approx(1)
    assert one_to_one is None or one_to_one == pytest.approx(0.5)


def test_batches_pass_over_all_rows() -> None:
    rows = torch.arange(10.0)[:, None]
    seen = torch.cat(list(batches(rows, 4, 5, 0))).flatten()
    assert sorted(seen.tolist()) == sorted([*range(10)] * 2)
    assert not torch.equal(seen, torch.cat(list(batches(rows, 4, 5, 1))).flatten())


def test_the_mixture_is_of_its_features() -> None:
    data = mixture(SIZE, width=64, num_features=32)
    assert data.features is not None
    offset = (
        data.rows.mean(0) - data.rows.mean(0) @ torch.linalg.pinv(data.features) @ data.features
    )
    left = data.rows - offset
    spanned = left @ torch.linalg.pinv(data.features) @ data.features
    torch.testing.assert_close(spanned, left, rtol=0, atol=1e-3)
    found = (data.rows - data.rows.mean(0)) @ torch.linalg.pinv(data.features)
    assert float((found - found.amin(0) > 0.25).float().sum(1).mean()) == pytest.approx(3, rel=0.2)


def test_the_table_and_what_it_comes_to() -> None:
    found = {}
    for library, at in (("ours", {1.0: 0.2}), ("sae_lens", {1.0: 0.3, 3.0: 0.199})):
        for factor, fvu in at.items():
            for seed in range(2):
                run = bench.Run(library, "topk", factor, seed)
                found[run] = bench.Score(fvu, 0.9 + 0.02 * seed, None, 1.0)
    rows = bench.summarised("mixture", found)
    assert [(r["library"], r["lr"], r["fvu"]) for r in rows] == [
        ("ours", "default", 0.2),
        ("sae_lens", "default", 0.3),
        ("sae_lens", "x 3", 0.199),
    ]
    assert rows[0]["cosine +-"] == pytest.approx(0.01)
    (row,) = bench.verdicts(rows)
    assert row["at lr"] == "x 3"
    assert row["within 1%"]
    assert row["at least"] == pytest.approx(0.9)
    assert row["found"]


def test_mistakes_are_told() -> None:
    for given in (["torch=/bin/sh"], ["sae_lens"], ["sae_lens=/nowhere"]):
        with pytest.raises(typer.BadParameter, match="no LIBRARY=PATH"):
            bench._pythons(given)
    with pytest.raises(typer.BadParameter, match="no KEY=VALUE"):
        bench._train_keys(["lr"])
    assert bench._train_keys(["lr=1.0e-3"]) == {"lr": 1e-3}
    for args, word in (
        (["--data", "store"], "needs a STORE"),
        (["--data", "toy"], "--data toy is none of mixture, sae_lens, store"),
        (["--data", "mixture", "--train", "lr=-1"], "lr"),
    ):
        done = CliRunner().invoke(bench.app, ["quality", *args, "--steps", "20"])
        assert done.exit_code == 2
        assert word in done.output


def test_a_library_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('it does not run')\n")
    peers = bench.Peers({}, 1, tmp_path)
    peers.script, peers.pythons = broken, {"sparsify": sys.executable}
    runs = {name: [bench.Run(name, "topk", 1.0, 0)] for name in ("sparsify", "ours")}
    found = bench._all(mixture(SIZE), runs, peers, {})
    assert [run.library for run in found] == ["ours"]
    assert "sparsify failed: it does not run" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_command_trains_what_is_installed(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MIXTURE", SIZE)
    # SAELens, whose import takes ten seconds, is tried by tests/peers.sh.
    names = {"sparsify": bench.LIBRARIES["sparsify"]}
    monkeypatch.setattr(bench, "LIBRARIES", bench.LIBRARIES | {"sae_lens": ("topk", "jumprelu")})
    monkeypatch.setattr(bench.Peers, "__init__", _only(names, architecture))
    out = tmp_path / "table.json"
    args = ["quality", "--architecture", architecture, "--seeds", "1", "--factor", "1"]
    done = CliRunner().invoke(
        bench.app, [*args, "--data", "mixture", "--train", "warmup_steps=2", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    expected = {"ours"} | (
        {"sparsify"} if architecture == "topk" and find_spec("sparsify") else set()
    )
    assert {row["library"] for row in rows} == expected
    assert all(0 < row["fvu"] < 3 and 0 < row["cosine"] <= 1 for row in rows)


def _only(names: dict[str, Any], architecture: str) -> Any:
    made = bench.Peers.__init__

    def init(self: bench.Peers, pythons: dict[str, str], threads: int, folder: Path) -> None:
        made(self, pythons, threads, folder)
        kept = names if architecture == "topk" else {}
        self.pythons = {name: path for name, path in self.pythons.items() if name in kept}

    return init
