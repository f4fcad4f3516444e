"""The order of batches: a function of (seed, step), whole epochs, the same for any number of
ranks, resumable.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.activations import loader as loading
from flash_sae_dist.activations.loader import ActivationLoader, BlockOrder
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError, Geometry
from flash_sae_dist.activations.writer import StoreWriter

ROWS, WIDTH = 331, 6


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """Row i holds i in its first column (exact in bfloat16 as two parts)."""
    path = str(tmp_path_factory.mktemp("loader") / "store.zarr")
    geometry = Geometry(ROWS, 64, 16)
    writer = StoreWriter(path, {}, create=True)
    writer.create(geometry, {"h": WIDTH}, request.param, {})
    number = torch.arange(ROWS)
    rows = torch.zeros(ROWS, WIDTH)
    rows[:, 0], rows[:, 1] = number // 16, number % 16
    bits = rows.bfloat16().view(torch.uint16) if request.param == "bfloat16" else rows
    tokens = number.to(torch.int32).numpy()
    for shard in range(geometry.num_shards):
        start, stop = geometry.shard_range(shard)
        arrays = {"activations/h": bits[start:stop].numpy()}
        arrays |= {f"tokens/{n}": tokens[start:stop] for n in ("ids", "document", "position")}
        writer.write_shard(geometry, shard, arrays)
    writer.finish(geometry, ["h"])
    return ActivationStore.open(path)


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
    monkeypatch.setattr(loading, "_OPEN_FILES", 2)
    most = 0
    with ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=60) as loader:
        for got, want in zip(loader, load(store, 60), strict=True):
            assert torch.equal(got, want)
            most = max(most, open_files(store.path))
    # Those kept, and those that the threads are reading.
    assert 0 < most <= 2 + loading._READERS


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


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 200),
    block=st.integers(1, 40),
    seed=st.integers(0, 99),
    cut=st.integers(1, 500),
)
def test_block_order_is_a_permutation_however_it_is_cut(
    rows: int, block: int, seed: int, cut: int
) -> None:
    order = BlockOrder(rows, block, seed)

    def flat(start: int, stop: int) -> list[int]:
        return [b * block + r for b, lo, hi in order.pieces(start, stop) for r in range(lo, hi)]

    whole = flat(0, 2 * rows)
    assert sorted(whole[:rows]) == sorted(whole[rows:]) == list(range(rows))
    cut = min(cut, 2 * rows)
    assert flat(0, cut) + flat(cut, 2 * rows) == whole
