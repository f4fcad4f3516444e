"""Losses of the model with an SAE in it: gradients, positions, a run, what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from flash_sae_dist.activations.language_model import load_language_model
from flash_sae_dist.activations.token_batches import Sequences
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.data import ModelConfig, TextConfig
from flash_sae_dist.config.train import DeepSpeedTrainConfig, FusedTrainConfig
from flash_sae_dist.evaluation.loss_recovered import LossMeter
from flash_sae_dist.grid.runner import JobsFailedError, run_jobs
from flash_sae_dist.models.relu import ReLUConfig
from flash_sae_dist.models.saved import read_spec
from flash_sae_dist.models.topk import TopKConfig, TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engine import check_engine
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.member import Member
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.spliced import SplicedModel
from flash_sae_dist.training.step import SAETraining
from tests.tiny_model import config_data, held_out_table, save_bert, save_llama, save_text

CPU = torch.device("cpu")
LENGTH, SEQUENCES = 24, 4
HOOKPOINT = "model.layers.1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictions hang on its activations, and a text."""
    root = tmp_path_factory.mktemp("end")
    save_llama(root / "model", layers=3)
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    with torch.no_grad():
        for param in lm.model.parameters():
            param.mul_(8 if param.ndim == 2 else 1)
    lm.model.save_pretrained(root / "model")
    save_text(root / "text.jsonl", 200)
    return root


def data_in(root: Path, out: Path, **train: Any) -> dict[str, Any]:
    data = config_data(root) | {"output": str(out)}
    data["cache"] = {
        "hookpoints": [HOOKPOINT, "model.layers.0"], "context_length": LENGTH, "dtype": "float32",
        "batch_sequences": SEQUENCES,
    }  # fmt: skip
    data["sae"] = {"k": 4, "d_sae": 32}
    data["train"] |= {"hookpoint": HOOKPOINT, "source": "stream", "holdout": 0.1, "loss": "kl"}
    data["train"] |= {"batch_tokens": SEQUENCES * LENGTH, "num_tokens": 20 * SEQUENCES * LENGTH}
    data["train"] |= {"lr": 3e-3, "warmup_steps": 0} | train
    return {k: v for k, v in data.items() if k != "grid"}


def run(data: dict[str, Any], *, grid: bool = False) -> Path:
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=grid)
    return Path(data["output"])


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def packed() -> Tensor:
    """Sequences with padding, special tokens and held-out documents."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 54, (SEQUENCES, LENGTH), generator=g)
    attention = torch.arange(LENGTH) < torch.tensor([[24], [20], [24], [9]])
    keep = attention & (torch.arange(LENGTH) > 0)
    held = torch.zeros_like(keep)
    held[2, 12:] = True
    masks = (attention, keep & ~held, attention & ~held)
    return torch.cat([ids.int(), *(mask.int() for mask in masks)], dim=1)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_loss_and_gradient_are_those_of_a_plain_splice(
    root: Path, packed: Tensor, kind: Any
) -> None:
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    spliced, batch = SplicedModel(lm, HOOKPOINT, kind), Sequences.of(packed)
    rows = spliced.begin(packed)
    assert rows.shape == (int(batch.trained.sum()), 16)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    recon = (rows + 0.3 * noise).requires_grad_()
    loss = spliced.loss(recon)
    (grad,) = torch.autograd.grad(loss, recon)

    def plain(recon: Tensor) -> Tensor:
        """By a hook of its own over the model, token by token."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
        clean = lm.model(**inputs).logits

        def put(_: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new, at = hidden.clone(), 0
            for s in range(SEQUENCES):
                for t in range(LENGTH):
                    if batch.trained[s, t]:
                        new[s, t], at = recon[at], at + 1
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = lm.model.get_submodule(HOOKPOINT).register_forward_hook(put)
        logits = lm.model(**inputs).logits
        handle.remove()
        total, count = logits.new_zeros(()), 0
        for s in range(SEQUENCES):
            for t in range(LENGTH - 1):
                if batch.counted[s, t + 1]:
                    q, p = (z[s, t].log_softmax(0) for z in (logits, clean))
                    kl = (p.exp() * (p - q)).sum()
                    total = total + (kl if kind == "kl" else -q[batch.ids[s, t + 1]])
                    count += 1
        return total / count

    other = recon.detach().clone().requires_grad_()
    want = plain(other)
    (want_grad,) = torch.autograd.grad(want, other)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-3, atol=1e-6)
    # And by differences, along the gradient.
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        change = spliced.loss(recon + step) - spliced.loss(recon - step)
    assert float(change) == pytest.approx(2e-2 * float(grad.norm()), rel=0.02)
    assert all(param.grad is None for param in lm.model.parameters())


