"""Files of others: no code of theirs runs, nothing is written where their names point."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from flash_sae_dist import files
from flash_sae_dist.activations.language_model import load_language_model
from flash_sae_dist.activations.records import Records
from flash_sae_dist.activations.store import ActivationStore, Shape
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.data import ModelConfig
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.records import read_job
from tests.tiny_model import config_data, save_llama, write_config

CPU = torch.device("cpu")
CODE = """from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({ran!r}).touch()
class C(LlamaConfig):
    model_type = "mine"
class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes are in a Python file beside it, and a `y` on standard input."""
    folder = save_llama(tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "conf.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    return folder


def test_code_of_a_model_runs_only_where_the_config_says_so(custom: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        load_language_model(ModelConfig(name=str(custom)), CPU)
    assert not (custom.parent / "ran").exists()
    cfg = ModelConfig(name=str(custom), task="causal-lm", trust_remote_code=True)
    assert type(load_language_model(cfg, CPU).model).__name__ == "M"
    assert (custom.parent / "ran").exists()


NAMES = ["../../x", "/x", "a/b", "..", ".", "", "a..b", "a\\b", "a\0b", "layers.0:inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_hookpoints_that_are_paths_are_refused_where_read(tmp_path: Path, name: str) -> None:
    records = Records(str(tmp_path / "store"))
    shape = {"format": 1, "dtype": "float32", "rows": 16, "shard_rows": 16, "chunk_rows": 16}
    records.write("geometry.json", shape | {"widths": {name: 4}})
    with pytest.raises(UserError, match="no module's name"):
        Shape.read(records)
    with pytest.raises(UserError, match="no module's name"):
        ActivationStore.open(str(tmp_path / "store"))
    data = config_data(tmp_path)
    data["train"]["hookpoint"] = name
    words = "cannot hold a NUL" if "\0" in name else "no module's name"
    with pytest.raises(ConfigError, match=words):
        parse_config(data)
    (tmp_path / "job").mkdir()
    if name.isprintable():
        write_config(tmp_path / "job" / "job.yaml", data)
        with pytest.raises(ConfigError, match="no module's name"):
            read_job(tmp_path / "job")


def test_a_temporary_folder_of_anothers_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = files.private_folder()
    assert folder == files.private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="TMPDIR"):
        files.private_folder()
    shutil.rmtree(folder)
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="TMPDIR"):
        files.private_folder()
