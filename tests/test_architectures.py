"""Every architecture: one arithmetic on both engines, initial values, thresholds, save and load."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.config.train import ENGINES, TrainConfig
from flash_sae_dist.models import ARCHITECTURES, load_sae
from flash_sae_dist.models.base import SparseCoder
from flash_sae_dist.models.batch_topk import BatchTopK
from flash_sae_dist.models.crosscoder import CrosscoderConfig
from flash_sae_dist.models.jumprelu import JumpReLU, JumpReLUConfig
from flash_sae_dist.models.matryoshka import MatryoshkaConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.defaults import with_defaults
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.engines.autograd import AutogradEngine
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining

CPU = torch.device("cpu")
D_IN, D_SAE, BATCH, STEPS = 10, 48, 32, 110
# Thresholds and windows so large that pairs lie on both sides of each.
JUMP: dict[str, Any] = {"initial_threshold": 0.3, "bandwidth": 0.5}
# By case its architecture and keys.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {"k": 4}),
    "batch_topk": ("batch_topk", {"k": 4, "threshold_start": 5, "threshold_decay": 0.9}),
    "matryoshka": ("matryoshka", {"k": 4, "prefix_widths": (6, 20)}),
    "matryoshka_sum": ("matryoshka", {"k": 4, "prefix_losses": "sum"}),
    "multi_topk": ("multi_topk", {"k": 4}),
    "relu": ("relu", {"l1_coefficient": 2.0}),
    "gated": ("gated", {"l1_coefficient": 2.0}),
    "jumprelu": ("jumprelu", {"sparsity_coefficient": 0.05, **JUMP}),
    "jumprelu_target": ("jumprelu", {"sparsity": "target", "target_l0": 6.0, **JUMP}),
    "jumprelu_start": ("jumprelu", {"sparsity": "target", "target_l0": 6.0, "bandwidth": 0.5}),
    "jumprelu_quadratic": (
        "jumprelu",
        {"sparsity": "quadratic", "target_l0": 6.0, "sparsity_coefficient": 0.01, **JUMP},
    ),
    "jumprelu_tanh": ("jumprelu", {"sparsity": "tanh"}),
    "topk_crosscoder": ("topk_crosscoder", {"k": 4}),
    "batch_topk_crosscoder": (
        "batch_topk_crosscoder",
        {"k": 4, "threshold_start": 5, "threshold_decay": 0.9},
    ),
    "relu_crosscoder": ("relu_crosscoder", {"l1_coefficient": 2.0}),
}
AUTOGRAD = ("relu_crosscoder",)
FUSED = [case for case in CASES if case not in AUTOGRAD]
# Shares of active latents that no SAE has: its steps are sparse from the start.
SPARSE = (2.0, 2.0)
# Widths of two hookpoints and root mean squares, of the cases that read several.
SOURCES, UNITS = (4, 6), (1.5, 2.5)


@pytest.fixture(autouse=True, scope="module")
def sparse_steps() -> Iterator[None]:
    """So few latents are dense outside of tests; tests/test_density.py has those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(density.SHARES, "cpu", SPARSE)
        yield


@functools.cache
def batch(step: int) -> Tensor:
    """Sparse mixtures of few directions, in units of 3."""
    g = torch.Generator().manual_seed(step)
    directions = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(99))
    codes = torch.rand(BATCH, 20, generator=g) * (torch.rand(BATCH, 20, generator=g) < 0.15)
    return 3 * (codes @ directions + 0.05 * torch.randn(BATCH, D_IN, generator=g)).double()


def training(case: str, engine: str = "auto", **options: Any) -> SAETraining:
    architecture, keys = CASES[case]
    sae = ARCHITECTURES[architecture].Config(architecture=architecture, d_sae=D_SAE, **keys)
    cfg = ENGINES[engine](
        num_tokens=STEPS * BATCH, batch_tokens=BATCH, warmup_steps=5, lr=5e-3, engine=engine,
        precision="float64", dead_after_tokens=10 * BATCH, seed=3, **options,
    )  # fmt: skip
    return started(sae, cfg, Mesh.single())


def started(sae: SAEConfig, cfg: TrainConfig, mesh: Mesh) -> SAETraining:
    """On rows of `batch`, whose units are told."""
    if not isinstance(sae, CrosscoderConfig):
        return SAETraining(sae, cfg, D_IN, mesh, CPU, rms=2.0)
    t = SAETraining(sae, cfg, D_IN, mesh, CPU, sources=SOURCES)
    t.set_source_units(UNITS)
    return t


