"""The token table of a store: parts made ahead, gone on with anywhere, with each token's row."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flash_sae_dist.activations import harvest, tokenising
from flash_sae_dist.activations.damage import damages
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.records import Records
from flash_sae_dist.activations.row_plan import RowPlan
from flash_sae_dist.activations.store import ActivationStore, Geometry
from flash_sae_dist.activations.text import Making, TokenTable, sequences
from flash_sae_dist.activations.text_parts import TextParts, made_parts
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.data import TextConfig
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import WORDS, config_data, save_bert, save_llama, save_text

TOKENS = ("document", "position", "ids")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    save_llama(root / "llama")
    save_bert(root / "bert")
    save_text(root / "text.jsonl")
    rng = random.Random(3)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(400)]
    (root / "book.txt").write_text("\n".join(lines))
    return root


def making(root: Path, kind: str, length: int = 12) -> Making:
    paths = (str(root / "text.jsonl"), str(root / "book.txt"))
    cfg = TextConfig(source="files", paths=paths)
    tokenizer = AutoTokenizer.from_pretrained(root / kind)
    return Making(cfg, tokenizer, length, kind == "llama", True)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_text_goes_on_from_the_place_behind_any_sequence(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a document, of a piece of a long one, and between two."""
    from flash_sae_dist.activations import text_files

    monkeypatch.setattr(text_files, "PIECE", 200)
    how = making(root, kind)
    everything = list(sequences(how))
    assert len(everything) > 100
    for cut in range(0, len(everything), 7):
        rest = list(sequences(how, everything[cut][1]))
        assert len(rest) == len(everything) - cut - 1
        for (found, place), (want, expected) in zip(rest[:9], everything[cut + 1 :], strict=False):
            assert place == expected
            for a, b in zip(found, want, strict=True):
                assert np.array_equal(a, b)


