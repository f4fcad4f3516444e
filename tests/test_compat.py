"""Other libraries' scripts with one import line changed, and what stands behind those names.

`bash tests/peers/quick_starts.sh` runs the scripts on the libraries themselves, and writes what
they end at into tests/data/quick_starts.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from flash_sae_dist import interop
from flash_sae_dist.compat import dictionary_learning as dl
from flash_sae_dist.compat import sparsify as sp
from flash_sae_dist.compat.recipe import FusedTraining, Recipe, Watched
from tests.peers import speed
from tests.tiny_model import save_llama

ROOT = Path(__file__).parents[1]
ENDED_AT = json.loads((ROOT / "tests/data/quick_starts.json").read_text())
NAMES = {
    "dictionary_learning": (
        "AutoEncoderTopK, BatchTopKSAE, BatchTopKTrainer, MatryoshkaBatchTopKSAE, "
        "MatryoshkaBatchTopKTrainer, TopKTrainer, trainSAE"
    ),
    "sparsify": "SaeConfig, SparseCoder, TrainConfig, Trainer",
    "sae_lens": (
        "BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, LanguageModelSAERunnerConfig, "
        "LanguageModelSAETrainingRunner, LoggingConfig, MatryoshkaBatchTopKTrainingSAEConfig, "
        "TopKTrainingSAEConfig"
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), width=32)


def swapped(library: str) -> str:
    """The script of a library with its import line that of compat."""
    text = (ROOT / f"tests/peers/scripts/{library}_quick_start.py").read_text()
    pattern = rf"(from {library}[\w.]* import (\([^)]*\)|[^\n]*)\n)+"
    line = f"from flash_sae_dist.compat.{library} import {NAMES[library]}\n"
    new, count = re.subn(pattern, line, text)
    assert count == 1
    return new


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "options"),
    [
        ("dictionary_learning", []),
        ("dictionary_learning", ["batch_topk"]),
        ("dictionary_learning", ["matryoshka"]),
        ("sparsify", ["adam"]),
        ("sparsify", ["signum"]),
        ("sae_lens", []),
        ("sae_lens", ["batch_topk"]),
        ("sae_lens", ["matryoshka"]),
        ("sae_lens", ["jumprelu"]),
        ("sae_lens", ["jumprelu_quadratic"]),
    ],
)
def test_a_script_ends_where_its_library_does(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: str,
    options: list[str],
) -> None:
    if library == "sae_lens":
        pytest.importorskip("sae_lens")
    monkeypatch.setattr(sys, "argv", ["script", str(model), str(tmp_path / "out"), *options])
    exec(compile(swapped(library), f"{library}.py", "exec"), {"__name__": "__main__"})
    fvu = float(capsys.readouterr().out.split("FVU ")[-1])
    assert fvu == pytest.approx(ENDED_AT[" ".join([library, *options])], rel=0.01)
    # What it wrote is the library's format.
    names = ("ae.pt", "sae.safetensors", "sae_weights.safetensors")
    written = next(p for p in (tmp_path / "out").rglob("*") if p.name in names)
    assert interop.load(written.parent).d_sae == 256


@pytest.mark.slow
@pytest.mark.parametrize("library", ["dictionary_learning", "sparsify", "sae_lens"])
def test_the_scripts_are_timed(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/peers/speed.py, our half of it, on the CPU and small."""
    if library == "sae_lens":
        pytest.importorskip("sae_lens")
    for name, value in (("VOCABULARY", 64), ("LAYERS", 2), ("LAYER", 1), ("WARM", 2)):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "HOOKPOINT", "model.layers.1")
    shape = speed.Shape(tokens=256, d_in=24, d_sae=96, k=4)
    speed.save_model(tmp_path, shape)
    job = speed.Job(library, True, shape, 8, str(tmp_path), "cpu")
    found = {row["row"]: row for row in getattr(speed, library)(job)}
    assert len(found) == (2 if library == "sparsify" else 4)
    for name, row in found.items():
        assert ("forward" in row) == name.startswith("script")
        assert row["ms"] > 0
        # Nothing is trained to its end.
        assert 0 < row["fvu"] < 3
    theirs = {**row, "ms": 4 * row["ms"], "forward": 0.0}
    assert "| 4.00 |" in speed.shown(theirs, row | {"forward": 0.0})


