"""Transcoders: trained from one hookpoint to another, written for rows as they are stored, through
the verbs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flash_sae_dist import interop
from flash_sae_dist.activations.aligned import AlignedLoaders
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import ENGINES, AutogradTrainConfig
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models import ARCHITECTURES, load_sae
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.defaults import with_defaults
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.engines.autograd import AutogradEngine
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.tiny_model import config_data, write_config

CPU = torch.device("cpu")
D_IN, D_OUT, D_SAE, BATCH = 6, 9, 40, 64
KEYS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "jumprelu": {"initial_threshold": 0.3, "bandwidth": 0.5},
    "matryoshka": {"k": 4, "prefix_widths": (10,)},
    "multi_topk": {"k": 4},
}
MAP = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs far from 0, and what a layer makes of them, in other units."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, D_IN, generator=g, dtype=torch.float64) * 4 + 2
    return x, 30 * torch.tanh(x @ MAP.T / 8) + 5


def training(name: str, skip: bool, engine: str = "fused", **options: Any) -> SAETraining:
    sae = ARCHITECTURES[name].Config(architecture=name, d_sae=D_SAE, skip=skip, **KEYS[name])
    cfg = ENGINES[engine](
        num_tokens=100 * BATCH, batch_tokens=BATCH, warmup_steps=3, lr=5e-3, engine=engine,
        precision="float64", target="mlp", dead_after_tokens=3 * BATCH, **options,
    )  # fmt: skip
    return SAETraining(sae, cfg, D_IN, Mesh.single(), CPU, d_out=D_OUT)


@pytest.mark.parametrize(
    ("name", "skip", "options"),
    [
        ("topk", False, {}),
        ("topk", True, {"micro_batches": 3, "grad_clip": 0.3}),
        ("batch_topk", True, {}),
        ("matryoshka", True, {"grad_clip": 0.3}),
        ("multi_topk", False, {"micro_batches": 2}),
        ("jumprelu", True, {"dense": True, "dead_latents": "auxk"}),
        ("jumprelu", True, {"grad_clip": 0.3, "micro_batches": 2}),
    ],
    ids=str,
)
def test_the_fused_engine_trains_as_autograd(
    name: str, skip: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other widths on both sides, b_dec that nothing subtracts, decoder rows of any norm; with dead
    latents from step 100 on.
    """
    shares = (0.0, 0.0) if options.pop("dense", False) else (2.0, 2.0)
    monkeypatch.setitem(density.SHARES, "cpu", shares)
    both = [training(name, skip, engine, **options) for engine in ("fused", "autograd")]
    assert [type(t.engine) for t in both] == [FusedEngine, AutogradEngine]
    timer = PhaseTimer(CPU, enabled=False)
    found = []
    for t in both:
        lines = [t.step(*[rows(n)[0], timer, rows(n)[1]]) for n in range(8)]
        # Some that never fire are listed and have gradients of their own.
        t.sae.b_enc.data[::5] = -50.0
        t.engine.refresh_()
        t.dead.tokens_since_fired[::5] = 10**6
        t.step_index = 100
        lines += [t.step(*[rows(n)[0], timer, rows(n)[1]]) for n in range(8, 12)]
        found.append([[float(m) for m in line] for line in lines])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-11)
    revives = name != "jumprelu" or "dead_latents" in options
    assert (found[0][-1][1] > 0) == revives
    for key, tensor in both[1].sae.state_dict().items():
        torch.testing.assert_close(both[0].sae.state_dict()[key], tensor, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(both[0].sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("options", [{}, {"subtract_mean": True, "normalize": "expected_norm"}])
def test_it_learns_and_is_written_for_rows_as_they_are(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    skip = name != "batch_topk"
    t = training(name, skip, grad_clip=1.0, **options)
    timer = PhaseTimer(CPU, enabled=False)
    fvus = []
    for step in range(60):
        x, y = rows(step)
        fvus.append(float(t.step(x, timer, y).fvu))
    assert fvus[-1] < 0.6 * fvus[0]
    x, y = rows(99)
    t.calibrate(lambda: [rows(98)[0]])
    weights = t.final_weights()
    t.sae.eval()
    assert t.target is not None
    inner = t.sae(t.normalization(x, torch.float64)).recon
    want = inner * t.target.divisor(D_OUT) + (0 if t.target.mean is None else t.target.mean)
    t.sae.save(tmp_path, {n: w.float() for n, w in weights.items()})
    loaded = load_sae(tmp_path)
    assert loaded.spec()["d_out"] == D_OUT
    assert loaded.spec()["skip"] == skip
    assert (loaded.W_skip is not None) == skip
    torch.testing.assert_close(loaded(x.float()).recon.double(), want, rtol=1e-3, atol=1e-2)
    again = training(name, skip, grad_clip=1.0, **options)
    again.load_state(t.state())
    t.sae.train()
    assert float(again.step(x, timer, y).fvu) == float(t.step(x, timer, y).fvu)


def test_what_makes_no_sense_is_refused() -> None:
    sae = ARCHITECTURES["topk"].Config(d_sae=8, k=2, skip=True)
    with pytest.raises(ConfigError, match="sae.skip=True is of transcoders alone"):
        with_defaults(AutogradTrainConfig(num_tokens=9, engine="autograd"), sae, 8)
    cfg = AutogradTrainConfig(
        num_tokens=9, engine="autograd", target="mlp", dead_latents="resample"
    )
    with pytest.raises(ConfigError, match="train.dead_latents='resample' takes directions of the"):
        with_defaults(cfg, sae, 8)


@pytest.mark.parametrize(
    ("sae", "told"),
    [
        ({"architecture": "relu"}, "sae.architecture='relu' penalises"),
        ({"architecture": "gated", "skip": True}, "sae.architecture='gated' penalises"),
        ({"architecture": "jumprelu", "sparsity": "tanh"}, "sae.sparsity='tanh' penalises"),
        ({"architecture": "jumprelu", "pre_act_coefficient": 3e-6}, "sae.pre_act_coefficient=3"),
    ],
    ids=str,
)
def test_a_penalty_of_activations_sizes_is_refused(sae: dict[str, Any], told: str) -> None:
    config = ARCHITECTURES[sae["architecture"]].Config(d_sae=8, **sae)
    train = AutogradTrainConfig(num_tokens=9, engine="autograd", target="mlp")
    with pytest.raises(ConfigError, match=f"{told}.* train.target='mlp' .*or drop train.target"):
        with_defaults(train, config, 8)
    if not config.skip:
        with_defaults(train.model_copy(update={"target": None}), config, 8)


def test_it_goes_through_the_verbs(tmp_path: Path) -> None:
    """From an MLP's input to its output; rows of both are of the same tokens."""
    data = config_data(tmp_path, hookpoints=["model.layers.1.mlp:input", "model.layers.1.mlp"])
    data["sae"] |= {"skip": True}
    data["train"] |= {"hookpoint": "model.layers.1.mlp:input", "target": "model.layers.1.mlp"}
    data["train"] |= {"num_tokens": 64 * 20}
    del data["grid"]
    config = str(write_config(tmp_path / "c.yaml", data))
    runner, app = CliRunner(), build()
    for verb in ("cache", "train", "evaluate"):
        result = runner.invoke(app, [verb, config])
        assert result.exit_code == 0, result.output[-3000:]
    (record,) = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert 0 < record["fvu"] < 1
    assert "loss" not in record
    result = runner.invoke(app, ["export", config])
    assert result.exit_code == 0, result.output[-3000:]
    assert (tmp_path / "run/export/sparsify").is_dir()
    assert not (tmp_path / "run/export/sae_lens").exists()
    result = runner.invoke(app, ["export", config, "export.formats=[sae_lens]"])
    assert result.exit_code == 2
    assert "is a transcoder of architecture 'topk', which SAELens cannot hold" in result.output
    result = runner.invoke(app, ["export", config, "export.formats=[sparsify]"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run/export/sparsify/train/model.layers.1.mlp:input"
    own = load_sae(tmp_path / "run/model.layers.1.mlp:input/sae")
    back, x = interop.load(folder), torch.randn(5, own.d_in)
    assert torch.equal(back(x).recon, own(x).recon)
    own.about = interop.About("model.layers.1.mlp:input", output_hookpoint="model.layers.1.mlp")
    own.save(tmp_path / "told")
    words = [config, f"SAE={tmp_path / 'told'}", "evaluate.rows=all", f"output={tmp_path / 'o'}"]
    result = runner.invoke(app, ["evaluate", *words])
    assert result.exit_code == 0, result.output
    (given,) = json.loads((tmp_path / "o/evaluation.json").read_text())
    assert given["fvu"] == pytest.approx(record["fvu"], rel=0.5)
    result = runner.invoke(app, ["evaluate", config, f"SAE={folder}", f"output={tmp_path / 'o'}"])
    assert result.exit_code == 2
    assert "is a transcoder whose file tells no hookpoint that it gives" in result.output
    result = runner.invoke(app, ["train", config, "train.target=model.layers.1.mpl", "output=x"])
    assert result.exit_code == 2
    assert "train.target='model.layers.1.mpl' is no hookpoint here; did you mean" in result.output
    store = ActivationStore.open(data["cache"]["store"])
    names = data["cache"]["hookpoints"]

    def loader(name: str, seed: int = 3) -> ActivationLoader:
        return ActivationLoader(store, name, batch_tokens=64, seed=seed, num_steps=4)

    found: list[torch.Tensor] = []
    with AlignedLoaders(loader, names) as both:
        pairs = list(both)
    for name in names:
        with loader(name) as one:
            found.append(torch.cat(list(one)))
    for side in (0, 1):
        assert torch.equal(torch.cat([pair[side] for pair in pairs]), found[side])
    layer = load_llama_mlp(tmp_path)
    torch.testing.assert_close(layer(pairs[2][0]), pairs[2][1], rtol=1e-3, atol=1e-4)


def load_llama_mlp(root: Path) -> Any:
    """The layer itself: what is read as its output is its output of what is read as its input."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root / "model").model.layers[1].mlp.float()