def run(t: SAETraining, steps: range) -> list[tuple[float, ...]]:
    timer = PhaseTimer(CPU, enabled=False)
    return [tuple(float(m) for m in t.step(batch(i), timer)) for i in steps]


@functools.cache
def trained(case: str, engine: str, *options: tuple[str, Any]) -> tuple[SAETraining, Any]:
    t = training(case, engine, **dict(options))
    return t, run(t, range(STEPS))


# In parts and clipped.
PARTS = (("micro_batches", 3), ("grad_clip", 0.05))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, ()) for case in FUSED),
        *(
            (case, PARTS)
            for case in ("matryoshka", "multi_topk", "jumprelu_target", "gated", "topk_crosscoder")
        ),
    ],
)
def test_the_fused_engine_trains_as_autograd(case: str, options: Any) -> None:
    """Losses of every step, and all parameters and thresholds at the end."""
    fused, got = trained(case, "fused", *options)
    autograd, want = trained(case, "autograd", *options)
    assert isinstance(fused.engine, FusedEngine)
    assert isinstance(autograd.engine, AutogradEngine)
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-11)
    for name, tensor in autograd.sae.state_dict().items():
        torch.testing.assert_close(fused.sae.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", list(CASES))
def test_it_learns(case: str) -> None:
    t, curve = trained(case, "autograd" if case in AUTOGRAD else "fused")
    fvus = [line[0] for line in curve]
    assert fvus[-1] < 0.7 * fvus[0]
    has_penalty = case.startswith(("jumprelu", "relu", "gated"))
    assert all((line[3] > 0) == has_penalty for line in curve[1:])
    assert t.is_finite()


def test_what_is_trained_by_autograd_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        t = training("relu_crosscoder", "auto")
    assert isinstance(t.engine, AutogradEngine)
    assert "train.engine=auto is autograd, which is slower than fused: the" in caplog.text
    with pytest.raises(ConfigError, match="train.engine='fused' needs the fused engine, but the"):
        training("relu_crosscoder", "fused")


def test_usual_values_come_with_the_architecture() -> None:
    lrs = {}
    for case, betas, dead, rule in (
        ("topk", (0.9, 0.999), "auxk", "width"),
        ("matryoshka", (0.9, 0.999), "auxk", None),
        ("jumprelu", (0.0, 0.999), "none", "width"),
        ("gated", (0.0, 0.999), "none", None),
        ("relu", (0.9, 0.999), "none", None),
    ):
        architecture, keys = CASES[case]
        sae = ARCHITECTURES[architecture].Config(architecture=architecture, d_sae=2**16, **keys)
        cfg = with_defaults(ENGINES["auto"](num_tokens=9, lr_rule=rule), sae, 64)
        lrs[case] = cfg.lr
        assert (cfg.adam_betas, cfg.dead_latents) == (betas, dead)
        own = ENGINES["auto"](
            num_tokens=9, lr=1.0, adam_betas=(0.5, 0.5), dead_latents="resample",
            encoder_scale="unit",
        )  # fmt: skip
        assert with_defaults(own, sae, 64) == own
    want = {"topk": 1e-4, "matryoshka": 8e-4, "jumprelu": 7e-5, "gated": 5e-5, "relu": 5e-5}
    assert lrs == pytest.approx(want)
    with pytest.raises(ConfigError, match="train.dead_latents='auxk' does nothing for sae.arch"):
        with_defaults(ENGINES["auto"](num_tokens=9, dead_latents="auxk"), sae, 64)


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    t, _ = trained(case, "autograd" if case in AUTOGRAD else "fused")
    t.sae.save(tmp_path, {n: w.to(torch.float32) for n, w in t.final_weights().items()})
    loaded = load_sae(tmp_path)
    assert type(loaded) is type(t.sae)
    assert loaded.spec() == t.sae.spec()
    assert not loaded.training
    x = batch(1000).float()
    want = copy.deepcopy(t.sae).eval()(x.double()).recon
    torch.testing.assert_close(loaded(x).recon.double(), want, rtol=1e-4, atol=1e-3)


def fractions(sae: SparseCoder, x: Tensor) -> float:
    codes = sae.encode(x)
    return float((codes.values > 0).sum() / len(x))


def test_batch_topk_takes_a_threshold_at_inference() -> None:
    """The moving average of dictionary_learning; a token's activations do not depend on others."""
    t, _ = trained("batch_topk", "fused")
    sae = copy.deepcopy(t.sae)
    assert isinstance(sae, BatchTopK)
    other = training("batch_topk", "autograd")
    timer = PhaseTimer(CPU, enabled=False)
    mean = 0.0
    for i in range(12):
        # Of the weights that the step begins with, b_dec of the first batch among them.
        if i == 0:
            other.init_b_dec(batch(0))
        values = other.sae.encode(batch(i)).values.detach()
        least = float(values[values > 0].min())
        mean = least if i <= 5 else 0.9 * mean + 0.1 * least
        other.step(batch(i), timer)
        assert float(other.sae.get_buffer("mean_threshold")) == pytest.approx(mean, rel=1e-12)
    x = torch.cat([batch(2000 + i) for i in range(8)])
    sae.eval()
    assert fractions(sae, x) == pytest.approx(4, rel=0.35)
    one, all_ = sae.encode(x[:1]), sae.encode(x)
    torch.testing.assert_close(one.values, all_.values[: int(all_.offsets[1])])
    one, all_ = sae.encode(x[:1]), sae.encode(x)
    torch.testing.assert_close(one.values, all_.values[: int(all_.offsets[1])])


@pytest.mark.parametrize("options", [{}, {"normalize": "unit_mean_square", "ema_decay": 0.9}])
def test_held_out_rows_give_each_latent_a_threshold(options: dict[str, Any]) -> None:
    t = training("batch_topk", **options)
    run(t, range(60))
    before = {name: p.detach().clone() for name, p in t.sae.named_parameters()}
    rows = [batch(3000 + i) for i in range(40)]
    t.calibrate(lambda: rows)
    for name, param in t.sae.named_parameters():
        assert torch.equal(param, before[name])
    kept = training("batch_topk").sae
    kept.load_state_dict(t.final_weights())
    assert isinstance(kept, BatchTopK)
    threshold = kept.eval().threshold
    assert threshold.std() > 0.01 * threshold.mean(), "one each"
    unseen = torch.cat([batch(4000 + i) for i in range(40)])
    assert fractions(kept, torch.cat(rows)) == pytest.approx(4, rel=0.05)
    assert fractions(kept, unseen) == pytest.approx(4, rel=0.1)

    def error(sae: SparseCoder) -> float:
        return float((sae(unseen).recon - unseen).detach().square().sum())

    by_batch = error(kept.train())
    by_token = error(kept.eval())
    assert by_token < 1.15 * by_batch


def test_without_held_out_rows_the_moving_average_stays(caplog: pytest.LogCaptureFixture) -> None:
    t = training("batch_topk")
    run(t, range(8))
    t.calibrate(None)
    assert "no rows are held out: every latent has the threshold" in caplog.text
    kept = t.final_weights()
    assert torch.equal(kept["threshold"], kept["mean_threshold"].expand(D_SAE))
    t = training("topk")
    t.calibrate(None)


def test_a_stream_is_not_told_to_hold_rows_out(caplog: pytest.LogCaptureFixture) -> None:
    t = training("batch_topk", source="stream")
    run(t, range(2))
    t.calibrate(None)
    assert "a stream gives no held-out rows: every latent has the threshold" in caplog.text
    assert "trained from a store each has its own" in caplog.text
    assert "train.holdout" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"sparsity": "target", "target_l0": 5.0}, 10),
        ({"sparsity": "quadratic", "target_l0": 5.0}, 10),
        ({"sparsity": "target", "target_l0": 0.2}, 1),
        ({"initial_l0": 7.0}, 7),
        ({"initial_l0": 7.0, "sparsity": "target", "target_l0": 5.0}, 7),
        ({"initial_l0": 1e3}, None),  # more than there are above the least threshold
        ({"initial_threshold": 0.01}, None),
        ({"sparsity": "tanh", "initial_threshold": 0.01}, None),
    ],
)
def test_jumprelu_begins_with_few_active_latents(keys: dict[str, Any], count: int | None) -> None:
    sae = JumpReLUConfig(d_sae=D_SAE, **keys)
    cfg = ENGINES["auto"](
        num_tokens=BATCH, batch_tokens=BATCH, precision="float64", encoder_scale="unit"
    )
    t = started(sae, cfg, Mesh.single())
    t.init_b_dec(batch(0))
    threshold = t.sae.state_dict()["threshold"]
    assert len(threshold.unique()) == 1
    if count is None:
        assert threshold[0].item() == pytest.approx(0.01 * 2)
        return
    reached = t.sae.dense_candidates(batch(0)).values >= threshold
    assert reached.sum(dim=1).median() == count


