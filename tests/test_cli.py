"""The command line: help that teaches, mistakes told in one sentence before any work, all verbs
end to end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import flash_sae_dist
from flash_sae_dist.config.data import CacheConfig
from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.launch import bench
from flash_sae_dist.launch.cli import PATH_VERBS, VERBS, build
from flash_sae_dist.launch.entry import processes
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.training.job import load_config
from tests.tiny_model import config_data, write_config

RUNNER = CliRunner()
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def app() -> Any:
    return build()


def test_help_names_every_verb(app: Any) -> None:
    text = RUNNER.invoke(app, ["--help"]).output
    for verb in VERBS:
        assert verb in text
    for verb in VERBS:
        result = RUNNER.invoke(app, [verb, "--help"])
        assert result.exit_code == 0
        first = {"verify": "PATH", "convert": "FROM", "push": "OUTPUT", "pull": "OWNER/NAME"}
        assert first.get(verb, "CONFIG.yaml") in result.output


def test_help_teaches(app: Any) -> None:
    """What the verb does, which sections it reads, an example, and how several processes start."""
    for verb in set(VERBS) - set(PATH_VERBS):
        text = " ".join(RUNNER.invoke(app, [verb, "--help"]).output.split())
        assert f"flash-sae {verb} configs/" in text
        assert "flash-sae keys" in text
        assert "train.batch_tokens=8192" in text
    text = RUNNER.invoke(app, ["--help"]).output
    assert "accelerate launch -m" in text
    assert text.index("cache ") < text.index("export ") < text.index("keys ")


def test_help_shows_all_of_its_text(app: Any) -> None:
    """Rich takes words in square brackets for markup and drops them."""
    for verb in VERBS:
        run = importlib.import_module(f"flash_sae_dist.launch.{verb}").run
        shown = " ".join(RUNNER.invoke(app, [verb, "--help"]).output.split())
        assert " ".join(str(run.__doc__).split()) in shown


def test_bench_tells_what_there_is(app: Any) -> None:
    result = RUNNER.invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    assert "encode, decode, step, parity, shards" in result.output
    assert "error" not in result.output
    assert "bench 'foo' is none of encode" in mistake(app, "bench", "foo")
    if not torch.cuda.is_available():
        assert "torch finds none on this machine" in mistake(app, "bench", "encode")


def test_errors_reach_the_launchers_report(
    app: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank hands over its sentence; the first one prints it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, printed in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        result = RUNNER.invoke(app, ["train", str(root / "c.yaml"), "sae.kk=1"])
        assert result.exit_code == 2
        assert result.output.count("error: ") == printed
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert "did you mean 'sae.k'" in told["message"]
        (tmp_path / "error.json").unlink()


def test_processes_wait_for_one_another_and_compute_as_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of a grid may wait for hours; a user's accelerate config may say fp16."""
    made: dict[str, Any] = {}

    class Recorder:
        def __init__(self, **options: Any) -> None:
            made.update(options)

        def wait_for_everyone(self) -> None:
            made["waited"] = "ended" not in made

        def end_training(self) -> None:
            made["ended"] = True

    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with processes(load_config(root / "c.yaml")):
        assert "ended" not in made
    assert made["waited"]
    assert made["ended"]
    (handler,) = made["kwargs_handlers"]
    assert handler.to_kwargs()["timeout"] > timedelta(days=1)
    assert made["mixed_precision"] == "no"
    assert made["log_with"] is None


_FAILS_BESIDE_NCCL = """
import atexit, sys
from flash_sae_dist.launch import entry
def run(config):
    "Fail."
    with entry.processes(config):
        raise RuntimeError("a mistake")
entry._nccl_is_up = lambda: True
entry.end_groups = lambda: print("ended groups")
atexit.register(lambda: print("ended as usual"))
entry.verb_main(run)
"""


