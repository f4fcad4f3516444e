"""What fails at no fault of ours: files that cannot be read now, full disks, no locks, no memory.
Each ends in one sentence, and nothing is overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from flash_sae_dist import ending, files
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.evaluation.metrics import measure
from flash_sae_dist.files import UnreadableError, locked, replacing, sweep
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models.losses import total_variance
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training import checkpoint
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import amend, config_data, write_config

RUNNER = CliRunner()
ROOT = Path(__file__).parents[1]
UNREADABLE = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a config of 20 steps."""
    root = tmp_path_factory.mktemp("failures")
    data = config_data(root)
    data["train"] |= {"num_tokens": 1280, "log_every": 5}
    write_config(root / "c.yaml", data)
    assert run("cache", root).exit_code == 0
    return root


def run(verb: str, root: Path, *args: str) -> Any:
    return RUNNER.invoke(build(), [verb, str(root / "c.yaml"), *args], catch_exceptions=False)


def sentence(result: Any, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    return str(line)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> Iterator[None]:
    """Opening a file of a name fails, as a colleague's or a broken disk's does; root may open what
    rights forbid."""
    original = Path.open

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if name in self.name:
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        yield


@pytest.mark.parametrize("number", UNREADABLE)
def test_a_finished_sae_that_cannot_be_read_is_not_trained_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = f"output={root / 'finished'}"
    assert run("train", root, out).exit_code == 0
    job = root / "finished" / "model.layers.0"
    before = {p: p.stat().st_mtime_ns for p in job.rglob("*") if p.is_file()}
    for name in ("sae.safetensors", "config.json"):
        with failing(monkeypatch, number, name):
            said = sentence(run("train", root, out), 1)
        assert os.strerror(number) in said
        assert name in said
    after = {p: p.stat().st_mtime_ns for p in job.rglob("*") if p.is_file()}
    assert after == before
    del tmp_path


@pytest.mark.parametrize("number", UNREADABLE)
def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run("train", root, f"output={root / 'finished'}")
    folder = root / "finished" / "model.layers.0" / "checkpoints"
    for name in ("manifest.json", "shard-00000"):
        with (
            failing(monkeypatch, number, name),
            pytest.raises(UnreadableError, match="cannot be read now"),
        ):
            checkpoint.newest_step(folder, Mesh.single())
    assert checkpoint.newest_step(folder, Mesh.single()) == 20


def test_absence_and_wrong_content_are_damage(root: Path, tmp_path: Path) -> None:
    assert checkpoint.newest_step(tmp_path / "none", Mesh.single()) is None
    assert not TopKSAE.is_whole(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "sae.safetensors").write_bytes(b"x")
    assert not TopKSAE.is_whole(tmp_path)
    del root


@pytest.mark.parametrize("verb", ["train", "cache"])
def test_a_disk_without_space_is_told_before_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    place = tmp_path / "new"
    key = "output" if verb == "train" else "cache.store"
    said = sentence(run(verb, root, f"{key}={place}"), 2)
    assert f"{key}='{place}' has 1,000 bytes free, but" in said
    assert not list(tmp_path.rglob("*.yaml")) + list(tmp_path.rglob("shard-*"))


_LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
what, number = sys.argv.pop(1), int(sys.argv.pop(1))
resource.setrlimit(getattr(resource, what), (number, number))
from flash_sae_dist.launch.cli import main
main()
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_one_sentence(root: Path, tmp_path: Path) -> None:
    """As a full disk, in the middle of a checkpoint; without the limit it goes on."""
    out = f"output={tmp_path / 'run'}"
    args = ["RLIMIT_FSIZE", "20000", "train", str(root / "c.yaml"), out]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("\nerror: ") :]
    assert re.search(r"step-00000010\.\w{32}\.partial/shard-00000-of-00001\.safetensors", said)
    assert "ulimit -f" in said
    assert "has no checkpoint yet: the same command begins it anew" in said
    assert run("train", root, out).exit_code == 0
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*.tmp"))