def test_other_positions_go_on_as_they_are(root: Path, packed: Tensor) -> None:
    """With the rows themselves in their place nothing changes."""
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    for kind in ("ce", "kl"):
        spliced, batch = SplicedModel(lm, HOOKPOINT, kind), Sequences.of(packed)
        found = float(spliced.loss(spliced.begin(packed)))
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
        logits, used = lm.model(**inputs).logits[:, :-1], batch.counted[:, 1:]
        clean = float(F.cross_entropy(logits[used], batch.ids[:, 1:][used]))
        assert found == pytest.approx(clean if kind == "ce" else 0.0, abs=1e-5)


def kl_of(root: Path, folder: Path) -> float:
    """Divergence with an SAE, as `evaluate` measures it, on documents that were not trained on."""
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    other = save_text(root / "other.jsonl", 30, seed=9)
    table = held_out_table(
        TextConfig(source="files", paths=(str(other),)), lm.tokenizer, context_length=LENGTH,
        causal=True, drop_special_tokens=True, after_documents=2, num_sequences=16,
    )  # fmt: skip
    return LossMeter(lm, HOOKPOINT, table, 8).measure(TopKSAE.load(folder / "sae")).kl_spliced


def begun_sae(root: Path, folder: Path) -> Path:
    """An SAE trained by fvu on rows of random words, as the text is."""
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    ids = torch.randint(4, 54, (128, LENGTH), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = 0
    whole = torch.ones_like(ids)
    kept = whole.index_fill(1, torch.tensor([0]), 0)
    packed = torch.cat([ids, whole, kept, whole], dim=1).int()
    rows = SplicedModel(lm, HOOKPOINT, "ce").begin(packed)
    cfg = FusedTrainConfig(num_tokens=200 * 184, batch_tokens=184, lr=5e-3, warmup_steps=0)
    t = SAETraining(TopKConfig(k=4, d_sae=32), cfg, 16, Mesh.single(), CPU, rms=1.0)
    for step in range(200):
        part = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:184]
        t.step(rows[part], PhaseTimer(CPU, enabled=False))
    t.sae.save(folder / "sae", t.final_weights())
    return folder


def test_fine_tuning_by_kl_lowers_what_evaluate_measures(root: Path, tmp_path: Path) -> None:
    """Beside as many steps of fvu from the same SAE on the same text."""
    begun, found = begun_sae(root, tmp_path / "begun"), {}
    batch = 2 * SEQUENCES * LENGTH
    keys: dict[str, Any] = {"num_tokens": 24 * batch, "batch_tokens": batch, "lr": 2e-3}
    keys |= {"log_every": 8, "checkpoint_every": 1000, "init_from": str(begun / "sae")}
    for loss in ("fvu", "kl"):
        more = {"buffer_tokens": 800} if loss == "fvu" else {}
        out = data_in(root, tmp_path / loss, loss=loss, **keys, **more)
        found[loss] = run(out) / HOOKPOINT
    told = lines(found["kl"])
    assert "model_loss" not in lines(found["fvu"])[0]
    assert all(0 < line["model_loss"] < 1 for line in told)
    before, by_fvu, by_kl = (kl_of(root, f) for f in (begun, found["fvu"], found["kl"]))
    assert by_kl < 0.98 * by_fvu, (before, by_fvu, by_kl)
    assert by_kl < 0.94 * before, (before, by_fvu, by_kl)
    assert read_spec(found["kl"] / "sae")["architecture"] == "topk"


