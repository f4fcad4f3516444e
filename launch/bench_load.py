"""The loader alone, beside what it is made of in the same run: reads of the same blocks by as many
threads as it may use, and on a GPU the copy of pinned memory.

    python -m flash_sae_dist.launch.bench_load load [--store STORE --hookpoint NAME] [--json FILE]

Without a store one of random rows is made, of --gib GiB at gpt2 shape, under --folder (memory, by
default), and removed again. `preadv` (`requests` to an object store) reads whole blocks in a random
order into reused buffers and verifies nothing. `host us`: what a batch costs the thread
that asks for it. The rates of preload=host and device are those of the second epoch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ..activations.blocks import REQUESTS, BlockReader, BlockSpace
from ..activations.feed import BatchFeed
from ..activations.loader import READERS, ActivationLoader
from ..activations.preload import Kept
from ..activations.store import ActivationStore, make_geometry, shard_path
from ..activations.writer import StoreWriter, row_sums
from ..parallel.mesh import Mesh
from .bench_timing import print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
HOOKPOINT, DOCUMENT = "rows", "tokens/document"
_SHARD_MIB = 64.0
_DOCUMENT_ROWS = 500
_COPY_BYTES, _COPIES = 64 << 20, 20


@app.callback()
def _several() -> None:
    """The loader beside its limits."""


def make_store(path: str, rows: int, width: int) -> ActivationStore:
    """A store of about so many random bfloat16 rows. Its shards differ in their documents alone:
    the first is written, the others are copies of its files.
    """
    geometry = make_geometry(rows, width, 2, _SHARD_MIB)
    num_shards = max(1, rows // geometry.shard_rows)
    geometry = geometry._replace(rows=num_shards * geometry.shard_rows)
    writer = StoreWriter(path, {"made": "bench load"}, create=True)
    writer.create(geometry, {HOOKPOINT: width}, "bfloat16", {})
    shard, rng = geometry.shard_rows, np.random.default_rng(0)
    bits = torch.from_numpy(rng.standard_normal((shard, width), dtype=np.float32)).bfloat16()
    number = np.arange(shard, dtype=np.int32)
    arrays = {
        f"activations/{HOOKPOINT}": bits.view(torch.uint16).numpy(),
        "tokens/ids": number,
        DOCUMENT: rng.permutation(number // _DOCUMENT_ROWS).astype(np.int32),
        "tokens/position": number % _DOCUMENT_ROWS,
    }
    sums = {HOOKPOINT: row_sums(bits)}
    crcs = {name: writer.write_rows(geometry, 0, name, values) for name, values in arrays.items()}
    rows_name = f"activations/{HOOKPOINT}"
    for other in range(num_shards):
        if other:
            source, target = (Path(path, shard_path(rows_name, s)) for s in (0, other))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        for name in arrays.keys() - {rows_name}:
            first = other * (shard // _DOCUMENT_ROWS + 1) if name == DOCUMENT else 0
            crcs[name] = writer.write_rows(geometry, other, name, arrays[name] + np.int32(first))
        writer.record_shard(geometry, other, crcs, sums)
    writer.finish(geometry, [HOOKPOINT], num_shards * (shard // _DOCUMENT_ROWS + 1))
    return ActivationStore.open(path)


@contextmanager
def store_for(
    store: str, hookpoint: str, folder: str, gib: float, width: int, keep: str
) -> Iterator[tuple[ActivationStore, str]]:
    """The named store and hookpoint, or one of random rows that is kept at `keep` or removed."""
    rows = int(gib * 2**30 / (2 * width))
    if store:
        yield ActivationStore.open(store), hookpoint
        return
    if keep:
        yield make_store(keep, rows, width), HOOKPOINT
        return
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield make_store(f"{made}/rows.zarr", rows, width), HOOKPOINT


def read_rate(store: ActivationStore, hookpoint: str, threads: int) -> float:
    """Bytes/s of whole blocks read in a random order into reused buffers, unverified."""
    reader = BlockReader(store, f"activations/{hookpoint}")
    order = np.random.default_rng(0).permutation(reader.num_blocks)

    def read(part: int) -> None:
        space = BlockSpace.of(reader.empty())
        for block in order[part::threads].tolist():
            file, offset = reader.locate(block)
            file.read_into(space.bytes, offset)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
            begin = time.perf_counter()
            list(pool.map(read, range(threads)))
            return reader.num_blocks * reader.chunk_bytes / (time.perf_counter() - begin)
    finally:
        reader.close()


def copy_rate(device: torch.device) -> float:
    """Bytes/s of copies from pinned memory to a GPU."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return _COPIES * _COPY_BYTES / (time.perf_counter() - begin)


