"""Metrics against their definitions; loss recovered at its two ends; reports."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from flash_sae_dist import TopKSAE
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.holdout import held_out
from flash_sae_dist.activations.language_model import load_language_model, replace_activations
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.evaluation.finished import finished_saes
from flash_sae_dist.evaluation.loss_recovered import LossMeter, LossRecovered
from flash_sae_dist.evaluation.metrics import density_histogram, measure
from flash_sae_dist.evaluation.report import (
    evaluation_record,
    table,
    write_evaluation,
    write_report,
)
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import config_data, held_out_table, save_bert, save_llama, save_text

CPU = torch.device("cpu")


def test_metrics_equal_their_definitions() -> None:
    sae = TopKSAE(8, 24, 3, dtype=torch.float64)
    x = torch.randn(100, 8, dtype=torch.float64) * torch.arange(1, 9) + 5
    m = measure(sae, torch.split(x, 30))
    out = sae(x)
    fvu = (x - out.recon.detach()).square().sum() / (x - x.mean(0)).square().sum()
    fired = torch.zeros(24).index_add_(
        0, out.codes.latents.flatten().long(), (out.codes.values > 0).flatten().float()
    )
    assert m.tokens == 100
    assert m.fvu == pytest.approx(float(fvu), rel=1e-9)
    assert m.l0 == pytest.approx(float((out.codes.values > 0).sum()) / 100)
    assert m.dead_fraction == pytest.approx(float((fired == 0).float().mean()))
    cosine = torch.cosine_similarity(x, out.recon, dim=1).mean()
    assert m.cosine == pytest.approx(cosine.item(), rel=1e-9)
    torch.testing.assert_close(m.density, fired.double() / 100)
    recon = out.recon.detach()
    assert m.explained_variance == 1 - m.fvu
    assert m.mse == pytest.approx(float((x - recon).square().sum(1).mean()), rel=1e-9)
    assert m.l2_ratio == pytest.approx(float((recon.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-9)
    bias = recon.square().sum() / (x * recon).sum()
    assert m.relative_bias == pytest.approx(float(bias), rel=1e-9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and one SAE, as `cache` and `train` leave them."""
    root = tmp_path_factory.mktemp("trained")
    data = config_data(root)
    run_cache(parse_config(data), Accelerator(cpu=True))
    data["train"] |= {"num_tokens": 640}
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    return root


@pytest.mark.parametrize(
    ("asked", "batch"), [(1000, 384), (1001, 100), (512, 128), (7, 3), (10**6, 400)]
)
def test_the_rows_asked_for_are_measured(
    trained: Path, capsys: pytest.CaptureFixture[str], asked: int, batch: int
) -> None:
    data = config_data(trained)
    data["evaluate"] = {"num_tokens": asked, "batch_tokens": batch, "loss_sequences": 0}
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert record["tokens"] == min(asked, 1500)
    assert "loss" not in record
    assert capsys.readouterr().err.splitlines()[-1].startswith("evaluate: 100%")


