"""Own arrays become a store: every format and type, the same rows after a kill, one sentence for
what is no array of rows; train, grid, evaluate and export need no language model.
"""

from __future__ import annotations

import json
import logging
import pickle
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from flash_sae_dist import ending
from flash_sae_dist.activations.importing import Importer, ImportOptions, run_import
from flash_sae_dist.activations.store import ActivationStore, array_names
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.launch.cli import build
from tests.dist.jobs import finish, kill_after
from tests.dist.ranks import Running, rank_env, start_module
from tests.tiny_model import write_config

RUNNER = CliRunner()
Array = npt.NDArray[Any]
SUFFIXES = (".npy", ".npz", "-compressed.npz", ".safetensors", ".pt", ".parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def numbers(rows: int, width: int, seed: int = 0) -> Array:
    """Rows that every float type holds as they are: bfloat16 has 8 bits."""
    return np.random.default_rng(seed).integers(-100, 100, (rows, width)).astype(np.float64)


def write(file: Path, rows: Array, dtype: str) -> Path:
    """Rows as a file of its suffix."""
    name = file.name
    if name.endswith((".safetensors", ".pt")):
        tensor = torch.from_numpy(rows).to(getattr(torch, dtype))
        if name.endswith(".pt"):
            torch.save({"rows": tensor, "about": "mine"}, file)
        else:
            save_file({"rows": tensor, "other": torch.zeros(3)}, file)
        return file
    rows = rows.astype(dtype)
    if name.endswith(".npy"):
        np.save(file, rows)
    elif name.endswith("-compressed.npz"):
        np.savez_compressed(file, rows=rows)
    elif name.endswith(".npz"):
        np.savez(file, other=np.zeros(3), rows=rows)
    else:
        values = pa.array(rows.ravel())
        column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
        pq.write_table(pa.table({"rows": column}), file, row_group_size=11)
    return file


def stored(path: Path | str, name: str = "rows") -> tuple[Array, Array]:
    """(rows as float64, document of each) of a store whose checksums hold."""
    store = ActivationStore.open(str(path))
    store.verify()
    rows = store.read(f"activations/{name}", 0, store.rows)
    if store.dtype == "bfloat16":
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float64), store.read("tokens/document", 0, store.rows)


def everything(path: Path | str) -> dict[str, Array]:
    """Every array of a store."""
    store = ActivationStore.open(str(path))
    store.verify()
    found = {name: store.read(name, 0, store.rows) for name in array_names(store.widths)}
    return found | {f"mean/{h}": store.mean(h) for h in store.hookpoints}


