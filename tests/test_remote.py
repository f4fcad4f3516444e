"""Stores in an object store: what is written and read there is what a folder would hold, whatever
requests fail; the cache on a disk stays within its size and serves several processes.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from flash_sae_dist import files
from flash_sae_dist.activations import local_cache, read_processes, remote
from flash_sae_dist.activations.blocks import BlockReader
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.importing import ImportOptions, run_import
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.local_cache import LocalCache
from flash_sae_dist.activations.merging import run_merge
from flash_sae_dist.activations.read_worker import _Files, read_all
from flash_sae_dist.activations.records import Records, held
from flash_sae_dist.activations.remote import RemoteError
from flash_sae_dist.activations.store import (
    ActivationStore,
    DamagedStoreError,
    array_names,
    store_of,
)
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.launch.cli import build
from flash_sae_dist.training.job import parse_config
from tests.dist.ranks import CONTEXT, kill, rank_env, start_module
from tests.s3_server import BUCKET, Bucket, Faults, S3Server
from tests.tiny_model import config_data, write_config

pytest.importorskip("obstore")
RUNNER = CliRunner()
ROWS = "activations/rows"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty one, where failed requests are soon repeated."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    quick = {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(seconds=1)}
    monkeypatch.setitem(remote.RETRIES, "backoff", quick | {"base": 2})
    server.bucket.objects.clear()
    server.bucket.requests.clear()
    server.bucket.faults, server.bucket.failed = Faults(), 0
    return server.bucket


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows, and a store of them in a folder."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    np.save(folder / "rows.npy", generator.standard_normal((3000, 24)).astype(np.float32))
    take_in(str(folder / "local"), folder)
    return folder


def take_in(out: str, folder: Path, **options: Any) -> str:
    """Imports the rows of a folder."""
    named = [f"rows={folder}/rows.npy"]
    return run_import(out, named, ImportOptions("float32", 0, 0.01, "50", **options))


def url(name: str = "store") -> str:
    return f"s3://{BUCKET}/some/{name}.zarr"


def batches(store: ActivationStore, steps: int = 60, **options: Any) -> torch.Tensor:
    loader = ActivationLoader(
        store, "rows", batch_tokens=128, seed=3, num_steps=steps, holdout=0.05, **options
    )
    with loader:
        return torch.cat(list(loader))


def assert_same(a: ActivationStore, b: ActivationStore) -> None:
    assert a.geometry == b.geometry
    assert a.made_of()["rows"] == b.made_of()["rows"]
    for name in array_names(a.widths):
        assert np.array_equal(a.read(name, 0, a.rows), b.read(name, 0, b.rows)), name


@pytest.fixture
def stored(bucket: Bucket, rows: Path) -> ActivationStore:
    take_in(url(), rows)
    return ActivationStore.open(url())


def test_a_store_is_the_same_in_a_bucket(stored: ActivationStore, rows: Path) -> None:
    local = ActivationStore.open(str(rows / "local"))
    stored.verify()
    assert_same(stored, local)
    assert torch.equal(batches(stored), batches(local))
    assert torch.equal(batches(stored, preload="host"), batches(local))


def test_verbs_take_urls(stored: ActivationStore, rows: Path) -> None:
    app = build()
    for command in (["info", url()], ["stats", url()], ["verify", url()]):
        result = RUNNER.invoke(app, ["store", *command], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    told = RUNNER.invoke(app, ["store", "info", url(), "--json"], catch_exceptions=False)
    assert json.loads(told.output)["date"].startswith("2026-11-30 00:00")
    assert "complete; nothing to do" in take_in(url(), rows)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(error=0.1),
        Faults(dropped=0.1),
        Faults(error=0.1, dropped=0.1, cut=0.1, seed=1),
    ],
    ids=["errors", "dropped", "all"],
)
def test_failed_requests_lose_nothing(
    bucket: Bucket, rows: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    """Shards go in parts, too."""
    monkeypatch.setattr(remote, "_PART_BYTES", 4096)
    bucket.faults = faults
    take_in(url(), rows)
    local, store = ActivationStore.open(str(rows / "local")), ActivationStore.open(url())
    assert torch.equal(batches(store), batches(local))
    failed = bucket.failed
    bucket.faults = Faults()
    assert failed > 20
    store.verify()
    assert_same(store, local)
    assert not bucket.uploads, "no part is left behind"


def test_an_end_of_the_tries_is_one_sentence(
    stored: ActivationStore, bucket: Bucket, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote.RETRIES, "max_retries", 2)
    bucket.faults = Faults(down=True)
    told = r"^s3://.*/records/.* cannot be reached: .*503.*; check the network.*command again$"
    with pytest.raises(RemoteError, match=told):
        ActivationStore.open(url())
    with pytest.raises(RemoteError, match=told):
        take_in(url("other"), rows)
    result = RUNNER.invoke(build(), ["store", "info", url()])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert f"error: {url()}/records/" in result.output


def test_a_loader_tells_what_it_met(
    stored: ActivationStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote.RETRIES, "max_retries", 1)
    opened = ActivationStore.open(url())
    loader = ActivationLoader(opened, "rows", batch_tokens=128, seed=3, num_steps=60)
    bucket.faults = Faults(down=True)
    with loader, pytest.raises(RemoteError, match=f"{url()}/{ROWS}/c/.*503"):
        list(loader)


def test_damage_is_told(stored: ActivationStore, bucket: Bucket) -> None:
    key = stored.shard_file(ROWS, 0).removeprefix(f"s3://{BUCKET}/")
    whole = bucket.objects[key]
    torn = bytearray(whole)
    torn[5] ^= 1
    bucket.objects[key] = bytes(torn)
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is damaged in chunk 0: its crc32c"):
        BlockReader(stored, ROWS).read(0)
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is damaged"):
        stored.verify()
    bucket.objects[key] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is torn: its index"):
        BlockReader(stored, ROWS).read(0)
    del bucket.objects[key]
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is missing from the store"):
        ActivationStore.open(url())


def test_an_index_is_read_once(stored: ActivationStore, bucket: Bucket) -> None:
    """A block is one request, and a shard one more."""
    reader = BlockReader(stored, ROWS)
    bucket.requests.clear()
    for _ in range(2):
        for block in range(reader.num_blocks):
            reader.read(block)
    assert len(bucket.requests) == 2 * reader.num_blocks + stored.geometry.num_shards
    assert {method for method, _ in bucket.requests} == {"GET"}


def test_a_killed_import_goes_on(bucket: Bucket, rows: Path, tmp_path: Path) -> None:
    named = ["import", url(), f"rows={rows}/rows.npy", "--dtype", "float32", "--documents", "50"]
    named += ["--shard-mib", "0.01"]
    bucket.faults = Faults(latency_s=0.01)
    environment = rank_env(0, 1, 0) | {k: v for k, v in os.environ.items() if "AWS" in k}
    job = start_module("flash_sae_dist.launch.store", named, environment, tmp_path / "import.log")
    deadline = time.monotonic() + 60
    while sum("/records/shard-" in key for key in list(bucket.objects)) < 5:
        assert time.monotonic() < deadline
        assert job.process.is_alive(), job.text()
        time.sleep(0.01)
    kill([job])
    bucket.faults = Faults()
    with pytest.raises(ConfigError, match="unfinished"):
        ActivationStore.open(url())
    kept = {k: v for k, v in bucket.objects.items() if "/records/shard-" in k}
    assert "some/store.zarr/records/owner.json" in bucket.objects
    assert len(kept) < 40
    bucket.requests.clear()
    take_in(url(), rows)
    written = {key for method, key in bucket.requests if method in ("PUT", "POST")}
    assert not written & kept.keys(), "whole shards are not written again"
    store = ActivationStore.open(url())
    store.verify()
    assert_same(store, ActivationStore.open(str(rows / "local")))


def test_two_launches_are_told_apart(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAIT_S", 0.3)
    records = Records(url())
    with held(records, url()):
        assert records.read("owner.json") is not None
        with (
            pytest.raises(ConfigError, match=r"is at work in s3://"),
            held(Records(url()), url()),
        ):
            pass
    assert records.read("owner.json") is None


def test_of_two_that_begin_at_once_one_is_refused(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writes its record between the second's look and its own."""
    read, first = Records.read, {"host": "another", "pid": 1, "id": "x", "time": time.time()}

    def late(self: Records, name: str) -> dict[str, Any] | None:
        found = read(self, name)
        if found is None:
            self.write("owner.json", first)
        return found

    monkeypatch.setattr(Records, "read", late)
    with (
        pytest.raises(ConfigError, match="process 1 of host another is at work"),
        held(Records(url()), url()),
    ):
        pass
    assert read(Records(url()), "owner.json") == first


