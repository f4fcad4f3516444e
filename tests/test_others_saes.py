"""Somebody else's SAE: measured on a store or a model, trained further; a run trained longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from typer.testing import CliRunner

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import AutogradTrainConfig
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.interop import About
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.crosscoder import Crosscoder
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.step import SAETraining
from tests.tiny_model import config_data

HOOKPOINT = "model.layers.0"


def cpu() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, an SAE that was trained on it, and exports of it."""
    root = tmp_path_factory.mktemp("made")
    data = config_data(root)
    run_cache(parse_config(data), cpu())
    run_jobs(parse_config(data), cpu(), grid=False)
    sae = TopKSAE.load(root / "run" / HOOKPOINT / "sae")
    for name in ("dictionary_learning", "sparsify", "qwen_scope", "sae_lens"):
        about = About(HOOKPOINT) if name == "sae_lens" else None
        interop.save(sae, root / name, name, about)
    return root


def test_exports_are_measured_as_the_sae_itself(made: Path, tmp_path: Path) -> None:
    data = config_data(made) | {"output": str(made / "run")}
    (own,) = run_evaluation(parse_config(data), cpu())
    data["output"] = str(tmp_path / "others")
    names = ("dictionary_learning", "sparsify", "qwen_scope", "sae_lens")
    data["evaluate"] |= {"saes": [str(made / n) for n in names], "hookpoint": HOOKPOINT}
    records = run_evaluation(parse_config(data), cpu())
    assert [r["job"] for r in records] == sorted(names)
    for record in records:
        for key in ("tokens", "fvu", "l0", "never_fired_fraction"):
            assert record[key] == pytest.approx(own[key], rel=1e-4), key
        assert record["loss"]["spliced"] == pytest.approx(own["loss"]["spliced"], rel=1e-4)
        assert (tmp_path / "others" / record["job"] / "evaluation.json").is_file()
    assert (tmp_path / "others/report.md").is_file()


def test_a_model_gives_the_rows_where_there_is_no_store(made: Path, tmp_path: Path) -> None:
    data = config_data(made) | {"output": str(tmp_path)}
    data["cache"]["store"] = None
    data["evaluate"] |= {"saes": [str(made / "sae_lens")]}
    (record,) = run_evaluation(parse_config(data), cpu())
    assert record["tokens"] == 512
    assert 0 < record["fvu"] < 1
    assert record["loss"]["spliced"] != record["loss"]["clean"]
    data["evaluate"]["loss_sequences"] = 0
    (again,) = run_evaluation(parse_config(data), cpu())
    assert "loss" not in again
    # Other rows of the same model.
    assert again["fvu"] == pytest.approx(record["fvu"], rel=0.2)


def test_the_command_line_alone(made: Path, tmp_path: Path) -> None:
    words = [
        f"SAE={made / 'dictionary_learning/ae.pt'}",
        f"SAE={made / 'sae_lens'}",
        f"store={made / 'store.zarr'}",
        f"output={tmp_path}",
        "evaluate.loss_sequences=0",
        "evaluate.num_tokens=256",
        f"evaluate.hookpoint={HOOKPOINT}",
    ]
    result = CliRunner().invoke(build(), ["evaluate", *words])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [r["job"] for r in found] == ["ae.pt", "sae_lens"]
    assert found[0]["fvu"] == pytest.approx(found[1]["fvu"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"saes": ["DIR/dictionary_learning"]},
            "tells no hookpoint; set evaluate.hookpoint to one",
        ),
        ({"saes": ["DIR/sae_lens"], "hookpoint": "h.3"}, "reads 'h.3'; set evaluate.hookpoint"),
        ({"saes": ["DIR/nothing"]}, "is no file or folder"),
        ({"saes": ["DIR/text.jsonl"]}, "no SAE of a format"),
        ({"saes": ["DIR/sae_lens", "DIR/sae_lens"]}, "twice"),
    ],
)
def test_mistakes_are_told(made: Path, asked: dict[str, Any], told: str) -> None:
    data = config_data(made)
    asked["saes"] = [path.replace("DIR", str(made)) for path in asked["saes"]]
    data["evaluate"] |= asked
    with pytest.raises(ConfigError, match=told):
        run_evaluation(parse_config(data), cpu())


def test_another_width_is_told(made: Path, tmp_path: Path) -> None:
    interop.save(TopKSAE(12, 40, 3), tmp_path / "a", "sparsify")
    data = config_data(made)
    data["evaluate"] |= {"saes": [str(tmp_path / "a")], "hookpoint": HOOKPOINT}
    with pytest.raises(ConfigError, match="is of width 12, but model.layers.0 of 16"):
        run_evaluation(parse_config(data), cpu())


def trained(data: dict[str, Any], path: Path, **train: Any) -> TopKSAE:
    data = data | {"output": str(path), "train": data["train"] | train}
    run_jobs(parse_config(data), cpu(), grid=False)
    return TopKSAE.load(path / HOOKPOINT / "sae")


