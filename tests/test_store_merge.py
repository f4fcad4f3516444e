"""Stores merged are the stores that would have been made together; what a store tells of itself."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from typer.testing import CliRunner

from flash_sae_dist import ending
from flash_sae_dist.activations import text_parts
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.importing import ImportOptions, run_import
from flash_sae_dist.activations.merging import run_merge
from flash_sae_dist.activations.store import ActivationStore, Geometry, array_names
from flash_sae_dist.activations.summary import describe, distribution
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.launch.cli import build
from flash_sae_dist.training.job import parse_config
from tests.dist.jobs import finish, kill_after
from tests.dist.ranks import Running, rank_env, start_module
from tests.test_store_import import assert_same, everything, numbers
from tests.tiny_model import config_data, save_text

RUNNER = CliRunner()
WIDTHS = {"a": 8, "b": 8, "c": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make(folder: Path, name: str, *hookpoints: str, rows: int = 1024, seed: int = 0) -> str:
    """A store of hookpoints, whose rows are a function of hookpoint and seed."""
    named = []
    for h in hookpoints:
        file = folder / f"{h}-{rows}-{seed}.npy"
        np.save(file, numbers(rows, WIDTHS[h], seed + ord(h)).astype("float32"))
        named.append(f"{h}={file}")
    run_import(str(folder / name), named, ImportOptions("bfloat16"))
    return str(folder / name)


def recut(source: str, out: Path, shard_rows: int) -> str:
    """The same rows in the same order in shards of another size."""
    store = ActivationStore.open(source)
    geometry = Geometry(store.rows, shard_rows, 16)
    writer = StoreWriter(str(out), {}, create=True)
    writer.create(geometry, store.widths, store.dtype, {})
    for shard in range(geometry.num_shards):
        rows = geometry.shard_range(shard)
        arrays = {name: store.read(name, *rows) for name in array_names(store.widths)}
        writer.write_shard(geometry, shard, arrays)
    writer.finish(geometry, store.hookpoints, store.num_documents())
    return str(out)


def linked(path: str) -> set[str]:
    """Files of rows that are another store's, too."""
    found = (p for p in Path(path).rglob("*") if p.is_file() and p.stat().st_nlink > 1)
    return {p.relative_to(path).as_posix() for p in found}


@pytest.mark.parametrize("copy", [False, True])
def test_other_hookpoints_of_the_same_rows(tmp_path: Path, copy: bool) -> None:
    parts = [make(tmp_path, "1", "a", "c"), make(tmp_path, "2", "b")]
    both = make(tmp_path, "both", "a", "c", "b")
    out = str(tmp_path / "out")
    told = run_merge(out, parts, copy=copy)
    of = 6 * ActivationStore.open(out).geometry.num_shards
    assert f"{of} of {of} files" in told
    assert_same(out, both)
    assert len(linked(out)) == (0 if copy else of)
    assert ActivationStore.open(out).made_of("b") == ActivationStore.open(both).made_of("b")
    assert "nothing to do" in run_merge(out, parts, copy=copy)
    for part in parts:
        shutil.rmtree(part)
    ActivationStore.open(out).verify()


def test_other_hookpoints_cut_in_another_way(tmp_path: Path) -> None:
    first, other = make(tmp_path, "1", "a"), make(tmp_path, "2", "b")
    run_merge(str(tmp_path / "out"), [first, recut(other, tmp_path / "recut", 32)])
    assert_same(tmp_path / "out", make(tmp_path, "both", "a", "b"))
    assert {p.split("/")[0] for p in linked(str(tmp_path / "out"))} == {"activations", "tokens"}
    assert not [p for p in linked(str(tmp_path / "out")) if p.startswith("activations/b")]


@pytest.mark.parametrize(
    ("rows", "files"),
    [((1024, 1024), 4 * 32 - 16), ((1024, 500), 4 * 16), ((1000, 1024), 4 * 15), ((7, 3, 9), 0)],
)
def test_rows_behind_one_another(tmp_path: Path, rows: tuple[int, ...], files: int) -> None:
    """Files serve as they are as far as shards begin where they began."""
    parts = [
        recut(make(tmp_path, f"{n}", "a", rows=r, seed=n), tmp_path / f"recut{n}", 64)
        for n, r in enumerate(rows)
    ]
    if rows[1] == 500:
        parts[1] = str(tmp_path / "1")
    out = str(tmp_path / "out")
    run_merge(out, parts)
    assert len(linked(out)) == files
    found, each = everything(out), [everything(part) for part in parts]
    first = np.cumsum([0, *rows])
    for number, (part, start) in enumerate(zip(each, first, strict=False)):
        at = slice(start, start + rows[number])
        for name in ("activations/a", "tokens/ids", "tokens/position"):
            assert np.array_equal(found[name][at], part[name])
        assert np.array_equal(found["tokens/document"][at], part["tokens/document"] + start)
    store = ActivationStore.open(out)
    assert store.num_documents() == sum(rows)
    mean = sum(part["mean/a"] * r for part, r in zip(each, rows, strict=True)) / sum(rows)
    np.testing.assert_allclose(store.mean("a"), mean, rtol=1e-12)


