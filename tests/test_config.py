"""Every mistake in a config ends in one sentence that names the key, the value and the nearest
right name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel

from flash_sae_dist.config.base import ConfigError, element_models, section_models
from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.config.train import (
    ENGINES,
    AutogradTrainConfig,
    DeepSpeedTrainConfig,
    FusedTrainConfig,
)
from flash_sae_dist.launch.cli import _keys
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.training.engine import choose_engine
from flash_sae_dist.training.job import Config, load_config, parse_config, with_values
from flash_sae_dist.training.records import read_job

GOOD: dict[str, Any] = {
    "output": "runs/x",
    "sae": {"k": 16, "d_sae": 1024},
    "train": {"num_tokens": 1000, "hookpoint": "layers.3"},
    "grid": {"values": {"sae.k": [16, 32], "train.lr": ["1e-4", 3e-4]}},
}
CACHE: dict[str, Any] = {"store": "x.zarr", "hookpoints": ["layers.3"], "num_tokens": 100}
MIXTURE: dict[str, Any] = {"source": "mixture", "mixture": [{"source": "pydoc"}]}
INF, NAN = float("inf"), float("nan")


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """GOOD with one key replaced."""
    section, _, name = dotted.partition(".")
    if not name:
        return GOOD | {section: value}
    return GOOD | {section: {**GOOD.get(section, {}), name: value}}


def test_good_config() -> None:
    config = parse_config(GOOD)
    assert config.sae is not None
    assert config.sae.k == 16
    assert config.grid is not None
    assert config.grid.values["train.lr"] == (1e-4, 3e-4), "YAML reads 1e-4 as a string"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("outptu", "x", ["outptu", "'x'", "'output'"]),
        ("train.lrr", 1, ["train.lrr", "1", "'train.lr'"]),
        ("train.batch_token", 5, ["train.batch_token", "5", "'train.batch_tokens'"]),
        ("train.num_tokens", "many", ["train.num_tokens", "'many'", "whole number"]),
        ("train.num_tokens", 5e3, ["train.num_tokens", "5000.0", "whole number"]),
        ("train.lr", "fast", ["train.lr", "'fast'", "write a number"]),
        ("sae.k", [16], ["sae.k=[16]", "whole number"]),
        ("sae", 3, ["sae=3", "section"]),
        ("trackers", "wandb", ["trackers='wandb'", "list, such as [a, b]"]),
        ("grid", {"values": {"sae.k": 16}}, ["grid.values.sae.k=16", "list"]),
        ("grid", {"values": 16}, ["grid.values=16", "`key: value`"]),
        ("output", "s3://bucket/run", ["output='s3://bucket/run'", "folder"]),
        ("export", {"directory": "s3://b/x"}, ["export.directory", "'s3://b/x'"]),
        ("train.num_tokens", 0, ["train.num_tokens", "0", "greater than 0"]),
        ("train.num_tokens", True, ["train.num_tokens", "True"]),
        ("train.precision", "bf16", ["train.precision", "'bf16'", "'bfloat16'"]),
        ("train.adam_mode", "lazzy", ["'lazzy'", "'lazy'"]),
        ("train.engine", "fast", ["train.engine='fast' is not a choice"]),
        ("train.engine", "autograde", ["train.engine='autograde'", "'autograd'"]),
        ("train.engine", 3, ["train.engine=3", "autograd"]),
        ("train.step", "plain", ["train.step=plain is now train.engine=autograd"]),
        ("train.step", "fused", ["train.step=fused is train.engine=fused"]),
        ("grid", {"values": {"train.step": ["plain"]}}, ["train.step=plain is now train.engine"]),
        (
            "train",
            {"num_tokens": 9, "engine": "autograd", "adam_mode": "lazy"},
            ["train.adam_mode='lazy' needs train.engine=auto or fused"],
        ),
        (
            "train",
            {"num_tokens": 9, "engine": "autograd", "dead_latents": "ghost"},
            ["train.dead_latents='ghost' needs the fused engine"],
        ),
        (
            "train",
            {"num_tokens": 9, "engine": "deepspeed", "dead_latents": "ghost"},
            ["needs the fused engine, not train.engine='deepspeed'"],
        ),
        (
            "train",
            {"num_tokens": 9, "engine": "deepspeed", "moment_dtype": "bfloat16"},
            ["train.moment_dtype='bfloat16' needs train.engine=auto or fused"],
        ),
        (
            "train",
            {"num_tokens": 9, "engine": "deepspeed", "precision": "float64"},
            ["train.precision='float64'", "set train.precision=float32"],
        ),
        ("train.deepspeed_config", "x.json", ["needs train.engine=deepspeed"]),
        ("train", {"num_tokens": 9, "engine": "autograd", "lrr": 1}, ["'train.lrr'", "'train.lr'"]),
        ("sae.architecture", "topkk", ["sae.architecture='topkk'", "'topk'"]),
        ("sae.architecture", ["topk"], ["sae.architecture=['topk'] is not a choice"]),
        ("sae.kk", 3, ["unknown key 'sae.kk'", "'sae.k'"]),
        ("sae", {"k": 9, "d_sae": 8}, ["sae.k=9", "sae.d_sae=8", "lower k"]),
        ("sae", {"k": 9}, ["sae.d_sae", "sae.expansion_factor"]),
        ("sae", {"k": 9, "d_sae": 64, "expansion_factor": 8}, ["sae.d_sae", "64", "8"]),
        ("grid", {"values": {"sae.kk": [1]}}, ["grid.values", "'sae.kk'", "'sae.k'"]),
        ("grid", {"values": {"train.num_shards": [1, 2]}}, ["'train.num_shards'"]),
        ("grid", {"values": {"sae.k": []}}, ["grid.values", "'sae.k'", "at least one"]),
        ("grid", {"values": {"sae.k": [2, 4, 2]}}, ["grid.values: 'sae.k' holds 2 twice"]),
        ("grid", {"values": {"train.lr": [0.001, "1e-3"]}}, ["'train.lr' holds 0.001 twice"]),
        ("grid", {"points": [{"sae.kk": 1}]}, ["grid.points", "'sae.kk'", "'sae.k'"]),
        ("grid", {"points": [{"sae.k": 1}, {"train.lr": 1}]}, ["lacks 'train.lr'"]),
        (
            "grid",
            {"values": {"sae.k": [1]}, "points": [{"sae.k": 2}]},
            ["grid.points and grid.values both have 'sae.k'"],
        ),
        (
            "grid",
            {"overrides": {"layers.0": {"sae.kk": 1}}},
            ["grid.overrides.layers.0", "'sae.k'"],
        ),
        ("grid", {"overrides": {"layers.0": 1}}, ["grid.overrides.layers.0=1"]),
        (
            "grid",
            {"values": {"sae.k": [1]}, "exclude": [{"train.lr": 1}]},
            ["grid.exclude has no use for key 'train.lr'"],
        ),
        ("grid", {"hookpoints": []}, ["grid.hookpoints=[] is empty", "at least one"]),
        ("train.num_shards", "all", ["train.num_shards='all'", "greater than 0, or auto"]),
        ("train.num_shards", 0, ["train.num_shards=0", "greater than 0, or auto"]),
        ("train.num_shards", True, ["train.num_shards=True"]),
        ("train.adam_betas", [2.0, 0.9], ["train.adam_betas.0=2.0", "less than 1"]),
        ("train.adam_betas", [0.9, 1.0], ["train.adam_betas.1=1.0", "less than 1"]),
        ("train.adam_betas", [-1.0, 0.9], ["train.adam_betas.0=-1.0", "or equal to 0"]),
        ("train.adam_betas", [NAN, NAN], ["train.adam_betas.0=nan", "finite"]),
        ("train.adam_betas", [0.9], ["train.adam_betas=[0.9] is too short; write 2 values"]),
        ("train.adam_eps", INF, ["train.adam_eps=inf", "finite"]),
        ("train.lr", INF, ["train.lr=inf", "finite"]),
        ("train.lr", "1e999", ["train.lr=inf", "finite"]),
        ("train.aux_coef", NAN, ["train.aux_coef=nan", "finite"]),
        ("train.grad_clip", INF, ["train.grad_clip=inf", "finite"]),
        ("train.seed", -1, ["train.seed=-1", "or equal to 0"]),
        ("train.seed", 10**23, ["train.seed=1000", "64 bits"]),
        ("train.dead_after_tokens", 10**23, ["train.dead_after_tokens=1000", "64 bits"]),
        ("sae", {"k": 9, "d_sae": 10**21}, ["sae.d_sae=1000", "64 bits"]),
        ("sae", {"k": 9, "d_sae": 10**11}, ["sae.d_sae=100000000000", "less than 2147483648"]),
        ("sae", {"k": 9, "expansion_factor": INF}, ["sae.expansion_factor=inf", "finite"]),
        ("cache", CACHE | {"seed": -1}, ["cache.seed=-1", "or equal to 0"]),
        ("cache", CACHE | {"shard_mib": INF}, ["cache.shard_mib=inf", "finite"]),
        ("cache", CACHE | {"store": ""}, ["cache.store='' is empty", "path"]),
        ("output", "", ["output='' is empty", "path"]),
        ("store", "", ["store='' is empty", "path"]),
        ("export", {"directory": ""}, ["export.directory='' is empty", "path"]),
        ("model", {"name": ""}, ["model.name='' is empty", "name"]),
        ("text", {"source": "hub", "name": ""}, ["text.name='' is empty", "name"]),
        ("evaluate", 3, ["evaluate", "3"]),
        ("text", {"source": "hub"}, ["text.name", "'hub'"]),
        ("text", {"source": "files"}, ["text.paths", "'files'"]),
        ("text", {"source": "web"}, ["text.source", "'web'"]),
        ("text", {"source": "pydoc", "tokens_column": "x"}, ["text.tokens_column", "drop it"]),
        (
            "text",
            {"source": "hub", "name": "x", "tokens_column": "x", "messages_column": "y"},
            ["text.tokens_column and text.messages_column both name what is read"],
        ),
        ("text", {"source": "mixture"}, ["text.mixture is empty", "{source: pydoc}"]),
        ("text", {"source": "pydoc", "mixture": [{"source": "pydoc"}]}, ["source=mixture"]),
        ("text", MIXTURE | {"column": "x"}, ["text.column says nothing of a mixture"]),
        ("text", MIXTURE | {"mixture": [{"source": "hub"}]}, ["text.mixture: name is missing"]),
        ("text", MIXTURE | {"mixture": [MIXTURE]}, ["unknown key 'text.mixture.0.mixture'"]),
        ("text", MIXTURE | {"mixture": [{"source": "mixture"}]}, ["cannot be a mixture itself"]),
        ("text", MIXTURE | {"mixture": [3]}, ["text.mixture.0=3", "section"]),
        ("text", MIXTURE | {"mixture": {"source": "pydoc"}}, ["text.mixture=", "list"]),
        ("text", MIXTURE | {"mixture": [{}]}, ["'text.mixture.0.source' is missing"]),
        (
            "text",
            MIXTURE | {"mixture": [{"source": "pydoc", "wieght": 2}]},
            ["'text.mixture.0.wieght'", "'text.mixture.0.weight'"],
        ),
        (
            "text",
            MIXTURE | {"mixture": [{"source": "pydoc", "weight": 0}]},
            ["text.mixture.0.weight=0", "greater than 0"],
        ),
        ("model", {"name": "x", "quantization": "4"}, ["model.quantization='4'", "4bit"]),
        ("model", {"name": "x", "adapter": ""}, ["model.adapter='' is empty"]),
        ("model", {"name": "x", "device_map": "atuo"}, ["model.device_map='atuo'", "balanced"]),
        ("model", {"name": "x", "device_map": {}}, ["model.device_map={} is no placement"]),
        ("model", {"name": "x", "device_map": {"a": 1.5}}, ["model.device_map={'a': 1.5}"]),
    ],
)
def test_bad_value(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config(changed(key, value))
    text = str(e.value)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word} is not in: {text}"


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    config = load_config(file, ["sae.k=4", "train.lr=1e-3", "grid.values.sae.d_sae=[64, 128]"])
    assert config.sae is not None
    assert config.train is not None
    assert config.grid is not None
    assert (config.sae.k, config.train.lr) == (4, 1e-3)
    assert config.grid.values["sae.d_sae"] == (64, 128)


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    """A commit may be digits with an e among them; only a float's key reads it as a number."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    config = load_config(file, ["model.name=gpt2", "model.revision='7e12345'", "train.lr='1e-4'"])
    assert config.model is not None
    assert config.train is not None
    assert (config.model.revision, config.train.lr) == ("7e12345", 1e-4)
    with pytest.raises(ConfigError, match=r"train\.num_tokens='1e6' is of the wrong type"):
        load_config(file, ["train.num_tokens=1e6"])


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the name `~` would be made below the working folder."""
    monkeypatch.setenv("HOME", "/home/me")
    data = GOOD | {"output": "~/runs", "store": "~/a.zarr", "export": {"directory": "~/out"}}
    config = parse_config(data | {"cache": CACHE | {"store": "~/b.zarr"}})
    assert config.cache is not None
    assert (config.output, config.store) == ("/home/me/runs", "/home/me/a.zarr")
    assert (config.export.directory, config.cache.store) == ("/home/me/out", "/home/me/b.zarr")
    assert parse_config(data | {"store": "s3://b/~/a.zarr"}).store == "s3://b/~/a.zarr"


def test_a_width_beyond_32_bits_is_told() -> None:
    sae = parse_config(GOOD | {"sae": {"k": 4, "expansion_factor": 2**28}}).sae
    assert sae is not None
    assert sae.width(4) == 2**30
    with pytest.raises(ConfigError, match=r"sae\.expansion_factor=268435456.0 gives 4294967296"):
        sae.width(16)


@pytest.mark.parametrize(
    ("override", "word"),
    [("sae.k", "key=value"), ("=3", "key=value"), ("output.x=1", "'output'"), ("sae.q=1", "sae.q")],
)
def test_bad_override(tmp_path: Path, override: str, word: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError, match=word):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[1, 2]", "sections"),
        ("", "is empty"),
        ("a: [", "YAML"),
        ("!!python/name:os.system", "YAML"),
        ("output: a\nsae: {k: 1}\noutput: b", r"'output' stands there twice \(line 3\)"),
        ("sae:\n  k: 1\n  k: 2", r"'k' stands there twice"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_bad_file(tmp_path: Path, text: str | bytes, word: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=word) as e:
        load_config(file)
    assert "\n" not in str(e.value)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("output: x")
    with pytest.raises(ConfigError, match=r"is a folder, not a file.*quickstart\.yaml"):
        load_config(tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("output: x")
    with pytest.raises(ConfigError, match=r"quickstart\.yaml"):
        load_config(tmp_path / "quickstar.yaml")


def test_with_values_checks_the_combination() -> None:
    config = parse_config(GOOD)
    assert with_values(config, {"sae.k": 8}).sae == config.sae.model_copy(update={"k": 8})  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"sae\.k=2000"):
        with_values(config, {"sae.k": 2000})


def test_every_field_is_documented_and_read() -> None:
    root = Path(__file__).parents[1]
    sources = {
        p: p.read_text()
        for folder in ("flash_sae_dist", "launch")
        for p in (root / folder).rglob("*.py")
    }

    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            for section in (sections := section_models(model, name)):
                walk(section)
            if sections:
                continue
            for section in element_models(model, name):
                walk(section)
            assert field.description, f"{model.__name__}.{name} has no docstring"
            readers = sum(f".{name}" in text for text in sources.values())
            assert readers, f"nothing reads {model.__name__}.{name}"

    walk(Config)


FIELDS = {
    "": "output store trackers",
    "model": (
        "name revision gguf_file task dtype adapter quantization device_map trust_remote_code"
    ),
    "text": (
        "source name subset revision split column tokens_column messages_column paths streaming "
        "mixture"
    ),
    "cache": (
        "store hookpoints num_tokens context_length batch_sequences drop_special_tokens "
        "skip_first_tokens max_norm_ratio shard_mib memory_gib dtype seed"
    ),
    "sae": (
        "architecture d_sae expansion_factor input_norm skip k search threshold_decay "
        "threshold_start prefix_widths prefix_losses sparsity sparsity_coefficient sparsity_warmup "
        "target_l0 tanh_scale bandwidth initial_threshold initial_l0 ste_to_input "
        "pre_act_coefficient l1_coefficient decoder_norms"
    ),
    "train": (
        "hookpoint target source loss fvu_coef buffer_tokens num_tokens batch_tokens optimizer "
        "weight_decay lr lr_rule schedule schedule_cycles min_lr_rate warmup_steps decay_fraction "
        "adam_betas adam_eps normalize subtract_mean engine grad_clip micro_batches "
        "dead_latents aux_coef k_aux dead_after_tokens precision num_shards num_replicas "
        "encoder_scale init_from seed holdout preload log_every checkpoint_every "
        "checkpoint_minutes keep_checkpoints rendezvous_timeout_s heartbeat_s adam_mode "
        "moment_dtype ema_decay deepspeed_config"
    ),
    "grid": "hookpoints values points exclude overrides",
    "evaluate": "rows saes hookpoint k num_tokens batch_tokens loss_sequences",
    "features": (
        "saes latents num_tokens batch_tokens top_examples quantile_examples context_tokens "
        "output_tokens nearest"
    ),
    "export": "formats directory",
    "store_cache": "folder gib",
}


def test_the_set_of_keys_is_frozen() -> None:
    """A new key is added on purpose, here too; each one is a promise to users."""
    found: dict[str, list[str]] = {}
    for key in _keys(Config):
        if not key.section:
            section, _, name = key.name.rpartition(".")
            found.setdefault(section, []).append(name)
    assert {section: " ".join(names) for section, names in found.items()} == FIELDS


def test_exponents_in_lists_are_numbers() -> None:
    config = parse_config(changed("train.adam_betas", ["9e-1", 0.999]))
    assert config.train is not None
    assert config.train.adam_betas == (0.9, 0.999)
    grid = parse_config(changed("grid", {"values": {"train.adam_betas": [[0.5, "9e-1"]]}})).grid
    assert grid is not None
    assert grid.values == {"train.adam_betas": ((0.5, 0.9),)}


def test_autograd_has_the_keys_of_every_engine_alone() -> None:
    config = parse_config(changed("train.engine", "autograd"))
    assert type(config.train) is AutogradTrainConfig
    assert type(parse_config(changed("train.engine", "deepspeed")).train) is DeepSpeedTrainConfig
    assert type(parse_config(GOOD).train) is FusedTrainConfig


@pytest.mark.parametrize("engine", ["auto", "fused", "autograd", "deepspeed"])
def test_every_engine_clips_adds_up_and_replicates(engine: str) -> None:
    options = {"grad_clip": 1.0, "micro_batches": 2, "num_replicas": 2, "dead_latents": "auxk"}
    data = {"num_tokens": 9, "engine": engine, **options}
    assert parse_config(GOOD | {"train": data}).train is not None


def test_an_old_jobs_step_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(changed("train.step", "plain")))
    with pytest.raises(ConfigError, match=r"job\.yaml: train\.step is gone: .*engine=autograd"):
        read_job(tmp_path)


class ToyConfig(SAEConfig):
    """Keys of a toy architecture."""

    architecture: Literal["toy"] = "toy"
    """toy: a test's."""
    sparsity: float
    """A key of its own."""


