"""Options of the step: clipping, micro-batches, resampling, schedules, precision."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import ENGINES, FusedTrainConfig
from flash_sae_dist.kernels import reference
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.crosscoder import TopKCrosscoderConfig
from flash_sae_dist.models.jumprelu import JumpReLUConfig
from flash_sae_dist.models.relu import ReLUConfig
from flash_sae_dist.models.topk import TopKConfig, TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.defaults import usual_lr, with_defaults
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.optim import budget_lr, clip_grads_, default_lr, lr_at
from flash_sae_dist.training.sparse_adam import SparseAdam
from flash_sae_dist.training.step import SAETraining

CPU = torch.device("cpu")
D_IN, D_SAE, K, BATCH = 8, 48, 3, 64


def training(**options: Any) -> SAETraining:
    cfg = ENGINES[options.get("engine", "auto")](
        **{
            "num_tokens": 100 * BATCH,
            "batch_tokens": BATCH,
            "lr": 1e-3,
            "warmup_steps": 2,
            "precision": "float64",
            "dead_after_tokens": 10**9,
            **options,
        }
    )
    return SAETraining(TopKConfig(k=K, d_sae=D_SAE), cfg, D_IN, Mesh.single(), CPU)


def batch(step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, D_IN, generator=g, dtype=torch.float64)


def curve(t: SAETraining, steps: int) -> list[float]:
    timer = PhaseTimer(CPU, enabled=False)
    return [float(t.step(batch(i), timer).fvu) for i in range(steps)]


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = training(engine="autograd"), training(micro_batches=4)
    assert curve(whole, 10) == pytest.approx(curve(parts, 10), rel=1e-12)
    for a, b in zip(whole.sae.parameters(), parts.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_clipping_equals_torchs() -> None:
    t = training(engine="autograd")
    for p in t.sae.parameters():
        p.grad = torch.randn_like(p)
    mine = [p.grad.clone() for p in t.sae.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(t.sae.parameters(), 0.7)
    want = [p.grad.clone() for p in t.sae.parameters() if p.grad is not None]
    for p, g in zip(t.sae.parameters(), mine, strict=True):
        p.grad = g
    clip_grads_(t.sae, 0.7)
    for p, g in zip(t.sae.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-8)


def test_clipping_changes_a_run_only_where_it_bites() -> None:
    free = curve(training(engine="autograd"), 5)
    for engine in ("autograd", "fused"):
        unbound = curve(training(engine=engine, grad_clip=1e9), 5)
        assert unbound == pytest.approx(free, rel=1e-9)
        bound = curve(training(engine=engine, grad_clip=1e-6), 5)
        assert bound != pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_resampling_revives_dead_latents(engine: str) -> None:
    t = training(engine=engine, dead_latents="resample", dead_after_tokens=10 * BATCH)
    with torch.no_grad():
        t.sae.b_enc[:10] = -1e3
    t.step(batch(0), PhaseTimer(CPU, enabled=False))
    for i in range(1, 9):
        t.step(batch(i), PhaseTimer(CPU, enabled=False))
    t.dead.tokens_since_fired.add_(2 * BATCH)
    assert int(t.dead.mask().sum()) >= 10
    moments = t.optimizer.state[t.sae.W_enc]["exp_avg"]
    t.step_index = 20  # the next multiple of the window
    t._resample(batch(11))
    assert int(t.dead.mask().sum()) == 0
    assert (moments[:10] == 0).all()
    torch.testing.assert_close(t.sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    assert (t.sae.b_enc[:10] == 0).all()
    # Each points along some input of the batch that it was drawn from.
    x = torch.nn.functional.normalize(batch(11) - t.sae.b_dec, dim=1)
    best = (t.sae.W_dec[:10] @ x.T).max(dim=1).values
    torch.testing.assert_close(best, torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(
        torch.cosine_similarity(t.sae.W_enc[:10], t.sae.W_dec[:10], dim=1),
        torch.ones(10, dtype=torch.float64),
    )


def test_the_first_window_resamples_what_never_fired_in_it() -> None:
    t = training(dead_latents="resample", dead_after_tokens=5 * BATCH)
    with torch.no_grad():
        t.sae.b_enc[:10] = -1e3
    for i in range(5):
        t.step(batch(i), PhaseTimer(CPU, enabled=False))
    assert (t.sae.b_enc[:10] < -900).all()
    t.step(batch(5), PhaseTimer(CPU, enabled=False))
    assert (t.sae.b_enc[:10] > -1).all()


def test_resampling_leaves_a_run_that_is_not_finite_to_say_so() -> None:
    t = training(dead_latents="resample", dead_after_tokens=BATCH)
    t.step(batch(0), PhaseTimer(CPU, enabled=False))
    t.dead.tokens_since_fired.fill_(10 * BATCH)
    before = t.sae.W_enc.clone()
    t.step_index = 20
    t._resample(torch.full((BATCH, D_IN), float("nan"), dtype=torch.float64))
    assert torch.equal(t.sae.W_enc, before)


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_loss_falls_in_every_mode(mode: str) -> None:
    losses = curve(training(adam_mode=mode, lr=1e-2), 60)
    assert losses[-1] < 0.8 * losses[0]


def test_shards_round_as_one_process_does() -> None:
    """By the index over all shards: a run goes on with the same bits on another number of them."""
    step = torch.tensor(3.0)
    whole = reference.random_bits(5, step, 1, 16, 8)
    for shard in range(4):
        mesh = Mesh(0, 1, 0, 1, shard, 4, None, None, None)
        sae = TopKSAE(8, 16, 2, mesh=mesh)
        optimizer = SparseAdam(sae, 1e-3, moment_dtype=torch.bfloat16, seed=5)
        seed = optimizer.options().seed
        part = reference.random_bits(seed, step, 1, sae.d_sae_local, 8, sae.first_latent)
        assert torch.equal(part, whole[sae.first_latent :][: sae.d_sae_local])


def test_bfloat16_moments_train_and_are_kept() -> None:
    t = training(precision="float32", moment_dtype="bfloat16", lr=1e-2)
    losses = curve(t, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert t.state().rows["exp_avg.W_enc"].dtype == torch.bfloat16


def test_ghost_gradients_train() -> None:
    t = training(dead_latents="ghost", dead_after_tokens=BATCH, lr=1e-2)
    losses = curve(t, 40)
    assert losses[-1] < losses[0]


def test_the_running_average_is_what_is_kept() -> None:
    t = training(ema_decay=0.9)
    t.init_b_dec(batch(0))
    average = {n: p.detach().clone() for n, p in t.sae.named_parameters()}
    for i in range(6):
        t.step(batch(i), PhaseTimer(CPU, enabled=False))
        if i == 0:
            # The average starts from the weights that the optimizer was made with.
            assert not torch.equal(t.final_weights()["W_enc"], t.sae.W_enc)
        for name, p in t.sae.named_parameters():
            average[name].lerp_(p.detach(), 0.1)
    kept = t.final_weights()
    for name in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(kept[name], average[name])
    torch.testing.assert_close(
        kept["W_dec"], torch.nn.functional.normalize(average["W_dec"], dim=1)
    )
    resumed = training(ema_decay=0.9)
    state = t.state()
    resumed.load_state(state)
    for name, value in kept.items():
        assert torch.equal(resumed.final_weights()[name], value)


def test_schedule() -> None:
    cfg = FusedTrainConfig(num_tokens=1000, batch_tokens=10, warmup_steps=10, decay_fraction=0.2)
    rates = [lr_at(s, 100, 1.0, cfg) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert default_lr(2**14) == pytest.approx(2e-4)
    assert default_lr(2**16) == pytest.approx(1e-4)


def test_the_learning_rate_of_a_budget() -> None:
    assert budget_lr(2**14, 3000) == pytest.approx(1.6e-3), "the most"
    assert budget_lr(2**14, 75_000) == pytest.approx(4e-4)
    assert budget_lr(2**12, 75_000) == pytest.approx(8e-4)
    assert budget_lr(2**14, 10**6) == default_lr(2**14), "never less than the usual"
    cfg = {"num_tokens": 3000 * BATCH, "batch_tokens": BATCH}
    t = SAETraining(TopKConfig(k=K, d_sae=2**14), FusedTrainConfig(**cfg), D_IN, Mesh.single(), CPU)
    assert t.peak_lr == pytest.approx(1.6e-3)
    rates = [lr_at(step, 3000, 1.0, t.cfg) for step in (74, 149, 2000)]
    assert rates == pytest.approx([0.5, 1, 1]), "a twentieth of the steps is warm-up"
    assert lr_at(500, 10**5, 1.0, t.cfg) == pytest.approx(0.501), "1000 steps at the most"
    with pytest.raises(ValueError, match="says nothing beside train.lr=0.1"):
        FusedTrainConfig(**cfg, lr=0.1, lr_rule="budget")
    with pytest.raises(ConfigError, match="with Adam, not of sae.architecture='relu'"):
        with_defaults(FusedTrainConfig(**cfg, lr_rule="budget"), ReLUConfig(d_sae=D_SAE), D_IN)
    for sae, more, rate in (
        (TopKConfig(k=K, d_sae=2**14), {"lr_rule": "width"}, 2e-4),
        (TopKConfig(k=K, d_sae=2**14), {"init_from": "x"}, 2e-4),
        (TopKConfig(k=K, d_sae=2**14), {"init_from": "x", "lr_rule": "budget"}, 1.6e-3),
        (TopKConfig(k=K, d_sae=2**14), {"target": "y"}, 2e-4),
        (TopKCrosscoderConfig(k=K, d_sae=2**14), {}, 2e-4),
        (ReLUConfig(d_sae=2**14), {}, 5e-5),
        (JumpReLUConfig(d_sae=2**14), {}, 1.6e-3),
        (JumpReLUConfig(d_sae=2**14), {"lr_rule": "width"}, 7e-5),
        (JumpReLUConfig(d_sae=2**14), {"num_tokens": 200_000 * BATCH}, 7e-5 * 10**0.5),
        (JumpReLUConfig(d_sae=2**14), {"num_tokens": 10**7 * BATCH}, 7e-5),
    ):
        assert usual_lr(FusedTrainConfig(**cfg | more), sae, D_IN) == pytest.approx(rate)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize(
    "architecture", ["topk", "batch_topk", "matryoshka", "multi_topk", "jumprelu"]
)
def test_the_encoder_starts_at_the_scale_of_least_squares(engine: str, architecture: str) -> None:
    made = []
    for scale in ("unit", "least_squares"):
        cfg = ENGINES[engine](
            engine=engine, num_tokens=BATCH, batch_tokens=BATCH, precision="float64",
            encoder_scale=scale,
        )  # fmt: skip
        keys = {"initial_l0": K} if architecture == "jumprelu" else {"k": K}
        sae = ARCHITECTURES[architecture].Config.model_validate({"d_sae": D_SAE, **keys})
        t = SAETraining(sae, cfg, D_IN, Mesh.single(), CPU)
        t.init_b_dec(batch(0))
        made.append(t.sae)
    unit, scaled = made
    ratio = (scaled.W_enc / unit.W_enc).detach()
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    torch.testing.assert_close(scaled.W_dec, unit.W_dec)
    assert 0.1 < float(ratio[0, 0]) < 0.99, "unit rows of few dimensions overshoot"
    if architecture == "jumprelu":
        moved = scaled.state_dict()["threshold"] / unit.state_dict()["threshold"]
        torch.testing.assert_close(moved, ratio[:, 0])
    # The best scale of least squares: the error is orthogonal to the reconstruction.
    x = batch(0)
    found = scaled.main_codes(scaled.activate(scaled.candidates(x)))
    recon = scaled.combine(found).detach()
    error = x - scaled.b_dec.detach() - recon
    assert abs(float((error * recon).sum())) < 1e-9 * float(recon.square().sum())


def test_an_encoder_that_cannot_be_scaled_is_refused() -> None:
    cfg = FusedTrainConfig(num_tokens=9, encoder_scale="least_squares")
    for config, given, word in (
        (ReLUConfig(d_sae=D_SAE), cfg, "active above a threshold"),
        (JumpReLUConfig(d_sae=D_SAE, initial_threshold=0.1), cfg, "active above a threshold"),
        (TopKCrosscoderConfig(k=K, d_sae=D_SAE), cfg, "crosscoders such as"),
        (TopKConfig(k=K, d_sae=D_SAE), cfg.model_copy(update={"target": "y"}), "begins at zero"),
        (TopKConfig(k=K, d_sae=D_SAE), cfg.model_copy(update={"init_from": "x"}), "is given"),
    ):
        with pytest.raises(ConfigError, match=word):
            with_defaults(given, config, D_IN)


def test_b_dec_starts_at_the_geometric_median() -> None:
    t = training()
    x = batch(0)
    x[:5] += 1e4  # outliers, which move a mean
    t.init_b_dec(x)
    median = t.sae.b_dec.detach()
    assert float(median.norm()) < 1
    # At the geometric median the unit vectors towards the points cancel.
    pull = torch.nn.functional.normalize(x - median, dim=1).sum(dim=0)
    assert float(pull.norm()) < 1e-3 * BATCH


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "expected_norm"},
        {"subtract_mean": True},
        {"normalize": "unit_mean_square", "subtract_mean": True},
        {"normalize": "expected_norm", "subtract_mean": True},
    ],
)
def test_normalization_is_undone_in_what_is_written(engine: str, options: dict[str, Any]) -> None:
    """Training is that of rows that were normalised before; the SAE that is kept reads others."""
    t = training(engine=engine, **options)
    rows = [5 * batch(i) + torch.arange(D_IN) for i in range(6)]
    mean = rows[0].mean(0) if "subtract_mean" in options else torch.zeros(D_IN, dtype=torch.float64)
    centred = rows[0] - mean
    divisor = {
        "unit_mean_square": float(centred.square().mean().sqrt()),
        "expected_norm": float(centred.norm(dim=1).mean()) / D_IN**0.5,
    }.get(options.get("normalize", "none"), 1.0)
    timer = PhaseTimer(CPU, enabled=False)
    got = [tuple(map(float, t.step(x, timer))) for x in rows]
    other = training(engine=engine)
    want = [tuple(map(float, other.step((x - mean) / divisor, timer))) for x in rows]
    assert got == [pytest.approx(line, rel=1e-9, abs=1e-12) for line in want]
    kept = TopKSAE(D_IN, D_SAE, K, dtype=torch.float64)
    kept.load_state_dict(t.final_weights())
    x = rows[-1]
    expected = other.sae((x - mean) / divisor).recon * divisor + mean
    torch.testing.assert_close(kept(x).recon, expected)
    again = training(engine=engine, **options)
    again.load_state(t.state())
    assert again.normalization.unit(D_IN) == t.normalization.unit(D_IN)
    assert float(again.step(x, timer).fvu) == float(t.step(x, timer).fvu)


def test_a_mean_of_the_first_batch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    t = training(subtract_mean=True)
    x = batch(0)
    t.normalization.measure(x)
    norm = float(x.double().mean(0).norm())
    assert f"is taken from the first batch: its norm is {norm:.4g}" in caplog.text


def test_a_store_tells_the_mean() -> None:
    mean = torch.arange(float(D_IN))
    sae = TopKConfig(k=K, d_sae=D_SAE)
    cfg = FusedTrainConfig(num_tokens=9, subtract_mean=True)
    t = SAETraining(sae, cfg, D_IN, Mesh.single(), CPU, rms=10.0, mean=mean)
    assert torch.equal(t.normalization.mean, mean.double())
    assert t.normalization.unit(D_IN) == pytest.approx((100 - float(mean.square().mean())) ** 0.5)


OF_TRANSFORMERS = {
    "linear": ("linear", {}, {}),
    "cosine": ("cosine", {}, {}),
    "constant": ("constant_with_warmup", {}, {}),
    "inverse_sqrt": ("inverse_sqrt", {}, {}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}, {"schedule_cycles": 3}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr_rate": 0.2}, {"min_lr_rate": 0.2}),
}


@pytest.mark.parametrize("schedule", OF_TRANSFORMERS)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(schedule: str, warmup: int) -> None:
    """A step later: the first step has a learning rate here."""
    from transformers import get_scheduler

    name, their_keys, our_keys = OF_TRANSFORMERS[schedule]
    steps, optimizer = 40, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
        scheduler_specific_kwargs=their_keys,
    )  # fmt: skip
    want = []
    for _ in range(steps + 1):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    cfg = FusedTrainConfig(num_tokens=9, warmup_steps=warmup, schedule=schedule, **our_keys)
    got = [lr_at(step, steps, 2.0, cfg) for step in range(steps)]
    assert got[:warmup] == pytest.approx(want[1 : warmup + 1])
    assert got[warmup:] == pytest.approx(want[warmup:steps])


def test_a_schedule_refuses_keys_of_another() -> None:
    with pytest.raises(
        ValueError, match="train.decay_fraction=0.5 says nothing of train.schedule="
    ):
        FusedTrainConfig(num_tokens=9, schedule="cosine", decay_fraction=0.5)
