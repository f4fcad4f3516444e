"""Rows of huge norms are left out of stores: which ones, the same for any number of processes and
after a kill; no training, evaluation or statistics see them.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flash_sae_dist.activations.damage import damages
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.holdout import held_out
from flash_sae_dist.activations.importing import ImportOptions, run_import
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.merging import run_merge
from flash_sae_dist.activations.pipeline import Pipeline
from flash_sae_dist.activations.store import ActivationStore, array_names
from flash_sae_dist.activations.summary import describe, distribution
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.launch.cli import build
from flash_sae_dist.training.job import parse_config
from tests.dist.ranks import free_port, rank_env, start_module, wait
from tests.tiny_model import config_data, write_config

RESIDUAL, MLP = "model.layers.0", "model.layers.1.mlp"
Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def scale_word(root: Path, factor: float, word: int = 11) -> None:
    """Makes a word's embedding huge: so is the residual behind it, and no MLP's output."""
    file = root / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][word] *= factor
    save_file(weights, file, {"format": "pt"})


def cache(root: Path, **keys: Any) -> ActivationStore:
    """The tiny model's store under root/store.zarr, its checksums verified."""
    run_cache(parse_config(config_data(root, shard_mib=0.002, **keys)), Accelerator(cpu=True))
    store = ActivationStore.open(str(root / "store.zarr"))
    store.verify()
    return store


def everything(store: ActivationStore) -> dict[str, Array]:
    found = {name: store.read(name, 0, store.rows) for name in array_names(store.widths)}
    found |= {f"mean/{h}": store.mean(h) for h in store.hookpoints}
    return found | {f"over/{h}": rows for h, rows in store.over.items()}


