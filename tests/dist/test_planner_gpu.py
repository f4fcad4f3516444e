"""Six jobs drawn at random, trained on GPUs: what each process takes of memory and time is what the
planner says.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flash_sae_dist.launch.bench_load import make_store
from flash_sae_dist.training.job import parse_config
from tests.dist.ranks import run_ranks

SEED = 20261130
# One of each is drawn; of the others any.
KINDS = ("store", "auxk", "replicas", "stream", "store", "store")
STEPS, LISTED_AT = 240, 100
# Of the fused engine, each with a chance of a quarter.
OPTIONS: dict[str, Any] = {
    "moment_dtype": "bfloat16",
    "grad_clip": 1.0,
    "ema_decay": 0.999,
    "micro_batches": 2,
}


class Drawn(NamedTuple):
    """A job."""

    kind: str
    n: int
    d: int
    f: int
    k: int
    dead: float  # the share of its latents that are dead
    options: dict[str, Any]
    blocks: int  # of the model of a stream

    def __str__(self) -> str:
        told = "".join(f" {key}={value}" for key, value in self.options.items())
        dead = f" {self.dead:.2f} dead" if self.dead else ""
        return f"{self.kind} N={self.n} D={self.d} F={self.f} k={self.k}{dead}{told}"

    def config(self, folder: Path) -> dict[str, Any]:
        """Of one pass over the steps at a constant small learning rate: what is dead stays so."""
        train: dict[str, Any] = {
            **{"batch_tokens": self.n, "num_tokens": STEPS * self.n, "log_every": 10},
            **{"lr": 1e-5, "warmup_steps": 0, "decay_fraction": 0, "checkpoint_every": 10**6},
        } | self.options
        if self.dead:
            train["dead_after_tokens"] = (LISTED_AT - 10) * self.n
        data: dict[str, Any] = {
            "output": str(folder / "run"),
            "sae": {"k": self.k, "d_sae": self.f},
            "trackers": [],
        }
        if self.kind != "stream":
            train |= {"hookpoint": "rows", "preload": "none"}
            train |= {"num_replicas": 2} if self.kind == "replicas" else {}
            return data | {"train": train, "store": str(folder / "rows.zarr")}
        hookpoint = f"model.layers.{self.blocks * 7 // 16}"
        return data | {
            "train": train | {"source": "stream", "hookpoint": hookpoint},
            "model": {"name": str(folder / "model")},
            "text": {"source": "files", "paths": [str(folder / "model" / "text.jsonl")]},
            "cache": {**{"hookpoints": [hookpoint], "context_length": 512, "batch_sequences": 16}},
        }


def draw(seed: int = SEED) -> list[Drawn]:
    """The six jobs, between the shapes of docs/performance.md in every size."""
    rng, found = random.Random(seed), []
    for kind in KINDS:
        n, k = rng.choice([1024, 2048, 4096, 8192]), rng.choice([16, 32, 50, 64, 100, 128])
        d = rng.choice([768, 1024, 2048, 2304, 3584, 4096])
        f = 64 * round(2 ** rng.uniform(14, 17) / 64)
        blocks = rng.choice([8, 12, 16])
        dead = rng.choice([0.1, 1 / 3]) if kind == "auxk" else 0.0
        options = {key: value for key, value in OPTIONS.items() if rng.random() < 0.25}
        if kind == "stream":
            d, f = min(d, 2048), min(f, 2**15)
        found.append(Drawn(kind, n, d, f, k, dead, options, blocks))
    return found


def test_what_is_drawn_is_what_a_config_can_say(tmp_path: Path) -> None:
    drawn = draw()
    assert {"auxk", "replicas", "stream"} <= {one.kind for one in drawn}
    assert draw() == drawn
    for one in drawn:
        config = parse_config(one.config(tmp_path))
        assert config.train is not None
        assert config.train.batch_tokens == one.n


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: no disk is what is timed."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("one", draw(), ids=str)
def test_a_drawn_job_takes_what_is_planned(one: Drawn, memory: Path, tmp_path: Path) -> None:
    """Memory within a tenth, a step's time within a fifth, on each of its GPUs."""
    world, model = (2 if one.kind == "replicas" else 1), ""
    if torch.cuda.device_count() < world:
        pytest.skip("needs two GPUs")
    if one.kind == "stream":
        model = f"{one.d}x{one.blocks}"
    else:
        make_store(str(memory / "rows.zarr"), 60 * one.n, one.d)
    args = (json.dumps(one.config(memory)), str(one.dead), model)
    told = run_ranks("tests.dist.planner_worker", world, tmp_path, *args, timeout=300)
    for found in told:
        print(one, {key: round(value, 3) for key, value in found.items()})
    for found in told:
        assert found["listed"] == pytest.approx(one.dead * one.f, rel=0.05)
        assert found["planned peak"] == pytest.approx(found["peak"], rel=0.1)
        assert found["planned ms"] == pytest.approx(found["ms"], rel=0.2)
