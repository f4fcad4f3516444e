"""safetensors files written in pieces, by one process or by the owners of their rows, and crc32c of
parts put together.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flash_sae_dist import files, sums, tensor_files
from flash_sae_dist.models import saved
from flash_sae_dist.models.base import SparseCoder
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.sums import Part


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=5000), st.lists(st.integers(0, 5000), max_size=6), st.randoms())
def test_sums_of_parts_are_the_sum_of_the_whole(
    data: bytes, cuts: list[int], rng: random.Random
) -> None:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [Part(a, b - a, crc32c(data[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)]
    rng.shuffle(parts)
    assert sums.combine(parts) == f"{crc32c(data):08x}"


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 4096, 50_001])
def test_a_file_has_one_sum_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    want = f"{crc32c(data):08x}"
    assert files.checksum(tmp_path / "x") == want
    monkeypatch.setattr(files, "_BLOCK", 1000)
    monkeypatch.setattr(files, "_SPAN", 4096)
    assert files.checksum(tmp_path / "x") == want


@pytest.mark.parametrize("piece", [8, 1 << 23])
def test_safetensors_reads_every_type_and_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(tensor_files, "_PIECE", piece)
    made = {str(dtype): torch.randn(5, 3).to(dtype) for dtype in tensor_files._NAMES}
    made |= {"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "odd": torch.ones(3) > 0}
    made |= {"turned": torch.randn(4, 6).T, "tied": made["torch.float32"]}
    crc = tensor_files.save(tmp_path / "x", made)
    assert crc == files.checksum(tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def in_threads(monkeypatch: pytest.MonkeyPatch, work: Callable[[Mesh], Any], *shape: int) -> list:  # type: ignore[type-arg]
    """What work gives on each of replicas x shards, a thread each, which agree as ranks do."""
    replicas, shards = shape
    meshes = [
        Mesh(0, 1, replica, replicas, shard, shards, None, None, None)
        for replica in range(replicas)
        for shard in range(shards)
    ]
    barrier, told = threading.Barrier(len(meshes)), [None] * len(meshes)

    def by_member(make: Callable[[], Any], mesh: Mesh) -> list[Any]:
        try:
            made: Any = make()
        except Exception as e:
            made = e
        told[mesh.member] = made
        barrier.wait(10)
        found = list(told)
        barrier.wait(10)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found

    monkeypatch.setattr(saved.agree, "by_member", by_member)
    out: list[Any] = [None] * len(meshes)

    def run(mesh: Mesh) -> None:
        try:
            out[mesh.member] = work(mesh)
        except Exception as e:
            out[mesh.member] = e

    threads = [threading.Thread(target=run, args=(mesh,)) for mesh in meshes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return out


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_owners_of_rows_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    whole = TopKSAE(6, 40, 3, seed=4)
    whole.save(tmp_path / "one")
    want = (tmp_path / "one/sae.safetensors").read_bytes()

    def save(mesh: Mesh) -> None:
        sae: SparseCoder = TopKSAE(6, 40, 3, mesh=mesh, seed=4)
        sae.save(tmp_path / "many")

    assert in_threads(monkeypatch, save, *shape) == [None] * (shape[0] * shape[1])
    assert (tmp_path / "many/sae.safetensors").read_bytes() == want
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "config.json",
        "sae.safetensors",
    ]
    assert TopKSAE.is_whole(tmp_path / "many")
    assert torch.equal(TopKSAE.load(tmp_path / "many").W_dec, whole.W_dec)


def test_a_full_disk_of_one_owner_is_told_to_all_and_leaves_no_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def write(descriptor: int, data: Any, at: int) -> int:
        if at > 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    out = in_threads(
        monkeypatch, lambda mesh: TopKSAE(6, 40, 3, mesh=mesh).save(tmp_path / "x"), 1, 2
    )
    assert all(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in out)
    assert any("while writing" in note for note in out[0].__notes__)
    assert not list((tmp_path / "x").iterdir())