class Toy:
    """An architecture that nothing else knows."""

    Config = ToyConfig


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", Toy)


@pytest.mark.usefixtures("toy")
def test_a_registered_architecture_is_in_configs_at_once() -> None:
    data = GOOD | {"sae": {"architecture": "toy", "d_sae": 64, "sparsity": "1e-3"}}
    data["grid"] = {"values": {"sae.sparsity": ["1e-4", 0.5], "train.engine": ["auto"]}}
    config = parse_config(data)
    assert type(config.sae) is ToyConfig
    assert config.sae.sparsity == 1e-3
    assert config.grid is not None
    assert config.grid.values["sae.sparsity"] == (1e-4, 0.5)
    changed_one = with_values(config, {"sae.sparsity": 0.5}).sae
    assert changed_one == config.sae.model_copy(update={"sparsity": 0.5})
    assert "sae.sparsity" in [key.name for key in _keys(Config)]
    # job.yaml keeps the architecture's own keys.
    again = parse_config(config.model_dump(mode="json", exclude_unset=True))
    assert again == config


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("sae", "words"),
    [
        ({"architecture": "toi"}, ["sae.architecture='toi'", "'toy'"]),
        ({"architecture": "toy", "k": 3}, ["sae.k=3 needs sae.architecture=topk"]),
        ({"architecture": "toy", "sparsty": 3}, ["unknown key 'sae.sparsty'", "'sae.sparsity'"]),
        ({"architecture": "toy"}, ["'sae.sparsity' is missing"]),
        ({"sparsity": 0.1, "k": 3}, ["sae.sparsity=0.1 needs sae.architecture=jumprelu or toy"]),
    ],
)
def test_an_architecture_refuses_the_keys_of_others(sae: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config(GOOD | {"sae": {"d_sae": 64, **sae}})
    for word in words:
        assert word in str(e.value), f"{word} is not in: {e.value}"


@pytest.mark.parametrize(
    ("options", "architecture", "engine"),
    [
        ({}, "topk", "fused"),
        ({"engine": "fused", "adam_mode": "lazy"}, "topk", "fused"),
        ({"engine": "autograd"}, "topk", "autograd"),
        ({}, "gated", "fused"),
        ({}, "relu_crosscoder", "autograd"),
        (
            {"engine": "fused"},
            "relu_crosscoder",
            "train.engine='fused' needs the fused engine, but",
        ),
        ({"ema_decay": 0.9}, "relu_crosscoder", "train.ema_decay=0.9 needs the fused engine"),
        (
            {"dead_latents": "ghost"},
            "relu_crosscoder",
            "train.dead_latents='ghost' needs the fused engine",
        ),
    ],
)
def test_the_engine_is_chosen_in_one_place(
    options: dict[str, Any], architecture: str, engine: str
) -> None:
    cfg = ENGINES[options.get("engine", "auto")](num_tokens=9, **options)
    own = {"k": 4} if architecture == "topk" else {}
    sae = ARCHITECTURES[architecture].Config(architecture=architecture, d_sae=64, **own)
    if engine in ENGINES:
        choice = choose_engine(cfg, sae)
        assert choice.engine == engine
        assert (choice.reason is not None) == (engine == "autograd" and not options)
    else:
        with pytest.raises(ConfigError, match=engine):
            choose_engine(cfg, sae)
