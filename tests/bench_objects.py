"""Our writer and loader beside obstore alone, on the same object store:

    python -m tests.bench_objects [--url s3://bucket/folder] [--gib 0.5] [--rounds 5]

Without a URL a stand-in of S3 is started in a process of its own, which answers after --latency-ms.
Rounds take turns, and each figure is the best of them, in GB/s of rows. obstore alone writes files
of the size of our shards, and reads parts of the size of our blocks in a random order, --requests
at once, and looks at nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import obstore
import torch
from obstore.store import from_url

from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore, Geometry, make_geometry
from flash_sae_dist.activations.writer import StoreWriter, row_sums
from flash_sae_dist.launch.bench_load import HOOKPOINT
from tests.dist.ranks import free_port
from tests.s3_server import BUCKET, environment

WIDTH, BATCH, WRITERS = 768, 4096, 4
ROWS = f"activations/{HOOKPOINT}"


class Work:
    """A store of random rows, written and read in both ways."""

    def __init__(self, url: str, rows: int, requests: int) -> None:
        cut = make_geometry(rows, WIDTH, 2, 64.0)
        self.shards = max(1, rows // cut.shard_rows)
        self.geometry: Geometry = cut._replace(rows=self.shards * cut.shard_rows)
        self.bits = torch.randn(cut.shard_rows, WIDTH).bfloat16()
        self.rows = self.bits.view(torch.uint16).numpy()
        self.bytes = self.shards * self.rows.nbytes
        self.requests = requests
        self.url, self.client, self.plain = url, from_url(f"{url}/client"), self.rows.tobytes()

    def write(self) -> float:
        """By the writer: rows, tokens and records, into a store that is begun anew. Sums of rows
        are made before, as on a GPU.
        """
        for about in obstore.list(from_url(self.url), "ours").collect():
            obstore.delete(from_url(self.url), about["path"])
        writer = StoreWriter(f"{self.url}/ours", {"made": "bench"}, create=True)
        number = np.arange(len(self.rows), dtype=np.int32)
        tokens = {"ids": number, "document": number // 500, "position": number % 500}
        arrays = {ROWS: self.rows, **{f"tokens/{name}": array for name, array in tokens.items()}}
        sums = {HOOKPOINT: row_sums(self.bits)}

        def shard(number: int) -> None:
            crcs = {n: writer.write_rows(self.geometry, number, n, a) for n, a in arrays.items()}
            writer.record_shard(self.geometry, number, crcs, sums)

        begin = time.perf_counter()
        writer.create(self.geometry, {HOOKPOINT: WIDTH}, "bfloat16", {})
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(shard, range(self.shards)))
        writer.finish(self.geometry, [HOOKPOINT], len(self.rows) // 500 + 1)
        return self.bytes / (time.perf_counter() - begin)

    def client_write(self) -> float:
        """By obstore, with its own defaults."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(WRITERS) as pool:
            list(
                pool.map(lambda n: obstore.put(self.client, f"{n}", self.plain), range(self.shards))
            )
        return self.bytes / (time.perf_counter() - begin)

    def read(self) -> float:
        """Two epochs of the loader, from its first request on."""
        store = ActivationStore.open(f"{self.url}/ours")
        steps = 2 * store.rows // BATCH
        loader = ActivationLoader(store, HOOKPOINT, batch_tokens=BATCH, seed=0, num_steps=steps)
        out = torch.empty(loader.shape, dtype=loader.dtype)
        begin = time.perf_counter()
        with loader:
            for _ in range(steps):
                loader.fill_(out)
        return steps * out.nbytes / (time.perf_counter() - begin)

    def client_read(self) -> float:
        """As many bytes in as large parts."""
        size = self.geometry.chunk_rows * WIDTH * 2
        parts = [(n, at) for n in range(self.shards) for at in range(0, len(self.plain), size)]
        order = np.random.default_rng(0).permutation(len(parts))
        begin = time.perf_counter()
        asyncio.run(self._get([parts[i] for i in order], size))
        return self.bytes / (time.perf_counter() - begin)

    async def _get(self, parts: list[tuple[int, int]], size: int) -> None:
        free = asyncio.Semaphore(self.requests)

        async def one(number: int, at: int) -> None:
            async with free:
                await obstore.get_range_async(self.client, f"{number}", start=at, length=size)

        await asyncio.gather(*(one(*part) for part in parts))


def bench(work: Work, rounds: int) -> None:
    """Prints the best of each."""
    ways: dict[str, Callable[[], float]] = {
        "write": work.write,
        "client write": work.client_write,
        "read": work.read,
        "client read": work.client_read,
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, run in ways.items():
            best[name] = max(best[name], run() / 1e9)
    for name in ("write", "read"):
        ours, client = best[name], best[f"client {name}"]
        print(f"{name}: {ours:.2f} GB/s, obstore alone {client:.2f}: {ours / client:.2f} of it")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="")
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = int(options.gib * 2**30 / WIDTH / 2)
    if options.url:
        bench(Work(options.url, rows, options.requests), options.rounds)
        return
    port = free_port()
    os.environ.update(environment(port))
    # For obstore alone; ours takes the endpoint's word for it.
    os.environ["AWS_ALLOW_HTTP"] = "true"
    command = [sys.executable, "-m", "tests.s3_server", str(port), str(options.latency_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        bench(Work(f"s3://{BUCKET}/bench", rows, options.requests), options.rounds)
        server.communicate()


if __name__ == "__main__":
    main()
