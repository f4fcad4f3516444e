"""The plan of a config, for `flash-sae plan`: what caching takes, and each job with its figures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..activations.preload import kept_by_auto
from ..config.base import ConfigError
from ..files import check_space
from ..grid.plan import (
    Bundle,
    check_fit,
    choose_mesh,
    jobs_of,
    place,
    seconds_of,
    works_of,
)
from ..parallel.mesh import Mesh
from ..training.host_memory import free_bytes
from ..training.job import Config
from ..training.records import Job
from .caching import CachePlan, Rows, cache_plan, check_cache, rows_there
from .devices import Launch
from .memory import DEAD_SHARE, Memory, Work, memory_of_rank
from .search import Choice, check_memory, choices, fits, meshes
from .storage import checkpoint_bytes, disk_bytes, host_bytes, num_checkpoints, sae_bytes
from .streaming import StreamPlan, stream_plan
from .timing import StepTime, step_time
from .wire import Sent, batch_sent, step_sent

T = TypeVar("T")


class JobFigures(NamedTuple):
    """What one of several jobs of a shape takes."""

    work: Work
    num: int  # jobs of this shape
    memory: Memory  # of a rank, with a tenth of the latents dead
    fresh_peak: int  # of a rank, while none is dead
    sent: list[Sent]  # of a step
    to_device: int  # bytes of a rank's rows a step
    to_host: int  # bytes of its part of a checkpoint
    time: StepTime


class TrainPlan(NamedTuple):
    """What `train` or `grid` takes."""

    num_shards: int
    num_replicas: int
    why: str  # asked for, all processes, or found
    jobs: list[JobFigures]  # by shape
    groups: list[list[Bundle]]
    host: dict[str, int]  # bytes of a process
    disk: dict[str, int]  # bytes of all jobs
    seconds: float
    others: list[Choice]  # of the largest job

    @property
    def num_jobs(self) -> int:
        """SAEs in all."""
        return sum(figures.num for figures in self.jobs)


class Overview(NamedTuple):
    """All that is predicted of a config."""

    launch: Launch
    rows: Rows | StreamPlan
    cache: CachePlan | None  # None where the store is there, or needless
    train: TrainPlan | None  # None where the config trains nothing, or what it trains cannot be
    refused: list[str]  # what a verb would refuse
    free_host: int
    free_disk: dict[str, int]  # by key of the config


def overview(config: Config, launch: Launch, width: int | None = None) -> Overview:
    """Plans a config's jobs from their first step to the last, whatever is done already. Raises
    ConfigError for what cannot be planned at all; what does not fit is told in `refused`.
    """
    refused: list[str] = []
    rows, cache = _rows(config, launch, width)
    if cache is not None:
        free_host = free_bytes() if launch.is_here else None
        _tell(partial(check_cache, cache, config, launch, free_host), refused)
    train = None
    if config.sae is not None and config.train is not None:
        try:
            train = _train_plan(config, rows, launch, refused)
        except ConfigError as e:
            refused.append(str(e))
    free_disk = _free_disk(config, rows)
    found = Overview(launch, rows, cache, train, refused, free_bytes(), free_disk)
    if launch.is_here:
        _check_disk(config, found)
    return found


def _rows(
    config: Config, launch: Launch, width: int | None
) -> tuple[Rows | StreamPlan, CachePlan | None]:
    """What the SAEs are trained on, and what making it takes where that is yet to be done."""
    if config.train is not None and config.train.source == "stream":
        return _with_width(partial(stream_plan, config, launch, width), width), None
    rows = rows_there(config.store_path())
    is_made_here = config.cache is not None and config.store in (None, config.cache.store)
    if rows is not None and (rows.is_there or not is_made_here):
        return rows, None
    if not is_made_here:
        raise ConfigError(f"store={config.store_path()!r} is no activation store; check the path")
    cache = _with_width(partial(cache_plan, config, launch, width), width)
    return cache.rows, cache


def _with_width(make: Callable[[], T], width: int | None) -> T:
    try:
        return make()
    except ConfigError as e:
        if width is not None:
            raise
        raise ConfigError(f"{e}; --width D plans without the model") from e


def processes_of(config: Config) -> int:
    """Processes that a config's shards and replicas are, of shards that it leaves out or to auto
    one.
    """
    if config.train is None:
        return 1
    shards = config.train.num_shards
    return (shards if isinstance(shards, int) else 1) * config.train.num_replicas


def _tell(check: Callable[[], None], refused: list[str]) -> None:
    try:
        check()
    except ConfigError as e:
        refused.append(str(e))


def _train_plan(
    config: Config, rows: Rows | StreamPlan, launch: Launch, refused: list[str]
) -> TrainPlan:
    grid = config.grid is not None
    jobs = jobs_of(config, list(rows.widths), grid=grid)
    works = works_of(jobs, rows.widths, rows.dtype, launch)
    buffer: Callable[[Job], int] | None = None
    if isinstance(rows, StreamPlan):
        assert config.cache is not None
        works = {name: rows.beside(work, config.cache) for name, work in works.items()}
        buffer = partial(_buffer_of, works)
    P, R, why = _mesh(config, jobs, works, launch, grid=grid)
    num_groups = launch.processes // (P * R)
    check_fit(jobs, rows.widths, Mesh(0, num_groups, 0, R, 0, P, None, None, None))
    too_large = (work for work in works.values() if not fits(work, P, R, launch.memory))
    if (work := next(too_large, None)) is not None:
        _tell(partial(check_memory, work, P, R, launch), refused)
    groups = place(jobs, works, launch, P, R, buffer)
    figures = _figures(list(works.values()), rows, launch, P, R)
    largest = max(figures, key=lambda f: f.memory.peak).work
    fullest = max((b for group in groups for b in group), key=lambda b: len(b.jobs))
    together = [works[job.name] for job in fullest.jobs]
    on_host = rows_kept(together[0], rows, launch).get("host", 0)
    return TrainPlan(
        P, R, why, figures, groups, host_bytes(together, P, R, on_host), _disk(jobs, works),
        seconds_of(groups),
        choices(largest, launch, meshes(launch.processes, None, several_groups=grid)),
    )  # fmt: skip


def _mesh(
    config: Config, jobs: list[Job], works: dict[str, Work], launch: Launch, *, grid: bool
) -> tuple[int, int, str]:
    assert config.train is not None
    shards, replicas = config.train.num_shards, config.train.num_replicas
    if shards == "auto":
        return (*choose_mesh(jobs, works, launch, grid=grid), "the fastest that fits")
    if shards is None:
        if launch.processes % replicas:
            raise ConfigError(
                f"train.num_replicas={replicas} does not divide the {launch.processes} processes; "
                "change it or --processes"
            )
        return launch.processes // replicas, replicas, "all processes"
    members = shards * replicas
    if launch.processes % members or (launch.processes != members and not grid):
        raise ConfigError(
            f"train.num_shards={shards} x train.num_replicas={replicas} needs {members} "
            f"processes, but {launch.processes} are planned; set --processes {members}"
        )
    return shards, replicas, "asked for"


def _buffer_of(works: dict[str, Work], job: Job) -> int:
    stream = works[job.name].stream
    return 0 if stream is None else stream.buffer


def _figures(
    works: list[Work], rows: Rows | StreamPlan, launch: Launch, P: int, R: int
) -> list[JobFigures]:
    """By shape, in the order of the jobs: those that take the same are told once."""
    shapes: dict[object, list[Work]] = {}
    for work in works:
        train = work.train
        taken = (memory_of_rank(work, P, R), step_sent(work, P, R), work.d_sae, work.k, work.steps)
        shapes.setdefault((str(taken), train.grad_clip is None, train.preload), []).append(work)
    found = []
    for alike in shapes.values():
        work = alike[0]
        kept = rows_kept(work, rows, launch).get("device", 0)
        dead = round(DEAD_SHARE * (work.d_sae // P)) if work.revives else 0
        found.append(
            JobFigures(
                work,
                len(alike),
                memory_of_rank(work, P, R, dead=DEAD_SHARE, preloaded=kept),
                memory_of_rank(work, P, R, preloaded=kept).peak,
                [*step_sent(work, P, R, dead), *batch_sent(work, P, R)],
                rows_to_device(work, P * R),
                checkpoint_bytes(work) // P,
                step_time(work, launch, P, R),
            )
        )
    return found


def rows_to_device(work: Work, num_members: int) -> int:
    """Bytes of a batch that each process copies to its device: a stream's are there."""
    if work.stream is not None:
        return 0
    return work.train.batch_tokens // num_members * work.d_in * work.stored_bytes


