"""Whether a job fits, what to change where it does not, and the best P x R."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from ..config.base import ConfigError
from .devices import GIB, Launch
from .memory import DEAD_SHARE, Memory, Work, memory_of_rank
from .timing import StepTime, step_time

# Predictions are off by up to a tenth: half of that is no reason to refuse what may fit.
DOUBT = 1.05
# More shards than this are not proposed.
_MOST_SHARDS = 4096


class Choice(NamedTuple):
    """P shards x R replicas, and what one of them takes."""

    num_shards: int
    num_replicas: int
    memory: Memory  # with a tenth of the latents dead
    time: StepTime
    fits: bool

    def __str__(self) -> str:
        return f"{self.num_shards} x {self.num_replicas}"


def splits(work: Work, num_shards: int, num_replicas: int) -> bool:
    """Whether latents and batch can be split so."""
    batch = work.train.batch_tokens
    return (
        work.d_sae % num_shards == 0
        and batch % (num_shards * num_replicas) == 0
        and work.train.micro_batches <= batch // num_replicas
    )


def need(work: Work, num_shards: int, num_replicas: int) -> Memory:
    """What a job takes that must fit: no latent is dead yet, and rows need not stay."""
    return memory_of_rank(work, num_shards, num_replicas)


def fits(work: Work, num_shards: int, num_replicas: int, memory: int) -> bool:
    """Whether a rank has the memory that a job takes."""
    return need(work, num_shards, num_replicas).peak <= DOUBT * memory


def meshes(
    processes: int, num_replicas: int | None, *, several_groups: bool
) -> list[tuple[int, int]]:
    """Every (P, R) that the processes of a launch can have: all of them one SAE's, or several
    groups'.
    """
    sizes = [n for n in range(1, processes + 1) if processes % n == 0]
    members = sizes if several_groups else [processes]
    return [(m // r, r) for m in members for r in sizes if m % r == 0 and num_replicas in (None, r)]


def choices(work: Work, launch: Launch, pairs: Sequence[tuple[int, int]]) -> list[Choice]:
    """What each (P, R) takes, the fastest step first; those that cannot be split are left out."""
    found = [
        Choice(
            p,
            r,
            memory_of_rank(work, p, r, dead=DEAD_SHARE),
            step_time(work, launch, p, r),
            fits(work, p, r, launch.memory),
        )
        for p, r in pairs
        if splits(work, p, r)
    ]
    return sorted(found, key=lambda c: (c.time.ms, c.num_shards))


def check_memory(
    work: Work,
    num_shards: int,
    num_replicas: int,
    launch: Launch,
    varied: Collection[str] = (),  # keys that setting alone does not change
) -> None:
    """Raises ConfigError where a job's ranks have not the memory that it takes, in a sentence that
    names what to change.
    """
    if fits(work, num_shards, num_replicas, launch.memory):
        return
    takes = need(work, num_shards, num_replicas)
    kept, step = sum(takes.kept.values()), sum(takes.step.values()) + sum(takes.feed.values())
    where = f"the {launch.gpu.name}" if launch.on_gpu else "its share of this host"
    found = _cures(work, num_shards, num_replicas, launch.memory)
    cures = [cure for cure in found if cure.partition("=")[0] not in varied]
    told = f"set {', or '.join(cures[:3])}" if cures else "lower sae.d_sae and train.batch_tokens"
    raise ConfigError(
        f"{work.name}: sae.d_sae={work.d_sae} at width {work.d_in} over train.num_shards="
        f"{num_shards} takes {takes.peak / GIB:,.1f} GiB of a process's memory (weights and Adam's "
        f"state {kept / GIB:,.1f}, a step of train.batch_tokens={work.train.batch_tokens} "
        f"{step / GIB:,.1f}), but {where} has {launch.memory / GIB:,.1f} GiB free; {told}"
    )


def _cures(work: Work, P: int, R: int, memory: int) -> Iterator[str]:
    """Changes of one key of which each is enough, the cheapest first."""

    def enough(p: int = P, d_sae: int = work.d_sae, **train: object) -> bool:
        changed = work._replace(train=work.train.model_copy(update=train), d_sae=d_sae)
        return fits(changed, p, R, memory)

    if work.engine == "fused" and work.moment == 4 and enough(moment_dtype="bfloat16"):
        yield "train.moment_dtype=bfloat16"
    batch = work.train.batch_tokens
    for parts in _doublings(work.train.micro_batches, batch // R):
        if enough(micro_batches=parts):
            yield f"train.micro_batches={parts}"
            break
    # Processes on one host without GPUs share its memory: more of them have no more.
    for p in _doublings(P, _MOST_SHARDS) if work.on_gpu else ():
        if splits(work, p, R) and enough(p):
            yield f"train.num_shards={p} with {p * R} processes an SAE"
            break
    for factor in _doublings(1, batch):
        fewer = batch // factor
        is_even = fewer % (P * R) == 0 and fewer // R >= work.train.micro_batches
        if is_even and enough(batch_tokens=fewer):
            yield f"train.batch_tokens={fewer}"
            break
    if d_sae := _widest(work, P, R, memory):
        yield f"sae.d_sae={d_sae}"


def _doublings(start: int, most: int) -> Iterator[int]:
    while (start := 2 * start) <= most:
        yield start


def _widest(work: Work, P: int, R: int, memory: int) -> int:
    """The most latents that fit, a multiple of 64 P where there are as many; 0 for none."""
    unit = P * (64 if work.d_sae >= 64 * P else 1)
    low, high = 0, work.d_sae // unit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(work._replace(d_sae=middle * unit), P, R, memory):
            low = middle
        else:
            high = middle - 1
    return low * unit if low * unit >= work.k else 0