def fvu_of(sae: TopKSAE, store: ActivationStore) -> float:
    x = interop.thresholds.rows_of(store, HOOKPOINT)
    out = sae(x).recon
    return float((out - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("normalize", ["none", "unit_mean_square"])
@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_training_goes_on_from_somebody_elses(
    made: Path, tmp_path: Path, engine: str, normalize: str
) -> None:
    data, store = config_data(made), ActivationStore.open(str(made / "store.zarr"))
    given = interop.load(made / "dictionary_learning")
    asked = {"engine": engine, "normalize": normalize}
    # With next to no learning rate it stays what it was: in the units of the rows, too.
    same = trained(
        data, tmp_path / "same", init_from=str(made / "dictionary_learning/ae.pt"), num_tokens=64,
        lr=1e-12, warmup_steps=0, **asked,
    )  # fmt: skip
    for name, value in given.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    tuned = trained(
        data, tmp_path / "tuned", init_from=str(made / "dictionary_learning"), num_tokens=1280,
        warmup_steps=0, lr=3e-3, **asked,
    )  # fmt: skip
    assert fvu_of(tuned, store) < 0.97 * fvu_of(given, store)


ALONE = sorted(n for n, kind in ARCHITECTURES.items() if not issubclass(kind, Crosscoder))


@pytest.mark.parametrize("name", ALONE)
def test_every_architecture_begins_as_given_and_is_written_so(name: str, tmp_path: Path) -> None:
    """Thresholds and biases go into the units of the rows as the engine gets them, and back."""
    kind = ARCHITECTURES[name]
    keys = {"architecture": name, "d_sae": 40, "k": 4}
    fields = kind.Config.model_fields
    config = kind.Config.model_validate({n: v for n, v in keys.items() if n in fields})
    given = kind.from_config(config, 12)
    with torch.no_grad():
        for key, tensor in given.state_dict().items():
            if key != "W_dec":
                tensor.add_(0.2 * torch.rand_like(tensor))
    given.save(tmp_path)
    options = {"num_tokens": 64, "batch_tokens": 64, "normalize": "unit_mean_square"}
    options |= {"subtract_mean": True, "engine": "autograd", "precision": "float64"}
    train = AutogradTrainConfig.model_validate(options | {"init_from": str(tmp_path)})
    rows = Mesh.single(), torch.device("cpu")
    training = SAETraining(config, train, 12, *rows, rms=3.0, mean=torch.arange(12) / 6)
    training._into_units()
    assert not torch.allclose(training.sae.b_dec, given.b_dec.double())
    for key, value in training.final_weights().items():
        torch.testing.assert_close(value, given.state_dict()[key].double(), msg=key)


def test_what_cannot_be_begun_from_is_told(made: Path, tmp_path: Path) -> None:
    for change, told in (
        ({"sae.d_sae": 128}, "sae.d_sae=64, not 128; set sae.d_sae=64"),
        ({"sae.input_norm": "layer_norm"}, "sae.input_norm='none', not 'layer_norm'"),
        ({"sae.input_norm": "layer_norm", "train.subtract_mean": True}, "drop one"),
        ({"train.target": HOOKPOINT}, "begins SAEs alone, not a transcoder"),
        ({"train.init_from": str(made / "nothing")}, "train.init_from: .*is no file or folder"),
    ):
        data = config_data(made) | {"output": str(tmp_path / "x")}
        data["train"]["init_from"] = str(made / "sae_lens")
        for key, value in change.items():
            section, _, name = key.partition(".")
            data[section][name] = value
        with pytest.raises(ConfigError, match=told):
            run_jobs(parse_config(data), cpu(), grid=False)
        assert not (tmp_path / "x").exists()


def test_the_files_not_their_path_are_what_a_job_began_from(made: Path, tmp_path: Path) -> None:
    data = config_data(made)
    short = {"num_tokens": 640, "init_from": str(made / "sae_lens")}
    trained(data, tmp_path / "a", **short)
    moved = tmp_path / "moved"
    interop.save(interop.load(made / "sae_lens"), moved, "sae_lens", About(HOOKPOINT))
    trained(data, tmp_path / "a", **short | {"init_from": str(moved)})
    with pytest.raises(ConfigError, match="train.init_from"):
        trained(data, tmp_path / "a", **short | {"init_from": str(made / "sparsify")})


def test_a_decoder_of_other_norms_is_told(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae = TopKSAE(16, 64, 4)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    interop.save(sae, tmp_path / "long", "sparsify")
    same = trained(
        config_data(made), tmp_path / "run", init_from=str(tmp_path / "long"), num_tokens=64,
        lr=1e-12, warmup_steps=0,
    )  # fmt: skip
    assert "decoder rows of other norms than 1" in caplog.text
    x = torch.randn(20, 16)
    torch.testing.assert_close(same(x).recon, sae(x).recon, rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_trained_for_longer(made: Path, tmp_path: Path) -> None:
    data = config_data(made)
    first = trained(data, tmp_path, num_tokens=640)
    longer = trained(data, tmp_path, num_tokens=1920)
    assert not torch.equal(first.W_enc, longer.W_enc)
    lines = (tmp_path / HOOKPOINT / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))
    job = yaml.safe_load((tmp_path / HOOKPOINT / "job.yaml").read_text())
    assert job["train"]["num_tokens"] == 1920