def test_every_row_is_measured_once(trained: Path) -> None:
    """However many a pass takes: all rows of the store, none of them twice."""
    data = config_data(trained)
    found = []
    for batch in (1500, 400):
        data["evaluate"] = {"num_tokens": 1500, "batch_tokens": batch, "loss_sequences": 0}
        found += run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert found[0]["density_histogram"] == found[1]["density_histogram"]
    assert found[0]["fvu"] == pytest.approx(found[1]["fvu"], rel=1e-6)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that holds a tenth of its store out."""
    root = tmp_path_factory.mktemp("held")
    data = config_data(root)
    run_cache(parse_config(data), Accelerator(cpu=True))
    data["train"] |= {"num_tokens": 640, "holdout": 0.1}
    data["evaluate"] |= {"loss_sequences": 0}
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    return root, data


def test_the_rows_that_training_held_out_are_measured(held: tuple[Path, dict[str, Any]]) -> None:
    root, data = held
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    rows = held_out(store, 0.1).rows
    assert record["tokens"] == len(rows) > 50
    assert record["rows"] == "rows that training held out"
    assert "held out" in (root / "run/report.md").read_text()
    x = torch.from_numpy(store.read("activations/model.layers.0", 0, 1500)[rows])
    m = measure(TopKSAE.load(root / "run/model.layers.0/sae"), [x])
    assert record["fvu"] == pytest.approx(m.fvu, rel=1e-5)
    assert record["explained_variance"] == pytest.approx(1 - m.fvu, rel=1e-5)
    densities = np.load(root / "run/model.layers.0/densities.npy")
    np.testing.assert_allclose(densities, m.density.float().numpy())


def test_all_rows_on_demand_and_of_other_stores(
    held: tuple[Path, dict[str, Any]], other_stores: Path
) -> None:
    _, data = held
    data = data | {"evaluate": data["evaluate"] | {"rows": "all", "num_tokens": 10**6}}
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert (record["tokens"], record["rows"][:8]) == (1500, "all rows")
    data = data | {"evaluate": data["evaluate"] | {"rows": "held_out"}}
    data["store"] = str(other_stores / "text.zarr")
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert record["rows"] == "all rows of a store that training did not read"
    assert record["tokens"] == ActivationStore.open(data["store"]).rows


def test_where_nothing_was_held_out_all_is_read_and_said(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = config_data(trained)
    data["evaluate"]["loss_sequences"] = 0
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert record["rows"] == "all rows, which training may have seen"
    assert "train.holdout=0.01 held no rows of" in caplog.text


def test_a_damaged_sae_is_told(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    data = config_data(trained) | {"output": str(tmp_path / "run")}
    file = tmp_path / "run/model.layers.0/sae/sae.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="holds no whole TopKSAE"):
        run_evaluation(parse_config(data), Accelerator(cpu=True))
    TopKSAE(8, 24, 3).save(file.parent)
    with pytest.raises(ConfigError, match="width 8, but model.layers.0 in .* of 16"):
        run_evaluation(parse_config(data), Accelerator(cpu=True))
    for text in (b"{", b"[8]", b"\xff"):
        (file.parent / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match="sae is damaged"):
            run_evaluation(parse_config(data), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("job.yaml", b"sae: {k: [1\n"),
        ("job.yaml", b""),
        ("job.yaml", b"\xff\xfe\x00"),
        ("job.yaml", b"output: run\n"),
        ("store.json", b'{"model.na'),
        ("store.json", b"[1]"),
        ("store.json", b"\xff"),
    ],
)
def test_a_damaged_record_is_told_by_name(
    trained: Path, tmp_path: Path, name: str, text: bytes
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run/model.layers.0" / name
    file.write_bytes(text)
    data = config_data(trained) | {"output": str(tmp_path / "run")}
    with pytest.raises(UserError) as e:
        run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert str(e.value).startswith(f"{file} is damaged (")
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def other_stores(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of the same hookpoints and widths: of another model, of special tokens, too, and of
    another text."""
    root = tmp_path_factory.mktemp("other")
    data = config_data(trained)
    save_llama(root / "other", layers=4)
    save_text(root / "other.jsonl", seed=1)
    for name, section, values in (
        ("model", "model", {"name": str(root / "other")}),
        ("special", "cache", {"drop_special_tokens": False}),
        ("text", "text", {"paths": [str(root / "other.jsonl")]}),
    ):
        changed = data | {section: data[section] | values}
        changed["cache"] = changed["cache"] | {"store": str(root / f"{name}.zarr")}
        run_cache(parse_config(changed), Accelerator(cpu=True))
    return root


@pytest.mark.parametrize(
    ("name", "key"), [("model", "model weights"), ("special", "cache.drop_special_tokens")]
)
def test_a_store_of_other_rows_is_refused(
    trained: Path, other_stores: Path, tmp_path: Path, name: str, key: str
) -> None:
    """Its numbers would be written over the right ones, as if they were this SAE's."""
    shutil.copytree(trained / "run", tmp_path / "run")
    data = config_data(trained) | {"output": str(tmp_path / "run")}
    data["store"] = str(other_stores / f"{name}.zarr")
    (tmp_path / "run/evaluation.json").write_text("the right ones")
    with pytest.raises(ConfigError, match=f"{name}.zarr' has {key}=.*was trained on .*; name the"):
        run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert (tmp_path / "run/evaluation.json").read_text() == "the right ones"


def test_a_store_of_another_text_is_measured(
    trained: Path, other_stores: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that training has not seen are the better measure; the losses' text is told."""
    shutil.copytree(trained / "run", tmp_path / "run")
    data = config_data(trained) | {"output": str(tmp_path / "run")}
    data["store"] = str(other_stores / "text.zarr")
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert 0 < record["fvu"] < 1
    assert "text.paths=" in caplog.text
    assert "losses are of another text" in caplog.text


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("model", {"name": "gpt2"}, "model.name='gpt2' differs from"),
        ("cache", {"context_length": 100}, "cache.context_length=100 differs from 24"),
        ("cache", {"context_length": 1}, "cache.context_length=1 differs from 24"),
        ("cache", {"drop_special_tokens": False}, "drop_special_tokens=False differs from True"),
    ],
)
def test_losses_in_another_model_are_refused(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    values: dict[str, Any],
    told: str,
) -> None:
    data = config_data(trained)
    data[section] |= values
    monkeypatch.setattr(
        "flash_sae_dist.evaluation.runner.load_language_model",
        lambda *_: pytest.fail("loaded before the check"),
    )
    with pytest.raises(ConfigError, match=told) as e:
        run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert "evaluate.loss_sequences=0" in str(e.value)


