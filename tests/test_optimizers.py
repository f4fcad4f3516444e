"""Optimizers beside Adam: equal to their models, resumed bit for bit, refused where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import ENGINES, FusedTrainConfig
from flash_sae_dist.models.topk import TopKConfig, TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.defaults import with_defaults
from flash_sae_dist.training.engine import choose_engine
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.muon import Muon, orthogonalised
from flash_sae_dist.training.optim import lr_at
from flash_sae_dist.training.schedule_free import ScheduleFreeSign
from flash_sae_dist.training.sparse_adam import SparseAdam
from flash_sae_dist.training.step import SAETraining
from tests import test_architectures, test_transcoders

CPU = torch.device("cpu")
D_IN, D_SAE, BATCH = 8, 48, 64


def training(**options: Any) -> SAETraining:
    keys = {"num_tokens": 100 * BATCH, "batch_tokens": BATCH, "warmup_steps": 2}
    keys |= {"precision": "float64", "dead_after_tokens": 9 * BATCH, **options}
    cfg = ENGINES[options.get("engine", "auto")](**keys)
    return SAETraining(TopKConfig(k=3, d_sae=D_SAE), cfg, D_IN, Mesh.single(), CPU, rms=2.0)


def run(t: SAETraining, steps: range) -> list[float]:
    timer = PhaseTimer(CPU, enabled=False)
    found = []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x = 2 * torch.randn(BATCH, D_IN, generator=g, dtype=torch.float64)
        found.append(float(t.step(x, timer).fvu))
    return found


def norms(rows: Tensor) -> Tensor:
    return rows.detach().norm(dim=1)


def test_adamw_is_torchs_on_both_engines() -> None:
    """Decay that a run shows: 1 - 1e-3 * 20 a step, of all rows of the encoder."""
    keys = {"optimizer": "adamw", "weight_decay": 20.0, "lr": 1e-3, "grad_clip": 0.5}
    fused, dense = training(**keys), training(**keys, engine="autograd")
    assert isinstance(fused.engine, FusedEngine)
    assert type(dense.optimizer) is torch.optim.AdamW
    assert [g["weight_decay"] for g in dense.optimizer.param_groups] == [20.0, 0.0]
    assert run(fused, range(12)) == pytest.approx(run(dense, range(12)), rel=1e-9)
    for name, param in fused.sae.named_parameters():
        torch.testing.assert_close(param, dense.sae.get_parameter(name), rtol=1e-8, atol=1e-11)
    plain = training(lr=1e-3, grad_clip=0.5)
    run(plain, range(12))
    ratio = float((fused.sae.W_enc.norm() / plain.sae.W_enc.norm()).detach())
    assert ratio == pytest.approx(0.98**12, abs=0.05)
    torch.testing.assert_close(norms(fused.sae.W_dec), torch.ones(D_SAE).double())


def test_adamw_decays_every_matrix_of_any_step() -> None:
    """W_skip of a transcoder whose steps are dense, and the rows of a crosscoder."""
    keys: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 20.0}
    timer = PhaseTimer(CPU, enabled=False)
    for skips in (True, False):
        both = []
        for engine in ("fused", "autograd"):
            if skips:
                t = test_transcoders.training("jumprelu", True, engine, **keys)
            else:
                t = test_architectures.training("topk_crosscoder", engine, **keys)
            for step in range(12):
                x, *y = test_transcoders.rows(step) if skips else [test_architectures.batch(step)]
                t.step(x, timer, *y)
            assert (t.engine.density is not None and t.engine.density.is_dense) == skips
            both.append(t)
        fused, dense = (dict(t.sae.named_parameters()) for t in both)
        assert isinstance(both[0].engine, FusedEngine)
        assert ("W_skip" in fused) == skips
        decayed = both[1].optimizer.param_groups[0]["params"]
        assert {n for n, p in dense.items() if p.ndim == 2} == {
            n for n, p in dense.items() if any(p is q for q in decayed)
        }
        for name, param in fused.items():
            torch.testing.assert_close(param, dense[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("shape", [(48, 8), (8, 48)])
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    rows: dict[Tensor, tuple[int, Mesh | None]] = {ours: (shape[0], Mesh.single())}
    groups: list[dict[str, Any]] = [{"params": [ours]}]
    mine = Muon(groups, 0.02, rows_of=rows, betas=(0.9, 0.999), eps=1e-8, decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(shape, generator=g)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        other.step()
    # Both iterate in bfloat16, in another order.
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    values = torch.linalg.svdvals(orthogonalised(grad.double(), None))
    assert 0.6 < values.min() < values.max() < 1.3


def test_muon_steps_matrices_and_adam_the_rest() -> None:
    t = training(optimizer="muon")
    assert t.cfg.lr == t.peak_lr == 2e-3
    assert isinstance(t.optimizer, Muon)
    run(t, range(3))
    states = {name: set(t.optimizer.state[p]) for name, p in t.sae.named_parameters()}
    assert states["W_enc"] == states["W_dec"] == {"momentum_buffer"}
    assert states["b_enc"] == states["b_dec"] == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(norms(t.sae.W_dec), torch.ones(D_SAE).double())
    # Biases take their steps in the data's units.
    assert [group["lr"] for group in t.optimizer.param_groups] == pytest.approx([2e-3, 4e-3])


def test_signum_writes_its_average_at_unit_norm() -> None:
    t = training(optimizer="signum", warmup_steps=0, encoder_scale="unit")
    optimizer = t.optimizer
    assert isinstance(optimizer, SparseAdam)
    assert t.peak_lr == pytest.approx(5e-3 / (D_SAE / 2**14) ** 0.5)
    first = {name: p.detach().clone() for name, p in t.sae.named_parameters()}
    run(t, range(1))
    for name in ("W_enc", "b_enc"):
        z = optimizer.state[t.sae.get_parameter(name)]["z"]
        unit = 2.0 if name == "b_enc" else 1.0
        # By lr in each coordinate that has a gradient; after one step the average is z.
        moved = (z - first[name]).abs()
        assert set((moved / (t.peak_lr * unit)).round(decimals=9).unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(t.engine.weights()[name], z)
    run(t, range(1, 30))
    kept = t.final_weights()
    torch.testing.assert_close(norms(kept["W_dec"]), torch.ones(D_SAE).double())
    assert not torch.equal(kept["W_enc"], t.sae.W_enc)
    assert lr_at(99, 100, 1.0, t.cfg) == 1.0
    assert run(t, range(30, 31))[0] < 0.9


@pytest.mark.parametrize("case", ["topk-auxk", "batch_topk-resample", "gated-none", "transcoder"])
def test_signum_is_autograds_on_the_fused_engine(case: str) -> None:
    """Losses, weights, what is written and z; and a run of the one goes on as the other's."""
    name, _, dead = case.partition("-")

    def steps(t: SAETraining, end: int) -> list[list[float]]:
        losses = []
        for step in range(t.step_index, end):
            x, *y = test_transcoders.rows(step) if t.target else [test_architectures.batch(step)]
            losses.append([float(m) for m in t.step(x, PhaseTimer(CPU, enabled=False), *y)])
        return losses

    def begun(engine: str) -> SAETraining:
        keys: dict[str, Any] = {"optimizer": "signum", "micro_batches": 2 - (name == "batch_topk")}
        if name == "transcoder":
            t = test_transcoders.training("topk", True, engine, **keys)
            # At the mean b_dec's gradient is rounding, which has no sign.
            t.sae.begin_ = lambda *_: None  # type: ignore[method-assign]
            return t
        return test_architectures.training(name, engine, dead_latents=dead, **keys)

    fused, dense, goes_on = begun("fused"), begun("autograd"), begun("fused")
    assert isinstance(fused.optimizer, SparseAdam)
    assert isinstance(dense.optimizer, ScheduleFreeSign)
    for ours, theirs in zip(steps(fused, 25), steps(dense, 25), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-11)
    goes_on.load_state(dense.state())
    assert steps(goes_on, 30)[-1] == pytest.approx(steps(dense, 30)[-1], rel=1e-8, abs=1e-11)
    for t in (fused, goes_on):
        steps(t, 30)
        for found, want in (
            (t.engine.state(), dense.engine.state()),
            (t.final_weights(), dense.final_weights()),
        ):
            assert found.keys() == want.keys()
            for key, tensor in want.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    ("optimizer", "engine"),
    [("adamw", "auto"), ("muon", "auto"), ("signum", "auto"), ("signum", "autograd")],
)
@pytest.mark.parametrize("dead_latents", ["auxk", "resample"])
def test_a_resumed_run_has_the_same_bits(optimizer: str, engine: str, dead_latents: str) -> None:
    keys = {"optimizer": optimizer, "dead_latents": dead_latents, "precision": "float32"}
    keys["engine"] = engine
    through, begun, resumed = (training(**keys) for _ in range(3))
    run(through, range(24))
    run(begun, range(13))
    state = begun.state()
    copied = state._replace(
        rows={k: v.clone() for k, v in state.rows.items()},
        whole={k: v.clone() for k, v in state.whole.items()},
    )
    resumed.load_state(copied)
    run(resumed, range(13, 24))
    for name, tensor in through.final_weights().items():
        assert torch.equal(resumed.final_weights()[name], tensor), name