def test_dense_steps_take_the_batch_whole(
    root: Path, packed: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of many active latents go by blocks of tokens, but the model reads whole sequences."""
    monkeypatch.setitem(density.BLOCK_ELEMENTS, "cpu", 32 * 10)
    lm = load_language_model(ModelConfig(name=str(root / "model"), dtype="float32"), CPU)
    cfg = FusedTrainConfig(num_tokens=900, batch_tokens=9, loss="kl", source="stream")
    spliced = SplicedModel(lm, HOOKPOINT, "kl")
    t = SAETraining(ReLUConfig(architecture="relu", d_sae=32), cfg, 16, Mesh.single(), CPU, rms=1.0)
    t.splice(spliced)
    for _ in range(2):
        t.step(packed, PhaseTimer(CPU, enabled=False))
    assert t.engine.density is not None
    assert t.engine.density.is_dense
    rows = spliced.begin(packed)
    assert len(rows) > 2 * t.engine.density.block
    with torch.no_grad():
        want = float(spliced.loss(t.sae(rows).recon))
    t.step(packed, PhaseTimer(CPU, enabled=False))
    assert t.engine.model_loss is not None
    assert float(t.engine.model_loss) == pytest.approx(want, rel=1e-5)


def test_a_run_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FVU beside it, rows that are divided and centred, in a grid over hookpoints."""
    options: dict[str, Any] = {"fvu_coef": 0.5, "normalize": "unit_mean_square", "loss": "ce"}
    options |= {
        "subtract_mean": True,
        "checkpoint_every": 8,
        "optimizer": "adamw",
        "num_tokens": 14 * SEQUENCES * LENGTH,
    }
    whole = run(data_in(root, tmp_path / "whole", **options) | {"grid": {}}, grid=True)
    step = Member.step

    def fails(self: Member, *args: Any) -> Any:
        if self.training.step_index == 11:
            raise RuntimeError("power lost")
        return step(self, *args)

    data = data_in(root, tmp_path / "cut", **options) | {"grid": {}}
    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", fails)
        with pytest.raises(JobsFailedError, match="power lost"):
            run(data, grid=True)
    cut = run(data, grid=True)
    files = sorted(p.relative_to(whole) for p in whole.rglob("sae.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    told = lines(whole / files[0].parents[1])
    assert told[-1]["model_loss"] < told[0]["model_loss"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": "store"}, "train.loss='kl' runs the model on whole texts; set train.source="),
        ({"fvu_coef": 1.0, "loss": "fvu"}, "train.fvu_coef=1.0 stands beside train.loss=ce or kl"),
        ({"micro_batches": 2}, "lower train.batch_tokens instead; drop train.micro_batches=2"),
        ({"target": "model.layers.1"}, "train.loss='kl' is of SAEs, not of transcoders"),
        ({"buffer_tokens": 600}, "mixes no rows.*drop train.buffer_tokens=600"),
        ({"batch_tokens": 100}, "train.batch_tokens=100 is no multiple of cache.context_length=24"),
        ({"engine": "fused"}, "train.engine='fused' needs the fused engine, but the gradient of"),
        ({"holdout": 0.9999999}, "the text gives no batch of 4 whole sequences"),
        ({"batch_tokens": 24 * 4096}, "the text gives no batch of 4096 whole sequences"),
    ],
)
def test_what_does_not_fit_is_refused(
    root: Path, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(data_in(root, tmp_path, **keys))


def test_batches_of_a_grid_are_whole_sequences(root: Path, tmp_path: Path) -> None:
    data = data_in(root, tmp_path) | {"grid": {"values": {"train.batch_tokens": [96, 100]}}}
    with pytest.raises(ConfigError, match="train.batch_tokens=100 is no multiple of cache.conte"):
        run(data, grid=True)


def test_shards_and_other_models_are_refused(root: Path, tmp_path: Path) -> None:
    cfg = FusedTrainConfig(num_tokens=9, loss="ce", source="stream")
    with pytest.raises(ConfigError, match="train.num_shards=2 x train.num_replicas=1 split it"):
        check_engine(cfg, Mesh(0, 1, 0, 1, 0, 2, None, None, None, None))
    with pytest.raises(ValueError, match="train.loss='ce' is not of train.engine='deepspeed'"):
        DeepSpeedTrainConfig(num_tokens=9, engine="deepspeed", loss="ce", source="stream")
    save_bert(tmp_path / "bert")
    data = data_in(root, tmp_path / "out")
    data["model"] = {"name": str(tmp_path / "bert"), "dtype": "float32"}
    with pytest.raises(ConfigError, match="train.loss='kl' is of what a causal language model"):
        run(data)
