"""What the benchmarks set up: weights, dead latents, our rows, another checkout's process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from accelerate import Accelerator

from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.launch import bench_cache, bench_step, bench_stream
from flash_sae_dist.launch.bench_against import compare
from flash_sae_dist.launch.bench_features import prepare, rates
from flash_sae_dist.launch.bench_load import HOOKPOINT, load, load_rate, make_store, read_rate
from flash_sae_dist.launch.bench_peers import BY_ARCHITECTURE, sae_lens_step, sparsify_step
from flash_sae_dist.launch.bench_step import EXACT, OURS, PEERS
from flash_sae_dist.launch.bench_train import train
from flash_sae_dist.launch.bench_training import (
    SHAPES,
    OurStep,
    dead_latents,
    make_training,
    shape_of,
    still_dead,
)
from flash_sae_dist.parallel.mesh import Mesh
from tests.tiny_model import save_llama, save_text

TINY = (64, 16, 960, 4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OURS)
def test_each_of_our_rows_trains(name: str) -> None:
    step = OurStep(TINY, CPU, **OURS[name])
    losses = [float(step().fvu) for _ in range(3)]
    # JumpReLU's rate is next to 0, and the batch rule's list changes from step to step.
    assert losses[-1] < losses[0] * (1.001 if "architecture" in OURS[name] else 1)
    assert step.about().keys() == {"step"}


@pytest.mark.parametrize("name", [name for name in OURS if "dead" in OURS[name]])
def test_dead_latents_are_dead_spread_and_stay_so(name: str) -> None:
    options = OURS[name]
    step = OurStep(TINY, CPU, **options)
    mask = dead_latents(TINY[2], options["dead"])
    assert step.dead == int(mask.sum()) == int(TINY[2] * options["dead"])
    assert int(mask.int().diff().abs().sum()) > 5, "they are spread"
    for _ in range(30):
        assert float(step().aux) > 0
    assert step.training.dead.any_listed
    silent = step.training.dead.tokens_since_fired > step.training.cfg.dead_after_tokens
    assert torch.equal(silent, mask)
    assert "remark" not in step.about()


def test_half_of_the_dead_latents_activations_are_positive() -> None:
    training = make_training(TINY, Mesh.single(), CPU, dead=1 / 3)
    x = torch.randn(TINY[0], TINY[1])
    pre = x @ training.sae.W_enc.T
    dead = pre[:, dead_latents(TINY[2], 1 / 3)]
    assert 0.4 < float((dead > 0).float().mean()) < 0.6


@pytest.mark.parametrize("num_shards", [2, 4])
def test_weights_are_the_same_on_any_number_of_shards(num_shards: int) -> None:
    shape = (8, 3, 5000 * 4, 2)
    whole = make_training(shape, Mesh.single(), CPU, dead=0.1)
    parts = [
        make_training(shape, Mesh(0, 1, 0, 1, shard, num_shards, None, None, None), CPU, dead=0.1)
        for shard in range(num_shards)
    ]
    for name, want in whole.sae.named_parameters():
        got = [dict(part.sae.named_parameters())[name] for part in parts]
        assert torch.equal(got[0] if name == "b_dec" else torch.cat(got), want)
    assert sum(still_dead(part) for part in parts) == still_dead(whole) == 2000
    assert torch.allclose(whole.sae.W_dec.norm(dim=1), torch.ones(shape[2]))


def test_shapes_have_names_or_sizes() -> None:
    for name, shape in SHAPES.items():
        assert shape_of(name) == shape
        if name.startswith("n"):
            n, d, f, k = shape
            assert name == f"n{n}-d{d}-f{f}-k{k}"
    assert shape_of("n8-d4-f16-k2") == (8, 4, 16, 2)
    for name in ("n8-d4-f16-k17", "n0-d4-f16-k2", "foo"):
        with pytest.raises(typer.BadParameter, match=f"--shape {name} is no shape"):
            shape_of(name)


def _checkout(root: Path, ms: str) -> Path:
    """A package whose step takes `ms`, an expression of the shape."""
    package = root / "flash_sae_dist/launch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "bench_step.py").write_text("def _fused_step(shape):\n    return lambda: shape\n")
    body = f"def median_ms(step, repeats, ahead):\n    N, D, F, k = step()\n    return {ms}\n"
    (package / "bench_timing.py").write_text(body)
    return root


@pytest.mark.slow
def test_checkouts_are_timed_in_turns(tmp_path: Path) -> None:
    ours = _checkout(tmp_path / "a", "N * (repeats == 7 and ahead)")
    other = _checkout(tmp_path / "b", "2 * N if N < 50 else 1 / 0")
    shapes = {"fast": (10, 2, 3, 1), "fails": (64, 2, 3, 1), "after": (20, 2, 3, 1)}
    rows: list[dict[str, Any]] = compare(shapes, other, 7, ours)
    assert [row["shape"] for row in rows] == list(shapes)
    for row, ms in ((rows[0], 10), (rows[2], 20)):
        assert row["ours ms"] == ms
        assert row["ours / other"] == 0.5
        assert row["in turns"] == "  ".join(2 * [f"{ms:.3f} {2 * ms:.3f}"])
    assert str(other) in rows[1]["remark"]


def test_the_exact_row_is_first() -> None:
    assert next(iter(OURS)) == EXACT


def test_rows_by_threshold_have_their_mean_l0() -> None:
    for name in (name for name in OURS if "mean L0 64" in name):
        assert 54 < float(OurStep(TINY, CPU, **OURS[name])().l0) < 74


@pytest.mark.parametrize(
    "architecture", ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU", "Standard", "Gated"]
)
def test_sae_lens_classes_train(architecture: str) -> None:
    pytest.importorskip("sae_lens")
    step = sae_lens_step(TINY, architecture, "cpu")
    losses = [float(step()) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("options", [{}, {"transcode": True, "skip_connection": True}], ids=str)
def test_sparsify_coder_trains(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    pytest.importorskip("sparsify")
    step = sparsify_step(TINY, "cpu", **options)
    losses = [float(step()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_peers_stand_beside_ours_of_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {ours for ours, _ in BY_ARCHITECTURE.values()} <= OURS.keys()
    times = iter(range(1, 99))
    monkeypatch.setattr(bench_step, "_alone", lambda make, repeats: {"ms": float(next(times))})
    rows = {row["implementation"]: row for row in bench_step._rows(TINY, "SAELens's B", 1)}
    assert list(rows) == [EXACT, "ours, BatchTopK", "SAELens's BatchTopK"]
    assert rows["ours, BatchTopK"]["x exact"] == 2
    assert rows["SAELens's BatchTopK"]["x ours"] == 1.5
    rows = {row["implementation"]: row for row in bench_step._rows(TINY, "sparsify", 1)}
    peers = [name for name in PEERS if "sparsify" in name]
    assert list(rows) == [EXACT, "ours, transcoder", "ours, skip transcoder", *peers]
    assert rows["sparsify, fused Adam"]["x ours"] == (
        rows["sparsify, fused Adam"]["ms"] / rows[EXACT]["ms"]
    )


def test_the_store_that_is_made_is_whole_and_its_documents_differ(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "s.zarr"), 9000, 16)
    assert 8000 < store.rows <= 9000
    documents = store.read("tokens/document", 0, store.rows)
    assert documents.max() + 1 == store.num_documents()
    assert documents[0] != documents[store.geometry.shard_rows]
    with ActivationLoader(store, HOOKPOINT, batch_tokens=store.rows, seed=0, num_steps=1) as rows:
        (batch,) = rows
    assert 0.9 < float(batch.float().std()) < 1.1
    assert read_rate(store, HOOKPOINT, 2) > 0
    for preload in ("none", "host", "device"):
        rate, host = load_rate(store, HOOKPOINT, 100, preload, 0.01, CPU)
        assert rate > 0
        assert host * rate > 0


def test_bench_load_prints_every_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder=str(tmp_path), gib=0.001, width=16, batch_tokens=512, cpu=True)
    out = capsys.readouterr().out
    for row in ("preadv, 1 threads", "preload=none", "preload=host", "preload=device"):
        assert row in out
    assert not list(tmp_path.iterdir()), "the store is removed"
    kept = str(tmp_path / "kept.zarr")
    load(keep=kept, gib=0.001, width=16, batch_tokens=512, cpu=True, preload=["none"])
    ActivationStore.open(kept).verify()
    with pytest.raises(typer.BadParameter, match="none of none, host, device"):
        load(cpu=True, preload=["disk"])
    with pytest.raises(typer.BadParameter, match="go together"):
        load(cpu=True, store="s.zarr")


def test_bench_train_prints_every_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    report = tmp_path / "report.json"
    train(
        shape="n64-d16-f128-k4", folder=str(tmp_path), gib=0.0005, tokens=1280, jobs=2,
        log_every=5, seconds=0.05, cpu=True, json=report,
    )  # fmt: skip
    rows = {row["what"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows.keys() == {
        "step alone", "sparsify's step alone", "loader alone, preload=none", "train, windows",
        "train, whole",
    }  # fmt: skip
    assert all(row["tokens/s"] > 0 for row in rows.values())
    assert "train, whole" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"], "the rest is removed"
    with pytest.raises(typer.BadParameter, match="--jobs 0"):
        train(jobs=0, cpu=True)
    with pytest.raises(typer.BadParameter, match="go together"):
        train(store="s.zarr", cpu=True)


def test_bench_stream_prints_rates_and_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stream, "make_model", lambda folder, *_: save_llama(folder))
    monkeypatch.setattr(bench_stream, "make_text", lambda file, _: save_text(file))
    monkeypatch.setattr(bench_cache, "VOCABULARY", 50)
    for module in (bench_cache, bench_stream):
        monkeypatch.setattr(module, "CONTEXT", 24)
        monkeypatch.setattr(module, "SEQUENCES", 4)
    report = tmp_path / "report.json"
    bench_stream.stream(
        tokens=640, batch=64, latents=64, k=4, saes="1,2", buffer_tokens=600, width=16, blocks=3,
        folder=tmp_path, passes=2, json_file=report, cpu=True,
    )  # fmt: skip
    rows = json.loads(report.read_text())["rows"]
    assert [row["SAEs"] for row in rows] == [1, 2]
    for row in rows:
        assert row["limit"] == pytest.approx(1 / (1 / row["forward"] + 1 / row["steps"]))
        assert row["x limit"] == pytest.approx(row["stream"] / row["limit"])
    assert "x limit" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"], "the rest is removed"


def test_features_are_timed_beside_evaluate(tmp_path: Path) -> None:
    """On rows whose latents are unequally often active."""
    config, accelerator = prepare(tmp_path, 3000, (64, 256, 4), CPU), Accelerator(cpu=True)
    run_jobs(config, accelerator, grid=False)
    rows = config.features.num_tokens
    found = rates(config, accelerator, rows)
    assert [row["verb"] for row in found] == ["evaluate", "features"]
    for row in found:
        assert 0 < row["pass s"] < row["seconds"]
        assert row["rows/s"] == pytest.approx(rows / row["pass s"])
    density = np.load(tmp_path / "run/rows/densities.npy")
    assert density.sum() == pytest.approx(4, rel=0.02)
    assert density[:16].mean() > 3 * density[-16:].mean() > 0