def test_resampled_latents_begin_anew() -> None:
    t = training(optimizer="signum")
    run(t, range(3))
    mask = torch.arange(D_SAE) < 5
    with torch.no_grad():
        t.sae.W_enc[mask] = 7
    t.engine.forget_(mask)
    z = t.optimizer.state[t.sae.W_enc]["z"]
    assert bool((z[mask] == 7).all())
    assert not bool((z[~mask] == 7).any())


def test_which_engine_steps_them() -> None:
    engines = {"adam": "fused", "adamw": "fused", "signum": "fused", "muon": "autograd"}
    for optimizer, engine in engines.items():
        cfg = FusedTrainConfig(num_tokens=9, optimizer=optimizer)
        assert choose_engine(cfg).engine == engine
    with pytest.raises(ConfigError, match="train.engine='fused' needs the fused engine, but train"):
        choose_engine(FusedTrainConfig(num_tokens=9, optimizer="muon", engine="fused"))
    with pytest.raises(ConfigError, match="train.ema_decay=0.9 needs the fused engine"):
        choose_engine(FusedTrainConfig(num_tokens=9, optimizer="muon", ema_decay=0.9))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"weight_decay": 0.1}, "train.weight_decay=0.1 says nothing of train.optimizer='adam'"),
        ({"optimizer": "signum", "grad_clip": 1.0}, "train.grad_clip=1.0 says nothing of train.op"),
        ({"optimizer": "signum", "schedule": "linear"}, "train.schedule='linear' says nothing of"),
        ({"optimizer": "signum", "ema_decay": 0.9}, "train.ema_decay=0.9 is of Adam, not of train"),
        ({"optimizer": "adamw", "adam_mode": "lazy"}, "which train.adam_mode='lazy' leaves alone"),
        ({"optimizer": "muon", "engine": "deepspeed"}, "train.optimizer='muon' is not of train.en"),
        ({"schedule_cycles": 2}, "train.schedule_cycles=2 says nothing of train.schedule="),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ENGINES[keys.get("engine", "auto")](num_tokens=9, **keys)


