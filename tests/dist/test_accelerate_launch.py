"""The verbs as users start several processes: `accelerate launch -m flash_sae_dist.launch.VERB`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from flash_sae_dist.grid.trackers import safe_names
from tests.dist.jobs import finish, start
from tests.dist.ranks import free_port, start_module, wait
from tests.tiny_model import config_data, write_config

pytestmark = pytest.mark.slow


class Launched(NamedTuple):
    """What became of a launch."""

    returncode: int | None
    stdout: str
    stderr: str


def launch(verb: str, *args: str, processes: int = 2, cpu: bool = True) -> Launched:
    """Runs a verb, or a module, to its end; a hang is a failure of the test."""
    module = verb if "." in verb else f"flash_sae_dist.launch.{verb}"
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port()), "-m", module, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "1"} if cpu else {})
    with tempfile.TemporaryDirectory() as folder:
        # The launcher alone is a fork; the processes that it starts are none.
        running = start_module("accelerate.commands.launch", options, env, Path(folder) / "log")
        (code,) = wait([running], timeout=120)
        return Launched(code, running.out.read_text(), running.err.read_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    data = config_data(root)
    data["train"] |= {"num_tokens": 1280, "log_every": 5}
    data["trackers"] = ["tensorboard"]
    return write_config(root / "c.yaml", data)


@pytest.fixture
def store(config: Path) -> Path:
    """The config's store, cached by the first test that asks for it."""
    store = config.parent / "store.zarr"
    if not (store / "records/complete.json").exists():
        assert launch("cache", str(config)).returncode == 0
    return store


def test_the_whole_job(config: Path) -> None:
    for verb in ("cache", "grid", "evaluate", "export"):
        done = launch(verb, str(config))
        assert done.returncode == 0, done.stderr[-3000:]
        assert (verb == "evaluate") == ("CE kept" in done.stdout), "its table, once"
    out = config.parent / "run"
    assert len(json.loads((out / "evaluation.json").read_text())) == 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for job in ("model.layers.0/k=2", "model.layers.1.mlp/k=4"):
        # Each is a run of its own.
        events = EventAccumulator(str(out / "flash_sae_dist" / safe_names([job])[job])).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"fvu", "l0", "dead_fraction", "lr", "tokens_per_s", "ms/data"} <= tags
        curve = [(e.step, e.value) for e in events.Scalars("fvu")]
        lines = [json.loads(x) for x in (out / job / "metrics.jsonl").read_text().splitlines()]
        assert curve == [(x["step"], pytest.approx(x["fvu"], rel=1e-6)) for x in lines]


def test_deepspeed_trains(config: Path, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero2 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json"
    options = [f"train.deepspeed_config={zero2}", "train.num_replicas=2", f"store={store}"]
    said = finish(
        start("train", config, 2, "train.engine=deepspeed", *options, f"output={tmp_path}")
    )
    assert "trained; fvu 0." in said
    assert "[WARNING]" not in said, "DeepSpeed says nothing"
    (lines,) = tmp_path.glob("*/metrics.jsonl")
    curve = [json.loads(line) for line in lines.read_text().splitlines()]
    assert curve[-1]["step"] == 20
    assert curve[-1]["fvu"] < curve[0]["fvu"]


@pytest.mark.parametrize(
    ("verb", "override", "words"),
    [
        ("train", "sae.d_sae=63", "sae.d_sae=63 is not divisible by the 2 shards; use 64"),
        # Found by the first process alone, while the second waits for it.
        ("cache", "text.paths=[none.txt]", "text.paths: 'none.txt' names no file"),
        ("train", "train.num_shards=3", "set accelerate launch --num_processes 3"),
    ],
)
def test_a_mistake_ends_all_processes(
    config: Path, store: Path, verb: str, override: str, words: str, tmp_path: Path
) -> None:
    args = [override, f"output={tmp_path / 'none'}", f"cache.store={tmp_path / 'new.zarr'}"]
    if verb != "cache":
        args.append(f"store={store}")
    done = launch(verb, str(config), *args)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, "one process tells it"
    assert words in said[0]
    own = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in own, "the launcher's own follows, but none of ours comes before it"
    # What stands last on the terminal is the launcher's report: it holds the sentence, too.
    assert words in done.stderr.rsplit("Root Cause", 1)[1]
    assert not (tmp_path / "none").exists(), "nothing was begun"


def test_the_first_tells_all_before_a_failed_sae_ends_the_launch(
    config: Path, store: Path, tmp_path: Path
) -> None:
    args = [
        f"store={store}",
        f"output={tmp_path}",
        "train.num_shards=1",
        "grid.hookpoints=[model.layers.0]",
    ]
    done = launch("grid", str(config), *args, "grid.values={train.lr: [1.0e-3, 1.0e+30]}")
    assert done.returncode != 0
    assert "model.layers.0/lr=0.001: trained; fvu " in done.stdout
    assert "error: 1 of 2 SAEs failed (model.layers.0/lr=1e+30: " in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


def test_a_failure_ends_a_launch_whose_other_processes_wait(config: Path) -> None:
    done = launch("tests.dist.fail_worker", str(config))
    assert done.returncode != 0
    assert "RuntimeError: the second's mistake" in done.stderr
