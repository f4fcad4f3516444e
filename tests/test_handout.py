"""Bundles go to whichever group is free: long grids end together, and are planned at once."""

from __future__ import annotations

import heapq
import time
from pathlib import Path

import numpy as np
import pytest

from flash_sae_dist.grid.handout import bundles_for, in_order
from flash_sae_dist.grid.plan import Bundle, Plan, expand, place, works_of
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.planner.devices import GPUS, Launch
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.records import Job

CONFIG = parse_config(
    {
        "output": "runs/x",
        "sae": {"k": 32, "d_sae": 16384},
        "train": {"num_tokens": 100_000_000},
        "grid": {
            "values": {
                "sae.d_sae": [4096, 8192, 16384, 32768, 65536],
                "sae.k": [16, 32, 64],
                "train.lr": [1e-4, 2e-4],
            }
        },
    }
)
WIDTHS = {f"layers.{i}": 2304 for i in range(10)}


def makespan(durations: list[float], num_groups: int) -> float:
    """Time until the last group is done, each taking the next one when it is free."""
    free = [0.0] * num_groups
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def plan_of(costs: np.ndarray) -> Plan:
    jobs = [Job(str(n), Path(str(n)), CONFIG) for n in range(len(costs))]
    bundles = [Bundle([job], cost) for job, cost in zip(jobs, costs.tolist(), strict=True)]
    return Plan(jobs, {job.name for job in jobs}, [bundles[0::2], bundles[1::2]])


@pytest.mark.parametrize("seed", range(5))
def test_200_jobs_on_64_devices_end_near_the_bound(seed: int) -> None:
    """Of sizes over a factor of ten, each taking up to a fifth more or less than was predicted."""
    rng = np.random.default_rng(seed)
    predicted = np.exp(rng.uniform(0, np.log(10), 200))
    actual = predicted * rng.uniform(0.8, 1.2, 200)
    order = [int(bundle.jobs[0].name) for bundle in in_order(plan_of(predicted))]
    assert sorted(order) == list(range(200))
    bound = max(actual.sum() / 64, actual.max())
    assert makespan([actual[n] for n in order], 64) < 1.15 * bound


def test_300_jobs_are_planned_at_once() -> None:
    began = time.monotonic()
    launch = Launch(GPUS["H200"], 64, 8, 120 << 30)
    jobs = expand(CONFIG, list(WIDTHS))
    groups = place(jobs, works_of(jobs, WIDTHS, "bfloat16", launch), launch, 1, 1)
    seconds = time.monotonic() - began
    assert len(jobs) == 300
    assert sorted(j.name for g in groups for b in g for j in b.jobs) == sorted(j.name for j in jobs)
    assert seconds < 5


def test_one_group_takes_all() -> None:
    plan = plan_of(np.array([1.0, 3.0, 2.0]))
    assert [bundle.cost for bundle in bundles_for(plan, Mesh.single())] == [3.0, 2.0, 1.0]