def test_a_failure_waits_for_no_other_gpu(root: Path) -> None:
    """NCCL's end of a group waits for all its processes, which may wait for this one."""
    done = subprocess.run(
        [sys.executable, "-c", _FAILS_BESIDE_NCCL, str(root / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: a mistake" in done.stderr
    assert "ended" not in done.stdout


_LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
_RANK = """
import os, time
from flash_sae_dist.launch.entry import end_with_launcher
end_with_launcher()
print("watching", flush=True)
time.sleep(60)
"""


def test_processes_end_with_a_killed_launcher() -> None:
    """Else they would go on beside those of the same command started again."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, _RANK], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    lines = [launcher.stdout.readline() for _ in range(2)]
    assert "watching\n" in lines
    pid = int(next(line for line in lines if line.strip().isdigit()))
    launcher.kill()
    launcher.wait()
    # The rank's end closes the last writer of the pipe.
    deadline = time.monotonic() + 10
    while select.select([launcher.stdout], [], [], 0.1)[0] == [] and time.monotonic() < deadline:
        pass
    try:
        assert time.monotonic() < deadline, "the rank went on"
        assert launcher.stdout.read() == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_more_processes_than_gpus_are_told(
    app: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert "2 processes on this host, which has 1 GPU(s)" in mistake(
        app, "train", str(root / "c.yaml")
    )


def test_keys_lists_fields_with_their_meaning(app: Any) -> None:
    result = RUNNER.invoke(app, ["keys", "sae.k"])
    assert "sae.k" in result.output
    assert "Active latents" in result.output


def test_keys_list_what_each_architecture_takes(app: Any) -> None:
    lines = [line for line in RUNNER.invoke(app, ["keys", "sae."]).output.splitlines()]
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    for name, kind in ARCHITECTURES.items():
        assert f"{name}: " in told["sae.architecture"]
        for key in kind.Config.model_fields.keys() - SAEConfig.model_fields.keys():
            assert name in told[f"sae.{key}"]
    assert told["sae.l1_coefficient"].startswith("gated 1.0; relu, relu_crosscoder 5.0 (")
    for verb in ("train", "keys"):
        assert RUNNER.invoke(app, [verb, "--help"]).exit_code == 0
    text = " ".join(RUNNER.invoke(app, ["train", "--help"]).output.split())
    assert ", ".join([*ARCHITECTURES][:-1]) + f" or {[*ARCHITECTURES][-1]}" in text


def test_keys_are_a_line_each_in_a_pipe(app: Any) -> None:
    """Whole, to be found and copied, with defaults as YAML has them."""
    lines = [line.split() for line in RUNNER.invoke(app, ["keys"]).output.splitlines()]
    default = {words[0]: words[1] for words in lines}
    assert len(default) == len(lines)
    assert default["cache.drop_special_tokens"] == "true"
    assert default["grid.values"] == "{}"
    assert default["train.lr"] == "null"
    assert default["sae.k"] == "needed"
    (formats,) = (words for words in lines if words[0] == "export.formats")
    assert formats[1:] == ['["sae_lens",', '"sparsify"]', "Formats", "to", "write:", *formats[6:]]


def test_keys_are_whole_on_a_narrow_terminal(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_sae_dist.launch.cli._width", lambda: 60)
    shown = RUNNER.invoke(app, ["keys", "cache."]).output
    assert max(map(len, shown.splitlines())) <= 60
    for name in CacheConfig.model_fields:
        assert f"cache.{name} " in shown


def test_a_word_in_no_key_is_told(app: Any) -> None:
    assert "did you mean 'sae.k'?" in mistake(app, "keys", "sae.kk")
    told = mistake(app, "keys", "zzz")
    assert told == "error: no key contains 'zzz'; `flash-sae keys` lists all"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    data = config_data(root)
    # In fewer steps the draw of the initial weights decides which k is ahead.
    data["train"] |= {"num_tokens": 12800, "log_every": 50, "checkpoint_every": 50}
    write_config(root / "c.yaml", data)
    return root


def test_whole_job(app: Any, root: Path) -> None:
    config = str(root / "c.yaml")
    for verb in ("cache", "grid", "evaluate", "export"):
        result = RUNNER.invoke(app, [verb, config], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    records = json.loads((root / "run/evaluation.json").read_text())
    assert [r["job"] for r in records] == [
        f"model.layers.{h}/k={k}" for h in ("0", "1.mlp") for k in (2, 4)
    ]
    for record in records:
        assert 0 < record["fvu"] < 1
        assert record["loss"]["clean"] < 5
        assert record["l0"] <= record["k"]
        folder = root / "run" / record["job"]
        for name in (
            "density.png",
            "evaluation.json",
            "job.yaml",
            "status.json",
            "sae/config.json",
        ):
            assert (folder / name).is_file()
    by_job = {r["job"]: r["fvu"] for r in records}
    assert by_job["model.layers.0/k=4"] < by_job["model.layers.0/k=2"], "more latents, less error"
    assert (root / "run/fvu_l0.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((root / "run/export").glob("*/*/*/cfg.json"))) == 8


def mistake(app: Any, *args: str) -> str:
    result = RUNNER.invoke(app, list(args))
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_stop_before_any_work(app: Any, root: Path) -> None:
    config = str(root / "c.yaml")
    if not (root / "store.zarr/records/complete.json").exists():
        assert RUNNER.invoke(app, ["cache", config]).exit_code == 0
    out = f"output={root / 'none'}"
    assert "'train.lr'" in mistake(app, "train", config, out, "train.lrr=1")
    assert "did you mean 'model.layers.0'" in mistake(
        app, "train", config, out, "train.hookpoint=model.layer.0"
    )
    assert "train.num_shards=2" in mistake(app, "train", config, out, "train.num_shards=2")
    assert "flash-sae cache" in mistake(app, "train", config, out, f"store={root / 'no.zarr'}")
    assert "sae.k=65" in mistake(app, "train", config, out, "sae.k=65")
    assert "grid.hookpoints: 'model.layers.7'" in mistake(
        app, "grid", config, out, "grid.hookpoints=[model.layers.7]"
    )
    assert "did you mean 'tensorboard'" in mistake(
        app, "train", config, out, "trackers=[tensorbord]"
    )
    assert "pip install clearml" in mistake(app, "train", config, out, "trackers=[clearml]")
    assert "holds no finished SAE" in mistake(app, "evaluate", config, out)
    assert "did you mean" in mistake(
        app,
        "cache",
        config,
        f"cache.store={root / 'new.zarr'}",
        "cache.hookpoints=[model.layer.1]",
    )
    assert not (root / "none").exists(), "nothing was begun"


def test_a_job_of_another_config_is_not_taken_for_this_one(app: Any, root: Path) -> None:
    config = str(root / "c.yaml")
    if not (root / "store.zarr/records/complete.json").exists():
        assert RUNNER.invoke(app, ["cache", config]).exit_code == 0
    args = ["train", config, f"output={root / 'again'}"]
    assert RUNNER.invoke(app, args).exit_code == 0
    text = mistake(app, *args, "train.lr=0.5")
    assert "train.lr=0.5" in text
    assert "0.001" in text


@pytest.mark.parametrize("name", ["nonsense", "1,2,3", "0,8,16,2", "4,8,16,17"])
def test_bench_encode_takes_shapes_by_name_or_size(name: str) -> None:
    assert bench._shape("gpt2") == (4096, 768, 24576, 32)
    assert bench._shape("900,2304,16384,20") == (900, 2304, 16384, 20)
    with pytest.raises(typer.BadParameter, match=f"--shape {name} is no shape.*N,D,F,k"):
        bench._shape(name)


def test_the_version_is_told(app: Any) -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"flash_sae_dist {flash_sae_dist.__version__}\n"
