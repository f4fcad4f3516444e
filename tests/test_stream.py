"""Training from the model itself: the rows of a store in another order, each once an epoch, from
one forward pass for all hookpoints and SAEs; resumed anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.activations import language_model, stream, tokenising
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.holdout import document_hash
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.activations.stream import ModelRows, open_stream
from flash_sae_dist.activations.stream_order import BufferShape, Share, StreamOrder, Window
from flash_sae_dist.activations.text import TokenTable
from flash_sae_dist.activations.tokenising import Tokeniser
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.grid.plan import _buffers, place, train_job, works_of
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.planner.devices import launch_here
from flash_sae_dist.planner.memory import DEAD_SHARE, memory_of_rank
from flash_sae_dist.training.job import Config, parse_config
from flash_sae_dist.training.member import Member
from tests.tiny_model import assert_same_rows, config_data, save_llama, save_text

CPU, ALONE = torch.device("cpu"), Mesh.single()
BOTH = ["model.layers.0", "model.layers.1.mlp"]
BATCH, STEPS = 64, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a store of all of it."""
    root = tmp_path_factory.mktemp("stream")
    run_cache(parse_config(config_data(root, num_tokens=10**6)), Accelerator(cpu=True))
    return root


def data_in(root: Path, out: Path, **train: Any) -> dict[str, Any]:
    data = config_data(root) | {"output": str(out)}
    for key in ("store", "num_tokens"):
        del data["cache"][key]
    data["train"] |= {"source": "stream", "buffer_tokens": 600, "holdout": 0.0}
    data["train"] |= {"num_tokens": STEPS * BATCH, **train}
    return data


def config_in(root: Path, out: Path, **train: Any) -> Config:
    return parse_config(data_in(root, out, **train))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every forward pass of the model but the probe's."""
    seen: list[int] = []
    run_model = language_model.run_model

    def counted(lm: Any, ids: torch.Tensor, attention: torch.Tensor | None) -> Any:
        seen.append(len(ids))
        return run_model(lm, ids, attention)

    monkeypatch.setattr(language_model, "run_model", counted)
    return seen


class Parts:
    """Parts of a text in memory, of which another is there after each time that it is asked
    for.
    """

    def __init__(self, tables: list[TokenTable]) -> None:
        self.tables, self.there = tables, 1

    @property
    def ended(self) -> bool:
        return self.there == len(self.tables)

    def known(self) -> list[TokenTable]:
        return self.tables[: self.there]

    def load(self, number: int) -> TokenTable:
        assert number < self.there
        return self.tables[number]

    def wait(self, part: int) -> None:
        assert part == self.there
        self.there += 1