def joined(tables: list[TokenTable], name: str) -> Any:
    return np.concatenate([getattr(table, name) for table in tables])


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("num_rows", [1, 500, 10**9])
def test_parts_are_the_text_whatever_their_size(root: Path, kind: str, num_rows: int) -> None:
    how = making(root, kind)
    (whole, only) = next(made_parts(how, 10**6, num_rows, []))
    assert only.last
    for size in (1, 8, 64):
        made = list(made_parts(how, size, num_rows, []))
        assert [part.last for _, part in made] == [False] * (len(made) - 1) + [True]
        for name in ("ids", "document", "position", "keep", "attention"):
            assert np.array_equal(joined([t for t, _ in made], name), getattr(whole, name))
        assert sum(part.rows for _, part in made) == only.rows
        for count in {0, len(made) // 2, len(made) - 1}:
            before = [part for _, part in made[:count]]
            rest = list(made_parts(how, size, num_rows, before))
            assert [part for _, part in rest] == [part for _, part in made[count:]]


def test_parts_are_read_as_they_were_written(root: Path, tmp_path: Path) -> None:
    how = making(root, "llama")
    writer, reader = (TextParts(Records(str(tmp_path)), 12, 16) for _ in range(2))
    made = list(made_parts(how, 16, 1500, []))
    for number, (table, part) in enumerate(made):
        assert len(reader.known()) == number
        writer.add(table, part)
        assert reader.known()[-1] == part
        found = reader.load(number)
        for name in ("ids", "document", "position", "keep", "attention"):
            assert np.array_equal(getattr(found, name), getattr(table, name))
    assert reader.ended
    assert reader.rows_before[-1] >= 1500


@given(
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 3),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_made_once(
    size: int, shard_rows: int, unit: int, batch: int, world: int, data: Any
) -> None:
    """Whatever is missing, by however many processes, and in the same batch as at first."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tables = []
    for _ in range(data.draw(st.integers(1, 4))):
        ids = rng.integers(0, 9, (size, 6)).astype(np.int32)
        tables.append(TokenTable(ids, ids, ids, rng.random((size, 6)) < 0.6))
    total = sum(int(t.keep.sum()) for t in tables)
    if total == 0:
        return

    class Parts:
        ended = True
        rows_before = np.cumsum([0, *(int(t.keep.sum()) for t in tables)]).tolist()  # noqa: RUF012

        def load(self, number: int) -> TokenTable:
            return tables[number]

    geometry = Geometry(data.draw(st.integers(1, total + 9)), shard_rows, 1)
    plan = RowPlan(Parts(), geometry, unit, 5, batch)  # type: ignore[arg-type]
    assert plan.geometry.rows == min(total, geometry.rows)
    num_shards = plan.geometry.num_shards

    def made(todo: list[int]) -> dict[int, tuple[bytes, int]]:
        found: dict[int, tuple[bytes, int]] = {}
        for rank in range(world):
            left = {s: np.diff(plan.geometry.shard_range(s))[0] for s in todo}
            for passed in plan.batches(todo, rank, world):
                for shard, source, target in passed.pieces:
                    left[shard] -= len(source)
                    for a, b in zip(source, target, strict=True):
                        row = shard * shard_rows + int(b)
                        assert row not in found
                        found[row] = passed.ids.tobytes(), int(passed.ids.reshape(-1)[a])
                for shard in passed.whole:
                    assert left.pop(shard) == 0
            assert all(n > 0 for n in left.values())
        return found

    every = made(list(range(num_shards)))
    assert sorted(every) == list(range(plan.geometry.rows))
    some = data.draw(st.lists(st.integers(0, num_shards - 1), unique=True))
    again = made(sorted(some))
    inside = [r for r in every if r // shard_rows in some]
    assert again == {row: every[row] for row in inside}
    for shard in range(num_shards):
        start, stop = plan.geometry.shard_range(shard)
        assert plan.tokens(shard)["tokens/ids"].tolist() == [
            every[r][1] for r in range(start, stop)
        ]
    rows = [plan.rows_of_part(number) for number in range(len(tables))]
    taken = np.concatenate([r[r >= 0] for r in rows])
    assert sorted(taken.tolist()) == list(range(plan.geometry.rows))
    for table, places in zip(tables, rows, strict=True):
        assert not (places[~table.keep] >= 0).any()
        for row, token in zip(places[places >= 0], table.ids[places >= 0], strict=True):
            assert every[int(row)][1] == token


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 sequences, of which one tells how a store is cut."""
    monkeypatch.setattr(harvest, "part_size", lambda *_: 16)
    monkeypatch.setattr(Geometry, "enough_rows", 300)


def test_a_process_of_its_own_makes_the_other_parts(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config_data(tmp_path, shard_mib=0.002)
    followed: list[int] = []
    follow = tokenising.Tokeniser.follow

    def noted(self: tokenising.Tokeniser) -> None:
        followed.append(len(self.parts.known()))
        follow(self)

    monkeypatch.setattr(tokenising.Tokeniser, "follow", noted)
    run_cache(parse_config(data), Accelerator(cpu=True))
    assert followed == [1], "the others are not there when passes begin"
    store = ActivationStore.open(data["cache"]["store"])
    store.verify()
    shape = store.text_shape()
    assert shape is not None
    assert len(TextParts(store.records, 24, 16).known()) > 3
    row, ids, keep = (np.asarray(store.array(f"text/{n}")[:]) for n in ("row", "ids", "keep"))
    assert sorted(row[row >= 0].tolist()) == list(range(store.rows))
    assert (keep[row >= 0] == 1).all()
    tokens = store.read("tokens/ids", 0, store.rows)
    assert np.array_equal(tokens[row[row >= 0]], ids[row >= 0])


def test_a_text_that_ends_early_ends_the_store(
    tmp_path: Path, small_parts: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It was begun for more rows than came."""
    data = config_data(tmp_path, shard_mib=0.002, num_tokens=10**6)
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    store.verify()
    other = config_data(tmp_path / "at once", shard_mib=0.002, num_tokens=store.rows)
    run_cache(parse_config(other), Accelerator(cpu=True))
    whole = ActivationStore.open(other["cache"]["store"])
    pairs = [
        sorted(zip(*(of.read(f"tokens/{n}", 0, of.rows).tolist() for n in TOKENS), strict=True))
        for of in (whole, store)
    ]
    assert pairs[0] == pairs[1]
    assert f"the text ends after {store.rows} stored tokens" in caplog.text


def test_what_the_process_meets_is_one_sentence_and_its_parts_are_kept(
    tmp_path: Path, small_parts: None
) -> None:
    data = config_data(tmp_path, shard_mib=0.002, num_tokens=10**6)
    file = save_text(tmp_path / "text.jsonl", documents=400)
    whole = file.read_text()
    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:-3], "no JSON"]))
    with pytest.raises(ConfigError, match=r"text\.jsonl.* cannot be read"):
        run_cache(parse_config(data), Accelerator(cpu=True))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "store.zarr/text").rglob("c/*/0")}
    assert len(kept) > 4
    file.write_text(whole)
    run_cache(parse_config(data), Accelerator(cpu=True))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "compared, not made again"
    ActivationStore.open(data["cache"]["store"]).verify()


def test_a_text_in_other_records_is_not_gone_on_with(tmp_path: Path, small_parts: None) -> None:
    """The same tokens, but the place behind a part is another."""
    data = config_data(tmp_path, shard_mib=0.002, num_tokens=10**6)
    file = save_text(tmp_path / "text.jsonl", documents=400)
    whole = file.read_text()
    file.write_text("\n".join([*whole.splitlines()[:-3], "no JSON"]))
    with pytest.raises(ConfigError, match="cannot be read"):
        run_cache(parse_config(data), Accelerator(cpu=True))
    file.write_text("\n\n\n" + whole)
    with pytest.raises(ConfigError, match="begun with this text in other records"):
        run_cache(parse_config(data), Accelerator(cpu=True))


def test_all_of_the_text_is_there_though_every_row_was(tmp_path: Path, small_parts: None) -> None:
    """A part behind those that tell how the store is cut is made again, with its documents."""
    data = config_data(tmp_path, shard_mib=0.002)
    run_cache(parse_config(data), Accelerator(cpu=True))
    path = data["cache"]["store"]
    before, records = ActivationStore.open(path), tmp_path / "store.zarr/records"
    documents, parts = before.num_documents(), before.made_of()["parts"]
    count = len(list(records.glob("text-*.json")))
    (records / f"text-{count - 2:08d}.json").unlink()
    assert [str(e) for e in damages(ActivationStore.open(path))]
    run_cache(parse_config(data), Accelerator(cpu=True))
    after = ActivationStore.open(path)
    after.verify()
    assert (after.num_documents(), after.made_of()["parts"]) == (documents, parts)


def test_a_token_that_the_model_has_not_is_told_wherever_it_stands(
    tmp_path: Path, small_parts: None
) -> None:
    data = config_data(tmp_path, shard_mib=0.002, num_tokens=10**6)
    file = save_text(tmp_path / "text.jsonl", documents=400)
    folder = Path(data["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(folder)
    file.write_text(file.read_text() + json.dumps({"text": "beyond " * 40}) + "\n")
    with pytest.raises(ConfigError, match="the text has the token"):
        run_cache(parse_config(data), Accelerator(cpu=True))


def test_a_process_that_is_killed_is_told(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = tokenising.Tokeniser.follow

    def killed(self: tokenising.Tokeniser) -> None:
        follow(self)
        assert self.process is not None
        self.process.kill()

    monkeypatch.setattr(tokenising.Tokeniser, "follow", killed)
    with pytest.raises(UserError, match="tokenises the text ended with code -9"):
        run_cache(parse_config(config_data(tmp_path, shard_mib=0.002)), Accelerator(cpu=True))


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path, root: Path) -> None:
    """Though nothing tells it to."""
    data = config_data(tmp_path)
    data["text"]["paths"] = [str(root / "book.txt")] * 3000
    data["cache"]["num_tokens"] = 10**9
    config = parse_config(data)
    sections = config.model_dump(mode="json", include={"output", "model", "text", "cache"})
    place, rows = data["cache"]["store"], data["cache"]["num_tokens"]
    made = {"causal": True, "size": 64, "place": place, "num_rows": rows, "enough": rows}
    job = json.dumps({"config": sections, **made})
    file = tmp_path / "job.json"
    file.write_text(job)
    parent = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, '-m', {tokenising.__name__!r}]\n"
        "p = subprocess.Popen(command, stdin=-1, text=True)\n"
        "p.stdin.write(open(sys.argv[1]).read() + '\\n')\n"
        "p.stdin.flush()\nprint(p.pid, flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    records = tmp_path / "store.zarr/records"
    for _ in islice(iter(lambda: time.sleep(0.1), 1), 600):
        if records.exists() and len(list(records.glob("text-*.json"))) > 1:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for _ in islice(iter(lambda: time.sleep(0.1), 1), 100):
        if (
            not Path(f"/proc/{child}").exists()
            or "zombie" in Path(f"/proc/{child}/status").read_text()
        ):
            return
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it went on alone")


def test_the_first_tokens_of_a_sequence_can_be_left_out(tmp_path: Path) -> None:
    data = config_data(tmp_path, skip_first_tokens=5)
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    row = np.asarray(store.array("text/row")[:])
    assert (row[:, :5] == -1).all()
    assert (row[:, 5:] >= 0).any()


def test_all_hear_of_a_process_that_dies_though_the_first_needs_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: Any = SimpleNamespace(records=Records(str(tmp_path)), ended=False)
    nothing: Any = None
    monkeypatch.setattr(sys, "executable", "/bin/false")
    config: Any = parse_config(config_data(tmp_path))
    making: Any = SimpleNamespace(causal=True)
    parts.size = 1
    place = str(tmp_path)
    with tokenising.Tokeniser(config, making, parts, place, num_rows=9, first=True) as first:
        first.follow()
        other = tokenising.Tokeniser(nothing, making, parts, place, num_rows=9, first=False)
        ends = time.monotonic() + 20
        while not list(tmp_path.glob("records/tokenising.json")):
            assert time.monotonic() < ends
        with pytest.raises(UserError, match="ended with code 1; .* what was tokenised is kept"):
            other.wait()
