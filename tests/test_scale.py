"""Training does not depend on the scale of the data: x -> s x gives the same FVU, selections and
latents that never fired.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from flash_sae_dist.activations.store import ActivationStore, make_geometry
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.models.topk import TopKConfig, TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.checkpoint import TrainingState
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.records import Job
from flash_sae_dist.training.step import SAETraining
from flash_sae_dist.training.trainer import Trainer

CPU = torch.device("cpu")
D_IN, D_SAE, K, BATCH, STEPS = 16, 96, 4, 64, 140
# Powers of two scale floating-point numbers exactly, the others to rounding.
FACTORS = (2.0**-10, 1e-3, 1e3)


def data(rows: int = STEPS * BATCH) -> Tensor:
    """Sparse mixtures of directions off the origin, of root mean square 1."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(48, D_IN))
    codes = rng.exponential(size=(rows, 48)) * (rng.random((rows, 48)) < 4 / 48)
    x = torch.from_numpy(codes @ atoms + 0.5)
    return x / x.square().mean().sqrt()


class Outcome(NamedTuple):
    curve: Tensor  # [STEPS, 3] fvu, aux, l0
    fvu: float
    active: Tensor  # [N, D_SAE] bool
    never_fired: float


def outcome(sae: TopKSAE, x: Tensor, curve: Tensor) -> Outcome:
    with torch.no_grad():
        values, indices = codes = sae.encode(x)
        fvu = (sae.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum()
    active = torch.zeros(len(x), D_SAE).scatter_(1, indices.long(), (values > 0).float()).bool()
    return Outcome(curve, float(fvu), active, float((~active.any(0)).float().mean()))


def start(factor: float | None, **options: Any) -> SAETraining:
    cfg = ENGINES[options.get("engine", "auto")](
        num_tokens=STEPS * BATCH,
        batch_tokens=BATCH,
        lr=3e-3,
        warmup_steps=10,
        precision="float64",
        dead_after_tokens=BATCH,
        **options,
    )
    return SAETraining(TopKConfig(k=K, d_sae=D_SAE), cfg, D_IN, Mesh.single(), CPU, rms=factor)


def dead_from_the_start(training: SAETraining, factor: float) -> SAETraining:
    """The first latents' bias is so low that they seldom fire."""
    with torch.no_grad():
        training.sae.b_enc[:24] = -1.5 if training.cfg.normalize != "none" else -1.5 * factor
    return training


def steps(training: SAETraining, x: Tensor) -> Tensor:
    timer, curve = PhaseTimer(CPU, enabled=False), []
    while training.step_index < training.total_steps:
        at = training.step_index * BATCH
        curve.append(torch.stack(training.step(x[at : at + BATCH], timer)))
    return torch.stack(curve)


def finished(training: SAETraining) -> TopKSAE:
    sae = TopKSAE(D_IN, D_SAE, K, dtype=torch.float64)
    sae.load_state_dict(training.final_weights())
    return sae


def trained(factor: float, *, told: bool = True, **options: Any) -> Outcome:
    """An SAE of rows times factor; told: the root mean square comes from a store."""
    x = data() * factor
    training = dead_from_the_start(start(factor if told else None, **options), factor)
    curve = steps(training, x)
    return outcome(finished(training), x, curve)


def assert_same(got: Outcome, want: Outcome) -> None:
    torch.testing.assert_close(got.curve, want.curve, rtol=1e-6, atol=1e-9)
    assert got.fvu == pytest.approx(want.fvu, rel=1e-6)
    assert torch.equal(got.active, want.active)
    assert got.never_fired == want.never_fired


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "autograd"},
        {"grad_clip": 0.02, "micro_batches": 2},
        {"grad_clip": 0.02, "engine": "autograd"},
        {"dead_latents": "ghost"},
        {"dead_latents": "resample"},
        {"adam_eps": 1e-4},
        {"adam_eps": 1e-4, "engine": "autograd"},
        {"adam_mode": "lazy"},
        {"normalize": "unit_mean_square"},
        {"ema_decay": 0.99, "normalize": "unit_mean_square"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_a_factor_changes_nothing(options: dict[str, Any]) -> None:
    want = trained(1.0, **options)
    most = 0.65 if options.get("dead_latents") == "resample" else 0.6
    assert want.curve[-1, 0] < most * want.curve[0, 0]
    if options.get("dead_latents") != "resample":
        assert (want.curve[:, 1] > 0).any(), "dead latents must have had work"
    for factor in FACTORS:
        assert_same(trained(factor, **options), want)


def test_a_power_of_two_changes_no_bit() -> None:
    want, got = trained(1.0), trained(2.0**-10)
    assert torch.equal(got.curve, want.curve)


@pytest.mark.parametrize("normalize", ["none", "unit_mean_square"])
def test_without_statistics_the_first_batch_gives_the_unit(normalize: str) -> None:
    want = trained(1.0, told=False, normalize=normalize)
    for factor in FACTORS:
        assert_same(trained(factor, told=False, normalize=normalize), want)


def test_normalized_rows_train_as_raw_ones_do() -> None:
    want = trained(30.0)
    for engine in ("fused", "autograd"):
        assert_same(trained(30.0, engine=engine, normalize="unit_mean_square"), want)


def test_rows_of_nothing_but_zeros_have_no_unit() -> None:
    training = start(0.0)
    training.step(torch.zeros(BATCH, D_IN), PhaseTimer(CPU, enabled=False))
    assert training.is_finite()


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("normalize", ["none", "unit_mean_square"])
def test_a_resumed_run_keeps_its_unit(engine: str, normalize: str) -> None:
    x, whole = data() * 1e-2, start(None, engine=engine, normalize=normalize)
    timer = PhaseTimer(CPU, enabled=False)
    for i in range(50):
        whole.step(x[i * BATCH : (i + 1) * BATCH], timer)
    rows, rest, info = whole.state()
    copies = [{n: t.clone() for n, t in part.items()} for part in (rows, rest)]
    # Statistics that the store got meanwhile, say.
    again = start(0.5, engine=engine, normalize=normalize)
    again.load_state(TrainingState(copies[0], copies[1], info))
    assert torch.equal(steps(again, x), steps(whole, x))
    for name, weight in whole.final_weights().items():
        assert torch.equal(again.final_weights()[name], weight)


def store_of(path: Path, rows: Tensor) -> ActivationStore:
    geometry = make_geometry(len(rows), D_IN, 4, 128)
    writer = StoreWriter(str(path), {"model.name": "mine"}, create=True)
    writer.create(geometry, {"acts": D_IN}, "float32", {"config": {"model.name": "mine"}})
    for shard in range(geometry.num_shards):
        first, last = geometry.shard_range(shard)
        arrays = {"activations/acts": rows[first:last].float().numpy()}
        nothing = np.zeros(last - first, np.int32)
        arrays |= {f"tokens/{n}": nothing for n in ("ids", "document", "position")}
        writer.write_shard(geometry, shard, arrays)
    writer.finish(geometry, ["acts"], 1)
    return ActivationStore.open(str(path))


@pytest.mark.parametrize("normalize", ["none", "unit_mean_square"])
def test_float32_through_the_store(tmp_path: Path, normalize: str) -> None:
    """Rounding sets the runs apart, so figures are compared, not bits."""
    outcomes = []
    for factor in (1.0, 1e-3, 1e3):
        folder, x = tmp_path / f"{factor:g}", data() * factor
        store = store_of(folder / "store", x)
        assert store.root_mean_square("acts") == pytest.approx(factor, rel=1e-6)
        train = {"hookpoint": "acts", "num_tokens": STEPS * BATCH, "batch_tokens": BATCH}
        train |= {"lr": 3e-3, "warmup_steps": 10, "normalize": normalize}
        config = parse_config(
            {"output": str(folder / "run"), "sae": {"k": K, "d_sae": D_SAE}, "train": train}
        )
        job = Job("acts", folder / "run", config)
        Trainer([job], store, Mesh.single(), CPU, lambda *_: None, HostShare(1 << 30)).run()
        sae = TopKSAE.load(job.folder / "sae")
        outcomes.append(outcome(sae, x.float(), torch.empty(0)))
    for got in outcomes[1:]:
        assert got.fvu == pytest.approx(outcomes[0].fvu, rel=0.01)
        assert got.never_fired == pytest.approx(outcomes[0].never_fired, abs=0.01)
