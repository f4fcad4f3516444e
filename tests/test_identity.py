"""What lies at a path decides, not the path: the same content goes on, other content is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from flash_sae_dist import TopKSAE, identity
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.origin import model_parts
from flash_sae_dist.activations.store import ActivationStore, make_geometry
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError, UserError, section_models
from flash_sae_dist.config.data import ModelConfig
from flash_sae_dist.config.train import TrainConfig
from flash_sae_dist.evaluation.finished import finished_saes
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.files import read_json, write_json
from flash_sae_dist.grid.plan import jobs_of
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.models.jumprelu import JumpReLUConfig
from flash_sae_dist.training import made_of, member, optim
from flash_sae_dist.training.job import Config, parse_config, with_values
from flash_sae_dist.training.optim import budget_lr, default_lr
from flash_sae_dist.training.records import DamagedRecordError, Job
from flash_sae_dist.training.trainer import Trainer
from tests.tiny_model import config_data, save_llama, save_text

CPU = torch.device("cpu")
JOB = "model.layers.0"
STEPS = 20


class Killed(BaseException):
    """Stands for a kill -9 between two steps."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def data_in(root: Path, **train: Any) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    data = config_data(root, num_tokens=600)
    data["train"] |= {"num_tokens": 64 * STEPS, "checkpoint_every": 5, **train}
    data["evaluate"]["loss_sequences"] = 2
    return data


def cache(data: dict[str, Any]) -> None:
    run_cache(parse_config(data), Accelerator(cpu=True))


def train(data: dict[str, Any]) -> None:
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)


def evaluate(data: dict[str, Any]) -> dict[str, Any]:
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    return record


def train_half(data: dict[str, Any]) -> None:
    """Ends at a checkpoint, as a kill does."""
    checkpoint = Trainer._checkpoint

    def killing(self: Trainer, step: int) -> None:
        checkpoint(self, step)
        if step == STEPS // 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint", killing)
        with pytest.raises(Killed):
            train(data)


def weights(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(data["output"]) / JOB / "sae" / "sae.safetensors")


