"""Which jobs share a stream of batches, and which group of devices takes which stream."""

from __future__ import annotations

from typing import NamedTuple

from ..training.records import Job

# fp32 weights, gradients and two moments, and a 2-byte compute copy, of two [d_sae, d_in] matrices.
_BYTES_A_WEIGHT = 4 * 4 + 2


class Bundle(NamedTuple):
    """Jobs that are trained together on each batch of one hookpoint."""

    jobs: list[Job]
    cost: float


def job_bytes(job: Job, d_in: int, num_shards: int) -> int:
    """Bytes of one job's parameters, gradients and optimizer state on one rank."""
    assert job.config.sae is not None
    return 2 * job.config.sae.width(d_in) * d_in * _BYTES_A_WEIGHT // num_shards


def job_cost(job: Job, d_in: int) -> float:
    """Flops of a job's encoder matmuls, the dense part of its work."""
    assert job.config.sae is not None
    assert job.config.train is not None
    return 2.0 * job.config.train.num_tokens * job.config.sae.width(d_in) * d_in


def make_bundles(
    jobs: list[Job], widths: dict[str, int], num_shards: int, memory_bytes: int
) -> list[Bundle]:
    """Puts jobs that read the same batches together, as many as fit memory_bytes; at least one a
    bundle.
    """
    streams: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        t = job.config.train
        assert t is not None
        key = (t.hookpoint, t.batch_tokens, t.num_tokens, t.seed, t.log_every, t.checkpoint_every)
        streams.setdefault(key, []).append(job)
    bundles = []
    for stream in streams.values():
        assert stream[0].config.train is not None
        d_in = widths[str(stream[0].config.train.hookpoint)]
        together: list[Job] = []
        used = 0
        for job in stream:
            need = job_bytes(job, d_in, num_shards)
            if together and used + need > memory_bytes:
                bundles.append(Bundle(together, sum(job_cost(j, d_in) for j in together)))
                together, used = [], 0
            together.append(job)
            used += need
        bundles.append(Bundle(together, sum(job_cost(j, d_in) for j in together)))
    return bundles


def assign(bundles: list[Bundle], num_groups: int) -> list[list[Bundle]]:
    """Longest first, each to the group with the least work so far; every rank answers alike."""
    groups: list[list[Bundle]] = [[] for _ in range(num_groups)]
    loads = [0.0] * num_groups
    for bundle in sorted(bundles, key=lambda b: -b.cost):
        least = loads.index(min(loads))
        groups[least].append(bundle)
        loads[least] += bundle.cost
    return groups