def test_stores_that_do_not_fit(tmp_path: Path) -> None:
    a = make(tmp_path, "a", "a")
    out = str(tmp_path / "out")
    half = str(tmp_path / "half")
    run_import(half, [f"b={tmp_path}/a-1024-0.npy"], ImportOptions("float16"))
    other = str(tmp_path / "other")
    run_import(other, [f"b={tmp_path}/a-1024-0.npy"], ImportOptions(seed=1))
    np.save(tmp_path / "wide.npy", numbers(64, 9))
    wide = str(tmp_path / "wide")
    run_import(wide, [f"a={tmp_path}/wide.npy"], ImportOptions())
    for stores, words in (
        ([a], "fewer than two"),
        ([a, a], "hold the same rows; leave one out"),
        ([a, half], "holds float16, .* bfloat16"),
        ([a, other], r"another order \(tokens/document differs\)"),
        ([a, wide], "a has width 9 in .* 8 in"),
        ([a, make(tmp_path, "ab", "a", "b")], "a is in .* not all their hookpoints"),
        ([a, make(tmp_path, "short", "b", rows=100)], "has 100 rows, .* 1,024"),
        ([a, str(tmp_path / "none")], "is no activation store"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_merge(out, stores)
    with pytest.raises(ConfigError, match="is one of the stores|differs from"):
        run_merge(a, [a, make(tmp_path, "b", "b")])
    assert not Path(out).exists()
    run_merge(out, [a, str(tmp_path / "b")])
    with pytest.raises(ConfigError, match=r"merge.hookpoints=.* differs from"):
        run_merge(out, [a, make(tmp_path, "c", "c")])
    with pytest.raises(ConfigError, match="is made of other stores"):
        run_merge(out, [make(tmp_path, "a2", "a", seed=9), str(tmp_path / "b")])


def assert_table_is_of_rows(store: ActivationStore) -> None:
    """Each row stands once in the token table, at the token that the row's arrays tell."""
    row = store.read("text/row", 0, 10**6)
    has = row >= 0
    np.testing.assert_array_equal(np.sort(row[has]), np.arange(store.rows))
    for name in ("ids", "document", "position"):
        values = store.read(f"tokens/{name}", 0, store.rows)
        np.testing.assert_array_equal(store.read(f"text/{name}", 0, 10**6)[has], values[row[has]])
    store.verify()


def test_token_tables_of_any_cut_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of few sequences, whose last ones are not full."""
    monkeypatch.setattr(text_parts, "_PART_TOKENS", 24 * 16)
    data, stores = config_data(tmp_path, num_tokens=900), []
    for seed in range(2):
        save_text(tmp_path / "text.jsonl", seed=seed)
        data["cache"]["store"] = str(tmp_path / str(seed))
        run_cache(parse_config(data), Accelerator(cpu=True))
        stores.append(data["cache"]["store"])
    run_merge(str(tmp_path / "long"), stores)
    long = ActivationStore.open(str(tmp_path / "long"))
    assert len(list(tmp_path.glob("long/records/text-*.json"))) > 4
    assert_table_is_of_rows(long)
    before = ActivationStore.open(stores[0])
    own = before.read("text/ids", 0, 10**6)
    np.testing.assert_array_equal(long.read("text/ids", 0, len(own)), own)
    part = tmp_path / "long/text/ids/c/1/0"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(UserError, match="part 1 of the text is damaged"):
        long.verify()


def test_stores_without_a_text_merge_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_merge(str(tmp_path / "out"), [make(tmp_path, "1", "a"), make(tmp_path, "2", "b")])
    assert ActivationStore.open(str(tmp_path / "out")).text_shape() is None
    assert "token table" not in caplog.text


def test_cached_stores_keep_what_they_are_made_of(tmp_path: Path) -> None:
    data = config_data(tmp_path, shard_mib=0.01)
    hookpoints = data["cache"]["hookpoints"]
    stores = []
    for name, some in (("x", hookpoints[:1]), ("y", hookpoints[1:]), ("both", hookpoints)):
        data["cache"] |= {"store": str(tmp_path / name), "hookpoints": some}
        run_cache(parse_config(data), Accelerator(cpu=True))
        stores.append(data["cache"]["store"])
    out = str(tmp_path / "out")
    run_merge(out, stores[:2])
    assert_same(out, stores[2])
    merged = ActivationStore.open(out)
    for hookpoint in hookpoints:
        assert merged.made_of(hookpoint) == ActivationStore.open(stores[2]).made_of(hookpoint)
    for name in ("ids", "document", "position", "keep", "row"):
        tables = [ActivationStore.open(s).read(f"text/{name}", 0, 10**6) for s in (out, stores[2])]
        np.testing.assert_array_equal(*tables)
    assert_table_is_of_rows(merged)
    assert merged.knows_model()
    assert describe(merged)["model"] == describe(ActivationStore.open(stores[0]))["model"]
    save_text(tmp_path / "text.jsonl", seed=3)
    data["cache"] |= {"store": str(tmp_path / "z"), "hookpoints": hookpoints}
    run_cache(parse_config(data), Accelerator(cpu=True))
    run_merge(str(tmp_path / "long"), [stores[2], str(tmp_path / "z")])
    long = ActivationStore.open(str(tmp_path / "long"))
    assert long.rows == 3000
    assert "text" not in long.made_of()["parts"]
    assert_table_is_of_rows(long)
    each = [ActivationStore.open(s) for s in (str(tmp_path / "z"), out)]
    size, *sizes = (s.array("text/ids").shape[0] for s in (long, *each))
    assert size == sum(sizes)
    assert long.made_of()["parts"]["model weights"] == merged.made_of()["parts"]["model weights"]


def test_a_stopped_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [make(tmp_path, "1", "a", rows=1000), make(tmp_path, "2", "a", rows=900, seed=1)]
    asked = iter([0] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(ending, "requested", lambda: next(asked, 15))
        with pytest.raises(ending.StopRequested, match=r"\d+ of 30 shards are kept"):
            run_merge(str(tmp_path / "out"), parts)
    run_merge(str(tmp_path / "out"), parts)
    run_merge(str(tmp_path / "whole"), parts)
    assert_same(tmp_path / "out", tmp_path / "whole")


def start_merge(out: Path, parts: list[str]) -> list[Running]:
    args = ["merge", str(out), *parts]
    module = "flash_sae_dist.launch.store"
    return [start_module(module, args, rank_env(0, 1, 0), out.with_suffix(".log"))]


@pytest.mark.slow
def test_a_killed_merge_goes_on(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = [
        recut(make(tmp_path, str(n), "a", "b", rows=4000 - n, seed=n), tmp_path / f"r{n}", 64)
        for n in range(2)
    ]
    run_merge(str(tmp_path / "whole"), parts)
    for count in (1, 50, 90):
        job = start_merge(tmp_path / "killed", parts)
        kill_after(job, tmp_path / "killed/records", "shard-*.json", count, rng)
    finish(start_merge(tmp_path / "killed", parts))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def run(*args: str) -> str:
    result = RUNNER.invoke(build(), ["store", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.output)


def test_info_and_stats_tell_what_there_is(tmp_path: Path) -> None:
    store = make(tmp_path, "s", "a", "c")
    text = run("info", store)
    for word in ("1,024", "import", "bfloat16", "hookpoint", "a-1024-0.npy"):
        assert word in text
    told = json.loads(run("info", store, "--json"))
    assert told["hookpoints"]["c"]["width"] == 3
    rows = numbers(1024, 8, ord("a"))
    assert told["hookpoints"]["a"]["rms"] == pytest.approx(np.sqrt((rows**2).mean()))
    assert told["rows"] == told["documents"] == 1024
    found = json.loads(run("stats", store, "a", "--rows", "0", "--json"))["a"]
    norms = np.linalg.norm(rows, axis=1)
    assert found["rows"] == 1024
    assert found["max_norm"] == pytest.approx(norms.max())
    assert found["norms"]["0.5"] == pytest.approx(np.quantile(norms, 0.5))
    assert "median kurtosis" in run("stats", store)
    assert "1 checked, 1 whole" in run("verify", store)
    result = RUNNER.invoke(build(), ["store", "stats", store, "aa"])
    assert result.exit_code == 2
    assert "did you mean 'a'" in result.output


def test_statistics_of_dimensions(tmp_path: Path) -> None:
    """Against their definitions, with a massive row, a heavy and a constant dimension."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2000, 6)) + 2
    rows[:, 3] = 5
    rows[:, 1] = generator.standard_t(3, 2000) * 4
    rows[77] *= 100
    np.save(tmp_path / "x.npy", rows)
    run_import(str(tmp_path / "s"), [f"x={tmp_path}/x.npy"], ImportOptions("float32"))
    store = ActivationStore.open(str(tmp_path / "s"))
    found = distribution(store, "x", store.rows)
    x = rows.astype("float32").astype(np.float64)
    away = x - x.mean(0)
    kurtosis = (away**4).mean(0) / np.maximum((away**2).mean(0), 1e-300) ** 2
    for number, value, share in found.top_dims:
        assert value == pytest.approx(kurtosis[number], rel=1e-6)
        assert share == pytest.approx((x[:, number] ** 2).sum() / (x**2).sum())
    assert found.massive == pytest.approx(1 / 2000)
    assert found.constant_dims == 0, "the massive row moved it"
    small: Any = distribution(store, "x", 100)
    assert 100 <= small.rows < 200
