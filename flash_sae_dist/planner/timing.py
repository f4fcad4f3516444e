"""Time of a step and of a job: a roofline over measured rates.

A step is its products at the matmul rate, its gathers and its pass over the parameters at the copy
rate, its collectives at the links' rate; the loader runs beside it. Factors are fitted to
docs/performance.md: six shapes on one H200 within 6%, with dead latents too; a million latents and
two GPUs within 16% (tests/test_planner.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .devices import Launch
from .memory import DEAD_SHARE, Memory, Work, memory_of_rank
from .wire import Sent, batch_sent, step_sent

# Gathers of N*k rows, some of which come from the L2 cache; a step's launch, in ms.
_GATHERS, _LAUNCH_MS = 3.5, 0.05
# Times that products in bfloat16 are faster than in IEEE float32 (data sheets).
_FLOAT32 = 15
# Passes over parameters and dense gradients of the engines with autograd, beside the fused one's.
_AUTOGRAD_PASSES = 4.5
# Bytes of a parameter that go over the bus and through Adam on the host, and GB/s of that: 0.62 s a
# step of 1.07e9 parameters beside an H200 with 16 cores (docs/performance.md).
_OFFLOAD_BYTES, _OFFLOAD_GB_S = 36, 66.0
# A clipped step gathers twice more and reads the weights once more.
_CLIP_GATHERS = 2
# Bytes that the global top-k moves for a candidate: gathered, ordered, as keys, several passes.
_CANDIDATE_BYTES = 80
# Of a dead latent's flops and passes, five dense products with a selection between them.
_DEAD = 1.15
# Of the links' rate that NCCL reached at 134 MB; what a collective takes at least, in ms.
_LINK, _HOP_MS = 0.6, 0.03
# GB/s of one process's loader and of all of a host, from its page cache (bench load).
LOADER_GB_S, HOST_GB_S = 10.0, 12.8
# A forward pass reaches this of the matmul rate: 266,000 tokens/s of a Llama of 1.2 billion
# parameters on an H200 (docs/performance.md).
FORWARD = 0.51
# Seconds until a job's first step, and GB/s at which an SAE is written at its end.
_START_S, _WRITE_GB_S = 10.0, 2.0


class StepTime(NamedTuple):
    """Milliseconds of a step."""

    compute: float
    wire: float
    loader: float  # beside the two
    model: float = 0.0  # of a stream: forward passes, on the same GPU

    @property
    def ms(self) -> float:
        """What a step takes."""
        return max(self.compute + self.wire + self.model, self.loader)

    @property
    def bound(self) -> str:
        """What decides it."""
        if self.loader > self.compute + self.wire + self.model:
            return "the store"
        if self.model > self.compute + self.wire:
            return "the model"
        return "the wire" if self.wire > self.compute else "the GPU"


def compute_ms(
    work: Work, launch: Launch, num_shards: int, num_replicas: int, dead: float
) -> float:
    """A step's products, gathers and passes on one rank."""
    N, D, F = work.train.batch_tokens, work.d_in, work.d_sae // num_shards
    n, K, clips = N // num_replicas, work.slots(num_shards), work.train.grad_clip is not None
    matmul, copy = 1e9 * launch.gpu.matmul_tflops, 1e9 * launch.gpu.copy_tb_s  # a ms
    if work.on_gpu and work.compute.itemsize > 2:
        matmul /= _FLOAT32
    # A gather of the forward pass, the others of all replicas' pairs; a shard's slots are K, most
    # of them another's.
    rows = n + (_GATHERS - 1 + _CLIP_GATHERS * clips) * N
    moved = rows * K * D * work.compute.itemsize + _parameter_bytes(work, num_shards)
    if num_shards > 1:
        moved += _CANDIDATE_BYTES * n * K * num_shards
    ms = 2 * n * D * F / matmul + moved / copy + _LAUNCH_MS
    if work.offloads:
        ms += _OFFLOAD_BYTES * 2 * D * F / num_replicas / (_OFFLOAD_GB_S * 1e6)
    if not (M := work.listed(num_shards, dead)):
        return ms
    moved = 16 * n * M + 24 * M * D
    return ms + _DEAD * (10 * n * M * D / matmul + moved / copy) + _LAUNCH_MS