@pytest.mark.parametrize("case", ["jumprelu_start", "jumprelu"])
def test_resampled_jumprelu_latents_begin_where_others_are(case: str) -> None:
    sae = copy.deepcopy(trained(case, "fused")[0].sae)
    assert isinstance(sae, JumpReLU)
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[[3, 40]] = True
    living = sae.threshold.detach()[~mask].clone()
    sae.restart_(mask)
    want = living.mean() if case == "jumprelu_start" else torch.tensor(0.3 * 2.0)
    assert sae.threshold[mask].tolist() == pytest.approx([float(want)] * 2)
    assert torch.equal(sae.threshold[~mask], living)


def test_both_starts_of_jumprelu_are_refused() -> None:
    with pytest.raises(ValidationError, match="sae.initial_l0=5 and sae.initial_threshold=0.1"):
        JumpReLUConfig(d_sae=D_SAE, initial_l0=5, initial_threshold=0.1)


def test_jumprelu_thresholds_begin_in_the_datas_units_and_stay_positive() -> None:
    t = training("jumprelu")
    run(t, range(1))
    sae = t.sae
    assert isinstance(sae, JumpReLU)
    assert sae.threshold.detach() == pytest.approx(2.0 * 0.3, abs=0.02)
    t, _ = trained("jumprelu", "fused")
    assert isinstance(t.sae, JumpReLU)
    assert (t.sae.threshold > 0).all()
    assert t.sae.threshold.std() > 0.01, "they are trained"
    sae = JumpReLU(ARCHITECTURES["jumprelu"].Config(architecture="jumprelu", d_sae=4), 3)
    sae.threshold.data.fill_(-1)
    sae.project_()
    assert (sae.threshold > 0).all()