def assert_same(a: Path | str, b: Path | str) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert np.array_equal(value, right[name]), name


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_format_and_type(
    tmp_path: Path, suffix: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    if dtype == "bfloat16" and suffix not in (".safetensors", ".pt"):
        pytest.skip("numpy and Arrow have no bfloat16")
    caplog.set_level(logging.INFO)
    rows = numbers(300, 12)
    for n, (a, b) in enumerate(((0, 100), (100, 101), (101, 300))):
        write(tmp_path / f"{n}{suffix}", rows[a:b], dtype)
    run_import(
        str(tmp_path / "s"), [f"rows={tmp_path}/*{suffix}"], ImportOptions("float32", shard_mib=1)
    )
    found, document = stored(tmp_path / "s")
    assert sorted(document.tolist()) == list(range(300))
    assert np.array_equal(found, rows[document])
    assert (np.diff(document) != 1).mean() > 0.8, "shuffled over all files"
    assert (f"rows: {dtype} is cast to float32" in caplog.text) == (dtype != "float32")


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_of_rows(tmp_path: Path, data: st.DataObject) -> None:
    """Files of any sizes and formats, hookpoints of other widths, shards of any size."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # drawing may stop the function at any draw
    total = data.draw(st.integers(1, 2500))
    widths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    rows = [numbers(total, w, seed) for seed, w in enumerate(widths)]
    named = []
    for number, values in enumerate(rows):
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, total), max_size=3)) | {total})]
        suffix, dtype = data.draw(st.sampled_from(SUFFIXES)), data.draw(st.sampled_from("23"))
        for a, b in zip(cuts, cuts[1:], strict=False):
            file = folder / f"h{number}-{a:05d}{suffix}"
            write(file, values[a:b], {"2": "float16", "3": "float32"}[dtype])
        named.append(
            f"h.{number}={folder}/h{number}-*{suffix}::rows".removesuffix("::rows")
            + ("" if suffix == ".npy" else "::rows")
        )
    each = data.draw(st.integers(1, 9))
    mib = data.draw(st.sampled_from([0.001, 0.01, 128]))
    run_import(str(folder / "s"), named, ImportOptions("bfloat16", 3, mib, str(each)))
    store = ActivationStore.open(str(folder / "s"))
    place = store.read("tokens/position", 0, total)
    for number, values in enumerate(rows):
        found, document = stored(folder / "s", f"h.{number}")
        at = document.astype(np.int64) * each + place
        assert sorted(at.tolist()) == list(range(total))
        assert np.array_equal(found, values[at])
    assert store.num_documents() == -(-total // each)
    assert (store.read("tokens/ids", 0, total) == -1).all()


def test_long_stores_are_shuffled_in_short_runs(tmp_path: Path) -> None:
    """Of rows that lie beside one another a shard takes some, from everywhere."""
    write(tmp_path / "a.npy", numbers(40_000, 2), "float32")
    run_import(str(tmp_path / "s"), [f"rows={tmp_path}/a.npy"], ImportOptions())
    store = ActivationStore.open(str(tmp_path / "s"))
    start, stop = store.geometry.shard_range(0)
    document = np.sort(store.read("tokens/document", start, stop))
    runs = np.flatnonzero(np.diff(document) != 1)
    assert len(runs) > 40
    assert document[-1] - document[0] > 35_000


def saelens_folder(folder: Path, hooks: dict[str, Array], ids: Array | None) -> Path:
    """What its cache runner leaves: a column a hook of [context, width], and the token ids."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    columns: dict[str, Any] = {h: Array2D(v.shape[1:], "float32") for h, v in hooks.items()}
    values: dict[str, Any] = dict(hooks)
    if ids is not None:
        columns["token_ids"] = Sequence(Value("int32"), length=ids.shape[1])
        values["token_ids"] = ids
    data = Dataset.from_dict(values, features=Features(columns))
    data.save_to_disk(str(folder), num_shards=2)
    return folder


def test_saelens_cached_activations(tmp_path: Path) -> None:
    rows = numbers(20 * 8, 6).reshape(20, 8, 6).astype("float32")
    ids = np.arange(160, dtype=np.int32).reshape(20, 8)
    hook = "blocks.1.hook_resid_post"
    saelens_folder(tmp_path / "cache", {hook: rows, "blocks.0.hook_mlp_out": rows + 1}, ids)
    run_import(str(tmp_path / "s"), [f"{hook}={tmp_path}/cache"], ImportOptions("float32"))
    store = ActivationStore.open(str(tmp_path / "s"))
    found, document = stored(tmp_path / "s", hook)
    place = store.read("tokens/position", 0, store.rows)
    assert np.array_equal(found, rows[document, place])
    assert np.array_equal(store.read("tokens/ids", 0, store.rows), ids[document, place])
    assert store.num_documents() == 20
    with pytest.raises(ConfigError, match=r"holds 2 arrays .* name one, as in mine=.*::blocks"):
        run_import(str(tmp_path / "t"), [f"mine={tmp_path}/cache"], ImportOptions())
    named = [f"mine={tmp_path}/cache::blocks.0.hook_mlp_out"]
    run_import(str(tmp_path / "t"), named, ImportOptions("float32"))
    other, document = stored(tmp_path / "t", "mine")
    place = ActivationStore.open(str(tmp_path / "t")).read("tokens/position", 0, 160)
    assert np.array_equal(other, rows[document, place] + 1)


def test_sequences_in_parquet(tmp_path: Path) -> None:
    rows = numbers(30 * 4, 5).reshape(30, 4, 5)
    table = pa.table({"token_ids": [[1] * 4] * 30, "acts": rows.tolist()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    run_import(str(tmp_path / "s"), [f"rows={tmp_path}/a.parquet"], ImportOptions("float32"))
    found, document = stored(tmp_path / "s")
    place = ActivationStore.open(str(tmp_path / "s")).read("tokens/position", 0, 120)
    assert np.array_equal(found, rows[document, place])


def test_documents_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", numbers(100, 4), "float32")
    documents = np.repeat([4, 0, 9], [50, 30, 20])
    np.save(tmp_path / "d.npy", documents)
    options = ImportOptions("float32", documents=str(tmp_path / "d.npy"))
    run_import(str(tmp_path / "s"), [f"rows={tmp_path}/a.npy"], options)
    found, document = stored(tmp_path / "s")
    store = ActivationStore.open(str(tmp_path / "s"))
    place = store.read("tokens/position", 0, 100)
    at = np.array([{4: 0, 0: 50, 9: 80}[int(d)] for d in document]) + place
    assert sorted(at.tolist()) == list(range(100))
    assert np.array_equal(found, numbers(100, 4)[at])
    assert store.num_documents() == 10
    for wrong, told in (([1] * 99, "numbers 99 rows, not 100"), ([-1] * 100, "not in 0 ..")):
        np.save(tmp_path / "d.npy", np.array(wrong))
        with pytest.raises(ConfigError, match=told):
            run_import(str(tmp_path / "t"), [f"rows={tmp_path}/a.npy"], options)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def bad_files(folder: Path) -> dict[str, str]:
    """Files that are no rows, by what is said of them."""
    good = numbers(10, 4)
    np.save(folder / "cube.npy", np.zeros((2, 3, 4)))
    np.save(folder / "flat.npy", np.zeros(5))
    np.save(folder / "none.npy", np.zeros((0, 4)))
    np.save(folder / "whole.npy", np.zeros((3, 4), np.int64))
    np.save(folder / "objects.npy", np.array([[Evil()]], dtype=object), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(pickle.dumps(Evil()))
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"rows": Evil()}, folder / "evil.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torch.zeros(3, 4).to_sparse(), folder / "sparse.pt")
    torch.save(torch.zeros(3, 4, dtype=torch.int8), folder / "int8.pt")
    write(folder / "torn.npy", good, "float32")
    for name in ("torn.npz", "torn.safetensors", "torn.pt", "torn.parquet"):
        write(folder / name, numbers(500, 40), "float32")
    for name in ("torn.npy", "torn.npz", "torn.safetensors", "torn.pt", "torn.parquet"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    np.savez(folder / "several.npz", a=good, b=good)
    (folder / "text.csv").write_text("1,2")
    (folder / "dir").mkdir()
    pq.write_table(pa.table({"rows": [[1.0, 2.0], [1.0]]}), folder / "ragged.parquet")
    pq.write_table(pa.table({"rows": [[1.0, None]]}), folder / "null.parquet")
    pq.write_table(pa.table({"rows": ["text"]}), folder / "words.parquet")
    return {
        "cube.npy": r"shape \[2, 3, 4\], not \[rows, width\]",
        "flat.npy": r"shape \[5\]",
        "none.npy": r"shape \[0, 4\]",
        "whole.npy": "holds int64",
        "objects.npy": "never unpickled",
        "pickle.npy": "never unpickled",
        "pickle.pt": "never unpickled",
        "evil.pt": "never unpickled",
        "list.pt": "holds a list",
        "sparse.pt": "sparse|never unpickled",
        "int8.pt": "holds int8",
        "torn.npy": "no whole .npy",
        "torn.npz": "no whole .npz",
        "torn.safetensors": "no whole .safetensors",
        "torn.pt": "torn.pt (is no whole .pt|cannot be read)",
        "torn.parquet": "no whole .parquet",
        "several.npz": r"2 arrays \(a, b\), none of them 'rows'; name one, as in rows=.*::a",
        "several.npz::c": "has no array 'c'",
        "text.csv": "none of .npy",
        "dir": "without the state.json",
        "null.parquet": "a number is null",
        "words.parquet": "no rows of floats",
        "absent-*.npy": "names no file",
    }


def test_what_is_no_rows_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = build()
    for name, words in bad_files(tmp_path).items():
        result = RUNNER.invoke(app, ["store", "import", "s.zarr", f"rows={tmp_path}/{name}"])
        assert result.exit_code == 2, (name, result.output)
        (line,) = (x for x in result.output.splitlines() if x.startswith("error: "))
        assert re.search(words, line), line
    with pytest.raises(UserError, match="items"):
        run_import("s.zarr", ["rows=ragged.parquet"], ImportOptions())
    assert not (tmp_path / "evil-was-here").exists()
    assert not list(tmp_path.glob("s.zarr/records/complete.json"))


def test_mistakes_in_names_and_numbers(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", numbers(10, 4), "float32")
    write(tmp_path / "b.npy", numbers(9, 4), "float32")
    write(tmp_path / "c.npy", numbers(10, 5), "float32")
    a, b, c = (f"{tmp_path}/{n}.npy" for n in "abc")
    for named, words in (
        ([f"x={a}", f"y={b}"], "x has 10, y has 9"),
        ([f"x={a}", f"x={c}"], r"c.npy has width 5, but .*a.npy of x 4"),
        ([a], "is no NAME=PATH"),
        ([], "no NAME=PATH is given"),
        ([f"../x={a}"], "no module's name"),
        (["x=s3://bucket/a.npy"], "is a URL"),
        ([f"x={a}::k"], "drop ::k"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_import(str(tmp_path / "s"), named, ImportOptions())
    with pytest.raises(ConfigError, match="stands where the store to make is named"):
        run_import(f"x={a}", [f"x={a}"], ImportOptions())
    with pytest.raises(ConfigError, match="--documents=0 makes"):
        run_import(str(tmp_path / "s"), [f"x={a}"], ImportOptions(documents="0"))
    with pytest.raises(ConfigError, match=r"cannot be written"):
        run_import("/proc/s", [f"x={a}"], ImportOptions())
    assert not (tmp_path / "s").exists()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    rows = numbers(200, 4)
    write(tmp_path / "0.npy", rows, "float32")
    for value, dtype, words in (
        (np.nan, "bfloat16", r"1\.npy has nan in row 17, column 2; leave that row out"),
        (np.inf, "float32", r"1\.npy has inf in row 17"),
        (1e6, "float16", r"1\.npy has 1000000\.0 in row 17, .* float16 cannot hold.*bfloat16"),
    ):
        rows[17, 2] = value
        write(tmp_path / "1.npy", rows, "float32")
        with pytest.raises(UserError, match=words):
            run_import(str(tmp_path / "s"), [f"x={tmp_path}/?.npy"], ImportOptions(dtype))
        shutil.rmtree(tmp_path / "s")
    rows[17, 2] = 1
    write(tmp_path / "1.npy", rows, "float32")
    run_import(str(tmp_path / "s"), [f"x={tmp_path}/?.npy"], ImportOptions("float16"))


def test_the_same_command_again_and_other_content(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", numbers(100, 4), "float32")
    named, out = [f"x={tmp_path}/a.npy"], str(tmp_path / "s")
    assert "100 rows of x" in run_import(out, named, ImportOptions())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert "nothing to do" in run_import(out, named, ImportOptions())
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    assert "nothing to do" in run_import(out, [f"x={tmp_path}/b.npy"], ImportOptions())
    assert before == {p: p.stat().st_mtime_ns for p in before}
    write(tmp_path / "a.npy", numbers(100, 4, seed=1), "float32")
    with pytest.raises(ConfigError, match="is made of other files: rows of x"):
        run_import(out, named, ImportOptions())
    for other in ({"dtype": "float32"}, {"seed": 1}, {"shard_mib": 1}):
        with pytest.raises(ConfigError, match=f"import.{next(iter(other))}=.* differs from"):
            run_import(out, [f"x={tmp_path}/b.npy"], ImportOptions(**other))
    with pytest.raises(ConfigError, match="--documents="):
        run_import(out, [f"x={tmp_path}/b.npy"], ImportOptions(documents="2"))


def test_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", numbers(2000, 4), "float32")
    named = [f"x={tmp_path}/a.npy"]
    run_import(str(tmp_path / "s"), named, ImportOptions())
    run_import(str(tmp_path / "t"), named, ImportOptions())
    (tmp_path / "s/activations/x/c/3/0").unlink()
    with pytest.raises(UserError, match=r"x/c/3/0 is missing .*store import"):
        ActivationStore.open(str(tmp_path / "s"))
    run_import(str(tmp_path / "s"), named, ImportOptions())
    assert_same(tmp_path / "s", tmp_path / "t")


def test_a_stop_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.npy", numbers(2000, 4), "float32")
    named = [f"x={tmp_path}/a.npy"]
    asked = iter([0] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(ending, "requested", lambda: next(asked, 15))
        with pytest.raises(ending.StopRequested, match=r"stopped by SIGTERM; \d+ of 16 shards"):
            run_import(str(tmp_path / "s"), named, ImportOptions())
    assert 0 < len(list(tmp_path.glob("s/records/shard-*"))) < 16
    with monkeypatch.context() as patch:
        # Another version may cut a new store in another way.
        patch.setattr("flash_sae_dist.activations.importing.make_geometry", None)
        run_import(str(tmp_path / "s"), named, ImportOptions())
    run_import(str(tmp_path / "t"), named, ImportOptions())
    assert_same(tmp_path / "s", tmp_path / "t")


def test_a_disk_without_space_and_a_second_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_sae_dist import files

    write(tmp_path / "a.parquet", numbers(100, 4), "float32")
    named, out = [f"x={tmp_path}/a.parquet"], str(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
        with pytest.raises(ConfigError, match="has 1,000 bytes free, but what is left of the imp"):
            run_import(out, named, ImportOptions())
    monkeypatch.setattr(files, "_WAIT_S", 0.2)
    with files.locked(tmp_path / "s"), pytest.raises(ConfigError, match="is at work in"):
        run_import(out, named, ImportOptions())


def start_import(out: Path, named: list[str]) -> list[Running]:
    args = ["import", str(out), *named, "--dtype", "float32", "--shard-mib", "0.02"]
    module = "flash_sae_dist.launch.store"
    return [start_module(module, args, rank_env(0, 1, 0), out.with_suffix(".log"))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_import_goes_on(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = numbers(60_000, 16)
    for n in range(3):
        write(tmp_path / f"{n}.npy", rows[n * 20_000 : (n + 1) * 20_000], "float32")
    write(tmp_path / "b.parquet", rows[:, :5], "float32")
    named = [f"a={tmp_path}/?.npy", f"b={tmp_path}/b.parquet::rows"]
    finish(start_import(tmp_path / "whole", named))
    for count in (1, 40):
        job = start_import(tmp_path / "killed", named)
        kill_after(job, tmp_path / "killed/records", "shard-*.json", count, rng)
    finish(start_import(tmp_path / "killed", named))
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert not (tmp_path / "killed/records/import").exists()


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_an_import_killed_often_goes_on(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = numbers(60_000, 16)
    write(tmp_path / "a.npy", rows, "float32")
    write(tmp_path / "b.parquet", rows[:, :5], "float32")
    named = [f"a={tmp_path}/a.npy", f"b={tmp_path}/b.parquet::rows"]
    finish(start_import(tmp_path / "whole", named))
    for _ in range(5):
        job = start_import(tmp_path / "killed", named)
        kill_after(job, tmp_path, "killed/records/*", rng.randint(1, 60), rng)
    finish(start_import(tmp_path / "killed", named))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_every_verb_on_imported_rows(tmp_path: Path) -> None:
    """From a config without model and text."""
    generator = np.random.default_rng(0)
    codes = generator.random((3000, 40)) * (generator.random((3000, 40)) < 0.1)
    rows = codes @ generator.standard_normal((40, 16)) + 3
    write(tmp_path / "a.npy", rows, "float32")
    app, out = build(), tmp_path / "mine.zarr"
    named = [f"layers.3={tmp_path}/a.npy"]
    result = RUNNER.invoke(app, ["store", "import", str(out), *named], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    train = {"num_tokens": 6400, "batch_tokens": 64, "lr": 1e-2, "warmup_steps": 5}
    data = {
        "output": str(tmp_path / "run"),
        "store": str(out),
        "sae": {"k": 4, "d_sae": 64},
        "train": {**train, "hookpoint": "layers.3"},
        "grid": {"values": {"sae.k": [2, 4]}},
        "evaluate": {"num_tokens": 512},
        "trackers": [],
    }
    config = write_config(tmp_path / "c.yaml", data)
    for verb in ("train", "evaluate", "export", "grid", "evaluate", "verify"):
        where = str(tmp_path / "run" if verb == "verify" else config)
        result = RUNNER.invoke(app, [verb, where], catch_exceptions=False)
        assert result.exit_code == 0, (verb, result.output)
    records = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert len(records) == 3
    assert all(0 < r["fvu"] < 1 and "loss" not in r for r in records)


def test_evaluate_tells_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import Accelerator

    from flash_sae_dist.evaluation.runner import run_evaluation
    from flash_sae_dist.grid.runner import run_jobs
    from flash_sae_dist.training.job import parse_config

    write(tmp_path / "a.npy", numbers(500, 8), "float32")
    run_import(str(tmp_path / "s"), [f"x={tmp_path}/a.npy"], ImportOptions())
    config = parse_config(
        {
            "output": str(tmp_path / "run"),
            "store": str(tmp_path / "s"),
            "sae": {"k": 2, "d_sae": 16},
            "train": {"num_tokens": 640, "batch_tokens": 64, "hookpoint": "x", "warmup_steps": 1},
            "trackers": [],
        }
    )
    run_jobs(config, Accelerator(cpu=True), grid=False)
    caplog.set_level(logging.INFO)
    run_evaluation(config, Accelerator(cpu=True))
    told = [m for m in caplog.messages if "loss recovered is left out" in m]
    assert len(told) == 1
    assert "older than identities" not in caplog.text


def test_rows_imported_anew_from_other_files_go_on(tmp_path: Path) -> None:
    """Rows are known by themselves: in another format they are the same."""
    rows = numbers(500, 8)
    write(tmp_path / "a.npy", rows, "float32")
    write(tmp_path / "b.safetensors", rows, "float32")
    run_import(str(tmp_path / "s"), [f"x={tmp_path}/a.npy"], ImportOptions())
    named = [f"x={tmp_path}/b.safetensors::rows"]
    run_import(str(tmp_path / "t"), named, ImportOptions())
    stores = [ActivationStore.open(str(tmp_path / n)).made_of("x") for n in "st"]
    assert stores[0] == stores[1]
    assert stores[0]["parts"] == {}


def test_help_of_every_part() -> None:
    app = build()
    text = RUNNER.invoke(app, ["store", "--help"]).output
    from flash_sae_dist.launch import store

    for command in store.app.registered_commands:
        assert command.name is not None
        assert command.name in text
        result = RUNNER.invoke(app, ["store", command.name, "--help"])
        assert result.exit_code == 0
        assert f"flash-sae store {command.name}" in " ".join(result.output.split()) or (
            command.name == "verify" and "flash-sae verify" in result.output
        )
    assert "store" in RUNNER.invoke(app, ["--help"]).output


@pytest.mark.parametrize("changed", ["rows.npy", "documents.npy"])
def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    np.save(tmp_path / "rows.npy", numbers(400, 4).astype("float32"))
    np.save(tmp_path / "documents.npy", np.arange(400) // 10)
    options = ImportOptions(documents=str(tmp_path / "documents.npy"))
    write_one = Importer.write

    def write(self: Importer, shard: int, gatherers: Any) -> None:
        # In place: a mapped file gives what it holds now.
        array = np.load(tmp_path / changed, mmap_mode="r+")
        array[:5] = 1
        array.flush()
        write_one(self, shard, gatherers)

    with monkeypatch.context() as patch:
        patch.setattr(Importer, "write", write)
        with pytest.raises(UserError, match="a file changed while it was imported"):
            run_import(str(tmp_path / "s.zarr"), [f"rows={tmp_path}/rows.npy"], options)
    with pytest.raises(ConfigError, match="is unfinished"):
        ActivationStore.open(str(tmp_path / "s.zarr"))