def _parameter_bytes(work: Work, num_shards: int) -> float:
    """What Adam reads and writes, 26 bytes a parameter in float32 with bfloat16 copies; signum has
    one moment.
    """
    wide, moments = work.master, 1 if work.train.optimizer == "signum" else 2
    copies = work.compute.itemsize if work.compute.itemsize != wide else 0
    each = float(2 * wide + 2 * moments * work.moment + copies)
    each += 3 * wide * work.averages + wide * (work.train.grad_clip is not None)
    if work.engine != "fused":
        each *= _AUTOGRAD_PASSES
    return each * 2 * work.d_in * (work.d_sae // num_shards)


def sent_ms(sent: Sequence[Sent], launch: Launch, num_shards: int, num_replicas: int) -> float:
    """Collectives one after another, each at the rate of what its group spans."""
    size = {"shards": num_shards, "replicas": num_replicas}
    size["members"] = num_shards * num_replicas
    # Shards are neighbours, replicas lie num_shards apart.
    span = {"shards": num_shards, "replicas": size["members"], "members": size["members"]}
    total = 0.0
    for one in sent:
        group, hosts = size[one.group], -(-span[one.group] // launch.local)
        rate = launch.gpu.link_gb_s
        if hosts > 1:
            # A ring uses the adapters of all its ranks on a host.
            rate = min(rate, launch.gpu.network_gb_s * max(1, group // hosts))
        rounds = group - 1 if one.kind == "all_gather" else 2 * (group - 1) / group
        hop = _HOP_MS * (1 + math.log2(hosts))
        total += one.calls * hop + rounds * one.bytes / (_LINK * rate * 1e6)
    return total


def loader_ms(work: Work, launch: Launch, num_members: int) -> float:
    """A process's rows of a batch from the store, beside those of the others of its host."""
    if work.train.source == "stream":
        return 0.0
    host = HOST_GB_S if launch.store_gb_s is None else launch.store_gb_s
    rate = min(LOADER_GB_S, host / launch.local)
    return work.train.batch_tokens // num_members * work.d_in * work.stored_bytes / (rate * 1e6)


def model_ms(work: Work, launch: Launch, num_members: int) -> float:
    """Forward passes of a process's tokens of a batch, those that are held out among them."""
    if work.stream is None:
        return 0.0
    tokens = work.train.batch_tokens / num_members / (1 - work.train.holdout)
    return tokens * work.stream.flops / (FORWARD * 1e9 * launch.gpu.matmul_tflops)


def step_time(
    work: Work,
    launch: Launch,
    num_shards: int,
    num_replicas: int,
    *,
    dead: float = DEAD_SHARE,
) -> StepTime:
    """Time of a step of P shards x R replicas where a share of the latents is dead."""
    P, R = num_shards, num_replicas
    listed = round(dead * (work.d_sae // P)) if work.revives else 0
    return StepTime(
        compute_ms(work, launch, P, R, dead),
        sent_ms(step_sent(work, P, R, listed), launch, P, R),
        loader_ms(work, launch, P * R) + sent_ms(batch_sent(work, P, R), launch, P, R),
        model_ms(work, launch, P * R),
    )


class Cost(NamedTuple):
    """What a job adds to a bundle on P shards x R replicas."""

    memory: Memory  # with a tenth of the latents dead
    time: StepTime
    steps: int
    written: int  # bytes of the finished SAE that a rank writes


def cost_of(work: Work, launch: Launch, num_shards: int, num_replicas: int) -> Cost:
    """A job's cost."""
    return Cost(
        memory_of_rank(work, num_shards, num_replicas, dead=DEAD_SHARE),
        step_time(work, launch, num_shards, num_replicas),
        work.steps,
        8 * work.d_sae * work.d_in // num_shards,
    )


def bundle_seconds(costs: Sequence[Cost]) -> float:
    """Seconds of jobs that are trained together on each batch, whose rows are read or made once."""
    steps = sum(c.time.compute + c.time.wire for c in costs)
    ms = max(steps + costs[0].time.model, costs[0].time.loader)
    written = sum(c.written for c in costs)
    return _START_S + ms * costs[0].steps / 1e3 + written / (_WRITE_GB_S * 1e9)