def load_rate(
    store: ActivationStore,
    hookpoint: str,
    batch_tokens: int,
    preload: Kept,
    holdout: float,
    device: torch.device,
) -> tuple[float, float]:
    """(batches/s, host seconds a batch) of the loader through a feed, over an epoch: the first, or
    with rows kept in memory the second.
    """
    epoch = max(1, store.rows // batch_tokens)
    warm = min(10, epoch - 1) if preload == "none" else epoch
    steps = epoch if preload == "none" else 2 * epoch
    loader = ActivationLoader(
        store, hookpoint, batch_tokens=batch_tokens, seed=0, num_steps=steps,
        device=device, holdout=holdout, preload=preload,
    )  # fmt: skip

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with loader, BatchFeed(loader, steps, Mesh.single(), device) as feed:
        batches = iter(feed)
        for _ in range(warm):
            next(batches)
        wait()
        begin, host = time.perf_counter(), time.thread_time()
        for _ in batches:
            pass
        host = time.thread_time() - host
        wait()
        seconds = time.perf_counter() - begin
    return (steps - warm) / seconds, host / (steps - warm)


@app.command()
def load(
    store: Annotated[str, typer.Option(help="A store; left out, one is made.")] = "",
    hookpoint: Annotated[str, typer.Option(help="A hookpoint of that store.")] = "",
    folder: Annotated[str, typer.Option(help="Where a store is made.")] = "/dev/shm",
    gib: Annotated[float, typer.Option(help="Size of the store that is made.")] = 4.0,
    width: Annotated[int, typer.Option(help="Width of its rows.")] = 768,
    keep: Annotated[
        str, typer.Option(help="Make it here and leave it; its hookpoint is rows.")
    ] = "",
    batch_tokens: Annotated[int, typer.Option(help="Rows of a batch.")] = 4096,
    holdout: Annotated[float, typer.Option(help="As train.holdout.")] = 0.01,
    preload: Annotated[list[str] | None, typer.Option(help="none, host, device.")] = None,
    cpu: Annotated[bool, typer.Option(help="Batches for the CPU, where a GPU is, too.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """Batches from a store: GB/s beside reads and copies alone."""
    if bool(store) != bool(hookpoint):
        raise typer.BadParameter("--store and --hookpoint go together")
    modes: dict[str, Kept] = {"none": "none", "host": "host", "device": "device"}
    if wrong := set(preload or ()) - modes.keys():
        raise typer.BadParameter(f"--preload {wrong.pop()} is none of {', '.join(modes)}")
    device = torch.device("cpu" if cpu else "cuda")
    table: list[dict[str, Any]] = []
    with store_for(store, hookpoint, folder, gib, width, keep) as (opened, name):
        size = opened.shape.row_bytes(f"activations/{name}")
        for threads in (1, READERS if opened.records.local else REQUESTS):
            rate = read_rate(opened, name, threads)
            how = "preadv" if opened.records.local else "requests"
            table.append(_row(f"{how}, {threads} threads", rate, size))
        if not cpu:
            table.append(_row("copy to the GPU", copy_rate(device), size))
        for mode in preload or modes:
            found, host = load_rate(opened, name, batch_tokens, modes[mode], holdout, device)
            row = _row(f"loader, preload={mode}", found * batch_tokens * size, size)
            table.append(row | {"host us": 1e6 * host})
    print_table("Loader", table)
    if json is not None:
        write_json(json, "load", table)


def _row(what: str, rate: float, size: int) -> dict[str, Any]:
    return {"what": what, "GB/s": rate / 1e9, "M tokens/s": rate / size / 1e6}


if __name__ == "__main__":
    app()
