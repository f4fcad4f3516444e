"""The verbs as Python functions: the examples of docs/api.md, what they return and refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from flash_sae_dist import TopKSAE, api
from flash_sae_dist.config.data import ModelConfig
from flash_sae_dist.config.train import FusedTrainConfig
from flash_sae_dist.models.batch_topk import BatchTopK
from flash_sae_dist.training.job import parse_config, plain_data
from flash_sae_dist.training.records import read_job
from tests.tiny_model import config_data, save_llama, save_text

# A tiny model's, in the place of the example's.
_SMALL = {
    '"HuggingFaceTB/SmolLM2-135M"': '"model", "dtype": "float32"',
    "model.layers.15": "model.layers.1",
    "model.layers.20": "model.layers.2",
    "2_000_000": "1500",
    "20_000_000": "3200",
    "512,": '24, "dtype": "float32",',
    "16_384": "64",
    '"k": 32': '"k": 4',
    "k=32": "k=4",
    "[16, 64]": "[2, 6]",
    '"num_tokens": 3200}': '"num_tokens": 3200, "batch_tokens": 64, "warmup_steps": 5, "lr": 1e-3}',
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the code of docs/api.md leaves behind, run block by block."""
    text = (Path(__file__).parents[1] / "docs/api.md").read_text()
    for was, now in _SMALL.items():
        assert was in text, was
        text = text.replace(was, now)
    root = tmp_path_factory.mktemp("api")
    save_llama(root / "model")
    save_text(root / "text.jsonl")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)
    return names | {"root": root}


def test_every_function_has_an_example() -> None:
    text = (Path(__file__).parents[1] / "docs/api.md").read_text()
    functions = {name for name in api.__all__ if name.islower()}
    assert functions == {name for name in functions if f"api.{name}(" in text}


def test_the_examples_cache_and_train(shown: dict[str, Any]) -> None:
    store, root = shown["store"], shown["root"]
    assert store.hookpoints == ["model.layers.1", "model.layers.2"]
    assert shown["rows"].dtype == torch.float32
    assert torch.equal(
        shown["rows"], torch.from_numpy(store.read("activations/model.layers.1", 0, 256))
    )
    trained, sae = shown["trained"], shown["sae"]
    assert trained.folder == Path("runs/notebook/model.layers.1")
    assert (sae.d_sae, sae.d_in, sae.config.k) == (64, 16, 4)
    assert shown["out"].recon.shape == (256, 16)
    last = trained._replace(folder=root / trained.folder).metrics()[-1]
    assert (last["tokens"], last["fvu"] < 1) == (3200, True)
    config = read_job(root / shown["other"].folder)
    assert config is not None
    assert isinstance(config.sae, BatchTopK.Config)
    assert config.train is not None
    assert (config.train.seed, config.train.batch_tokens) == (1, 64)


def test_the_examples_sweep_measure_and_look(shown: dict[str, Any]) -> None:
    root = shown["root"]
    assert [s.name for s in shown["saes"]] == ["model.layers.1/k=2", "model.layers.1/k=6"]
    assert (root / "runs/notebook/report.html").is_file()
    records = {r["job"]: r for r in shown["records"]}
    assert list(records) == ["model.layers.1", "model.layers.1/k=2", "model.layers.1/k=6"]
    assert records["model.layers.1/k=2"]["l0"] <= 2 < records["model.layers.1/k=6"]["l0"] <= 6
    for job, record in records.items():
        density = np.load(root / "runs/notebook" / job / "densities.npy")
        assert density.shape == (64,)
        assert density.sum() == pytest.approx(record["l0"], rel=1e-4)
        assert record["loss"]["tokens"] > 0
    found = api.FeatureFolder(root / shown["found"].folder)
    assert found.page.is_file()
    assert [latent["index"] for latent in found.latents()] == [0, 1, 2, 3]
    assert found.summary()["tokens"] == shown["store"].rows
    for latent in found.latents():
        for example in latent["examples"]:
            assert len(example["tokens"]) == len(example["values"])


