"""The order of batches: a function of (seed, step), whole epochs, the same for any number of
ranks, resumable.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.activations import blocks as reading
from flash_sae_dist.activations import loader as loading
from flash_sae_dist.activations import preload as preloading
from flash_sae_dist.activations.feed import BatchFeed
from flash_sae_dist.activations.holdout import HeldOut, held_out
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.order import BlockOrder, KeptRows
from flash_sae_dist.activations.read_ahead import Plan, ReadAhead
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError, Geometry
from flash_sae_dist.activations.stored_rows import StoredRows
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import Preload
from flash_sae_dist.parallel.mesh import Mesh

ROWS, WIDTH = 331, 6


def make_store(
    path: str,
    rows: int = ROWS,
    shard: int = 64,
    chunk: int = 16,
    documents: list[int] | None = None,
    dtype: str = "float32",
) -> ActivationStore:
    """Row i holds i in its first two columns (exact in bfloat16 as two parts)."""
    geometry = Geometry(rows, shard, chunk)
    writer = StoreWriter(path, {}, create=True)
    writer.create(geometry, {"h": WIDTH}, dtype, {})
    number = torch.arange(rows)
    values = torch.zeros(rows, WIDTH)
    values[:, 0], values[:, 1] = number // 16, number % 16
    bits = values.bfloat16().view(torch.uint16) if dtype == "bfloat16" else values
    tokens = number.to(torch.int32).numpy()
    document = tokens if documents is None else np.array(documents, dtype=np.int32)
    for number_ in range(geometry.num_shards):
        start, stop = geometry.shard_range(number_)
        arrays = {"activations/h": bits[start:stop].numpy()}
        if dtype == "int8":
            arrays = StoredRows.encode(values[start:stop], dtype).arrays("h")
        arrays |= {f"tokens/{n}": tokens[start:stop] for n in ("ids", "position")}
        arrays |= {"tokens/document": document[start:stop]}
        writer.write_shard(geometry, number_, arrays)
    writer.finish(geometry, ["h"])
    return ActivationStore.open(path)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """A store whose every row is a document of its own."""
    return make_store(str(tmp_path_factory.mktemp("loader") / "store.zarr"), dtype=request.param)


def numbers(batches: list[torch.Tensor]) -> list[int]:
    rows = torch.cat(batches).float()
    return (rows[:, 0] * 16 + rows[:, 1]).long().tolist()


def load(
    store: ActivationStore, steps: int, start: int = 0, rank: int = 0, ranks: int = 1
) -> list[torch.Tensor]:
    with ActivationLoader(
        store,
        "h",
        batch_tokens=24,
        seed=5,
        start_step=start,
        num_steps=steps,
        rank=rank,
        num_ranks=ranks,
    ) as loader:
        return list(loader)


def test_every_row_once_an_epoch(store: ActivationStore) -> None:
    seen = numbers(load(store, steps=-(-3 * ROWS // 24)))
    for epoch in range(3):
        assert sorted(seen[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
    assert seen[:ROWS] != seen[ROWS : 2 * ROWS], "each epoch has its own order"


def test_ranks_split_the_same_batches(store: ActivationStore) -> None:
    whole = load(store, steps=20)
    for ranks in (2, 3, 4):
        parts = [load(store, steps=20, rank=r, ranks=ranks) for r in range(ranks)]
        for step in range(20):
            assert torch.equal(torch.cat([p[step] for p in parts]), whole[step])


def test_resume_at_any_step(store: ActivationStore) -> None:
    whole = load(store, steps=30)
    for start in (1, 13, 29):
        for got, want in zip(load(store, 30 - start, start), whole[start:], strict=True):
            assert torch.equal(got, want)


def test_another_seed_is_another_order(store: ActivationStore) -> None:
    with ActivationLoader(store, "h", batch_tokens=24, seed=6, num_steps=5) as loader:
        assert numbers(list(loader)) != numbers(load(store, 5))


def test_leaving_early_stops_the_threads(store: ActivationStore) -> None:
    with ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=10_000) as loader:
        next(iter(loader))
    assert not loader.reader.files


def open_files(folder: str) -> int:
    """How many files in a folder this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        # The one that lists the folder is closed by now, and the threads close others.
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(link).startswith(folder)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed there")
def test_few_files_are_open_at_a_time(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large store has more shards than a process may have files open."""
    monkeypatch.setattr(reading, "_OPEN_FILES", 2)
    most = 0
    with ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=60) as loader:
        for got, want in zip(loader, load(store, 60), strict=True):
            assert torch.equal(got, want)
            most = max(most, open_files(store.path))
    # Those kept, and those that the threads are reading.
    assert 0 < most <= 2 + loading.READERS


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_torn_file_is_told(store: ActivationStore, tmp_path: Path, size: int) -> None:
    shutil.copytree(store.path, tmp_path / "store.zarr")
    torn = ActivationStore.open(str(tmp_path / "store.zarr"))
    os.truncate(torn.shard_file("activations/h", 2), size)
    with pytest.raises(DamagedStoreError, match="c/2/0 is torn"):
        load(torn, 30)


def test_a_batch_the_ranks_cannot_split_is_told(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match="batch_tokens=24 is not divisible by the 5"):
        ActivationLoader(store, "h", batch_tokens=24, seed=0, num_steps=1, num_ranks=5)


def hashed(document: int) -> int:
    """murmur3's finalizer of a document's number, in Python's own integers."""
    h = (document + 0x9E3779B9) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor % 2**32
    return h ^ h >> 16


def rows_held_out(documents: list[int], share: float) -> set[int]:
    """The rule, a document at a time."""
    limit, left = int(share * len(documents)), int(share * len(documents))
    bound = int(2 * limit / len(documents) * 2**32)
    out: set[int] = set()
    for document in sorted(set(documents), key=lambda d: (hashed(d), d)):
        size = documents.count(document)
        if document < 0 or hashed(document) >= bound or size > limit:
            continue
        if size > left:
            break
        left -= size
        out |= {row for row, d in enumerate(documents) if d == document}
    return out


def stream(rows: int, chunk: int, seed: int, left_out: set[int], length: int) -> list[int]:
    """The first rows of the stream, an epoch after the other, written out."""
    found: list[int] = []
    epoch = 0
    while len(found) < length:
        order = np.random.default_rng([seed, epoch]).permutation(-(-rows // chunk))
        for block in order.tolist():
            whole = range(block * chunk, min(rows, (block + 1) * chunk))
            found += [row for row in whole if row not in left_out]
        epoch += 1
    return found[:length]


class Case(NamedTuple):
    """A store and a run over it."""

    chunk: int
    shard: int
    documents: list[int]  # of each row
    share: float
    batch: int
    ranks: int
    steps: int
    start: int
    part_blocks: int

    @property
    def rows(self) -> int:
        return len(self.documents)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunk = draw(st.sampled_from([1, 2, 5, 16]))
    documents = draw(
        st.one_of(
            st.lists(st.integers(-1, 12), min_size=1, max_size=150),
            st.integers(1, 150).map(lambda n: list(range(n))),
            st.integers(1, 150).map(lambda n: [7] * n),
        )
    )
    ranks = draw(st.integers(1, 4))
    return Case(
        chunk,
        chunk * draw(st.integers(1, 4)),
        documents,
        draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, (len(documents) - 0.5) / len(documents)])),
        ranks * draw(st.sampled_from([1, 3, 8, 50, 200])),
        ranks,
        draw(st.integers(1, 12)),
        draw(st.integers(0, 12)),
        draw(st.sampled_from([1, 2, 3, 1000])),
    )