def assert_same(a: dict[str, Array], b: dict[str, Array]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(with huge rows, the same but them) of a model one of whose words has a huge embedding."""
    whole, limited = (tmp_path_factory.mktemp(name) for name in ("whole", "limited"))
    config_data(whole)
    scale_word(whole, 1000)
    shutil.copytree(whole, limited, dirs_exist_ok=True)
    cache(whole)
    cache(limited, max_norm_ratio=10)
    return whole, limited


def test_huge_rows_are_left_out_and_nothing_else_changes(stores: tuple[Path, Path]) -> None:
    whole, store = (ActivationStore.open(str(root / "store.zarr")) for root in stores)
    norms = np.linalg.norm(whole.read(f"activations/{RESIDUAL}", 0, whole.rows), axis=1)
    wanted = np.flatnonzero(norms > 10 * np.median(norms))
    assert 5 < len(wanted) < 100
    np.testing.assert_array_equal(store.left_out, wanted)
    np.testing.assert_array_equal(store.over[RESIDUAL], wanted)
    assert (store.read("tokens/ids", 0, store.rows)[wanted] == 11).all()
    assert store.kept_rows == store.rows - len(wanted) == whole.rows - len(wanted)
    for name in array_names(store.widths):
        rows, before = store.read(name, 0, store.rows), whole.read(name, 0, whole.rows)
        if name.startswith("activations/"):
            assert (rows[wanted] == 0).all(), "also where its own norm is usual"
            rows, before = (np.delete(values, wanted, axis=0) for values in (rows, before))
        np.testing.assert_array_equal(rows, before, err_msg=name)
    row = store.read("text/row", 0, 10**6)
    assert not np.isin(row, wanted).any()
    assert (row >= 0).sum() == store.kept_rows


def test_statistics_are_of_what_is_kept(stores: tuple[Path, Path]) -> None:
    store = ActivationStore.open(str(stores[1] / "store.zarr"))
    for name, width in store.widths.items():
        rows = store.read(f"activations/{name}", 0, store.rows).astype(np.float64)
        rows = np.delete(rows, store.left_out, axis=0)
        np.testing.assert_allclose(store.mean(name), rows.mean(axis=0), atol=1e-12)
        rms = math.sqrt((rows**2).sum(axis=1).mean() / width)
        assert store.root_mean_square(name) == pytest.approx(rms, rel=1e-12)
        found = distribution(store, name, store.rows)
        assert (found.rows, found.rms) == (store.kept_rows, pytest.approx(rms))
        assert found.massive == 0


def test_no_stream_serves_them(stores: tuple[Path, Path]) -> None:
    store = ActivationStore.open(str(stores[1] / "store.zarr"))

    def served(**how: Any) -> list[bytes]:
        loader = ActivationLoader(store, RESIDUAL, batch_tokens=1, seed=0, num_steps=0, **how)
        rows = loader.order.rows
        loader = ActivationLoader(store, RESIDUAL, batch_tokens=rows, seed=0, num_steps=1, **how)
        with loader:
            return sorted(row.numpy().tobytes() for row in next(iter(loader)))

    out = held_out(store, 0.2).rows
    assert len(out)
    assert not np.isin(out, store.left_out).any()
    rows = store.read(f"activations/{RESIDUAL}", 0, store.rows)
    kept = np.setdiff1d(np.arange(store.rows), store.left_out)
    train = np.setdiff1d(kept, out)
    for wanted, how in (
        (kept, {}),
        (train, {"holdout": 0.2}),
        (out, {"holdout": 0.2, "only_held_out": True}),
    ):
        assert served(**how) == sorted(row.tobytes() for row in rows[wanted])


def test_it_is_told(
    stores: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "again"
    shutil.copytree(stores[1], root)
    shutil.rmtree(root / "store.zarr")
    with caplog.at_level(logging.INFO):
        store = cache(root, max_norm_ratio={"model.layers.*": 10})
    count, rows = len(store.left_out), store.rows
    line = f"leaves out {count} of 1,500 rows ({count / rows:.3%}): {count} for {RESIDUAL}"
    assert f"cache.max_norm_ratio {line}" in caplog.text
    assert list(store.over) == [RESIDUAL], "* is one part of a name"
    np.testing.assert_array_equal(
        store.left_out, ActivationStore.open(str(stores[1] / "store.zarr")).left_out
    )
    told = describe(store)
    assert told["left_out"] == {
        "rows": count, "share": count / rows, "above the limit of": {RESIDUAL: count}
    }  # fmt: skip
    assert told["norm_limits"][RESIDUAL]["of_rows"] == rows
    out = CliRunner().invoke(build(), ["store", "info", store.path])
    assert out.exit_code == 0
    assert f"rows={count}" in out.output


def test_processes_and_kills_change_nothing(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = everything(ActivationStore.open(str(stores[1] / "store.zarr")))
    keys = {"shard_mib": 0.002, "max_norm_ratio": 10}
    for name in ("two", "killed"):
        shutil.copytree(stores[0], tmp_path / name)
        shutil.rmtree(tmp_path / name / "store.zarr")
    two = tmp_path / "two"
    file, port = write_config(two / "config.yaml", config_data(two, **keys)), free_port()
    ranks = [
        start_module(
            "flash_sae_dist.launch.cache", [str(file)], rank_env(rank, 2, port), two / f"{rank}.log"
        )
        for rank in range(2)
    ]
    assert wait(ranks, timeout=180) == [0, 0], [rank.text() for rank in ranks]
    assert_same(everything(ActivationStore.open(str(two / "store.zarr"))), wanted)

    record, made = StoreWriter.record_shard, []

    def dies(self: StoreWriter, geometry: Any, shard: int, *rest: Any) -> None:
        if len(made) == 3:
            raise OSError("killed")
        made.append(shard)
        record(self, geometry, shard, *rest)

    def no_sample(*args: Any) -> None:
        raise AssertionError("the limits of the first launch stand")

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "record_shard", dies)
        with pytest.raises(OSError, match="killed"):
            cache(killed, max_norm_ratio=10)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "sample_norms", no_sample)
        assert_same(everything(cache(killed, max_norm_ratio=10)), wanted)
    with pytest.raises(ConfigError, match="cache.max_norm_ratio=20.0 differs from 10.0"):
        cache(killed, max_norm_ratio=20)


def test_rows_beyond_a_type_are_left_out(stores: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "float16"
    shutil.copytree(stores[0], root)
    shutil.rmtree(root / "store.zarr")
    scale_word(root, 1e6)
    with pytest.raises(UserError, match="not finite in float16"):
        cache(root, dtype="float16", store=str(root / "whole.zarr"))
    store = cache(root, dtype="float16", max_norm_ratio=10)
    wanted = np.flatnonzero(store.read("tokens/ids", 0, store.rows) == 11)
    np.testing.assert_array_equal(store.left_out, wanted)


@pytest.mark.parametrize(
    "value", [1, 0, -3, True, math.inf, math.nan, "10", {}, {RESIDUAL: 1}, {RESIDUAL: "10"}]
)
def test_what_is_no_ratio_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="cache.max_norm_ratio=.* leaves out rows by no ratio"):
        parse_config(config_data(tmp_path, max_norm_ratio=value))


def test_an_unknown_hookpoint_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model.layers.2' is none of the store's hookpoints"):
        cache(tmp_path, max_norm_ratio={"model.layers.2": 10})
    assert not (tmp_path / "store.zarr").exists()


ROWS, HUGE_A, HUGE_B = 2000, [3, 700, 1999], [700, 1200]


def arrays(folder: Path) -> list[str]:
    """NAME=PATH of two hookpoints with huge rows in other places; column 0 numbers them."""
    rng, named = np.random.default_rng(0), []
    for name, width, huge in (("a", 6, HUGE_A), ("b", 9, HUGE_B)):
        rows = rng.normal(size=(ROWS, width)).astype(np.float32)
        rows[huge] *= 1e4
        np.save(folder / f"{name}.npy", rows)
        named.append(f"{name}={folder / name}.npy")
    return named


def numbers_of(rows: list[int] | Array, store: ActivationStore) -> list[int]:
    """Rows of the files by rows of a store: each is a document of its own."""
    return sorted(store.read("tokens/document", 0, store.rows)[rows].tolist())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_imports_leave_rows_out(tmp_path: Path, dtype: str) -> None:
    options = ImportOptions(dtype, shard_mib=0.01, max_norm_ratio=("20",))
    told = run_import(str(tmp_path / "s.zarr"), arrays(tmp_path), options)
    assert "--max-norm-ratio leaves out 4 of 2,000 rows (0.200%): 3 for a, 2 for b" in told
    store = ActivationStore.open(str(tmp_path / "s.zarr"))
    store.verify()
    assert numbers_of(store.left_out, store) == sorted({*HUGE_A, *HUGE_B})
    assert numbers_of(store.over["b"], store) == HUGE_B
    for name in ("a", "b"):
        rows = store.read(f"activations/{name}", 0, ROWS)
        assert (rows[store.left_out] == 0).all()
        kept = np.delete(rows, store.left_out, axis=0).astype(np.float64)
        np.testing.assert_allclose(store.mean(name), kept.mean(axis=0), atol=1e-9)
    assert "nothing to do" in run_import(store.path, arrays(tmp_path), options)
    with pytest.raises(ConfigError, match="import.max_norm_ratio"):
        run_import(store.path, arrays(tmp_path), options._replace(max_norm_ratio=("b=20",)))


def test_a_ratio_of_one_hookpoint(tmp_path: Path) -> None:
    options = ImportOptions("float32", max_norm_ratio=("b=20",))
    run_import(str(tmp_path / "s.zarr"), arrays(tmp_path), options)
    store = ActivationStore.open(str(tmp_path / "s.zarr"))
    assert numbers_of(store.left_out, store) == HUGE_B
    assert store.over.keys() == {"b"}


@pytest.mark.parametrize("given", ["1", "0.5", "b=nan", "x", "a=", "c=10"])
def test_an_import_refuses_what_is_no_ratio(tmp_path: Path, given: str) -> None:
    options = ImportOptions(max_norm_ratio=(given,))
    with pytest.raises(ConfigError, match="--max-norm-ratio"):
        run_import(str(tmp_path / "s.zarr"), arrays(tmp_path), options)
    assert not (tmp_path / "s.zarr").exists()


def test_rows_that_are_mostly_zeros_have_no_limit(tmp_path: Path) -> None:
    rows = np.zeros((100, 4), np.float32)
    rows[:40] = 1
    np.save(tmp_path / "a.npy", rows)
    options = ImportOptions(max_norm_ratio=("10",))
    with pytest.raises(ConfigError, match="the median norm of a is 0, of which no ratio makes"):
        run_import(str(tmp_path / "s.zarr"), [f"a={tmp_path / 'a.npy'}"], options)


def test_merged_stores_leave_out_the_same(tmp_path: Path) -> None:
    named = arrays(tmp_path)
    options = ImportOptions("float32", shard_mib=0.01, max_norm_ratio=("20",))
    for name, seed, which in (("one", 0, named), ("two", 1, named), ("a", 0, named[:1]),
                              ("b", 0, named[1:])):  # fmt: skip
        run_import(str(tmp_path / name), which, options._replace(seed=seed))
    one, two = (ActivationStore.open(str(tmp_path / name)) for name in ("one", "two"))
    run_merge(str(tmp_path / "long"), [one.path, two.path])
    store = ActivationStore.open(str(tmp_path / "long"))
    store.verify()
    for name in ("a", "b"):
        wanted = np.concatenate([one.over[name], two.over[name] + ROWS])
        np.testing.assert_array_equal(store.over[name], wanted)
        mean = (one.mean(name) + two.mean(name)) / 2
        np.testing.assert_allclose(store.mean(name), mean, rtol=1e-9)
    with pytest.raises(ConfigError, match="leave out other rows for their norms"):
        run_merge(str(tmp_path / "both"), [str(tmp_path / "a"), str(tmp_path / "b")])


def test_damage_is_told_and_mended(tmp_path: Path) -> None:
    options = ImportOptions("float32", max_norm_ratio=("20",))
    named = arrays(tmp_path)
    run_import(str(tmp_path / "s.zarr"), named, options)
    store = ActivationStore.open(str(tmp_path / "s.zarr"))
    wanted = store.left_out
    for file in sorted(tmp_path.glob("s.zarr/left_out/**/*")):
        if file.is_file():
            before = file.read_bytes()
            file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            again = ActivationStore.open(store.path)
            assert [d for d in damages(again) if "left_out" in str(d)], file
            with pytest.raises(UserError, match="which makes it anew"):
                _ = again.left_out
            run_import(store.path, named, options)
            np.testing.assert_array_equal(ActivationStore.open(store.path).left_out, wanted)
    norms = tmp_path / "s.zarr" / "records" / "norms.json"
    norms.write_text(norms.read_text().replace('"sample": 2000', '"sample": 2001'))
    assert any("norms.json" in str(d) for d in damages(ActivationStore.open(store.path)))
    assert json.loads(norms.read_text())["sample"] == 2001