def rows(count: int, seed: int = 0) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, 12, generator=generator)
    for _ in range(count):
        chosen = torch.rand(64, 24, generator=generator)
        yield (chosen * (chosen > 0.9)) @ directions + 0.3


def test_the_autoencoder_is_one_memory_under_two_names() -> None:
    ae = dl.AutoEncoderTopK(12, 40, 3)
    assert sorted(ae.state_dict()) == sorted(
        ["k", "threshold", "decoder.weight", "encoder.weight", "encoder.bias", "b_dec"]
    )
    assert len(list(ae.parameters())) == 4
    x = next(rows(1))
    with torch.no_grad():
        ae.sae.W_dec.mul_(1.5)
    acts = ae.encode(x)
    torch.testing.assert_close(ae.decode(acts), ae(x))
    torch.testing.assert_close(ae.decoder.weight.T, ae.sae.W_dec)
    recon, again = ae(x, output_features=True)
    assert torch.equal(again, acts)
    dense, values, indices, every = ae.encode(x, return_topk=True)
    assert torch.equal(dense, acts)
    torch.testing.assert_close(every.gather(1, indices.long()), values)
    ae.threshold.fill_(0.4)
    assert torch.equal(ae.encode(x, use_threshold=True), every * (every > 0.4))
    wide = ae.double()
    with torch.no_grad():
        wide.sae.W_dec.mul_(2)
    torch.testing.assert_close(wide.decoder.weight.T, wide.sae.W_dec)
    assert wide.sae.W_enc.dtype == torch.float64


def test_the_matryoshka_autoencoder_is_one_memory_under_two_names() -> None:
    ae = dl.MatryoshkaBatchTopKSAE(12, 40, 3, [10, 30])
    names = ["k", "threshold", "group_sizes", "W_enc", "b_enc", "W_dec", "b_dec"]
    assert sorted(ae.state_dict()) == sorted(names)
    wide, x = ae.double(), next(rows(1)).double()
    with torch.no_grad():
        wide.sae.W_enc.mul_(2)
        wide.threshold.fill_(0.5)
    assert torch.equal(wide.W_enc.T, wide.sae.W_enc)
    every = torch.relu((x - wide.b_dec) @ wide.W_enc + wide.b_enc)
    torch.testing.assert_close(wide(x), (every * (every > 0.5)) @ wide.W_dec + wide.b_dec)
    acts = wide.encode(x, use_threshold=False)
    assert (acts > 0).sum() == 3 * len(x), "over the batch"
    wide.active_groups = 1
    assert torch.equal(wide.encode(x, use_threshold=False)[:, :10], acts[:, :10])
    assert not wide.encode(x, use_threshold=False)[:, 10:].any()
    with pytest.raises(ValueError, match=r"group_sizes=\[10, 20\] must be positive and sum to 40"):
        dl.MatryoshkaBatchTopKSAE(12, 40, 3, [10, 20])


@pytest.mark.parametrize(
    "kind", [dl.TopKTrainer, dl.BatchTopKTrainer, dl.MatryoshkaBatchTopKTrainer]
)
def test_trainers_save_as_they_go(tmp_path: Path, kind: Any) -> None:
    config = {
        "trainer": kind, "steps": 30, "activation_dim": 12, "dict_size": 40, "k": 3,
        "layer": 1, "lm_name": "m", "warmup_steps": 2, "threshold_start_step": 5, "device": "cpu",
    }  # fmt: skip
    if kind is dl.MatryoshkaBatchTopKTrainer:
        config["group_fractions"] = [0.25, 0.75]
    (trainer,) = dl.trainSAE(
        rows(60), [config], 30, save_dir=str(tmp_path), save_steps=[10], backup_steps=20,
        normalize_activations=False, verbose=True, log_steps=10, device="cpu",
    )  # fmt: skip
    assert config["trainer"] is kind, "a caller's config is left alone"
    assert (tmp_path / "trainer_0/checkpoints/ae_10.pt").is_file()
    assert float(trainer.ae.threshold) > 0
    told = json.loads((tmp_path / "trainer_0/config.json").read_text())["trainer"]
    assert (told["trainer_class"], told["k"]) == (kind.__name__, 3)
    assert "lr" in trainer.optimizer.state_dict()["param_groups"][0]
    assert trainer.get_logging_parameters()["dead_features"] == 0
    back = interop.load(tmp_path / "trainer_0")
    assert torch.equal(back.W_dec, trainer.ae.sae.W_dec)
    x = next(rows(1, seed=5))
    torch.testing.assert_close(back(x).recon, trainer.ae(x), rtol=1e-5, atol=1e-5)
    found = trainer.loss(x, step=30, logging=True)
    assert (found.f > 0).sum() <= 3 * len(x)
    assert trainer.loss(x, step=30) == pytest.approx(found.losses["l2_loss"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", [dl.TopKTrainer, dl.BatchTopKTrainer, dl.MatryoshkaBatchTopKTrainer]
)
def test_trainers_on_a_gpu_end_as_on_the_cpu(kind: Any) -> None:
    losses, thresholds = [], []
    for device in ("cpu", "cuda"):
        config = {
            "trainer": kind, "steps": 60, "activation_dim": 12, "dict_size": 40, "k": 3,
            "layer": 1, "lm_name": "m", "warmup_steps": 2, "threshold_start_step": 5,
            "device": device, "lr": 3e-3, "seed": 0,
        }  # fmt: skip
        if kind is dl.MatryoshkaBatchTopKTrainer:
            config["group_fractions"] = [0.25, 0.75]
        (trainer,) = dl.trainSAE(rows(60), [config], 60, device=device)
        losses.append(float(trainer.loss(torch.cat(list(rows(8, seed=5))))))
        thresholds.append(float(trainer.ae.threshold))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.02)