def shares(store: ActivationStore, case: Case, preload: Preload, *, only: bool) -> list[list[int]]:
    """The rows of each batch, all ranks' put together."""
    parts = []
    for rank in range(case.ranks):
        with ActivationLoader(
            store, "h", batch_tokens=case.batch, seed=3, start_step=case.start,
            num_steps=case.steps, rank=rank, num_ranks=case.ranks, holdout=case.share,
            only_held_out=only, preload=preload,
        ) as loader:  # fmt: skip
            parts.append([numbers([batch]) for batch in loader])
    return [sum(batch, []) for batch in zip(*parts, strict=True)]


def small_rings(patch: pytest.MonkeyPatch, case: Case) -> None:
    """Rings as small as they may be."""
    patch.setattr(loading, "_PART_BYTES", case.part_blocks * case.chunk * WIDTH * 4)
    patch.setattr(loading, "_RING_BYTES", 0)
    patch.setattr(loading, "_PARTS_AHEAD", 3)


class FakeEvent:
    """Copies that are never done until they are waited for, or done at once, by turns."""

    def __init__(self, number: int) -> None:
        self.done = number % 3 == 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_batches_are_those_of_the_plain_stream(case: Case) -> None:
    """Whatever the shapes, ranks, parts and where rows are kept."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        store = make_store(f"{folder}/s.zarr", case.rows, case.shard, case.chunk, case.documents)
        small_rings(patch, case)
        out = rows_held_out(case.documents, case.share)
        assert set(held_out(store, case.share).rows.tolist()) == out
        assert len(out) < case.rows, "something is left to train on"
        length = (case.start + case.steps) * case.batch
        for only, left_out in ((False, out), (True, set(range(case.rows)) - out)):
            if only and not out:
                with pytest.raises(ValueError, match="no row of the store is held out"):
                    shares(store, case, "none", only=True)
                continue
            whole = stream(case.rows, case.chunk, 3, left_out, length)
            want = [whole[i : i + case.batch] for i in range(0, length, case.batch)][case.start :]
            for preload in ("none", "host", "device", "auto"):
                assert shares(store, case, preload, only=only) == want, preload


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_blocks_that_are_copied_on_are_not_overwritten(case: Case) -> None:
    """As on a GPU: batches come out of its own memory, and slots of the ring come back late."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        store = make_store(f"{folder}/s.zarr", case.rows, case.shard, case.chunk, case.documents)
        small_rings(patch, case)
        numbers_ = itertools.count()
        patch.setattr(loading, "is_async", lambda device: True)
        patch.setattr(loading, "copied_event", lambda device: FakeEvent(next(numbers_)))
        length = (case.start + case.steps) * case.batch
        out = rows_held_out(case.documents, case.share)
        whole = stream(case.rows, case.chunk, 3, out, length)
        want = [whole[i : i + case.batch] for i in range(0, length, case.batch)][case.start :]
        for preload in ("none", "host", "device"):
            assert shares(store, case, preload, only=False) == want, preload


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 200),
    block=st.integers(1, 40),
    seed=st.integers(0, 99),
    out=st.sets(st.integers(0, 199), max_size=150),
)
def test_the_order_of_blocks_is_a_permutation(
    rows: int, block: int, seed: int, out: set[int]
) -> None:
    listed = np.array(sorted(row for row in out if row < rows), dtype=np.int64)
    kept = KeptRows(rows, block, listed)
    if len(listed) == rows:
        assert not kept.counts.any()
        return
    order = BlockOrder(kept.counts, seed)
    assert order.rows == rows - len(listed)
    blocks = order.blocks(0, 2 * order.blocks_an_epoch)
    whole = kept.places(blocks, blocks * block).tolist()
    epochs = [whole[: order.rows], whole[order.rows :]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(set(range(rows)) - set(listed.tolist()))
    for position in range(2 * order.rows):
        slot, skip = order.locate(position)
        (at,) = order.blocks(slot, slot + 1)
        assert kept.places(np.array([at]), np.array([at * block]))[skip] == whole[position]


def test_held_out_documents_depend_on_their_numbers_alone(tmp_path: Path) -> None:
    """A store of another model, chunked otherwise, leaves out the same ones; a larger share leaves
    out more.
    """
    documents = [row % 97 for row in range(970)]
    one = make_store(str(tmp_path / "one.zarr"), 970, 64, 16, documents)
    rng = np.random.default_rng(0)
    mixed = rng.permutation(documents).tolist()
    other = make_store(str(tmp_path / "other.zarr"), 970, 100, 50, mixed)
    found = []
    for share in (0.03, 0.1, 0.3):
        sets = [
            {d[row] for row in held_out(s, share).rows}
            for s, d in ((one, documents), (other, mixed))
        ]
        assert sets[0] == sets[1]
        assert 0 < 10 * len(sets[0]) <= share * 970
        found.append(sets[0])
    assert found[0] < found[1] < found[2]


def test_at_most_so_many_rows_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_sae_dist.activations.holdout.MAX_ROWS", 7)
    store = make_store(str(tmp_path / "s.zarr"))
    assert 0 < len(held_out(store, 0.5).rows) <= 7
    assert held_out(store, 0.0) == HeldOut(held_out(store, 0.0).rows, 0)


def test_what_is_held_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, documents in (("many", None), ("one", [3] * ROWS)):
        store = make_store(str(tmp_path / name), documents=documents)
        ActivationLoader(store, "h", batch_tokens=4, seed=0, num_steps=1, holdout=0.1)
        ActivationLoader(
            store, "h", batch_tokens=4, seed=0, num_steps=1, holdout=0.1, rank=1, num_ranks=2
        )
    told = [r.getMessage() for r in caplog.records if "holdout" in r.getMessage()]
    assert len(told) == 2
    assert "out of training" in told[0]
    assert "holds out nothing" in told[1]


def flip(store: ActivationStore, name: str, shard: int, at: int) -> None:
    file = Path(store.shard_file(name, shard))
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["activations/h", "tokens/document"])
@pytest.mark.parametrize("at", [0, 40, -1, -30])
def test_a_flipped_bit_is_never_read(tmp_path: Path, name: str, at: int) -> None:
    """In rows, in a checksum, in an index; of rows and of the documents' numbers."""
    store = make_store(str(tmp_path / "s.zarr"))
    flip(store, name, 1, at)
    where = r"/c/1.* (torn|damaged)"
    with pytest.raises(DamagedStoreError, match=where), ActivationLoader(
        store, "h", batch_tokens=24, seed=0, num_steps=14, holdout=0.1
    ) as loader:  # fmt: skip
        list(loader)