def test_errors_of_the_system_are_sentences_with_a_cure() -> None:
    for number, word in (
        (errno.ENOSPC, "free space"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENAMETOOLONG, "255 bytes"),
        (errno.EACCES, "rights"),
    ):
        told = ending.sentence_of(OSError(number, os.strerror(number), "/a/b"))
        assert told is not None
        assert told.startswith(f"/a/b: {os.strerror(number)}; ")
        assert word in told
    assert "train.batch_tokens" in str(ending.sentence_of(MemoryError("9 bytes")))
    assert ending.sentence_of(RuntimeError("ours")) is None
    assert ending.sentence_of(KeyError("ours")) is None


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing(tmp_path / "x"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="space") as e:
        fill()
    assert str(ending.sentence_of(e.value)).startswith(f"{tmp_path / 'x'}: No space left")


def test_leftovers_of_killed_runs_are_swept(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "checkpoints" / "step-00000010.partial").mkdir(parents=True)
    other = tmp_path / "k=2"
    other.mkdir()
    for folder in (tmp_path, tmp_path / "sae", other):
        (folder / f"x.json.{'0' * 32}.tmp").write_text("")
    (tmp_path / "mine.tmp").write_text("a user's own")
    with locked(tmp_path, below=("sae", "checkpoints")):
        left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {".lock", "mine.tmp", f"k=2/x.json.{'0' * 32}.tmp"}, "another job may be there"
    sweep(tmp_path, deep=True)
    assert not list(other.iterdir())


def test_a_folder_made_for_a_lock_alone_goes_again(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), locked(tmp_path / "a" / "b"):
        raise OSError("full")
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_text("")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]
    with locked(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "mine").exists()
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists(), "a user's own"


def test_a_lock_that_went_with_its_folder_holds_nobody_out(tmp_path: Path) -> None:
    """Threads that wait for one that removes the folder are one at a time still."""
    inside, most, made = threading.Semaphore(0), [], []

    def work() -> None:
        with locked(tmp_path / "store"):
            made.append(1)
            most.append(len(made))
            inside.release()
            time.sleep(0.02)
            made.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("word1 word2", "is longer than the whole text"),
        ("what no tokenizer knows " * 20, "gives special tokens alone"),
        ("word1 word2 " * 200, "bytes free"),
    ],
)
def test_a_mistake_before_any_row_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    data = config_data(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    data["cache"]["store"] = str(tmp_path / "deep" / "store.zarr")
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match=words):
        run_cache(parse_config(data), Accelerator(cpu=True))
    assert not (tmp_path / "deep").exists()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    monkeypatch.setattr(files, "_WAIT_S", 0.3)
    monkeypatch.setattr(files, "_BEAT_S", 0.1)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_second_launch_sees_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / ".owner.json"
    with locked(tmp_path):
        first = json.loads(record.read_text())
        assert first["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} of host .* is at work in"):
            locked(tmp_path).__enter__()
        time.sleep(0.4)
        assert json.loads(record.read_text())["time"] > first["time"], "it beats"
    assert "has no locks" in caplog.text
    assert not record.exists()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "dead", [{"host": socket.gethostname(), "pid": 2**22 + 5}, {"host": "away", "time": 5.0}]
)
def test_without_locks_a_dead_owner_is_replaced(tmp_path: Path, dead: dict[str, Any]) -> None:
    (tmp_path / ".owner.json").write_text(json.dumps({"time": time.time(), "id": "a", **dead}))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".owner.json").read_text())["pid"] == os.getpid()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending.listening(print):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("value", [0.0, 2.5, -1e4])
@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_rows_that_are_all_alike_have_an_fvu(value: float, engine: str) -> None:
    """The fraction of their squares that is unexplained: no 2e29, no NaN."""
    from flash_sae_dist.config.train import ENGINES
    from flash_sae_dist.models.topk import TopKConfig
    from flash_sae_dist.training.metrics import PhaseTimer
    from flash_sae_dist.training.step import SAETraining

    cpu = torch.device("cpu")
    x = torch.full((64, 24), value)
    cfg = ENGINES[engine](engine=engine, num_tokens=640, batch_tokens=64, warmup_steps=0)
    training = SAETraining(TopKConfig(k=4, d_sae=64), cfg, 24, Mesh.single(), cpu)
    for _ in range(10):
        metrics = training.step(x, PhaseTimer(cpu, enabled=False))
        assert 0 <= float(metrics.fvu) < 1e-3
    assert 0 <= measure(training.sae, [x]).fvu < 1e-3


def test_rows_that_vary_keep_their_variance() -> None:
    x = torch.randn(512, 8) * 1e-3 + 5
    expected = (x.double() - x.double().mean(0)).square().sum()
    assert float(total_variance(x, Mesh.single())) == pytest.approx(float(expected), rel=1e-3)