def test_the_example_exports(shown: dict[str, Any]) -> None:
    saes = ["model.layers.1", "model.layers.1/k=2", "model.layers.1/k=6"]
    root, first = shown["root"], shown["again"]
    assert shown["written"].name == saes[-1]
    assert torch.equal(
        first.W_dec, shown["saes"][1]._replace(folder=root / shown["saes"][1].folder).load().W_dec
    )
    for name in saes:
        assert (root / "runs/notebook/export/sae_lens" / name / "cfg.json").is_file()
        assert (root / "runs/notebook/export/dictionary_learning" / name / "ae.pt").is_file()


def test_keywords_are_laid_over_a_config(tmp_path: Path) -> None:
    data = config_data(tmp_path)
    config = api.config_of(
        data,
        output=tmp_path / "elsewhere",
        model=ModelConfig(name="other"),
        sae={"k": 8},
        train=FusedTrainConfig(num_tokens=64, hookpoint="model.layers.0"),
        grid=None,
        trackers=("tensorboard",),
    )
    assert config.output == str(tmp_path / "elsewhere")
    assert config.model == ModelConfig(name="other"), "a model is the whole section"
    assert config.sae == TopKSAE.Config(d_sae=64, k=8), "a mapping leaves the other keys"
    assert config.train == FusedTrainConfig(num_tokens=64, hookpoint="model.layers.0")
    assert config.grid is None
    assert config.trackers == ("tensorboard",)
    assert data["sae"] == {"k": 4, "d_sae": 64}, "what is given is not changed"


def test_a_file_and_a_config_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: a\nsae: {d_sae: 8, k: 2}\n")
    config = api.config_of(file, sae={"k": 3})
    assert config == api.config_of(str(file), sae={"k": 3}) == api.config_of(config)
    assert config.sae == TopKSAE.Config(d_sae=8, k=3)


def test_the_keywords_are_the_keys_of_a_config() -> None:
    assert list(api.Keys.__annotations__) != []
    assert set(api.Keys.__annotations__) == set(api.Config.model_fields)


def test_plain_data_keep_what_chose_a_model_and_what_only_the_grid_has() -> None:
    config = api.Config(output="a", sae=BatchTopK.Config(d_sae=8, k=2))
    assert parse_config(plain_data(config)) == config
    data = {
        "output": "a",
        "sae": {"d_sae": 8, "k": 2, "threshold_decay": 0.5},
        "grid": {"values": {"sae.architecture": ["topk", "batch_topk"], "train.num_tokens": [64]}},
    }
    again = api.config_of(api.config_of(data), output="b")
    assert again._of_others == {"threshold_decay": 0.5}
    assert set(again._from_grid) == {"sae.architecture", "train.num_tokens"}
    with pytest.raises(api.ConfigError, match="missing: the grid has it for `grid` alone"):
        again.check_complete("train")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "config: key 'output' is missing"),
        ({"output": "a"}, "section 'model' is missing: `cache` needs it"),
        ({"output": "a", "sea": {}}, "unknown key 'sea' .*did you mean 'sae'"),
        ({"output": "a", "sae": {"d_sae": 8, "kk": 1}}, "unknown key 'sae.kk'"),
        ({"output": "a", "trackers": "wandb"}, "trackers='wandb' is of the wrong type"),
    ],
    ids=["output", "section", "keyword", "key", "type"],
)
def test_mistakes_are_told(keys: Any, told: str) -> None:
    with pytest.raises(api.ConfigError, match=told):
        api.cache(**keys)


def test_a_tracker_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError, match="'tensorbord' is no tracker; did you mean"):
        api.train(config_data(tmp_path), trackers=["tensorbord"])
    assert not (tmp_path / "run").exists()


def test_one_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(api.ConfigError, match="this is one of 2; start the verb"):
        api.evaluate(config_data(tmp_path))


def test_an_accelerator_of_other_settings_is_told(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(
            api.ConfigError, match="an Accelerator with other settings .*restart it"
        ):
            api.evaluate(config_data(tmp_path))
    finally:
        AcceleratorState._reset_state()


def test_what_is_finished_is_not_made_again(
    shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shown["root"])
    weights = shown["trained"].folder / "sae/sae.safetensors"
    before = weights.stat()
    assert api.train(shown["run"]) == shown["trained"]
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    store = shown["store"]
    again = api.cache(shown["run"])
    assert (again.rows, again.made_of()) == (store.rows, store.made_of())