@pytest.mark.parametrize("preload", ["none", "host", "device"])
def test_damage_is_raised_at_its_batch(tmp_path: Path, preload: Preload) -> None:
    """Batches before it come out, although the threads are far ahead."""
    store = make_store(str(tmp_path / "s.zarr"), chunk=16)
    whole = stream(ROWS, 16, 0, set(), ROWS)
    bad = 100 // 16 * 16  # the first row of a block
    flip(store, "activations/h", bad // 64, (bad % 64) // 16 * (16 * WIDTH * 4 + 4) + 9)
    first = min(whole.index(row) for row in range(bad, bad + 16)) // 24
    seen = []
    with ActivationLoader(
        store, "h", batch_tokens=24, seed=0, num_steps=13, preload=preload
    ) as loader:
        batches = iter(loader)
        for _ in range(first):
            seen += numbers([next(batches)])
        with pytest.raises(DamagedStoreError, match="c/1/0 is damaged in chunk 2"):
            next(batches)
    assert seen == whole[: 24 * first]


def reading_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("block-")]


def test_no_thread_is_left(store: ActivationStore, tmp_path: Path) -> None:
    with ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=10_000) as loader:
        next(iter(loader))
        assert reading_threads()
    assert not reading_threads()
    shutil.copytree(store.path, tmp_path / "store.zarr")
    torn = ActivationStore.open(str(tmp_path / "store.zarr"))
    os.truncate(torn.shard_file("activations/h", 0), 3)
    with pytest.raises(DamagedStoreError, match="torn"):
        load(torn, 30)
    assert not reading_threads()