def test_loading_names_what_to_name(tmp_path: Path) -> None:
    TopKSAE(8, 16, 2).save(tmp_path / "job" / "sae")
    with pytest.raises(ValueError, match=r"none does not exist"):
        TopKSAE.load(tmp_path / "none")
    with pytest.raises(ValueError, match=rf"name {tmp_path}/job/sae$"):
        TopKSAE.load(tmp_path / "job")
    with pytest.raises(ValueError, match=r"is a file; name the folder"):
        TopKSAE.load(tmp_path / "job/sae/sae.safetensors")
    amend(tmp_path / "job/sae/config.json", lambda text: text.replace('"k": 2', '"k": 4.0'))
    with pytest.raises(ValueError, match=r"k=4\.0 is of the wrong type; write a whole number"):
        TopKSAE.load(tmp_path / "job/sae")


def test_a_width_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 9\]"):
        TopKSAE(8, 16, 2)(torch.zeros(2, 3, 9))


@pytest.mark.parametrize(
    ("verb", "override", "words"),
    [
        ("train", "train.warmup_steps=1000", "train.warmup_steps=1000 exceeds the 20 steps"),
        ("train", "train.micro_batches=65", "train.micro_batches=65 exceeds the 64 tokens"),
        ("train", "train.k_aux=0", "set train.dead_latents=none"),
        ("train", "train.batch_tokens=4611686018427387904", "takes "),
        ("train", "sae.d_sae=2147483647", "not divisible|takes|exceeds|has .* bytes free"),
        ("train", "train.seed=" + "[" * 2000, "not YAML"),
        ("train", "train={a: &x [*x]}", "stands inside what it stands for"),
        ("train", 'output="a\\0b"', "NUL"),
        ("grid", "grid.hookpoints=['" + ".".join(["**"] * 40) + ".zz']", "is not in the store"),
        ("grid", f"grid.values={{train.lr: [{', '.join(['1e-3'] * 2)}]}}", "twice"),
    ],
)
def test_mistakes_are_told_before_work(
    root: Path, tmp_path: Path, verb: str, override: str, words: str
) -> None:
    began = time.monotonic()
    said = sentence(run(verb, root, f"output={tmp_path / 'run'}", override), 2)
    assert re.search(words, said), said
    assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())


def test_an_anchor_bomb_is_refused(root: Path, tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "trackers: *a8"]))
    assert "more than 100,000 values" in sentence(run("train", tmp_path), 2)
    del root


def test_long_names_of_a_grid_are_told(root: Path, tmp_path: Path) -> None:
    keys = {"lr": 1e-3, "warmup_steps": 5, "decay_fraction": 0.2, "adam_eps": 1e-9}
    keys |= {"micro_batches": 1, "adam_mode": "exact", "moment_dtype": "float32", "k_aux": 8}
    keys |= {"dead_latents": "auxk", "aux_coef": 0.03125, "dead_after_tokens": 640, "seed": 1}
    keys |= {"precision": "float32", "checkpoint_every": 50, "ema_decay": None}
    keys |= {"keep_checkpoints": 2, "log_every": 5, "adam_betas": [0.9, 0.999]}
    values = json.dumps({f"train.{key}": [value] for key, value in keys.items()})
    args = (f"output={tmp_path / 'run'}", "grid.hookpoints=[model.layers.0]")
    said = sentence(run("grid", root, *args, f"grid.values={values}"), 2)
    assert "file systems take 255" in said
    assert not list(tmp_path.iterdir())


def test_k_may_stand_in_the_grid_alone(root: Path, tmp_path: Path) -> None:
    config = [f"output={tmp_path / 'run'}", "sae={d_sae: 64}", "grid.hookpoints=[model.layers.0]"]
    said = sentence(run("train", root, *config), 2)
    assert "key 'sae.k' is missing: the grid has it for `grid` alone" in said
    assert run("grid", root, *config).exit_code == 0
    assert len(list(tmp_path.glob("run/*/k=*/sae"))) == 2


def test_a_text_file_may_have_brackets_in_its_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text((root / "text.jsonl").read_text())
    args = (f"cache.store={tmp_path / 's'}", f'text.paths=["{tmp_path}/a[1].jsonl"]')
    assert run("cache", root, *args).exit_code == 0
