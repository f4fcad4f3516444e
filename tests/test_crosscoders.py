"""Crosscoders: the references' formulas, rows of several hookpoints in units of their own, and all
verbs.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flash_sae_dist import interop
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models import ARCHITECTURES, load_sae
from flash_sae_dist.models.crosscoder import Crosscoder
from flash_sae_dist.models.dead_latents import DeadLatents
from flash_sae_dist.models.sparsity import Batch
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.defaults import with_defaults
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.resample import resample_
from flash_sae_dist.training.step import SAETraining
from tests.test_architectures import BATCH, CPU, SOURCES, UNITS, batch, run, training
from tests.tiny_model import config_data, write_config

KINDS: dict[str, dict[str, Any]] = {
    "topk_crosscoder": {"k": 4},
    "batch_topk_crosscoder": {"k": 4},
    "relu_crosscoder": {},
}
D, F, N = 15, 24, 32
WIDTHS = (5, 7, 3)


def crosscoder(name: str, **keys: Any) -> Crosscoder:
    """Of three sources, its decoder rows of unequal norms in each and of norm 1 over all."""
    config = ARCHITECTURES[name].Config(architecture=name, d_sae=F, **KINDS[name], **keys)
    sae = ARCHITECTURES[name].from_config(config, D, sources=WIDTHS, dtype=torch.float64)
    assert isinstance(sae, Crosscoder)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(F, generator=g))
        sae.b_dec.copy_(0.3 * torch.randn(D, generator=g))
        W = torch.randn(F, D, generator=g) * torch.tensor([1.0, 0.1, 3.0]).repeat_interleave(
            torch.tensor(WIDTHS)
        )
        W[::2, :5] *= 8
        sae.W_dec.copy_(torch.nn.functional.normalize(W, dim=1))
    return sae


def reference(sae: Crosscoder, x: Tensor, given: tuple[Tensor, ...]) -> Tensor:
    """The losses of the papers and of dictionary_learning's fork, source by source: squared errors
    summed over sources (and for L1 the penalty of activations times summed decoder norms).
    """
    W_enc, b_enc, W_dec, b_dec = given
    xs, encs, decs = (torch.split(t, list(WIDTHS), dim=1) for t in (x, W_enc, W_dec))
    biases = torch.split(b_dec, list(WIDTHS))
    pre = sum(((x - b) @ e.T for x, b, e in zip(xs, biases, encs, strict=True)), torch.zeros(()))
    acts = (pre + b_enc).relu()
    norms = sum((d.norm(dim=1) for d in decs), torch.zeros(()))
    with torch.no_grad():
        scores = acts * norms
        keep = torch.ones_like(scores, dtype=torch.bool)
        if sae.config.architecture == "topk_crosscoder":
            keep = scores >= scores.topk(4, dim=1).values[:, -1:]
        elif sae.config.architecture == "batch_topk_crosscoder":
            keep = scores >= scores.flatten().topk(4 * N).values[-1]
    acts = acts * keep
    loss = sum(
        ((acts @ d + b - x).square().sum() for x, d, b in zip(xs, decs, biases, strict=True)),
        torch.zeros(()),
    )
    if sae.config.architecture == "relu_crosscoder":
        loss = loss + 5.0 * (acts * norms).sum()
    return loss


@pytest.mark.parametrize("name", list(KINDS))
def test_losses_and_gradients_are_the_references(name: str) -> None:
    sae = crosscoder(name).train()
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = tuple(
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    want = reference(sae, x, given)
    found = sae.candidates(x)
    codes = sae.activate(found)
    shared = Batch(torch.ones((), dtype=x.dtype), N, 1.0, torch.ones((), dtype=x.dtype))
    loss = (sae.decode(codes, x) - x).square().sum() + sae.penalty(x, found, codes, shared)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    ours = torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
    for got, expected in zip(ours, torch.autograd.grad(want, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_ranks_are_those_of_decoder_rows_of_any_norm() -> None:
    """A latent whose decoder row is longer and whose encoder is shorter is the same latent, and the
    norm of the whole row ranks as an SAE does.
    """
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sae = crosscoder("topk_crosscoder")
    before = sae.encode(x)
    norms = sae.decoder_norms(sae.W_dec.detach())
    torch.testing.assert_close(
        norms.square().sum(dim=1), torch.ones(F).double(), rtol=1e-6, atol=1e-6
    )
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    want = (pre * norms.sum(dim=1)).topk(4, dim=1).indices
    assert torch.equal(before.latents.long().sort().values, want.sort().values)
    whole = crosscoder("topk_crosscoder", decoder_norms="whole")
    assert torch.equal(whole.encode(x).latents.long().sort().values, pre.topk(4).indices.sort()[0])
    assert not torch.equal(whole.encode(x).latents, before.latents)


@pytest.mark.parametrize("options", [{}, {"subtract_mean": True, "normalize": "expected_norm"}])
def test_it_is_written_for_rows_as_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    """Sources in other units train as one does in units of 1, and all of it comes back."""
    t = training("batch_topk_crosscoder", "fused", **options)
    run(t, range(12))
    t.calibrate(lambda: [batch(100)])
    weights = t.final_weights()
    t.sae.save(tmp_path, {n: w.float() for n, w in weights.items()})
    loaded, x = load_sae(tmp_path), batch(101)
    assert loaded.sources == SOURCES
    assert loaded.spec()["sources"] == list(SOURCES)
    want = t.sae.eval()(x)
    got = loaded(x.float())
    torch.testing.assert_close(got.recon.double(), want.recon, rtol=1e-4, atol=1e-3)
    again = interop.contents.build(tmp_path, interop.contents.contents_of(loaded))
    assert torch.equal(again(x.float()).recon, got.recon)
    if not options:
        assert weights["source_scale"].tolist() == list(UNITS)
        # Rows in other units are the same run, source by source.
        other = training("batch_topk_crosscoder", "fused")
        times = torch.tensor([8.0] * SOURCES[0] + [0.25] * SOURCES[1], dtype=torch.float64)
        other.set_source_units([UNITS[0] * 8, UNITS[1] / 4])
        timer = PhaseTimer(CPU, enabled=False)
        for step in range(12):
            other.step(batch(step) * times, timer)
        torch.testing.assert_close(other.sae.W_dec, t.sae.W_dec, rtol=1e-9, atol=1e-12)


def test_units_that_nobody_told_are_the_first_batchs() -> None:
    cfg = training("topk_crosscoder", "fused").cfg
    config = ARCHITECTURES["topk_crosscoder"].Config(d_sae=24, k=4)
    t = SAETraining(config, cfg, 10, Mesh.single(), CPU, sources=SOURCES)
    assert not t.has_rms()
    t.step(batch(0), PhaseTimer(CPU, enabled=False))
    parts = torch.split(batch(0), list(SOURCES), dim=1)
    want = torch.stack([part.square().mean().sqrt() for part in parts])
    scale = t.sae.get_buffer("source_scale")
    torch.testing.assert_close(scale, want)
    again = SAETraining(config, cfg, 10, Mesh.single(), CPU, sources=SOURCES)
    again.load_state(t.state())
    assert torch.equal(again.sae.get_buffer("source_scale"), scale)


def test_l1_of_whole_rows_is_an_saes_on_the_fused_engine() -> None:
    found = []
    for engine in ("fused", "autograd"):
        like = training("relu_crosscoder", "autograd", dead_latents="none")
        config = like.sae.config.model_copy(update={"decoder_norms": "whole"})
        cfg = ENGINES[engine](**like.cfg.model_dump() | {"engine": engine})
        t = SAETraining(config, cfg, 10, Mesh.single(), CPU, sources=SOURCES)
        found.append((run(t, range(5)), t.sae.state_dict()))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-10)


def test_metrics_tell_each_sources_fvu() -> None:
    """Weighed by their variances they make the whole's."""
    t = training("topk_crosscoder", "fused")
    run(t, range(3))
    x = batch(3)
    rows = t._prepared(x)
    error = (t.sae.decode(t.sae.encode_rows(rows)) - rows).detach().square().sum(dim=0)
    variance = (rows - rows.mean(dim=0)).square().sum(dim=0)
    metrics = t.step(x, PhaseTimer(CPU, enabled=False))
    fvus = t.engine.source_fvus
    assert fvus is not None
    for part, got in zip((slice(0, 4), slice(4, 10)), fvus, strict=True):
        assert float(got) == pytest.approx(float(error[part].sum() / variance[part].sum()))
    assert float(metrics.fvu) == pytest.approx(float(error.sum() / variance.sum()))