def change_weights(folder: Path) -> None:
    """One value of one weight."""
    file = folder / "model.safetensors"
    found = {name: w.clone() for name, w in load_file(file).items()}
    found["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(found, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a finished SAE."""
    root = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        data = data_in(root)
        cache(data)
        train(data)
    return root


@pytest.mark.parametrize("what", ["text", "model weights", "model config rope", "cache.seed"])
def test_a_killed_train_does_not_go_on_with_a_store_made_anew_of_other_content(
    tmp_path: Path, what: str
) -> None:
    data = data_in(tmp_path)
    cache(data)
    train_half(data)
    shutil.rmtree(tmp_path / "store.zarr")
    if what == "text":
        save_text(tmp_path / "text.jsonl", seed=7)
    elif what == "cache.seed":
        data["cache"]["seed"] = 3
    elif what == "model weights":
        change_weights(tmp_path / "model")
    else:
        file = tmp_path / "model/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 77.0}))
    cache(data)
    with pytest.raises(ConfigError, match=rf"the store's {what}\S*=.* differs from .*; name ano"):
        train(data)


def test_the_same_content_elsewhere_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Another path of model, text and store, the store made anew, the weights in other files."""
    old = data_in(tmp_path / "old")
    cache(old)
    train_half(old)
    (tmp_path / "new").mkdir()
    shutil.copytree(tmp_path / "old/model", tmp_path / "new/elsewhere")
    shutil.copy(tmp_path / "old/text.jsonl", tmp_path / "new/other.jsonl")
    shutil.rmtree(tmp_path / "old/store.zarr")
    new = json.loads(json.dumps(old))
    new["model"]["name"] = str(tmp_path / "new/elsewhere")
    new["text"]["paths"] = [str(tmp_path / "new/other.jsonl")]
    new["cache"]["store"] = str(tmp_path / "new/rows.zarr")
    cache(new)
    shutil.move(tmp_path / "old/run", tmp_path / "new/run")
    shutil.rmtree(tmp_path / "old")
    new["output"] = str(tmp_path / "new/run")
    train(new)
    want = load_file(base / "run" / JOB / "sae" / "sae.safetensors")
    for name, value in weights(new).items():
        assert torch.equal(value, want[name]), name
    assert evaluate(new)["loss"]["clean"] > 0


def test_a_finished_store_is_compared_with_what_lies_there_now(tmp_path: Path) -> None:
    data = data_in(tmp_path)
    cache(data)
    os.utime(tmp_path / "text.jsonl")
    cache(data)
    save_text(tmp_path / "text.jsonl", seed=7)
    with pytest.raises(ConfigError, match=r"store\.zarr' is made of other things: text="):
        cache(data)
    save_text(tmp_path / "text.jsonl")
    cache(data)
    change_weights(tmp_path / "model")
    with pytest.raises(ConfigError, match="made of other things: model weights="):
        cache(data)


def test_a_token_table_of_another_text_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache killed between tokenising and its first shard, then the text is edited."""
    data = data_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "create", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            cache(data)
    assert (tmp_path / "store.zarr/records/text-00000000.json").exists()
    save_text(tmp_path / "text.jsonl", seed=7)
    cache(data)
    other = data_in(tmp_path / "other")
    save_text(tmp_path / "other/text.jsonl", seed=7)
    cache(other)
    stores = [ActivationStore.open(d["cache"]["store"]).made_of() for d in (data, other)]
    assert stores[0]["rows"] == stores[1]["rows"]
    assert stores[0]["parts"] == stores[1]["parts"]


def test_evaluate_compares_an_sae_with_the_rows_and_the_model(base: Path, tmp_path: Path) -> None:
    data = data_in(base)
    record = evaluate(data)
    assert record["made_of"]["sae"] == made_of.read(base / "run" / JOB / "sae")["digest"]  # type: ignore[index]
    assert record["made_of"]["store"]["parts"]["model weights"]
    assert record["made_of"]["loss_text"]
    shutil.copytree(base / "model", tmp_path / "model")
    change_weights(tmp_path / "model")
    other = json.loads(json.dumps(data))
    other["model"]["name"] = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model weights=.* differs from .*loss_sequences=0"):
        evaluate(other)
    other["cache"]["store"] = str(tmp_path / "store.zarr")
    cache(other)
    with pytest.raises(ConfigError, match=r"store\.zarr' has model weights=.*was trained on"):
        evaluate(other)


@pytest.mark.parametrize("key", ["sae.k", "train.lr", "train.batch_tokens", "train.adam_betas"])
def test_without_its_job_yaml_another_job_is_still_refused(
    base: Path, tmp_path: Path, key: str
) -> None:
    data = data_in(base) | {"output": str(tmp_path / "run")}
    section, _, name = key.partition(".")
    changed = json.loads(json.dumps(data))
    changed[section][name] = {"k": 3, "lr": 0.5, "batch_tokens": 128, "adam_betas": [0.5, 0.9]}[
        name
    ]
    train_half(data)
    folder = tmp_path / "run" / JOB
    for lost in ("job.yaml", "made_of.json", "store.json"):
        (folder / lost).unlink()
        with pytest.raises(ConfigError, match=rf"{key}=.* differs from .*; name another output"):
            train(changed)
    assert not (folder / "sae").exists()
    train(data)
    shutil.rmtree(folder / "checkpoints")
    for lost in ("job.yaml", "made_of.json"):
        (folder / lost).unlink()
    with pytest.raises(ConfigError, match=rf"{key}=.* differs from .*sae/made_of\.json"):
        train(changed)


def test_a_longer_run_of_a_job_without_identities_is_not_finished(
    base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    folder = tmp_path / "run" / JOB
    for lost in ("made_of.json", "sae/made_of.json"):
        (folder / lost).unlink()
    out = {"output": str(tmp_path / "run")}
    train(data_in(base) | out)
    assert not (folder / "made_of.json").exists(), "it was finished"
    train(data_in(base, num_tokens=64 * STEPS * 2) | out)
    assert json.loads((folder / "sae/made_of.json").read_text())["total_steps"] == 2 * STEPS


def test_a_pointer_in_place_of_weights_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        identity.checksums(tmp_path / "model.safetensors")


def test_a_longer_run_goes_on_and_says_how(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    out = {"output": str(tmp_path / "run")}
    shared = {"log_every": 7, "checkpoint_every": 3, "keep_checkpoints": 1, "micro_batches": 2}
    data = data_in(base, **shared, num_tokens=64 * STEPS * 2) | out
    caplog.set_level(logging.INFO)
    train(data)
    told = [m for m in caplog.messages if "train.num_tokens was" in m]
    assert len(told) == 1
    assert f"step {STEPS} of now {2 * STEPS}" in told[0]
    record = made_of.read(tmp_path / "run" / JOB / "sae")
    assert record is not None
    assert record["total_steps"] == 2 * STEPS
    before = weights(data)
    train(data)
    assert all(torch.equal(w, before[n]) for n, w in weights(data).items())
    with pytest.raises(ConfigError, match=rf"is {STEPS} steps, but .* trained for {2 * STEPS}"):
        train(data_in(base) | out)


def test_a_run_keeps_the_learning_rate_that_it_began_with(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left out goes with the number of tokens, or was another in an older version."""
    out = {"output": str(tmp_path / "run")}
    left_out = {"lr": None, "warmup_steps": None, "batch_tokens": 16}
    caplog.set_level(logging.INFO)
    store = ActivationStore.open(str(base / "store.zarr"))
    first = data_in(base, **left_out, num_tokens=16 * 5000)
    record = made_of.made_of(parse_config(first | out), store, CPU)
    assert record["step"]["train.lr"] == pytest.approx(budget_lr(64, 5000))
    assert record["step"]["train.warmup_steps"] == 250
    folder = tmp_path / "run" / JOB
    folder.mkdir(parents=True)
    made_of.write(folder, record)
    longer = data_in(base, **left_out, num_tokens=16 * 10**5) | out

    def begun(data: dict[str, Any]) -> TrainConfig:
        (job,) = jobs_of(parse_config(data), store.hookpoints, grid=False)
        job = made_of.as_begun(job, 16)
        made_of.check_same_job(job, store, CPU)
        assert job.config.train is not None
        return job.config.train

    assert begun(longer).lr == record["step"]["train.lr"]
    assert begun(longer).warmup_steps == 250
    assert "goes on at the learning rate that it began with" in caplog.text
    with pytest.raises(ConfigError, match=r"train\.lr="):
        begun(data_in(base, **left_out | {"lr_rule": "width"}, num_tokens=16 * 10**5) | out)
    # A record of a version in which the rate did not go with the budget, and warm-up was 1000.
    del record["begun_tokens"]
    record["step"] |= {"train.lr": default_lr(64), "train.warmup_steps": 1000}
    made_of.write(folder, record | {"digest": made_of._digest(record)})
    kept = begun(longer)
    assert (kept.lr, kept.warmup_steps) == (default_lr(64), 1000)
    record["step"]["train.lr"] = budget_lr(64, 5000)
    made_of.write(folder, record | {"digest": made_of._digest(record)})
    with pytest.raises(ConfigError, match=r"train\.warmup_steps=250 differs from 1000"):
        begun(data_in(base, **left_out | {"lr_rule": "budget"}, num_tokens=16 * 10**5) | out)
    record["step"]["train.lr"] = 0.5
    made_of.write(folder, record | {"digest": made_of._digest(record)})
    with pytest.raises(ConfigError, match=r"train\.lr=.* differs from 0\.5"):
        begun(longer)


@pytest.mark.parametrize("sparsity", ["target", "tanh"])
def test_jumprelu_goes_on_from_where_an_older_version_began(
    base: Path, tmp_path: Path, sparsity: str
) -> None:
    data = data_in(base) | {"output": str(tmp_path / "run")}
    aims = {"target_l0": 4.0} if sparsity == "target" else {}
    data["sae"] = {"architecture": "jumprelu", "d_sae": 64, "sparsity": sparsity, **aims}
    job, record = older(data, tmp_path, {"train.encoder_scale": "unit"})
    assert record["step"].pop("sae.initial_l0", None) == ("usual" if aims else None)
    record["step"]["sae.initial_threshold"] = None
    made_of.write(job.folder, record | {"digest": made_of._digest(record)})
    store = ActivationStore.open(str(base / "store.zarr"))
    kept = made_of.as_begun(job, 16)
    made_of.check_same_job(kept, store, CPU)
    assert isinstance(kept.config.sae, JumpReLUConfig)
    assert kept.config.train is not None
    assert kept.config.sae.usual("threshold") == (0.01 if aims else 0.1)
    assert kept.config.train.encoder_scale == "unit"
    assert kept.config.sae.l0_at_start() is None
    if aims:
        with pytest.raises(ConfigError, match=r"sae\.initial_(l0|threshold)="):
            made_of.check_same_job(job, store, CPU)


@pytest.mark.parametrize("by", ["architecture", "optimizer"])
def test_what_has_a_fused_form_since_goes_on_by_autograd(
    base: Path, tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_in(base, **({"optimizer": "signum"} if by == "optimizer" else {}))
    data |= {"output": str(tmp_path / "run")}
    if by == "architecture":
        data["sae"] = {"architecture": "gated", "d_sae": 64}
    job, record = older(data, tmp_path, {"train.engine": "autograd"})
    made_of.write(job.folder, record)
    caplog.set_level(logging.INFO)
    kept = made_of.as_begun(job, 16)
    made_of.check_same_job(kept, ActivationStore.open(str(base / "store.zarr")), CPU)
    assert kept.config.train is not None
    assert kept.config.train.engine == "autograd"
    assert "goes on by train.engine=autograd, as it began" in caplog.text


def older(data: dict[str, Any], tmp_path: Path, step: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """A job and its record, in which some values are an older version's."""
    store = ActivationStore.open(str(Path(data["cache"]["store"])))
    (job,) = jobs_of(parse_config(data), store.hookpoints, grid=False)
    record = made_of.made_of(job.config, store, CPU)
    assert record["step"].keys() >= step.keys()
    record["step"] |= step
    job.folder.mkdir(parents=True)
    return job, record | {"digest": made_of._digest(record)}


def test_a_longer_run_goes_on_by_the_same_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record, which has the first run's rate and its own number of tokens, is not another's."""
    monkeypatch.setattr(optim, "_TOPK_STEPS", 1000)  # so few steps are not all at the most
    left_out = {"lr": None, "warmup_steps": None}
    out = {"output": str(tmp_path / "run")}
    train(data_in(base, **left_out) | out)
    longer = data_in(base, **left_out, num_tokens=64 * STEPS * 2) | out
    rates = [budget_lr(64, steps) for steps in (STEPS, 2 * STEPS)]
    assert rates[0] > rates[1]
    for _ in range(3):
        train(longer)
        record = made_of.read(tmp_path / "run" / JOB)
        assert record is not None
        assert (record["begun_tokens"], record["total_steps"]) == (64 * STEPS, 2 * STEPS)
        assert record["step"]["train.lr"] == rates[0]
        assert record["step"]["train.warmup_steps"] == STEPS // 20


def test_a_run_that_was_killed_at_its_start_is_not_an_older_versions(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would begin at another rate, with a warm-up that is longer than it."""
    data = data_in(base, lr=None, warmup_steps=None) | {"output": str(tmp_path / "run")}

    def killed(*args: object) -> None:
        raise Killed

    for place, last in ((made_of, "write"), (member, "write_job")):
        with monkeypatch.context() as patch:
            patch.setattr(place, last, killed)
            with pytest.raises(Killed):
                train(data)
    train(data)
    record = made_of.read(tmp_path / "run" / JOB)
    assert record is not None
    assert record["step"]["train.lr"] == budget_lr(64, STEPS)
    assert record["step"]["train.warmup_steps"] == STEPS // 20


def test_other_versions_are_a_log_line(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_in(base) | {"output": str(tmp_path / "run")}
    train_half(data)
    now = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: now | {"torch": "99.0"})
    caplog.set_level(logging.INFO)
    train(data)
    told = [m for m in caplog.messages if "made with other versions" in m]
    assert len(told) == 1
    assert f"torch {now['torch']}, now 99.0" in told[0]


def test_what_is_older_than_identities_goes_on(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_in(base, holdout=0.0)
    data |= {"output": str(tmp_path / "run"), "store": str(tmp_path / "store.zarr")}
    shutil.copytree(base / "store.zarr", tmp_path / "store.zarr")
    for name, key in (("geometry", "identity"), ("complete", "content")):
        file = tmp_path / f"store.zarr/records/{name}.json"
        record = read_json(file)
        del record[key]
        write_json(file, record)
    whole = data | {"output": str(tmp_path / "whole")}
    train(whole)
    monkeypatch.setattr(made_of, "read", lambda folder: None)
    monkeypatch.setattr(made_of, "write", lambda folder, record: None)
    with monkeypatch.context() as patch:
        patch.setattr("flash_sae_dist.training.checkpoint._verify", _without_record)
        train_half(data)
    caplog.set_level(logging.INFO)
    for file in (tmp_path / "run" / JOB / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        del manifest["info"]["made_of"], manifest["crc32c"]
        file.write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ConfigError, match=r"train\.lr=0\.5 differs"):
        train(data | {"train": data["train"] | {"lr": 0.5}})
    with pytest.raises(
        ConfigError, match=r"holdout=0\.01 differs from 0\.0 .*; set train\.holdout=0"
    ):
        train(data | {"train": data["train"] | {"holdout": 0.01}})
    train(data)
    assert "older than identities" in caplog.text
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(data).items())
    assert evaluate(data)["made_of"]["sae"] is None


def test_a_job_older_than_the_holdout_goes_on_without_one(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its order left out nothing, which is not the default."""
    data = data_in(base, holdout=0.0) | {"output": str(tmp_path / "run")}
    whole = data | {"output": str(tmp_path / "whole")}
    train(whole)
    train_half(data)
    folder = tmp_path / "run" / JOB
    record = read_json(folder / made_of.MADE_OF)
    del record["step"]["train.holdout"]
    record["digest"] = identity.digest([record["step"], record["store"]["parts"]])
    write_json(folder / made_of.MADE_OF, record)
    for file in (folder / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["info"]["made_of"] = record
        # Manifests of this format hold no checksum of their own.
        del manifest["crc32c"]
        file.write_text(json.dumps(manifest | {"format": 1}))
    default = data | {"train": {k: v for k, v in data["train"].items() if k != "holdout"}}
    with pytest.raises(ConfigError, match="set train.holdout=0.0 to go on, name another output"):
        train(default)
    caplog.set_level(logging.INFO)
    train(data)
    assert f"resumed at step {STEPS // 2}" in caplog.text
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(data).items())


@pytest.mark.parametrize("preload", ["host", "device"])
def test_where_rows_are_kept_may_change_from_launch_to_launch(
    base: Path, tmp_path: Path, preload: str
) -> None:
    """The same weights, whenever and however often it changes."""
    data = data_in(base, preload=preload, holdout=0.1) | {"output": str(tmp_path / "run")}
    train_half(data)
    train(data | {"train": data["train"] | {"preload": "none"}})
    whole = data | {"output": str(tmp_path / "whole")}
    train(whole)
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(data).items())


def _without_record(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "manifest.json").read_text()))


def test_own_rows_are_known_by_themselves(tmp_path: Path) -> None:
    """A store that `cache` did not make has its rows' checksums alone."""

    def make(seed: int) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        geometry = make_geometry(600, 16, 4, 128)
        writer = StoreWriter(str(tmp_path / "own"), {"model.name": "mine"}, create=True)
        writer.create(geometry, {JOB: 16}, "float32", {})
        rows = torch.randn(600, 16, generator=torch.Generator().manual_seed(seed)).numpy()
        for shard in range(geometry.num_shards):
            a, b = geometry.shard_range(shard)
            tokens = {f"tokens/{n}": rows[a:b, 0].astype("int32") for n in ("ids", "document")}
            tokens["tokens/position"] = tokens["tokens/ids"]
            writer.write_shard(geometry, shard, {f"activations/{JOB}": rows[a:b], **tokens})
        writer.finish(geometry, [JOB], 1)
        data = data_in(tmp_path)
        return data | {"store": str(tmp_path / "own")}

    data = make(0)
    train_half(data)
    with pytest.raises(ConfigError, match="the store's rows="):
        train(make(1))
    train(make(0))


def test_a_linked_job_is_the_same_job_for_every_verb(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    (tmp_path / "disk").mkdir()
    shutil.move(tmp_path / "run" / JOB, tmp_path / "disk/j")
    (tmp_path / "run" / JOB).symlink_to(tmp_path / "disk/j")
    (tmp_path / "run/round").symlink_to(tmp_path / "run")
    (tmp_path / "run/twice").symlink_to(tmp_path / "disk/j")
    data = data_in(base) | {"output": str(tmp_path / "run")}
    before = os.stat(tmp_path / "disk/j/sae/sae.safetensors").st_mtime_ns
    train(data)
    assert os.stat(tmp_path / "disk/j/sae/sae.safetensors").st_mtime_ns == before
    assert [s.name for s in finished_saes(tmp_path / "run")] == [JOB]
    assert evaluate(data)["job"] == JOB
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert [s.name for s in finished_saes(tmp_path / "link")] == [JOB]


def test_a_flipped_record_is_told(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    file = tmp_path / "run" / JOB / "sae/made_of.json"
    file.write_text(file.read_text().replace('"sae.k": 4', '"sae.k": 5'))
    with pytest.raises(DamagedRecordError, match=r"made_of\.json is damaged \(its crc32c changed"):
        train(data_in(base) | {"output": str(tmp_path / "run")})


class TwoHookpoints:
    """Rows of a hookpoint and of a target, without identities."""

    config: dict[str, Any] = {}

    def __init__(self, target: str) -> None:
        self.rows = {"model.layers.0": "a", "mlp": target}

    def width(self, hookpoint: str) -> int:
        return 8

    def made_of(self, hookpoint: str) -> dict[str, Any]:
        return {"parts": {}, "rows": self.rows[hookpoint]}


def test_a_transcoders_record_covers_its_target(tmp_path: Path) -> None:
    data = data_in(tmp_path, target="mlp")
    config = parse_config(data)
    stores: list[Any] = [TwoHookpoints("b"), TwoHookpoints("c")]
    was, now = (made_of.made_of(config, store, torch.device("cpu")) for store in stores)
    assert was["digest"] != now["digest"]
    made_of.check_same("x", was, was)
    with pytest.raises(ConfigError, match="train.target's rows='c' differs from 'b', which x"):
        made_of.check_same("x", was, now)
    made_of.write(tmp_path, was)
    assert made_of.read(tmp_path) == was
    made_of.write(tmp_path, was | {"target_rows": "c"})
    with pytest.raises(DamagedRecordError, match="its digest changed"):
        made_of.read(tmp_path)


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    cfg = ModelConfig(name=str(tmp_path / "model"))
    for path in (tmp_path / "model").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    first = model_parts(cfg)
    folder = identity.private_folder()
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_tensors", lambda path: pytest.fail("read again"))
        assert model_parts(cfg) == first
    for entry in folder.iterdir():
        entry.write_text("{")
    assert model_parts(cfg) == first
    change_weights(tmp_path / "model")
    # The same size, and the time put back as rsync does: the inode's own time tells.
    os.utime(file, ns=(10**18, 10**18))
    assert model_parts(cfg) != first
    folder.chmod(0o755)
    assert identity.private_folder() is None
    assert model_parts(cfg) != first


def test_weights_cut_into_other_files_are_the_same(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    first = model_parts(ModelConfig(name=str(tmp_path / "model")))
    file = tmp_path / "model/model.safetensors"
    found = load_file(file)
    names = sorted(found)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
        save_file({n: found[n] for n in part}, tmp_path / f"model/part-{number}.safetensors")
    file.unlink()
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert model_parts(ModelConfig(name=str(tmp_path / "model"))) == first


def all_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name in model.model_fields:
        sections = section_models(model, name)
        for section in sections:
            found |= all_keys(section, f"{prefix}{name}.")
        if not sections:
            found.add(f"{prefix}{name}")
    return found


def test_every_key_of_a_config_is_of_one_kind() -> None:
    """A new key has to be put into one of these sets: does it change a step, rows, or neither?"""
    kinds = (identity.STEP_KEYS, identity.ROW_KEYS, identity.NAMING_KEYS, identity.FREE_KEYS)
    keys = {key for key in all_keys(Config) if not key.startswith("sae.")}
    assert frozenset().union(*kinds) == keys
    assert sum(map(len, kinds)) == len(keys)


# Another valid value of each key of sae and train.
OTHER: dict[str, Any] = {
    "sae.k": 3, "sae.search": "fp8", "sae.d_sae": 32, "sae.input_norm": "layer_norm",
    "train.hookpoint": "model.layers.1.mlp", "train.num_tokens": 9999,
    "train.batch_tokens": 32, "train.lr": 0.5, "train.warmup_steps": 6,
    "train.decay_fraction": 0.5, "train.schedule": "cosine", "train.adam_betas": [0.5, 0.9],
    "train.adam_eps": 1e-3, "train.optimizer": "adamw", "train.weight_decay": 0.5,
    "train.loss": "kl", "train.fvu_coef": 0.5, "train.schedule_cycles": 2, "train.min_lr_rate": 0.5,
    "train.engine": "autograd", "train.grad_clip": 1.0, "train.micro_batches": 2,
    "train.dead_latents": "none", "train.aux_coef": 1.0, "train.k_aux": 3,
    "train.dead_after_tokens": 641, "train.precision": "bfloat16", "train.num_shards": 1,
    "train.num_replicas": 2, "train.seed": 5, "train.log_every": 2, "train.checkpoint_every": 11,
    "train.keep_checkpoints": 3, "train.adam_mode": "lazy", "train.moment_dtype": "bfloat16",
    "train.ema_decay": 0.9, "train.normalize": "unit_mean_square", "train.subtract_mean": True,
    "train.checkpoint_minutes": 5.0, "train.rendezvous_timeout_s": 30, "train.holdout": 0.5,
    "train.preload": "host", "train.heartbeat_s": 9, "train.source": "stream",
    "train.buffer_tokens": 4096, "train.encoder_scale": "unit",
    "train.deepspeed_config": "other.json",
    "train.target": "model.layers.1.mlp", "sae.skip": True,
    "sae.threshold_decay": 0.5, "sae.threshold_start": 5, "sae.prefix_widths": [4, 9],
    "sae.prefix_losses": "sum", "sae.sparsity": "tanh", "sae.sparsity_coefficient": 0.5,
    "sae.sparsity_warmup": 0.5, "sae.target_l0": 9.0, "sae.tanh_scale": 2.0,
    "sae.bandwidth": 0.5, "sae.initial_threshold": 0.5, "sae.initial_l0": 5.0,
    "sae.ste_to_input": True, "sae.pre_act_coefficient": 0.5, "sae.l1_coefficient": 0.5,
    "sae.decoder_norms": "whole",
}  # fmt: skip
# What a key has to stand beside.
JUMP = {"sae.architecture": "jumprelu"}
NEEDED: dict[str, Any] = {
    **{f"sae.threshold_{key}": {"sae.architecture": "batch_topk"} for key in ("decay", "start")},
    **{f"sae.prefix_{key}": {"sae.architecture": "matryoshka"} for key in ("widths", "losses")},
    **{f"sae.sparsity{key}": JUMP for key in ("", "_coefficient", "_warmup")},
    **{
        f"sae.{key}": JUMP for key in ("tanh_scale", "bandwidth", "initial_threshold", "initial_l0")
    },
    **{f"sae.{key}": JUMP for key in ("ste_to_input", "pre_act_coefficient")},
    "sae.target_l0": {**JUMP, "sae.sparsity": "target", "sae.target_l0": 8.0},
    # Both begin with unit rows where that is left out.
    "train.target": {"train.engine": "autograd", "train.encoder_scale": "unit"},
    "train.init_from": {"train.encoder_scale": "unit"},
    "sae.skip": {"train.target": "model.layers.1.mlp"},
    "sae.l1_coefficient": {"sae.architecture": "relu"},
    "sae.decoder_norms": {
        "sae.architecture": "topk_crosscoder",
        "train.hookpoint": "model.layers.0+model.layers.1.mlp",
    },
    "train.buffer_tokens": {"train.source": "stream"},
    "train.deepspeed_config": {"train.engine": "deepspeed"},
    "train.weight_decay": {"train.optimizer": "adamw"},
    "train.schedule_cycles": {"train.schedule": "cosine_with_restarts"},
    "train.loss": {"train.source": "stream", "train.engine": "autograd"},
    "train.fvu_coef": {"train.source": "stream", "train.loss": "kl"},
    "train.min_lr_rate": {"train.schedule": "cosine_with_min_lr"},
}


def test_the_digest_covers_a_key_or_the_key_is_free(base: Path) -> None:
    store = ActivationStore.open(str(base / "store.zarr"))
    plain = parse_config(data_in(base))
    # One width under two keys; the architecture is the one that there is.
    keys = {k for k in all_keys(Config) if k.startswith(("sae.", "train."))}
    keys -= {"sae.architecture", "sae.expansion_factor"}
    # It counts by the learning rate that it comes to.
    keys -= {"train.lr_rule"}
    # A file's content counts, so it has to be there.
    TopKSAE(16, 64, 4).save(base / "given")
    others = {**OTHER, "train.init_from": str(base / "given")}
    for key in sorted(keys):
        assert key in others, f"give another value of {key}"
        config = with_values(plain, NEEDED.get(key, {}))
        before = made_of.made_of(config, store, CPU)
        after = made_of.made_of(with_values(config, {key: others[key]}), store, CPU)
        assert (after["digest"] == before["digest"]) == (key in identity.FREE_KEYS), key
        if key not in identity.FREE_KEYS:
            with pytest.raises(ConfigError, match=f"{key}="):
                made_of.check_same("it", before, after)


def test_what_is_left_out_is_what_it_comes_to(base: Path) -> None:
    store = ActivationStore.open(str(base / "store.zarr"))
    plain = parse_config(data_in(base, lr=None))
    values = {"train.lr": 8 * 2e-4 / (64 / 2**14) ** 0.5, "train.k_aux": 8, "train.engine": "fused"}
    values |= {"train.precision": "float32", "sae.d_sae": None, "sae.expansion_factor": 4.0}
    digests = [
        made_of.made_of(c, store, CPU)["digest"] for c in (plain, with_values(plain, values))
    ]
    assert digests[0] == digests[1]
    before, after = (
        made_of.made_of(
            with_values(parse_config(data_in(base, lr=None)), {"sae.d_sae": 4096, **rule}),
            store,
            CPU,
        )
        for rule in ({}, {"train.lr_rule": "width"})
    )
    with pytest.raises(ConfigError, match=r"train\.lr="):
        made_of.check_same("it", before, after)