@pytest.mark.gpu
def test_sparse_coders_on_a_gpu(model: Path, tmp_path: Path) -> None:
    """Schedule-free and in bfloat16; whatever precision products had, they have again."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(0, 54, (400, 32), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    found = []
    for device in ("cpu", "cuda"):
        cfg = sp.TrainConfig(
            sp.SaeConfig(num_latents=256, k=8), batch_size=8, layers=[1], lr=2e-3,
            log_to_wandb=False, save_dir=str(tmp_path / device),
        )  # fmt: skip
        trainer = sp.Trainer(cfg, data, lm.to(device))
        trainer.fit()
        (coder,), x = trainer.saes.values(), trainer._activations(ids[:8].to(device))["layers.1"]
        found.append(float(coder(x.float()).fvu))
    assert found[1] == pytest.approx(found[0], rel=0.03)
    assert torch.get_float32_matmul_precision() == "highest"


def test_scaled_rows_are_undone(tmp_path: Path) -> None:
    config = {
        "trainer": dl.TopKTrainer, "steps": 20, "activation_dim": 12, "dict_size": 40, "k": 3,
        "layer": 1, "lm_name": "m", "warmup_steps": 2, "seed": 0, "device": "cpu", "lr": 3e-3,
    }  # fmt: skip
    found = []
    for scale in (1.0, 50.0):
        data = [scale * batch for batch in rows(120)]
        (trainer,) = dl.trainSAE(iter(data), [config], 20, normalize_activations=True, device="cpu")
        found.append(trainer.ae(data[-1]) / scale)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_what_is_not_covered_is_refused_by_name() -> None:
    names = ("JumpReluTrainer", "GatedSAETrainer", "PAnnealTrainer", "AutoEncoder", "evaluate")
    for name in names:
        with pytest.raises(ImportError, match=f"{name} is not covered"):
            getattr(dl, name)
    with pytest.raises(AttributeError, match="no 'Nothing'"):
        dl.Nothing  # noqa: B018
    with pytest.raises(NotImplementedError, match="k_anneal_steps=5"):
        dl.TopKTrainer(9, 12, 40, 3, 1, "m", k_anneal_steps=5)
    with pytest.raises(NotImplementedError, match="use_wandb=True"):
        dl.trainSAE(rows(1), [], 1, use_wandb=True)
    for key, value in (("activation", "groupmax"), ("transcode", True), ("multi_topk", True)):
        with pytest.raises(NotImplementedError, match=f"{key}={value!r}"):
            sp.SaeConfig(**{key: value})
    for key, value in (("optimizer", "muon"), ("loss_fn", "kl"), ("k_decay_steps", 5)):
        with pytest.raises(NotImplementedError, match=f"{key}={value!r}"):
            sp.TrainConfig(sp.SaeConfig(), **{key: value})


def test_sparse_coders_read_and_write_the_librarys_files(tmp_path: Path) -> None:
    coder = sp.SparseCoder(12, sp.SaeConfig(num_latents=40, k=3))
    coder.save_to_disk(tmp_path / "layers.3")
    assert torch.equal(interop.load(tmp_path / "layers.3").W_enc, coder.encoder.weight)
    many = sp.SparseCoder.load_many(str(tmp_path), local=True)
    x = next(rows(1))[None]
    assert list(many) == ["layers.3"]
    out, again = coder(x), many["layers.3"](x)
    assert torch.equal(out.sae_out, again.sae_out)
    assert out.sae_out.shape == (1, 64, 12)
    top = coder.encode(x)
    torch.testing.assert_close(coder.decode(top.top_acts, top.top_indices), out.sae_out)
    out.fvu.backward()
    assert coder.encoder.weight.grad is not None
    assert isinstance(coder, nn.Module)


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_a_sparsify_run_goes_on(model: Path, tmp_path: Path, optimizer: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(0, 54, (48, 8), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")

    def config(name: str, **more: Any) -> sp.TrainConfig:
        return sp.TrainConfig(
            sp.SaeConfig(num_latents=64, k=4), batch_size=4, hookpoints=["layers.[01]"],
            optimizer=optimizer, lr=1e-3, lr_warmup_steps=2, log_to_wandb=False,
            save_dir=str(tmp_path), run_name=name, **more,
        )  # fmt: skip

    whole = sp.Trainer(config("whole"), data, lm)
    whole.fit()
    assert list(whole.saes) == ["layers.0", "layers.1"]
    # Stopped after half of its batches.
    first = sp.Trainer(config("half"), data, lm)
    first._batches = lambda: iter(ids.split(4)[:6])  # type: ignore[method-assign]
    first.fit()
    second = sp.Trainer(config("half"), data, lm)
    second.load_state(str(tmp_path / "half"))
    assert second.global_step == 6
    second.fit()
    for name, coder in whole.saes.items():
        torch.testing.assert_close(
            second.saes[name].encoder.weight, coder.encoder.weight, rtol=1e-4, atol=1e-6
        )


def test_tokens_are_left_out_of_a_sparsify_run(model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(0, 54, (8, 8), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    for excluded, kept in (([], 64), (list(range(20)), int((ids >= 20).sum()))):
        cfg = sp.TrainConfig(
            sp.SaeConfig(num_latents=64, k=4), batch_size=4, layers=[1], optimizer="adam",
            exclude_tokens=excluded, log_to_wandb=False, save_dir=str(tmp_path),
        )  # fmt: skip
        trainer = sp.Trainer(cfg, data, lm)
        trainer.fit()
        (stepper,) = trainer.steppers.values()
        assert isinstance(stepper, sp._Fused)
        assert stepper.training.tokens == kept


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """compat.sae_lens where SAELens is not installed."""
    import importlib.util

    real = importlib.util.find_spec
    name = "flash_sae_dist.compat.sae_lens"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "sae_lens" else real(n, *a)
    )
    before = sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)
    # The package has it as an attribute, too.
    vars(sys.modules["flash_sae_dist.compat"]).pop("sae_lens", None)
    if before is not None:
        sys.modules[name] = before


def sae_and_config(lens: Any, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=3))
    options = {"total_training_samples": 64 * 24, "train_batch_size_samples": 64, "lr": 3e-3}
    return sae, lens.SAETrainerConfig(**options | more)


def test_sae_lens_trainer_without_sae_lens(bare: Any, tmp_path: Path) -> None:
    sae, cfg = sae_and_config(bare, dead_feature_window=4, feature_sampling_window=10)
    start = float((next(rows(1)) - sae(next(rows(1)))).square().sum())
    trainer = bare.SAETrainer(cfg, sae, rows(1000))
    found = trainer.fit()
    assert found is sae
    assert float((next(rows(1)) - sae(next(rows(1)))).square().sum()) < 0.9 * start
    assert trainer.n_training_steps == 24
    assert 0 < float(trainer.feature_sparsity.sum()) <= 3
    assert trainer.dead_neurons.any(), "some did not fire for 4 steps"
    sae.save_inference_model(tmp_path)
    x = next(rows(1))
    torch.testing.assert_close(interop.load(tmp_path)(x).recon, sae(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ImportError, match="pip install sae-lens"):
        bare.LanguageModelSAETrainingRunner  # noqa: B018
    for name in ("GatedTrainingSAEConfig", "StandardTrainingSAEConfig"):
        with pytest.raises(ImportError, match="is not covered"):
            getattr(bare, name)
    with pytest.raises(ImportError, match="JumpReLUTrainingSAEConfig runs on SAELens itself"):
        bare.JumpReLUTrainingSAEConfig  # noqa: B018
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(NotImplementedError, match="normalize_activations='layer_norm'"):
        bare.SAETrainer(cfg, sae, rows(1))


def test_sae_lens_checkpoints_go_on(bare: Any, tmp_path: Path) -> None:
    data = list(rows(40))
    more = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path), "lr_warm_up_steps": 3}
    whole, cfg = sae_and_config(bare, **more)
    bare.SAETrainer(cfg, whole, iter(data)).fit()
    (folder,) = tmp_path.iterdir()
    steps = int(folder.name) // 64
    half, cfg = sae_and_config(bare)
    weights = interop.files.read_safetensors(folder / "sae_weights.safetensors")
    del weights
    trainer = bare.SAETrainer(cfg, half, iter(data[steps:]))
    trainer.load_trainer_state(folder)
    assert trainer.n_training_steps in (steps, steps - 1)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "expected_average_only_in"])
def test_sae_lens_batch_topk_ends_where_the_library_does(tmp_path: Path, norm: str) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens.training.sae_trainer import SAETrainer

    from flash_sae_dist.compat import sae_lens as lens

    found = []
    for trainer in (SAETrainer, lens.SAETrainer):
        torch.manual_seed(0)
        config = lens.BatchTopKTrainingSAEConfig(d_in=12, d_sae=40, k=3, normalize_activations=norm)
        sae = lens.BatchTopKTrainingSAE(config)
        total = {"total_training_samples": 64 * 150, "train_batch_size_samples": 64, "lr": 3e-3}
        options = {"logger": lens.LoggingConfig(log_to_wandb=False), "lr_end": 3e-4}
        cfg = lens.SAETrainerConfig(
            **total, **options, lr_scheduler_name="constant", lr_warm_up_steps=5,
            lr_decay_steps=20, n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999,
            device="cpu", autocast=False, dead_feature_window=1000, feature_sampling_window=500,
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            n_batches_for_norm_estimate=5,
        )  # fmt: skip
        ended = trainer(cfg=cfg, sae=sae, data_provider=rows(400)).fit()
        folder = tmp_path / trainer.__module__
        ended.save_inference_model(str(folder))
        x = torch.cat(list(rows(8, seed=9)))
        back = interop.load(folder)
        assert back.spec()["architecture"] == "jumprelu"
        error = float((back(x).recon - x).square().sum() / (x - x.mean(0)).square().sum())
        found.append((error, float(ended.topk_threshold), float((back.encode_dense(x) > 0).sum())))
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_what_sae_lens_options_are_not_covered() -> None:
    library = pytest.importorskip("sae_lens.llm_sae_training_runner")
    from flash_sae_dist.compat import sae_lens as lens

    assert lens.SAETrainingRunner is library.SAETrainingRunner
    assert library.SAETrainer is lens.SAETrainer, "whatever name the runner is asked for by"
    # All that SAELens trains by is one of ours, or refused: none is silently its own.
    for name in ("MultiSAETrainingRunner", "AbsTopKTrainingSAEConfig", "GatedTrainingSAE"):
        with pytest.raises(ImportError, match=f"{name} is not covered"):
            getattr(lens, name)
    cfg, width = sae_and_config(lens, logger=None)[1], {"d_in": 12, "d_sae": 40}
    matryoshka = {"k": 3, "matryoshka_widths": [10, 40], "use_matryoshka_aux_loss": True}
    for name, keys, told in (
        ("MatryoshkaBatchTopK", matryoshka, "use_matryoshka_aux_loss=True"),
        ("JumpReLU", {"jumprelu_sparsity_loss_mode": "tanh"}, "loss_mode='tanh'"),
        ("JumpReLU", {"pre_act_loss_coefficient": 3e-6}, "pre_act_loss_coefficient=3e-06"),
        ("JumpReLU", {"dtype": "float64"}, "dtype='float64'"),
    ):
        config = getattr(lens, f"{name}TrainingSAEConfig")(**width, **keys)
        sae = getattr(lens, f"{name}TrainingSAE")(config)
        with pytest.raises(NotImplementedError, match=told):
            lens.SAETrainer(cfg, sae, rows(1))


def test_a_recipe_is_dense_adam_on_the_summed_error() -> None:
    """The fused step beside autograd and torch.optim.Adam: unit rows left alone, norm clipped."""
    torch.manual_seed(0)
    sae, plain = (Watched(12, 40, 3) for _ in range(2))
    with torch.no_grad():
        for made in (sae, plain):
            made.W_dec.mul_(0.1)
            made.W_enc.mul_(0.1)
    for made in (sae, plain):
        made.watch(ranks_by_norm=True)
    training = FusedTraining(
        sae, Recipe(1e-2, "mse", grad_clip=0.5, unit_norm=False), torch.float32
    )
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for x in rows(12):
        loss = training.step(x).fvu
        # Selected as it does, differentiable.
        pre = (x - plain.b_dec) @ plain.W_enc.T + plain.b_enc
        top = (pre * plain.W_dec.norm(dim=1)).detach().topk(3, dim=1).indices
        acts = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top).relu())
        want = (x - acts @ plain.W_dec - plain.b_dec).square().sum(dim=1).mean()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-6)
        adam.zero_grad()
        want.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("streams", [False, True])
def test_tokens_of_a_sae_lens_store(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are read at once; what comes is what SAELens's own store gives."""
    theirs = pytest.importorskip("sae_lens.training.activations_store").ActivationsStore
    from flash_sae_dist.compat import sae_lens_store

    monkeypatch.setattr(sae_lens_store, "_ROWS_AT_ONCE", 4)
    texts = {"text": ["unused"] * 10, "tokens": torch.arange(120).view(10, 12).tolist()}
    data = Dataset.from_dict(texts)
    found = []
    for kind in (theirs, sae_lens_store.Store):
        store = object.__new__(kind)
        store.dataset = data.to_iterable_dataset() if streams else data
        store.tokens_column, store.context_size, store.is_dataset_tokenized = "tokens", 8, True
        store.n_dataset_processed, store.device, store.model = 0, "cpu", torch.nn.Linear(1, 1)
        store.iterable_sequences = store._iterate_tokenized_sequences()
        batches = [store.get_batch_tokens(3, move_to_model_device=False) for _ in range(5)]
        found.append((torch.cat(batches), store.n_dataset_processed))
    assert found[1][0].dtype == torch.long
    assert found[1][0].tolist() == found[0][0].tolist()
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_tokens_of_a_sparsify_run(model: Path, tmp_path: Path, form: str | None) -> None:
    ids = torch.arange(60).view(10, 6) % 50
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format(form)
    cfg = sp.TrainConfig(
        sp.SaeConfig(num_latents=16, k=2), batch_size=4, layers=[1], log_to_wandb=False,
        save_dir=str(tmp_path),
    )  # fmt: skip
    trainer = sp.Trainer(cfg, data, AutoModelForCausalLM.from_pretrained(model))
    assert torch.cat(list(trainer._batches())).tolist() == ids.tolist()
    data.set_transform(lambda rows: {"input_ids": [[1, 2]] * len(rows["input_ids"])})
    trainer.dataset = data
    assert torch.cat(list(trainer._batches())).tolist() == [[1, 2]] * 10, "a user's own form"


def test_sign_descent_begins_where_the_weights_are(model: Path, tmp_path: Path) -> None:
    """Also where they are set after the trainer was made."""
    data = Dataset.from_dict({"input_ids": (torch.arange(60).view(10, 6) % 50).tolist()})
    cfg = sp.TrainConfig(
        sp.SaeConfig(num_latents=16, k=2), batch_size=4, layers=[1], log_to_wandb=False,
        save_dir=str(tmp_path), lr=1e-9,
    )  # fmt: skip
    trainer = sp.Trainer(cfg, data, AutoModelForCausalLM.from_pretrained(model))
    (stepper,) = trainer.steppers.values()
    (coder,) = trainer.saes.values()
    with torch.no_grad():
        coder.encoder.weight.add_(3.0)
    want = coder.encoder.weight.clone()
    for _ in range(5):
        stepper.step(torch.randn(8, coder.d_in))
    torch.testing.assert_close(coder.encoder.weight, want, rtol=0, atol=1e-5)