@pytest.mark.parametrize(
    ("sae", "train", "told"),
    [
        ({"architecture": "topk", "k": 2}, {"hookpoint": "a+b"}, "joins hookpoints, which sae.arc"),
        ({"architecture": "topk_crosscoder", "k": 2}, {"hookpoint": "a"}, "is one; join them by +"),
        (
            {"architecture": "topk_crosscoder", "k": 2},
            {"hookpoint": "a+b", "target": "c"},
            "train.target='c' is of transcoders",
        ),
        (
            {"architecture": "topk_crosscoder", "k": 2},
            {"hookpoint": "a+b", "init_from": "/x"},
            "train.init_from='/x' begins SAEs alone",
        ),
        (
            {"architecture": "topk_crosscoder", "k": 2},
            {"hookpoint": "a+b", "source": "stream", "loss": "kl"},
            "train.loss='kl' puts the rows of one hookpoint back",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    sae: dict[str, Any], train: dict[str, Any], told: str
) -> None:
    config = ARCHITECTURES[sae["architecture"]].Config(d_sae=8, **sae)
    with pytest.raises(ConfigError) as error:
        with_defaults(ENGINES["auto"](num_tokens=9, **train), config, 8)
    assert told in str(error.value)
    with pytest.raises(ValueError, match="has 'a' twice"):
        ENGINES["auto"](num_tokens=9, hookpoint="a+b+a")
    with pytest.raises(ValueError, match="sae.skip=True is nothing that sae.architecture"):
        ARCHITECTURES["topk_crosscoder"].Config(d_sae=8, k=2, skip=True)


def test_it_goes_through_the_verbs(tmp_path: Path) -> None:
    """A grid of two on hookpoints of two widths: each is trained, resumed, measured and looked at;
    formats that have no place for it refuse by name.
    """
    one, two = "model.layers.0", "model.layers.1.mlp.down_proj:input"
    joined = f"{one}+{two}"
    data = config_data(tmp_path, hookpoints=[one, two])
    data["sae"] = {"d_sae": 64, "k": 4, "architecture": "topk_crosscoder"}
    data["train"] |= {"num_tokens": BATCH * 40, "batch_tokens": BATCH, "holdout": 0.05}
    data["train"].pop("hookpoint", None)
    data["grid"] = {
        "hookpoints": [joined],
        "values": {"sae.architecture": ["topk_crosscoder", "batch_topk_crosscoder"]},
    }
    config = str(write_config(tmp_path / "c.yaml", data))
    runner, app = CliRunner(), build()

    def verb(*words: str, code: int = 0) -> str:
        result = runner.invoke(app, [words[0], config, *words[1:]])
        assert result.exit_code == code, result.output[-3000:]
        return result.output

    verb("cache")
    assert "48" in verb("plan")
    verb("grid")
    folders = sorted(p.parent.parent for p in (tmp_path / "run").rglob("sae/config.json"))
    assert [folder.parent.name for folder in folders] == [joined] * 2
    line = json.loads((folders[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line[f"fvu/{one}"] < 1.5
    assert line["fvu"] < 1
    verb("evaluate")
    for record in json.loads((tmp_path / "run/evaluation.json").read_text()):
        assert list(record["source_fvus"]) == [one, two]
        assert min(record["source_fvus"].values()) < record["fvu"]
        assert record["fvu"] < max(record["source_fvus"].values())
        assert "loss" not in record
    verb("features", "features.num_tokens=256")
    with gzip.open(folders[0] / "features" / "features.jsonl.gz") as lines:
        norms = json.loads(next(lines))["decoder_norms"]
    assert list(norms) == [one, two]
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(1, abs=1e-3)
    told = verb("export", "export.formats=[sae_lens]", code=2)
    assert "of architecture 'topk_crosscoder', which SAELens cannot hold" in told.replace(
        "batch_topk_crosscoder", "topk_crosscoder"
    )
    verb("export", "export.formats=[flash_sae_dist,dictionary_learning]")
    written = tmp_path / "run/export/flash_sae_dist" / folders[0].relative_to(tmp_path / "run")
    assert interop.load(written).spec() == load_sae(folders[0] / "sae").spec()
    assert not (tmp_path / "run/export/dictionary_learning").exists(), "of two widths"
    words = (f"SAE={folders[0] / 'sae'}", f"output={tmp_path / 'o'}", "evaluate.rows=all")
    verb("evaluate", f"evaluate.hookpoint={joined}", *words)
    told = verb("evaluate", f"evaluate.hookpoint={two}+{one}", *words, code=2)
    assert "is of width 16 + 32" in told
    told = verb("train", "sae.architecture=topk_crosscoder", f"train.hookpoint={one}+x", code=2)
    assert "train.hookpoint='x' is not in the store" in told


@pytest.mark.parametrize("name", KINDS)
def test_resampling_draws_by_errors_of_rows_as_the_engine_gets_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of rows that are divided by their sources' scales a second time."""
    sae, x = crosscoder(name), torch.randn(N, D, dtype=torch.float64)
    sae.source_scale.copy_(torch.tensor([20.0, 0.1, 3.0]))
    dead = DeadLatents(F, 100, Mesh.single(), torch.device("cpu"))
    found: list[Tensor] = []
    dead.tokens_since_fired[:3] = 1000

    def drawn(weights: Tensor, number: int, **_: object) -> Tensor:
        found.append(weights)
        return torch.arange(number)

    errors = (x - sae.decode(sae.encode_rows(x))).detach().square().sum(dim=1)
    monkeypatch.setattr(torch, "multinomial", drawn)
    engine: Any = SimpleNamespace(sae=sae, forget_=lambda mask: None, refresh_=lambda: None)
    assert resample_(engine, dead, x, 0) == 3
    torch.testing.assert_close(found[0], errors.square().cpu())