def test_stores_merge(stored: ActivationStore, rows: Path, tmp_path: Path) -> None:
    """From a bucket and a folder into a bucket."""
    more = np.load(rows / "rows.npy")[:300] + 1
    np.save(tmp_path / "rows.npy", more)
    take_in(str(tmp_path / "more"), tmp_path)
    for out in (url("long"), str(tmp_path / "long")):
        run_merge(out, [url(), str(tmp_path / "more")])
    long, local = ActivationStore.open(url("long")), ActivationStore.open(str(tmp_path / "long"))
    long.verify()
    assert_same(long, local)
    assert long.rows == 3300


def test_without_obstore_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(
        ConfigError, match=r"needs obstore: pip install 'flash_sae_dist\[objects\]'"
    ):
        ActivationStore.open(url())


def test_what_no_url_names_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"store 'az://c/a' cannot be reached: .*Account must be"):
        Records("az://c/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert Records("az://c/a").root == "az://c/a"
    assert Records("gs://b/a/").root == "gs://b/a"


def test_a_cache_over_a_folder_is_told(
    rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="flash_sae_dist")
    data: dict[str, Any] = {"output": str(tmp_path / "run"), "store": str(rows / "local")}
    data["store_cache"] = {"folder": str(tmp_path / "cache"), "gib": 1}
    assert store_of(parse_config(data)).rows == 3000
    assert "store_cache is not used" in caplog.text
    (tmp_path / "file").write_text("")
    data["store_cache"]["folder"] = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"store_cache\.folder=.* is a file; name a folder"):
        store_of(parse_config(data))