def test_what_is_left_out_has_a_source() -> None:
    sae = TopKConfig(k=3, d_sae=2**16)
    usual = {name: FusedTrainConfig(num_tokens=9, optimizer=name) for name in ("adam", "adamw")}
    usual |= {name: FusedTrainConfig(num_tokens=9, optimizer=name) for name in ("muon", "signum")}
    found = {name: with_defaults(cfg, sae, 8) for name, cfg in usual.items()}
    rates = {"adam": 8e-4, "adamw": 8e-4, "muon": 2e-3, "signum": 2.5e-3}
    assert {name: cfg.lr for name, cfg in found.items()} == pytest.approx(rates)
    decays = {"adam": None, "adamw": 0.01, "muon": 0.0, "signum": None}
    assert {name: cfg.weight_decay for name, cfg in found.items()} == decays
    cfg = FusedTrainConfig(num_tokens=9, optimizer="muon", lr_rule="budget")
    with pytest.raises(ConfigError, match="with Adam, not of train.optimizer='muon', whose rate"):
        with_defaults(cfg, sae, 8)


def test_an_sae_of_muon_loads(tmp_path: Any) -> None:
    t = training(optimizer="muon", precision="float32")
    run(t, range(2))
    t.sae.save(tmp_path / "sae", t.final_weights())
    assert torch.equal(TopKSAE.load(tmp_path / "sae").W_enc, t.final_weights()["W_enc"])