def test_memory_is_bounded_however_far_a_run_goes(store: ActivationStore) -> None:
    """The ring and the plans alone, of a consumer that takes one batch."""
    with ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=10**9) as loader:
        batches = iter(loader)
        next(batches)
        threading.Event().wait(0.2)
        ahead = loader._ahead
        assert ahead._unreleased <= loading._PARTS_AHEAD
        assert len(ahead._made) <= loading._PARTS_AHEAD
        assert ahead._made[-1].first <= ahead._freed + loader._slots
        assert loader._slots * loader.reader.chunk_bytes <= loading._RING_BYTES


def test_blocks_are_read_once_an_epoch(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that two batches share too; kept ones once in all."""
    read: list[int] = []
    lock = threading.Lock()
    plain = reading.BlockReader.read_into

    def counting(self: reading.BlockReader, block: int, space: reading.BlockSpace) -> None:
        with lock:
            read.append(block)
        plain(self, block, space)

    monkeypatch.setattr(reading.BlockReader, "read_into", counting)
    steps = -(-3 * ROWS // 24)
    blocks = -(-ROWS // 16)
    want = load(store, steps)
    assert 3 * blocks <= len(read) <= 3 * blocks + 2
    for preload in ("host", "device"):
        read.clear()
        with ActivationLoader(
            store, "h", batch_tokens=24, seed=5, num_steps=steps, preload=preload
        ) as loader:
            assert all(torch.equal(a, b) for a, b in zip(loader, want, strict=True))
        assert set(read) == set(range(blocks))
        # One that is still being read when the next epoch wants it is read again.
        assert len(read) <= (2 * blocks if preload == "host" else blocks)


@pytest.mark.parametrize(
    ("epochs", "kind", "remote", "want"),
    [
        (0.5, "cuda", False, "none"),
        (1.0, "cuda", True, "none"),
        (1.5, "cuda", False, "device"),
        (1.5, "cuda", True, "device"),
        (9, "cpu", False, "none"),
        (9, "cpu", True, "host"),
    ],
)
def test_what_is_kept_where(
    store: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    epochs: float,
    kind: str,
    remote: bool,
    want: str,
) -> None:
    caplog.set_level(logging.INFO)
    reader = reading.BlockReader(store, "activations/h")
    reader.remote = store.array("activations/h") if remote else None
    size = reader.num_blocks * reader.chunk_bytes
    device = torch.device(kind)
    monkeypatch.setattr(preloading, "_host_bytes", lambda: 4 * size)
    monkeypatch.setattr(preloading, "_free_device_bytes", lambda device: 4 * size)
    assert preloading.choose_preload("auto", reader, epochs, device, tell=True) == want
    (line,) = caplog.messages
    assert line.startswith(f"train.preload=auto: {want}")
    # A row more than a quarter.
    monkeypatch.setattr(preloading, "_host_bytes", lambda: 4 * size - 1)
    monkeypatch.setattr(preloading, "_free_device_bytes", lambda device: 4 * size - 1)
    assert preloading.choose_preload("auto", reader, epochs, device) == "none"
    for asked in ("host", "device"):
        assert preloading.choose_preload(asked, reader, epochs, device) == asked
    with monkeypatch.context() as patch:
        # Each process of the host keeps all of the rows.
        patch.setenv("LOCAL_WORLD_SIZE", "5")
        with pytest.raises(ConfigError, match="'host' needs"):
            preloading.choose_preload("host", reader, epochs, device)
    monkeypatch.setattr(preloading, "_host_bytes", lambda: size - 1)
    monkeypatch.setattr(preloading, "_free_device_bytes", lambda device: size - 1)
    for asked in ("host", "device"):
        with pytest.raises(ConfigError, match=f"train.preload='{asked}' needs .*=auto or none"):
            preloading.choose_preload(asked, reader, epochs, device)


def endless(blocks: int) -> Iterator[Plan]:
    slot = 0
    for number in range(10**9):
        yield Plan([number * blocks + i for i in range(blocks)], slot, slot + blocks, number)
        slot += blocks


def test_an_error_of_the_planner_is_raised_and_not_waited_for() -> None:
    def broken() -> Iterator[Plan]:
        yield Plan([0], 0, 1, "first")
        raise RuntimeError("no more plans")

    ahead = ReadAhead(broken(), lambda b, s: None, num_slots=4, num_plans=4, num_threads=3)
    ahead.start()
    try:
        with pytest.raises(RuntimeError, match="no more plans"):  # noqa: PT012
            ahead.release(ahead.take())
            ahead.take()
    finally:
        ahead.close()


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(1, 5),
    spare=st.integers(0, 7),
    plans=st.integers(1, 4),
    threads=st.integers(1, 5),
    held=st.integers(0, 3),
)
def test_no_slot_is_written_before_it_is_released(
    blocks: int, spare: int, plans: int, threads: int, held: int
) -> None:
    """A consumer that holds back what it took finds it unchanged."""
    slots = np.full(blocks + spare, -1)

    def read(block: int, slot: int) -> None:
        slots[slot] = block

    ahead = ReadAhead(
        endless(blocks), read, num_slots=len(slots), num_plans=plans, num_threads=threads
    )
    held = min(held, plans - 1, len(slots) // blocks - 1)
    ahead.start()
    try:
        taken: list[Plan] = []
        for number in range(40):
            taken.append(ahead.take())
            assert taken[-1].payload == number
            for plan in taken:
                places = (plan.first + np.arange(blocks)) % len(slots)
                assert slots[places].tolist() == plan.blocks
            if len(taken) > held:
                ahead.release(taken.pop(0))
    finally:
        ahead.close()


@pytest.mark.gpu
@pytest.mark.parametrize("preload", ["none", "host", "device"])
@pytest.mark.parametrize("parts", [1, 1000])
def test_a_gpu_gets_the_same_batches(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, preload: Preload, parts: int
) -> None:
    """Through a feed, rings as small as they may be, every batch changed after its use, and the
    device busy: a copy that came too early or too late would show.
    """
    device, steps = torch.device("cuda"), 60
    monkeypatch.setattr(loading, "_PART_BYTES", parts * 16 * WIDTH * store_bytes(store))
    monkeypatch.setattr(loading, "_RING_BYTES", 0)
    monkeypatch.setattr(loading, "_PARTS_AHEAD", 3)

    def loader(device: torch.device, preload: Preload) -> ActivationLoader:
        return ActivationLoader(
            store, "h", batch_tokens=100, seed=5, num_steps=steps, device=device, holdout=0.2,
            preload=preload,
        )  # fmt: skip

    with loader(torch.device("cpu"), "none") as plain:
        want = list(plain)
    seen = []
    with (
        loader(device, preload) as source,
        BatchFeed(source, steps, Mesh.single(), device) as feed,
    ):
        for number, (x,) in enumerate(feed):
            if number % 7 == 3:
                torch.cuda._sleep(5_000_000)
            seen.append(x.clone())
            x.fill_(torch.nan)
    for number, (got, wanted) in enumerate(zip(seen, want, strict=True)):
        assert torch.equal(got.cpu(), wanted), number
    with loader(device, preload) as source:
        for got, wanted in zip(source, want, strict=True):
            assert got.is_cuda
            assert torch.equal(got.cpu(), wanted)


@pytest.mark.gpu
def test_a_gpus_memory_is_given_back(store: ActivationStore) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for preload in ("none", "host", "device"):
        with (
            ActivationLoader(
                store, "h", batch_tokens=24, seed=5, num_steps=99, device="cuda", preload=preload
            ) as source,
            BatchFeed(source, 99, Mesh.single(), torch.device("cuda")) as feed,
        ):
            next(iter(feed))
        del source, feed
        assert torch.cuda.memory_allocated() == before


def store_bytes(store: ActivationStore) -> int:
    """Bytes of a stored number."""
    return 2 if store.dtype == "bfloat16" else 4