@pytest.mark.parametrize("path", ["memory://a", "simplecache::s3://b/a", "http://host/a"])
def test_other_urls_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be reached: .* none of s3://, gs://, az://"):
        Records(path)


def only(number: int) -> Callable[..., None]:
    """Records so many shards, then fails."""
    record, left = StoreWriter.record_shard, iter(range(number))

    def some(self: StoreWriter, *arguments: Any) -> None:
        if next(left, None) is None:
            raise RuntimeError("no more")
        record(self, *arguments)

    return some


def test_from_cache_to_evaluate(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as through a folder, requests failing all the while; a cache that failed
    goes on.
    """
    kept: set[str] = set()
    app = build()
    for place in (str(tmp_path / "store.zarr"), url()):
        data = config_data(tmp_path, store=place, shard_mib=0.01)
        data["output"] = str(tmp_path / ("far" if "://" in place else "near"))
        data["train"]["num_tokens"] = 1920
        if "://" in place:
            data["store_cache"] = {"folder": str(tmp_path / "cache"), "gib": 0.1}
            bucket.faults = Faults(error=0.1, dropped=0.05)
            with monkeypatch.context() as patch:
                patch.setattr(StoreWriter, "record_shard", only(5))
                with pytest.raises(RuntimeError, match="no more"):
                    run_cache(parse_config(data), Accelerator(cpu=True))
            kept = {key for key in bucket.objects if "/records/shard-" in key}
            bucket.requests.clear()
        run_cache(parse_config(data), Accelerator(cpu=True))
        config = str(write_config(tmp_path / "c.yaml", data))
        for verb in ("train", "evaluate"):
            result = RUNNER.invoke(app, [verb, config], catch_exceptions=False)
            assert result.exit_code == 0, result.output
    assert bucket.failed > 20
    assert len(kept) == 5
    assert not kept & {key for method, key in bucket.requests if method == "PUT"}
    near, far = (list((tmp_path / run).rglob("sae.safetensors")) for run in ("near", "far"))
    assert len(near) == len(far) == 1
    assert near[0].read_bytes() == far[0].read_bytes()
    assert list((tmp_path / "cache").glob("*.shard"))


def cached(folder: Path, num_bytes: int = 1 << 30) -> ActivationStore:
    return ActivationStore.open(url(), LocalCache(str(folder), num_bytes))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.shard"))


def shards_asked(bucket: Bucket) -> list[str]:
    """Files of rows that were asked for."""
    return [key for _, key in bucket.requests if "/c/" in key]


def test_what_was_read_comes_from_the_disk(
    stored: ActivationStore, bucket: Bucket, rows: Path, tmp_path: Path
) -> None:
    want = batches(ActivationStore.open(str(rows / "local")))
    assert torch.equal(batches(cached(tmp_path)), want)
    store = cached(tmp_path)
    bucket.requests.clear()
    # Another opening, as of another process or of a launch after this one.
    assert torch.equal(batches(store), want)
    assert not shards_asked(bucket)
    # A damaged file of the cache is fetched again; so is one that holds nothing any more.
    for number, file in enumerate(sorted(tmp_path.glob("*.shard"))):
        data = np.memmap(file, np.uint8, "r+")
        data[random.Random(number).randrange(len(data)) :] = 255 if number % 2 else 0
    for is_damaged in (True, False):
        store = cached(tmp_path)
        bucket.requests.clear()
        assert torch.equal(batches(store), want)
        assert bool(shards_asked(bucket)) == is_damaged, "it was mended"


def test_other_rows_under_a_url_are_not_taken_for_those_of_before(
    stored: ActivationStore, bucket: Bucket, tmp_path: Path, rows: Path
) -> None:
    first = batches(cached(tmp_path))
    bucket.objects.clear()
    np.save(tmp_path / "rows.npy", np.load(rows / "rows.npy") + 1)
    take_in(url(), tmp_path)
    assert torch.equal(batches(cached(tmp_path)), batches(ActivationStore.open(url())))
    assert not torch.equal(batches(cached(tmp_path)), first)


def test_the_cache_is_bounded(
    stored: ActivationStore, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = batches(ActivationStore.open(str(rows / "local")))
    one = stored.records.files.sizes(f"{ROWS}/c")
    bound = 10 * max(one.values())
    # More is read than fits: a part stays, the rest passes by.
    assert torch.equal(batches(cached(tmp_path, bound)), want)
    kept = set(tmp_path.glob("*.shard"))
    assert len(kept) > 5
    assert size_of(tmp_path) <= bound
    assert torch.equal(batches(cached(tmp_path, bound)), want)
    assert set(tmp_path.glob("*.shard")) == kept
    # What nobody has read for long makes room, the oldest first.
    monkeypatch.setattr(local_cache, "BUSY_S", 50.0)
    old = sorted(kept)[:3]
    for age, file in enumerate(old):
        os.utime(file, (time.time() - 1000 + age,) * 2)
    cache = LocalCache(str(tmp_path), bound)
    free = bound - size_of(tmp_path)
    descriptor = cache.take_in(tmp_path / "new.shard", free + old[0].stat().st_size)
    assert descriptor is not None
    os.close(descriptor)
    assert not old[0].exists()
    assert old[1].exists()
    assert size_of(tmp_path) <= bound
    assert cache.take_in(tmp_path / "huge.shard", bound + 1) is None


def read_through(environment: dict[str, str], folder: Path, num_bytes: int, number: int) -> None:
    """What a process reads through a cache, in a file of its number."""
    os.environ.update(environment)
    torch.save(batches(cached(folder, num_bytes)), folder / f"{number}.pt")


def test_two_processes_share_a_cache(
    stored: ActivationStore, rows: Path, tmp_path: Path, bucket: Bucket
) -> None:
    bound = 12 * max(stored.records.files.sizes(f"{ROWS}/c").values())
    jobs = [
        CONTEXT.Process(target=read_through, args=(dict(os.environ), tmp_path, bound, number))
        for number in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    want = batches(ActivationStore.open(str(rows / "local")))
    assert all(torch.equal(torch.load(tmp_path / f"{n}.pt"), want) for n in range(2))
    assert 0 < size_of(tmp_path) <= bound


def test_a_cache_that_cannot_be_written_is_told(
    stored: ActivationStore, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = cached(tmp_path / "file")
    assert torch.equal(batches(store), batches(ActivationStore.open(str(rows / "local"))))
    assert caplog.text.count("rows are read without it") == 1


def test_processes_give_what_threads_give(
    stored: ActivationStore, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a GPU is."""
    monkeypatch.setattr(ActivationLoader, "_by_processes", lambda self: True)
    monkeypatch.setattr(read_processes, "_PROCESSES", 2)
    want = batches(ActivationStore.open(str(rows / "local")))
    for store in (stored, cached(tmp_path)):
        assert torch.equal(batches(store), want)


@pytest.mark.parametrize("with_cache", [False, True])
def test_processes_that_read_for_a_gpu(
    stored: ActivationStore, bucket: Bucket, tmp_path: Path, with_cache: bool
) -> None:
    """The worker's own function, with what the loader would send it."""
    store = cached(tmp_path) if with_cache else stored
    reader = BlockReader(store, ROWS)
    reader.place_all()
    size, blocks = reader.chunk_bytes, list(range(0, reader.num_blocks, 3))
    pieces = [(*reader.place(b), at * size, size) for at, b in enumerate(blocks)]
    sent = json.loads(json.dumps(pieces))
    for faults in (Faults(error=0.2, cut=0.2), Faults()):
        bucket.faults = faults
        memory = bytearray(size * len(blocks))
        assert read_all(sent, memoryview(memory), _Files()) == ""
        got = np.frombuffer(memory, np.float32).reshape(len(blocks), -1, 24)
        for block, found in zip(blocks, got, strict=True):
            want = reader.read(block)
            assert np.array_equal(found[: len(want)], want)
    if not with_cache:
        key = stored.shard_file(ROWS, 0).removeprefix(f"s3://{BUCKET}/")
        del bucket.objects[key]
        number, why = json.loads(read_all(sent, memoryview(memory), _Files()))
        assert number == 0
        assert f"{url()}/{ROWS}/c/0/0 cannot be reached" in why