def served(order: StreamOrder, skip: int, count: int) -> tuple[list[int], list[Window]]:
    """The tokens of `count` rows from one on, through a buffer as the device has it."""
    ring = np.full(order.shape.rows, -1)
    found: list[int] = []
    windows = []
    for window, behind in order.windows(skip):
        windows.append(window)
        for batch in window.batches:
            for chunk, source, target in batch.pieces:
                assert target.max() < order.shape.chunk_rows
                at = chunk * order.shape.chunk_rows + target
                ring[at] = batch.ids.reshape(-1)[source]
        found += ring[window.places[behind:]].tolist()
        assert len(window.fresh) <= order.shape.num_chunks
        if len(found) >= count:
            break
    return found[:count], windows


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 3),
    st.sampled_from([0.0, 0.3]), st.integers(0, 99), st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_token_is_served_once_an_epoch_from_any_place_on(
    num_parts: int, size: int, buffer: int, world: int, holdout: float, seed: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    tables, first = [], 0
    for number in range(num_parts):
        last = number == num_parts - 1
        sequences = int(rng.integers(1, 3 * size + 1)) if last else 3 * size
        ids = np.arange(first, first + 4 * sequences, dtype=np.int32).reshape(-1, 4)
        tables.append(TokenTable(ids, ids // 7, ids, rng.random(ids.shape) < 0.8))
        first += ids.size
    bound = int(holdout * 2**32)
    kept = [t.ids[t.keep & (document_hash(t.document) >= bound)] for t in tables]
    shape = BufferShape.of(max(buffer, size) * 4, size, 4)
    assert shape.rows <= max(buffer, size) * 4

    def order(rank: int) -> StreamOrder:
        parts = Parts(tables)
        share = Share(rank, world)
        return StreamOrder(parts, shape, size, (seed, 1), share, holdout, parts.wait)  # type: ignore[arg-type]

    epoch: list[int] = []
    for rank in range(world):
        mine = order(rank)
        own = sum(rows for *_, rows in mine._passes(0))
        if not own:
            # Its epochs have no rows, or the first ones have none.
            continue
        twice = own + sum(rows for *_, rows in mine._passes(1))
        every, _ = served(mine, 0, twice)
        assert sorted(every[own:]) == sorted(
            int(i)
            for part, sequences, _ in mine._passes(1)
            for i in mine._part(part)[0].ids[sequences][mine._part(part)[1][sequences]]
        )
        epoch += every[:own]
        skip = data.draw(st.integers(0, twice - 1))
        assert served(order(rank), skip, twice - skip)[0] == every[skip:]
    assert sorted(epoch) == np.sort(np.concatenate(kept)).tolist()


def test_windows_draw_from_all_chunks() -> None:
    ids = np.arange(64 * 8, dtype=np.int32).reshape(-1, 8)
    parts = Parts([TokenTable(ids, ids, ids, np.ones(ids.shape, np.bool_))])
    shape = BufferShape.of(4 * 32, 2, 8)
    assert shape == (8, 1, 16)
    order = StreamOrder(parts, shape, 2, (0, 0), Share(0, 1), 0.0, parts.wait)  # type: ignore[arg-type]
    _, windows = served(order, 0, 512)
    assert [len(w.fresh) for w in windows] == [8, *[1] * 24]
    assert [len(w.places) for w in windows] == [72, *[16] * 23, 72]
    for window in windows:
        assert len({int(place) // 16 for place in window.places}) == 8


def test_a_last_part_that_comes_between_two_looks_is_read() -> None:
    class Late(Parts):
        @property
        def ended(self) -> bool:
            self.there = len(self.tables)
            return True

    ids = np.arange(64, dtype=np.int32).reshape(2, -1, 8)
    parts = Late([TokenTable(i, i, i, np.ones(i.shape, np.bool_)) for i in ids])
    order = StreamOrder(parts, BufferShape(1, 1, 16), 2, (0, 0), Share(0, 1), 0.0, parts.wait)  # type: ignore[arg-type]
    assert sorted(served(order, 0, 64)[0]) == list(range(64))


def test_tokens_of_no_document_are_never_held_out() -> None:
    ids = np.arange(64, dtype=np.int32).reshape(-1, 8)
    document = np.where(ids % 8 == 0, -1, ids).astype(np.int32)
    parts = Parts([TokenTable(ids, document, ids, np.ones(ids.shape, np.bool_))])
    shape, share = BufferShape(1, 1, 16), Share(0, 1)
    order = StreamOrder(parts, shape, 2, (0, 0), share, 1 - 1e-9, parts.wait)  # type: ignore[arg-type]
    assert sorted(served(order, 0, 8)[0]) == list(range(0, 64, 8))


@pytest.fixture
def opened(root: Path, tmp_path: Path) -> Iterator[Callable[..., ModelRows]]:
    """Opens the model's rows for a config."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def rows(**train: Any) -> ModelRows:
            config, accelerator = config_in(root, tmp_path, **train), Accelerator(cpu=True)
            return stack.enter_context(open_stream(config, 10**4, accelerator, ALONE, CPU))

        yield rows


def streamed(
    rows: ModelRows, config: Config, steps: int, hookpoints: list[str] = BOTH
) -> dict[str, torch.Tensor]:
    """All rows of the first steps, by hookpoint."""
    assert config.train is not None
    found = []
    with rows.batches(hookpoints, config.train, 0, ALONE, CPU) as source:
        for _ in range(steps):
            outs = [torch.empty(shape, dtype=source.dtype) for shape in source.shapes]
            source.fill_(*outs)
            found.append(outs)
    return {h: torch.cat([outs[i] for outs in found]) for i, h in enumerate(hookpoints)}


def test_an_epoch_is_the_stores_rows(
    root: Path,
    tmp_path: Path,
    opened: Callable[..., ModelRows],
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the text is in small parts, of which a process of its own makes those that are asked
    for.
    """
    monkeypatch.setattr(stream, "part_size", lambda *_: 16)
    follow = Tokeniser.follow
    monkeypatch.setattr(Tokeniser, "follow", lambda self, enough: follow(self, 1))
    rows = opened()
    text = rows.tokeniser.parts
    assert len(text.known()) == 1
    store = ActivationStore.open(str(root / "store.zarr"))
    config = config_in(root, tmp_path, batch_tokens=store.rows // 40)
    assert store.rows % 40 == 0
    streamed(rows, config, 4)
    assert 1 < len(text.known()) < 5
    assert not text.ended
    passes.clear()
    found = streamed(rows, config, 40)
    sequences = sum(part.sequences for part in text.known())
    assert sum(passes) == sequences
    assert len(passes) == -(-sequences // 4), "one pass serves all hookpoints"
    for hookpoint, got in found.items():
        want = torch.from_numpy(store.read(f"activations/{hookpoint}", 0, store.rows))
        assert not torch.equal(got, want)
        assert_same_rows(got, want)


def test_the_process_that_tokenises_loads_beside_the_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one part is too little text, and ends with what fails before its job is known."""
    started: list[Any] = []
    start = tokenising._start_process

    def noted() -> Any:
        started.append(start())
        return started[-1]

    def refused(*_: Any) -> None:
        assert all(process.poll() is None for process in started)
        raise ConfigError("no such model")

    monkeypatch.setattr(tokenising, "_start_process", noted)
    monkeypatch.setattr(stream, "load_language_model", refused)
    for rows, count in ((100, 0), (10**9, 1)):
        config = config_in(root, tmp_path)
        with (
            pytest.raises(ConfigError, match="no such model"),
            open_stream(config, rows, Accelerator(cpu=True), ALONE, CPU),
        ):
            pass
        assert len(started) == count
    assert started[0].returncode is not None


def curve(folder: Path) -> list[dict[str, float]]:
    """The lines of a loss curve without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "checksum")
    return [{k: v for k, v in x.items() if k[:3] != "ms/" and k not in clock} for x in lines]


def run(config: Config, *, grid: bool = False) -> None:
    run_jobs(config, Accelerator(cpu=True), grid=grid)


def test_a_grid_runs_the_model_once_for_all(
    root: Path, tmp_path: Path, passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Two hookpoints, two SAEs on each, in one stream; each as if it were trained alone."""
    caplog.set_level("INFO")
    run(config_in(root, tmp_path / "grid"), grid=True)
    together = len(passes)
    # Less than an epoch.
    store = ActivationStore.open(str(root / "store.zarr"))
    assert store.rows > STEPS * BATCH
    assert together <= -(-(STEPS * BATCH + 600) // (4 * 22))
    assert "mixes 576 tokens (train.buffer_tokens), 6 times 1 forward passes" in caplog.text
    assert "rows of 2 hookpoints" in caplog.text
    assert f"forward passes: {together}, " in caplog.text
    passes.clear()
    data = data_in(root, tmp_path / "alone")
    run(parse_config(data))
    assert len(passes) == together
    assert curve(tmp_path / "alone/model.layers.0") == curve(tmp_path / "grid/model.layers.0/k=4")
    for name in ("model.layers.0/k=2", "model.layers.1.mlp/k=2", "model.layers.1.mlp/k=4"):
        assert len(curve(tmp_path / "grid" / name)) == STEPS


def test_a_run_that_ended_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its second epoch, and behind a window's first rows."""
    options = {"num_tokens": 3200, "batch_tokens": 160, "checkpoint_every": 8, "holdout": 0.05}
    options["normalize"] = "unit_mean_square"
    run(config_in(root, tmp_path / "whole", **options))
    step, made = Member.step, []

    def fails(self: Member, *args: Any) -> Any:
        made.append(self.training.step_index)
        if self.training.step_index == 18:
            raise RuntimeError("power lost")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", fails)
        with pytest.raises(RuntimeError, match="power lost"):
            run(config_in(root, tmp_path / "cut", **options))
    caplog.set_level("INFO")
    run(config_in(root, tmp_path / "cut", **options))
    assert made[-1] == 18
    assert "resumed at step 16" in caplog.text
    whole, cut = tmp_path / "whole/model.layers.0", tmp_path / "cut/model.layers.0"
    assert curve(cut) == curve(whole)
    name = "sae/sae.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_statistics_are_those_of_the_first_buffer(
    root: Path, tmp_path: Path, opened: Callable[..., ModelRows]
) -> None:
    rows, config = opened(), config_in(root, tmp_path, buffer_tokens=10**6)
    assert config.train is not None
    store = ActivationStore.open(str(root / "store.zarr"))
    with rows.batches(BOTH, config.train, 0, ALONE, CPU) as source:
        source.fill_(*(torch.empty(shape, dtype=source.dtype) for shape in source.shapes))
        for hookpoint in BOTH:
            # It holds all of the text.
            want = store.root_mean_square(hookpoint)
            assert source.root_mean_square(hookpoint) == pytest.approx(want, rel=1e-5)
    with rows.batches(BOTH, config.train, 3, ALONE, CPU) as source:
        source.fill_(*(torch.empty(shape, dtype=source.dtype) for shape in source.shapes))
        assert source.root_mean_square(BOTH[0]) is None, "a checkpoint has it"


def test_documents_are_held_out(
    root: Path, tmp_path: Path, opened: Callable[..., ModelRows]
) -> None:
    store = ActivationStore.open(str(root / "store.zarr"))
    documents = store.read("tokens/document", 0, store.rows)
    left = int((document_hash(documents) >= int(0.3 * 2**32)).sum())
    assert 0 < left < store.rows
    config = config_in(root, tmp_path, holdout=0.3, batch_tokens=1, buffer_tokens=10**6)
    found = streamed(opened(), config, left, BOTH[:1])[BOTH[0]]
    values = torch.from_numpy(store.read(f"activations/{BOTH[0]}", 0, store.rows))
    values = values[torch.from_numpy(document_hash(documents) >= int(0.3 * 2**32))]
    assert_same_rows(found, values)


def test_a_text_that_ends_is_read_again(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = data_in(root, tmp_path, num_tokens=3 * 640)
    data["cache"]["num_tokens"] = 600
    run(parse_config(data))
    told = [m for m in caplog.messages if "it is read again" in m]
    assert len(told) == 1
    assert 600 <= int(told[0].split()[5]) < 600 + 24


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("train", {"source": "store"}, "train.buffer_tokens=600 says nothing of a store"),
        ("train", {"preload": "host"}, "train.preload='host' says nothing of train.source=stream"),
        ("train", {"buffer_tokens": 95}, "train.buffer_tokens=95 is less than a forward pass"),
        ("train", {"buffer_tokens": 0}, "train.buffer_tokens=0"),
        ("train", {"buffer_tokens": 10**16}, "train.buffer_tokens=.* takes .* bytes at width 16"),
        ("train", {"hookpoint": "model.layer.0"}, "not in cache.hookpoints; did you mean"),
        ("train", {"hookpoint": None}, "name one of cache.hookpoints: model.layers.0, "),
        ("train", {"holdout": 0.9999999}, "gives no row to train on to process 1 of the 1"),
        ("train", {"num_shards": "auto"}, "train.num_shards='auto' looks at a store"),
        ("cache", {"max_norm_ratio": 10}, "cache.max_norm_ratio=10.* is not known to"),
        ("cache", {"dtype": "int8"}, "cache.dtype='int8' is a store's"),
        ("cache", {"context_length": 65}, "exceeds the model's 64 positions"),
        ("text", {"paths": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ("grid", {"values": {"train.source": ["stream"]}}, "no use for key 'train.source'"),
        ("model", None, "section 'model' is missing: `train.source=stream` needs it"),
    ],
)
def test_what_does_not_fit_is_refused(
    root: Path, tmp_path: Path, section: str, values: dict[str, Any] | None, words: str
) -> None:
    data = data_in(root, tmp_path)
    data[section] = None if values is None else {**data[section], **values}
    with pytest.raises(ConfigError, match=words):
        run(parse_config(data))


def test_a_text_too_short_for_the_processes_is_refused(
    opened: Callable[..., ModelRows],
) -> None:
    rows = opened()
    with pytest.raises(ConfigError, match="the text is .* forward passes .* for 99 processes"):
        stream._check_share(rows.tokeniser.parts, rows.cache, 99)


def test_a_store_needs_its_keys(root: Path, tmp_path: Path) -> None:
    config = config_in(root, tmp_path)
    with pytest.raises(ConfigError, match=r"key 'cache\.num_tokens' is missing"):
        run_cache(config, Accelerator(cpu=True))


def test_keys_of_stores_are_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = data_in(root, tmp_path, num_tokens=5 * BATCH)
    data["cache"] |= {"store": str(root / "store.zarr"), "shard_mib": 3}
    run(parse_config(data))
    assert "reads no store: cache.store, cache.shard_mib have no effect on it" in caplog.text


def test_jobs_that_do_not_fit_together_run_the_model_again(
    root: Path, tmp_path: Path, opened: Callable[..., ModelRows], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = opened()
    config = config_in(root, tmp_path)
    jobs = [train_job(config_in(root, tmp_path, hookpoint=h), rows.hookpoints) for h in BOTH]
    assert config.train is not None
    one = rows.buffer_bytes(BOTH[0], config.train)
    assert one == 576 * 16 * 4
    launch = launch_here(CPU, 1, 10**12)
    works = works_of(jobs, rows.widths, rows.dtype, launch)

    def sizes(memory: int, processes: int = 1, times: int = 1) -> list[list[int]]:
        here = launch._replace(memory=2 * memory, processes=processes)
        buffer = _buffers(rows, memory)
        groups = place(jobs * times, works, here, 1, 1, buffer)
        return [[len(bundle.jobs) for bundle in group] for group in groups]

    first, second = (memory_of_rank(work, 1, 1, dead=DEAD_SHARE) for work in works.values())
    # A batch has the rows of both hookpoints.
    both = first.peak + second.own + 2 * one + sum(first.feed.values())
    assert sizes(both) == [[2]]
    assert sorted(sizes(10**9, processes=3, times=2)) == [[], [2], [2]]
    assert not caplog.messages
    assert sizes(both - 1) == [[1, 1]]
    assert "the model runs 1 times more on the text" in caplog.text


def test_another_model_or_text_is_refused_and_a_store_measures(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "run", num_tokens=10 * BATCH, checkpoint_every=5)
    run(config)
    longer = config_in(tmp_path, tmp_path / "run", num_tokens=12 * BATCH, checkpoint_every=5)
    run(longer)
    with pytest.raises(ConfigError, match="train.buffer_tokens=700 differs from 600"):
        run(config_in(tmp_path, tmp_path / "run", num_tokens=12 * BATCH, buffer_tokens=700))
    with pytest.raises(ConfigError, match="store is missing: .*`flash-sae cache` makes it"):
        run_evaluation(config, Accelerator(cpu=True))
    data = data_in(tmp_path, tmp_path / "run", num_tokens=12 * BATCH)
    data["cache"] |= {"store": str(tmp_path / "store.zarr"), "num_tokens": 1000}
    run_cache(parse_config(data), Accelerator(cpu=True))
    (record,) = run_evaluation(parse_config(data), Accelerator(cpu=True))
    assert record["fvu"] < 1
    assert record["loss"]["recovered"] is not None
    save_text(tmp_path / "text.jsonl", seed=1)
    with pytest.raises(ConfigError, match="was begun with another text than this one"):
        run(longer)
    save_text(tmp_path / "other.jsonl", seed=1)
    data = data_in(tmp_path, tmp_path / "run", num_tokens=12 * BATCH)
    data["text"]["paths"] = [str(tmp_path / "other.jsonl")]
    with pytest.raises(ConfigError, match="the stream's text=.* differs from"):
        run(parse_config(data))
    save_text(tmp_path / "text.jsonl")
    torch.manual_seed(5)
    save_llama(tmp_path / "model", layers=2)
    with pytest.raises(ConfigError, match="the stream's model .* differs from"):
        run(longer)
