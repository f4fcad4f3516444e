"""Processes that read blocks: the same batches as threads give, errors where they belong."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sae_dist.activations.loader import ActivationLoader, _Memory
from flash_sae_dist.activations.read_ahead import Plan
from flash_sae_dist.activations.read_processes import ReadProcesses, SharedMemory
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError
from flash_sae_dist.config.base import UserError
from tests.test_loader import flip, make_store


@pytest.fixture
def by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU is."""
    monkeypatch.setattr(ActivationLoader, "_by_processes", lambda self: self._host is None)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(str(tmp_path / "s.zarr"), dtype="bfloat16")


def batches(store: ActivationStore, preload: str = "none", start: int = 0) -> list[torch.Tensor]:
    loader = ActivationLoader(
        store, "h", batch_tokens=24, seed=3, start_step=start, num_steps=40 - start,
        preload=preload, holdout=0.2,  # type: ignore[arg-type]
    )  # fmt: skip
    with loader:
        return [batch.clone() for batch in loader]


def children() -> set[int]:
    """Processes that this one started and that read blocks."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(status[1]) == os.getpid() and b"read_worker" in command:
            found.add(int(path.name))
    return found


def test_processes_give_what_threads_give(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = batches(store)
    with monkeypatch.context() as patch:
        patch.setattr(ActivationLoader, "_by_processes", lambda self: self._host is None)
        for preload in ("none", "device"):
            for found, expected in zip(batches(store, preload), want, strict=True):
                assert torch.equal(found, expected)
        resumed = batches(store, start=17)
        assert all(map(torch.equal, resumed, want[17:]))
    assert not children(), "none is left"


@pytest.mark.parametrize("preload", ["none", "host", "device"])
@pytest.mark.parametrize("processes", [False, True])
def test_int8_rows_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: str, processes: bool
) -> None:
    store = make_store(str(tmp_path / "s.zarr"), dtype="int8")
    if processes:
        monkeypatch.setattr(ActivationLoader, "_by_processes", lambda self: self._host is None)
    rows = torch.from_numpy(store.read("activations/h", 0, store.rows)).bfloat16()
    found = batches(store, preload)
    assert {batch.dtype for batch in found} == {torch.bfloat16}
    known = {tuple(row) for row in rows.tolist()}
    assert {tuple(row) for batch in found for row in batch.tolist()} < known
    plain = batches(make_store(str(tmp_path / "plain.zarr"), dtype="bfloat16"))
    for batch, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(batch.float(), expected.float(), atol=0.1, rtol=0)


def test_damage_is_raised_at_its_batch(store: ActivationStore, by_processes: None) -> None:
    whole = batches(store)
    flip(store, "activations/h", store.geometry.num_shards - 1, 3)
    loader = ActivationLoader(store, "h", batch_tokens=24, seed=3, num_steps=40, holdout=0.2)
    found: list[torch.Tensor] = []
    with loader, pytest.raises(DamagedStoreError, match="its crc32c does not hold"):
        found.extend(batch.clone() for batch in loader)
    assert 0 < len(found) < 40
    assert all(map(torch.equal, found, whole))


def test_a_killed_process_is_told(store: ActivationStore, by_processes: None) -> None:
    loader = ActivationLoader(store, "h", batch_tokens=24, seed=3, num_steps=10**6)
    with loader:
        reading = iter(loader)
        next(reading)
        for child in children():
            os.kill(child, signal.SIGKILL)
        with pytest.raises(UserError, match="reads the store ended with code -9"):
            list(reading)
    assert not children()


def test_they_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    file = tmp_path / "block"
    file.write_bytes(b"0" * 20)

    def plans() -> Iterator[Plan]:
        while True:
            yield Plan([], 0, 0, None)

    memory = SharedMemory(16, lock=False)
    reading = ReadProcesses(
        plans(), lambda block, slot: [(str(file), 0, 0, 16)], lambda block: UserError("damaged"),
        memory=memory, num_slots=1, num_plans=2,
    )  # fmt: skip
    reading.start()
    assert reading.take().blocks == []
    left = children()
    assert left
    for process in reading._processes:
        assert process.stdin is not None
        process.stdin.close()
    for _ in range(100):
        if not children() or all("Z" in Path(f"/proc/{c}/stat").read_text() for c in children()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("they went on alone")
    for process in reading._processes:
        process.stdin = None
    reading.close()
    memory.close()


def open_memories() -> int:
    """Memories that are open in this process."""
    links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum("flash_sae_dist blocks" in target for target in links)


def test_a_loader_that_fails_gives_its_memory_back(
    store: ActivationStore, by_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> ActivationLoader:
        return ActivationLoader(store, "h", batch_tokens=24, seed=5, num_steps=9)

    def fail(*args: Any) -> None:
        raise MemoryError

    before = open_memories()
    never_entered = make()
    assert open_memories() > before
    del never_entered
    gc.collect()
    assert open_memories() == before
    with monkeypatch.context() as patch:
        patch.setattr(_Memory, "allocate", fail)
        with pytest.raises(MemoryError):
            make()
    gc.collect()
    assert open_memories() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(MemoryError):
            make()
    gc.collect()
    assert open_memories() == before
