"""Every preset parses, and its hookpoints are modules of the model it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from flash_sae_dist.activations.language_model import resolve_hookpoints
from flash_sae_dist.grid import plan
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.training.job import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
# The class and depth of each preset's model, small in every other way.
SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
KV: dict[str, Any] = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
PYTHIA = (transformers.GPTNeoXConfig, SMALL | {"num_hidden_layers": 6, "intermediate_size": 64})
ALIKE = (
    *("batch-topk", "matryoshka", "jumprelu", "gated", "relu", "multi-topk", "architectures"),
    *("topk-crosscoder", "batch-topk-crosscoder", "relu-crosscoder"),
)
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2-small": (transformers.GPT2Config, {"n_layer": 12, "n_embd": 32, "n_head": 2}),
    "pythia-70m": PYTHIA,
    **{f"pythia-70m-{name}": PYTHIA for name in ALIKE},
    "gemma-2-2b-grid": (transformers.Gemma2Config, KV | {"num_hidden_layers": 26}),
    "llama-3.1-8b-wide": (transformers.LlamaConfig, KV | {"num_hidden_layers": 32}),
    "quickstart": (transformers.LlamaConfig, KV | {"num_hidden_layers": 30}),
}


def test_presets_are_the_promised_ones() -> None:
    assert set(PRESETS) == set(MODELS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_parses_and_its_hookpoints_exist(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    kind, sizes = MODELS[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind(**sizes))
    assert config.cache is not None
    hookpoints = resolve_hookpoints(model, config.cache.hookpoints)
    assert len(hookpoints) >= len(config.cache.hookpoints)
    assert config.train is not None
    if config.train.hookpoint is not None and config.grid is None:
        assert plan.train_job(config, hookpoints).name == config.train.hookpoint
    if config.grid is not None:
        names = [job.name for job in plan.expand(config, hookpoints)]
        assert len(set(names)) == len(names) > 1


def test_every_architecture_has_a_preset() -> None:
    trained = set()
    for name in PRESETS:
        sae = load_config(CONFIGS / f"{name}.yaml").sae
        assert sae is not None
        trained.add(sae.architecture)
    assert trained == ARCHITECTURES.keys()


def test_a_grid_gives_each_architecture_its_own_keys() -> None:
    config = load_config(CONFIGS / "pythia-70m-architectures.yaml")
    names = [job.name.partition("/")[2] for job in plan.expand(config, ["gpt_neox.layers.3"])]
    assert names == [
        *(
            f"architecture={a},k={k}"
            for a in ("topk", "batch_topk", "matryoshka")
            for k in (20, 40, 80)
        ),
        "architecture=jumprelu",
        *(f"architecture={a},l1_coefficient={c}" for a in ("gated", "relu") for c in (2.5, 5.0)),
    ]


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    data = yaml.safe_load(path.read_text())
    assert read.num_processes == data["num_processes"]
    assert read.num_machines == data["num_machines"]
