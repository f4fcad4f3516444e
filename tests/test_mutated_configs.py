"""Configs, overrides and paths changed at random (seeded): no traceback, nothing slow, and what is
invalid begins no work and leaves nothing behind. 300 of them with `-m torture`.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from flash_sae_dist.activations import harvest
from flash_sae_dist.grid import runner
from flash_sae_dist.launch.cli import _keys, build
from flash_sae_dist.training.job import Config
from tests.tiny_model import config_data, write_config

KEYS = [key.name for key in _keys(Config) if not key.section]

# Nothing that any key takes.
NONSENSE = [
    "{a: {b: c}}",
    "[[[1]]]",
    ".nan",
    "-.inf",
    "2024-13-45",
    "!!python/object/apply:os.system [x]",
    "*nowhere",
    "&a [*a]",
    "&a {b: *a}",
    "[" * 3000,
    "{a: " * 200 + "1" + "}" * 200,
    "'",
    '"\\0"',
    '"\\ud800"',
    "!!binary x",
    "!!int x",
    "? [a]\n: b",
    "9" * 5000,
    "-" + "9" * 40,
    "\x00",
    "\udcff",
]
ODD = [
    *("", "null", "true", "-1", "0", "1", "0.5", "1e400", "1e-400", "[]", "{}", "~", "[null]"),
    *("9223372036854775807", "4294967296", "1_000", "0x10", "1:30", "yes", "2024-01-01", "''"),
    *("a" * 300, "a/" * 3000, "é☃", "\u202e", "'%s{}'", "../../x", "/dev/null/x", "/proc/x/y"),
    *(
        "s3://",
        "http://[::1",
        "x://y",
        "'['",
        "'**'",
        "'[a-'",
        "'" + "**." * 60 + "z'",
        "~nobody/x",
    ),
    *(
        "[model.layers.0, model.layers.0]",
        "{sae.k: 3}",
        "{sae.k: [0]}",
        "{sae.k: []}",
        "{? 1 : [2]}",
    ),
]


class Trial(NamedTuple):
    """A command line, and whether it is known to be invalid."""

    verb: str
    text: bytes
    args: list[str]
    invalid: bool


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutated")
    data = config_data(root)
    data["train"]["num_tokens"] = 1280
    write_config(root / "c.yaml", data)
    done = CliRunner().invoke(build(), ["cache", str(root / "c.yaml")])
    assert done.exit_code == 0, done.output
    return root


def make_trial(rng: random.Random, data: dict[str, Any]) -> Trial:
    verb = rng.choice(["train", "train", "grid", "cache", "evaluate", "export"])
    text = yaml.safe_dump(data).encode()
    kind = rng.choice(["typo", "nonsense", "odd", "odd", "odd", "override", "bytes", "lines"])
    key = rng.choice(KEYS)
    if kind == "typo":
        at = rng.randrange(len(key))
        wrong = key[:at] + rng.choice("zq_-9") + key[at + 1 :]
        return Trial(verb, text, [f"{wrong}=1"], wrong not in KEYS)
    if kind == "nonsense":
        free = key.startswith("grid.values")
        return Trial(verb, text, [f"{key}={rng.choice(NONSENSE)}"], not free)
    if kind == "odd":
        return Trial(verb, text, [f"{key}={rng.choice(ODD)}"], False)
    if kind == "override":
        return Trial(verb, text, [rng.choice(["=1", "x", "=", "sae", "a.b.c.d", ".=1"])], True)
    if kind == "bytes":
        changed = bytearray(text)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return Trial(
            verb, bytes(changed[: rng.choice([len(text), rng.randrange(len(text))])]), [], False
        )
    lines = text.splitlines()
    for _ in range(rng.randint(1, 4)):
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines.insert(to, lines[at] if rng.random() < 0.5 else lines.pop(at))
    return Trial(verb, b"\n".join(lines), [], False)


def try_one(trial: Trial, root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir()
    began: list[str] = []
    with monkeypatch.context() as patch:
        patch.chdir(place)
        patch.setattr(runner, "_train", lambda *args, **kw: began.append("train") or (set(), {}))
        patch.setattr(harvest, "_write_shards", lambda *args: began.append("cache"))
        patch.setattr(harvest.StoreWriter, "create", lambda *args: began.append("cache"))
        patch.setattr(harvest.StoreWriter, "finish", lambda *args: None)
        config = place / "c.yaml"
        config.write_bytes(trial.text)
        begin = time.monotonic()
        result = CliRunner().invoke(build(), [trial.verb, str(config), *trial.args])
        took = time.monotonic() - begin
    told = f"{trial.verb} {[a[:200] for a in trial.args]}: {result.output[-1500:]}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        pytest.fail(told + "".join(traceback.format_exception(result.exception)))
    assert "Traceback" not in result.output, told
    assert result.exit_code in (0, 1, 2), told
    assert took < 20, told
    if trial.invalid:
        assert result.exit_code == 2, told
    if result.exit_code == 2:
        assert not began, told
        assert [p.name for p in place.iterdir()] == ["c.yaml"], told
        assert result.output.count("error: ") == 1 or "Usage" in result.output, told
    del root


def run_trials(seeds: range, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in seeds:
        place = tmp_path / str(seed)
        data = yaml.safe_load((root / "c.yaml").read_text())
        # As users write them: below the current folder.
        data["output"], data["store"] = "run", str(root / "store.zarr")
        data["cache"]["store"] = "new.zarr"
        rng = random.Random(seed)
        try_one(make_trial(rng, data), root, place, monkeypatch)


@pytest.mark.parametrize("part", range(4))
def test_mutated_configs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    run_trials(range(10 * part, 10 * part + 10), root, tmp_path, monkeypatch)


@pytest.mark.torture
@pytest.mark.parametrize("part", range(30))
def test_mutated_configs_often(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    run_trials(range(1000 + 10 * part, 1010 + 10 * part), root, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "path", ["", "/", "nowhere/c.yaml", "a" * 300, "a/" * 3000, "\udcff", "x\ny"]
)
def test_odd_paths_of_configs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build(), ["train", path])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())
    assert os.getcwd() == str(tmp_path)