def test_how_the_model_is_run_may_differ(trained: Path) -> None:
    data = config_data(trained, dtype="bfloat16", batch_sequences=3, num_tokens=10, seed=7)
    data["model"] |= {"dtype": "bfloat16", "task": "causal-lm"}
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert record["loss"]["clean"] > 0


def test_nothing_to_measure_is_told() -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        measure(TopKSAE(8, 24, 3), [])


def test_histogram_counts_every_latent() -> None:
    density = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.01, 0.001], dtype=torch.float64)
    h = density_histogram(density, bins=6)
    assert h.never == 2
    assert sum(h.counts) == 4
    assert len(h.log10_edges) == 7
    assert density_histogram(torch.zeros(5)).never == 5


class Whole(TopKSAE):
    """An SAE that loses nothing, or everything."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x)._replace(recon=self.factor * x)


@pytest.fixture(scope="module")
def meter(tmp_path_factory: pytest.TempPathFactory) -> LossMeter:
    return make_meter(tmp_path_factory.mktemp("lm"), "model", "model.layers.1")


def make_meter(root: Path, model: str, hookpoint: str) -> LossMeter:
    data = config_data(root)
    if model == "bert":
        save_bert(root / "bert")
    data["model"]["name"] = str(root / model)
    config = parse_config(data)
    assert config.model is not None
    assert config.text is not None
    lm = load_language_model(config.model, CPU)
    table = held_out_table(
        config.text,
        lm.tokenizer,
        context_length=24,
        causal=lm.causal,
        drop_special_tokens=True,
        after_documents=15,
        num_sequences=6,
    )
    return LossMeter(lm, hookpoint, table, batch_sequences=4)


def test_loss_recovered_at_its_ends(meter: LossMeter) -> None:
    perfect, nothing = Whole(16, 32, 2), Whole(16, 32, 2)
    nothing.factor = 0.0
    kept, lost = meter.measure(perfect), meter.measure(nothing)
    assert kept.spliced == pytest.approx(kept.clean, abs=1e-6)
    assert lost.spliced == pytest.approx(lost.zero, abs=1e-6)
    assert abs(lost.zero - lost.clean) > 1e-4
    assert lost.tokens == 6 * 23
    # A random model's own loss may fall with zeros; a trained one's rises.
    assert LossRecovered(1, 3.0, 3.0, 5.0, 0.0, 1.0).recovered == 1
    assert LossRecovered(1, 3.0, 4.5, 5.0, 0.0, 1.0).recovered == 0.25
    assert LossRecovered(1, 3.0, 5.0, 5.0, 0.0, 1.0).recovered == 0


def test_kl_is_of_the_models_predictions(meter: LossMeter) -> None:
    half = Whole(16, 32, 2)
    half.factor = 0.5
    found = meter.measure(half)
    table, lm = meter.table, meter.lm
    ids = torch.from_numpy(np.array(table.ids, dtype=np.int64))
    keep = torch.from_numpy(np.array(table.keep))[..., None]

    def logs(factor: float) -> torch.Tensor:
        def change(x: torch.Tensor) -> torch.Tensor:
            return torch.where(keep, factor * x, x)

        with torch.no_grad(), replace_activations(lm, meter.hookpoint, change):
            return lm.model(input_ids=ids).logits[:, :-1].log_softmax(-1)

    clean, changed, zero = logs(1.0), logs(0.5), logs(0.0)
    kl, kl_zero = ((clean.exp() * (clean - q)).sum(-1).mean() for q in (changed, zero))
    assert found.kl_spliced == pytest.approx(float(kl), rel=1e-3)
    assert found.kl_zero == pytest.approx(float(kl_zero), rel=1e-3)
    assert found.kl_recovered == pytest.approx(float(1 - kl / kl_zero), rel=1e-3)
    assert meter.measure(Whole(16, 32, 2)).kl_recovered == pytest.approx(1, abs=1e-5)
    assert math.isnan(LossRecovered(1, 3.0, 3.0, 3.0, 0.0, 0.0).kl_recovered)


def test_the_models_autocast_is_not_the_saes(meter: LossMeter) -> None:
    seen: list[bool] = []

    class Watching(Whole):
        def forward(self, x: torch.Tensor) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        meter.measure(Watching(16, 32, 2))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("zero", [3.0, 2.9])
def test_where_zeros_cost_nothing_there_is_nothing_to_recover(zero: float) -> None:
    """Where they lower the loss, the fraction would say 200% of an SAE that does harm."""
    assert math.isnan(LossRecovered(0, 3.0, 3.1, zero, 0.1, 0.5).recovered)


def test_clean_loss_is_the_models_own(meter: LossMeter) -> None:
    ids = torch.from_numpy(np.array(meter.table.ids, dtype=np.int64))
    own = meter.lm.model(input_ids=ids, labels=ids).loss
    assert meter.measure(Whole(16, 32, 2)).clean == pytest.approx(own.item(), rel=1e-5)


def test_special_tokens_keep_their_activations(meter: LossMeter) -> None:
    """Were the begin token replaced too, an SAE that zeroes would see every row."""
    seen: list[int] = []

    class Counting(Whole):
        def forward(self, x: torch.Tensor) -> Any:
            seen.append(len(x))
            return super().forward(x)

    meter.measure(Counting(16, 32, 2))
    assert sum(seen) == int(meter.table.keep.sum()) < meter.table.ids.size


def test_masked_models_have_a_loss_too(tmp_path: Path) -> None:
    meter = make_meter(tmp_path, "bert", "bert.encoder.layer.0")
    found = meter.measure(Whole(16, 32, 2))
    assert found.tokens == int((meter.hidden & meter.table.attention).sum()) > 0
    assert found.spliced == pytest.approx(found.clean, abs=1e-6)
    assert meter.measure(Whole(16, 32, 2)).clean == found.clean, "the same tokens are hidden"


def test_an_encoder_without_a_head_is_told(meter: LossMeter) -> None:
    headless = LossMeter(meter.lm._replace(task="none"), "model.layers.1", meter.table, 4)
    with pytest.raises(ConfigError, match="evaluate.loss_sequences=0"):
        headless.measure(Whole(16, 32, 2))


def test_what_is_no_number_is_null_in_json_and_a_dash_in_tables(tmp_path: Path) -> None:
    m = measure(TopKSAE(8, 24, 3), [torch.ones(4, 8)])
    assert math.isfinite(m.fvu), "of a constant's squares"
    m = m._replace(fvu=math.nan)
    record = evaluation_record("h", "h", 3, 24, m, LossRecovered(0, 3.0, 3.1, 3.0, 0.1, 0.0))
    write_report(tmp_path, [record])
    text = (tmp_path / "evaluation.json").read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read[0]["fvu"] is None
    assert read[0]["loss"]["recovered"] is None
    report = (tmp_path / "report.md").read_text()
    assert "| h | 3.0 | - |" in report
    assert "| - |\n" in report, "recovered"
    assert "A dash stands for what is no number" in report


def test_latents_that_never_fired_are_told_with_the_rows(tmp_path: Path) -> None:
    """Training's dead latents are others: it counts over dead_after_tokens."""
    m = measure(TopKSAE(8, 24, 3), [torch.randn(1500, 8)])
    record = evaluation_record("h", "h", 3, 24, m, None)
    assert record["never_fired_fraction"] == m.dead_fraction
    assert record["tokens"] == 1500
    assert "dead_fraction" not in record
    write_report(tmp_path, [record])
    text = (tmp_path / "report.md").read_text()
    assert "| never fired |" in text
    assert "1,500 stored rows" in text


