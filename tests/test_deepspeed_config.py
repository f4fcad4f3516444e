"""What a file of train.deepspeed_config may say, and what train.engine=deepspeed asks for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.deepspeed import read_deepspeed, zero_of
from flash_sae_dist.config.train import DeepSpeedTrainConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engine import check_engine, check_installed

PRESETS = Path(__file__).parents[1] / "configs" / "deepspeed"
GROUPS = Mesh(0, 2, 0, 1, 0, 1, None, None, None)


def config(file: Path | None = None, **train: Any) -> DeepSpeedTrainConfig:
    name = None if file is None else str(file)
    return DeepSpeedTrainConfig(
        engine="deepspeed", num_tokens=960, batch_tokens=96, deepspeed_config=name, **train
    )


def told(tmp_path: Path, text: str | dict[str, Any], **train: Any) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_deepspeed(config(file, **train), 2)


@pytest.mark.parametrize(
    ("name", "stage", "device"),
    [("zero1", 1, "none"), ("zero2", 2, "none"), ("zero2_offload", 2, "cpu")],
)
def test_presets(name: str, stage: int, device: str) -> None:
    zero = zero_of(config(PRESETS / f"{name}.json"))
    assert (zero.stage, zero.offload_optimizer.device) == (stage, device)
    assert sorted(p.stem for p in PRESETS.glob("*.json")) == ["zero1", "zero2", "zero2_offload"]


def test_keys_of_train_decide(tmp_path: Path) -> None:
    train = {"micro_batches": 3, "grad_clip": 0.5}
    same = {"gradient_clipping": 0.5, "gradient_accumulation_steps": "auto", "bf16": "auto"}
    same |= {"train_batch_size": 96, "fp16": {"enabled": False}, "zero_optimization": {"stage": 2}}
    found = told(tmp_path, same, **train)
    assert found == read_deepspeed(config(PRESETS / "zero2.json", **train), 2)
    assert found["train_micro_batch_size_per_gpu"] == 16
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (3, 0.5)
    assert found["zero_optimization"]["stage"] == 2
    assert read_deepspeed(config(), 1)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0 contradicts train.grad_clip", "0.0"]),
        ({"train_batch_size": 4}, ["train_batch_size=4 contradicts train.batch_tokens", "96"]),
        ({"gradient_accumulation_steps": 2}, ["contradicts train.micro_batches"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer' is what train.lr", "drop it"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler' is what train.warmup_steps"]),
        ({"bf16": {"enabled": True}}, ["'bf16' is what train.precision says"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3 is not a choice"]),
        ({"zero_optimization": {"stag": 1}}, ["'zero_optimization.stag'", "did you mean"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ["zero_optimization.offload_optimizer.device='nvme' is not a choice"],
        ),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "'zero_optimization'"]),
        ("[1]", ["is no JSON object", "configs/deepspeed/zero2.json"]),
        ("{", ["is no JSON object"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        told(tmp_path, text)
    for word in ("ds.json", *words):
        assert word in str(e.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json.*No such file.*zero2\.json"):
        check_engine(config(tmp_path / "none.json"), Mesh.single())


def test_deepspeed_is_asked_for_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flash_sae_dist\[deepspeed\]'"):
        check_installed(config())


def test_several_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_engine(config(), Mesh.single())
    with pytest.raises(ConfigError, match="2 groups of them; raise train.num_replicas"):
        check_engine(config(), GROUPS)