def test_training_does_not_depend_on_the_datas_scale() -> None:
    """Coefficients, windows and thresholds are told in units of the data."""
    for case in ("relu", "jumprelu", "jumprelu_start", "jumprelu_tanh", "batch_topk"):
        t = training(case)
        small = SAETraining(t.sae.config, t.cfg, D_IN, Mesh.single(), CPU, rms=2.0 / 64)
        timer = PhaseTimer(CPU, enabled=False)
        want = run(t, range(20))
        got = [tuple(float(m) for m in small.step(batch(i) / 64, timer)) for i in range(20)]
        for ours, theirs in zip(got, want, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize(
    "case", ["batch_topk", "jumprelu_target", "gated", "batch_topk_crosscoder"]
)
def test_it_goes_on_bit_for_bit(case: str) -> None:
    t = training(case)
    whole = run(t, range(12))
    first = training(case)
    run(first, range(7))
    state = first.state()
    state = state._replace(
        rows={n: x.clone() for n, x in state.rows.items()},
        whole={n: x.clone() for n, x in state.whole.items()},
    )
    second = training(case)
    second.load_state(state)
    assert run(second, range(7, 12)) == whole[7:]
    for name, tensor in t.sae.state_dict().items():
        assert torch.equal(second.sae.state_dict()[name], tensor)


def test_matryoshka_widths() -> None:
    keys: dict[str, Any] = {"architecture": "matryoshka", "k": 2}
    assert MatryoshkaConfig(d_sae=64, **keys).widths(8) == (2, 6, 14, 30, 64)
    assert MatryoshkaConfig(d_sae=64, prefix_widths=(8, 64), **keys).widths(8) == (8, 64)
    assert MatryoshkaConfig(expansion_factor=4, prefix_widths=(8,), **keys).widths(8) == (8, 32)
    with pytest.raises(ConfigError, match=r"sae.prefix_widths=\[40\] exceed the 32 latents"):
        MatryoshkaConfig(expansion_factor=4, prefix_widths=(40,), **keys).widths(8)
    for widths in ((8, 4), (80,)):
        with pytest.raises(ValueError, match="sae.prefix_widths"):
            MatryoshkaConfig(d_sae=64, prefix_widths=widths, **keys)


def test_jumprelu_aims_at_something() -> None:
    kind = ARCHITECTURES["jumprelu"].Config
    with pytest.raises(ValueError, match="sae.sparsity='target' needs sae.target_l0"):
        kind(architecture="jumprelu", d_sae=8, sparsity="target")
    with pytest.raises(ValueError, match="sae.target_l0=3.0 says nothing of sae.sparsity='l0'"):
        kind(architecture="jumprelu", d_sae=8, target_l0=3.0)