def test_long_names_of_jobs_stay_apart_on_a_terminal() -> None:
    m = measure(TopKSAE(8, 24, 3), [torch.randn(10, 8)])
    names = [f"transformer.h.8/adam_betas=(0.9, 0.999),d_sae=65536,k={k}" for k in (32, 64)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table([evaluation_record(name, "h", 3, 24, m, None) for name in names]))
    shown = console.export_text()
    assert "…" not in shown
    assert "10 stored rows" in shown
    first = "".join(line.split("│")[1].strip() for line in shown.splitlines() if "│" in line)
    assert all(name.replace(" ", "") in first.replace(" ", "") for name in names)


def test_an_sae_without_its_job_is_told(tmp_path: Path) -> None:
    TopKSAE(8, 24, 3).save(tmp_path / "a/sae")
    with pytest.raises(ConfigError, match="no job.yaml"):
        finished_saes(tmp_path)


def test_report_files(tmp_path: Path) -> None:
    sae = TopKSAE(8, 24, 3)
    m = measure(sae, [torch.randn(50, 8)])
    records = [evaluation_record(f"h/k={k}", "h", k, 24, m, None) for k in (3, 5)]
    write_evaluation(tmp_path / "h/k=3", records[0], m.density)
    write_report(tmp_path, records)
    text = (tmp_path / "report.md").read_text()
    assert "h/k=3" in text
    assert f"{m.fvu:.4f}" in text
    for file in (tmp_path / "fvu_l0.png", tmp_path / "h/k=3/density.png"):
        assert file.read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.rglob("*.tmp"))