def rows_kept(work: Work, rows: Rows | StreamPlan, launch: Launch) -> dict[str, int]:
    """Bytes of rows that train.preload keeps, by where."""
    if isinstance(rows, StreamPlan):
        return {}
    asked, geometry = work.train.preload, rows.shape.geometry
    size = geometry.rows * work.d_in * rows.itemsize
    if asked == "auto":
        free_host = 0 if rows.is_local or not launch.is_here else free_bytes() // launch.local
        on_device = launch.memory if launch.on_gpu else 0
        asked = kept_by_auto(size, work.train.num_tokens / geometry.rows, on_device, free_host)
    if asked == "device" and not launch.on_gpu:
        asked = "host"
    return {} if asked == "none" else {asked: size}


def _disk(jobs: list[Job], works: dict[str, Work]) -> dict[str, int]:
    saes = sum(sae_bytes(work) for work in works.values())
    kept = sum(num_checkpoints(work) * checkpoint_bytes(work) for work in works.values())
    whole = sum(disk_bytes(works[job.name]) for job in jobs)
    formats = max((len(job.config.export.formats) for job in jobs), default=0)
    return {
        "checkpoints": kept,
        "one more of each while it is written": whole - kept - saes,
        "SAEs": saes,
        "exports": saes * formats,
    }


def _free_disk(config: Config, rows: Rows | StreamPlan) -> dict[str, int]:
    places = {"output": config.output}
    if isinstance(rows, Rows) and not rows.is_there and rows.is_local and config.cache is not None:
        places["cache.store"] = config.cache.path()
    found = {}
    for key, where in places.items():
        folder = Path(where).absolute()
        while not folder.exists():
            folder = folder.parent
        found[key] = shutil.disk_usage(folder).free
    return found


def _check_disk(config: Config, found: Overview) -> None:
    """What the disks of this machine cannot take, as the verbs say it."""
    if found.cache is not None and found.cache.rows.is_local:
        assert config.cache is not None
        place, what, size = config.cache.path(), "the store", found.cache.rows.bytes
        _tell(partial(check_space, "cache.store", place, size, what), found.refused)
    if found.train is not None:
        needed = sum(size for what, size in found.train.disk.items() if what != "exports")
        what = "what is written for checkpoints (train.keep_checkpoints) and SAEs"
        _tell(partial(check_space, "output", config.output, needed, what), found.refused)


def rounds(groups: list[list[Bundle]]) -> int:
    """Bundles that the busiest group trains one after another."""
    return max((len(group) for group in groups), default=0)
