"""The plan of a config, for `flash-sae plan`: what caching takes, and each job with its figures."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from ..activations.preload import kept_by_auto
from ..config.base import ConfigError
from ..grid.plan import (
    Bundle,
    assign,
    check_fit,
    choose_mesh,
    jobs_of,
    make_bundles,
    on_mesh,
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
from .timing import StepTime, step_time
from .wire import Sent, batch_sent, step_sent


class JobFigures(NamedTuple):
    """What one of several jobs of a shape takes."""

    work: Work
    count: int  # jobs of this shape
    memory: Memory  # of a rank, with a tenth of the latents dead
    fresh_peak: int  # of a rank, while none is dead
    sent: list[Sent]  # of a step
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
        return sum(figures.count for figures in self.jobs)


class Overview(NamedTuple):
    """All that is predicted of a config."""

    launch: Launch
    rows: Rows
    cache: CachePlan | None  # None where the store is there
    train: TrainPlan | None  # None where the config trains nothing, or what it trains cannot be
    refused: list[str]  # what a verb would refuse
    free_host: int
    free_disk: dict[str, int]  # by key of the config


def overview(
    config: Config, launch: Launch, *, width: int | None, store_gb_s: float | None
) -> Overview:
    """Plans a config. Raises ConfigError for what cannot be planned at all; what does not fit is
    told in `refused`.
    """
    refused: list[str] = []
    rows = rows_there(config.store_path())
    cache = None
    if rows is None:
        if config.cache is None or config.store not in (None, config.cache.store):
            raise ConfigError(f"store={config.store!r} is no activation store; check the path")
        cache = cache_plan(config, launch, width)
        rows = cache.rows
        _tell(lambda: check_cache(cache, config, launch, free_bytes()), refused)
    train = None
    if config.sae is not None and config.train is not None:
        try:
            train = _train_plan(config, rows, launch, store_gb_s, refused)
        except ConfigError as e:
            refused.append(str(e))
    free_disk = _free_disk(config, rows)
    _check_disk(config, rows, cache, train, free_disk, refused)
    return Overview(launch, rows, cache, train, refused, free_bytes(), free_disk)


def _tell(check: object, refused: list[str]) -> None:
    assert callable(check)
    try:
        check()
    except ConfigError as e:
        refused.append(str(e))


def _train_plan(
    config: Config, rows: Rows, launch: Launch, store_gb_s: float | None, refused: list[str]
) -> TrainPlan:
    assert config.train is not None
    grid = config.grid is not None
    hookpoints = list(rows.shape.widths)
    jobs = jobs_of(config, hookpoints, grid=grid)
    works = works_of(jobs, rows.shape.widths, rows.itemsize, launch)
    P, R, why = _mesh(config, jobs, works, launch, grid=grid)
    num_groups = launch.processes // (P * R)
    mesh = Mesh(0, num_groups, 0, R, 0, P, None, None, None)
    jobs = [job._replace(config=on_mesh(job.config, P, R)) for job in jobs]
    check_fit(jobs, rows.shape.widths, mesh)
    for work in works.values():
        if not fits(work, P, R, launch.memory):
            _tell(lambda work=work: check_memory(work, P, R, launch), refused)
            break
    groups = assign(make_bundles(jobs, works, launch, P, R), num_groups)
    figures = _figures(list(works.values()), rows, launch, P, R, store_gb_s)
    largest = max(figures, key=lambda f: f.memory.peak).work
    fullest = max((b for group in groups for b in group), key=lambda b: len(b.jobs))
    preloaded = figures[0].memory.feed.get("rows", 0)
    return TrainPlan(
        P, R, why, figures, groups,
        host_bytes([works[job.name] for job in fullest.jobs], P, 0 if preloaded else 0),
        _disk(jobs, works),
        _seconds(groups, works, launch, P, R, store_gb_s),
        choices(largest, launch, meshes(launch.processes, None, several_groups=grid), store_gb_s),
    )  # fmt: skip


def _seconds(
    groups: list[list[Bundle]],
    works: dict[str, Work],
    launch: Launch,
    P: int,
    R: int,
    store_gb_s: float | None,
) -> float:
    from .timing import bundle_seconds

    if store_gb_s is None:
        return seconds_of(groups)
    timed = [
        [
            b._replace(cost=bundle_seconds([works[j.name] for j in b.jobs], launch, P, R, store_gb_s))
            for b in group
        ]
        for group in groups
    ]
    return seconds_of(timed)


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


def _figures(
    works: list[Work], rows: Rows, launch: Launch, P: int, R: int, store_gb_s: float | None
) -> list[JobFigures]:
    """By shape, in the order of the jobs: those that take the same are told once."""
    shapes: dict[object, list[Work]] = {}
    for work in works:
        taken = (memory_of_rank(work, P, R), step_sent(work, P, R), work.d_sae, work.k)
        shapes.setdefault(str(taken), []).append(work)
    found = []
    for alike in shapes.values():
        work = alike[0]
        preloaded = _preloaded(work, rows, launch)
        memory = memory_of_rank(work, P, R, dead=DEAD_SHARE, preloaded=preloaded)
        dead = round(DEAD_SHARE * (work.d_sae // P)) if work.revives else 0
        sent = [*step_sent(work, P, R, dead), *batch_sent(work, P, R)]
        time = step_time(work, launch, P, R, store_gb_s=store_gb_s)
        fresh = memory_of_rank(work, P, R, preloaded=preloaded).peak
        found.append(JobFigures(work, len(alike), memory, fresh, sent, time))
    return found


def _preloaded(work: Work, rows: Rows, launch: Launch) -> int:
    """Bytes of rows that train.preload keeps on a GPU."""
    asked, geometry = work.train.preload, rows.shape.geometry
    size = geometry.rows * work.d_in * rows.itemsize
    epochs = work.train.num_tokens / geometry.rows
    if asked == "auto" and launch.on_gpu:
        asked = kept_by_auto(size, epochs, launch.memory, 0)
    return size if asked == "device" and launch.on_gpu else 0


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


def _free_disk(config: Config, rows: Rows) -> dict[str, int]:
    places = {"output": config.output}
    if not rows.is_there and rows.is_local and config.cache is not None:
        places["cache.store"] = config.cache.store
    found = {}
    for key, place in places.items():
        folder = Path(place).absolute()
        while not folder.exists():
            folder = folder.parent
        found[key] = shutil.disk_usage(folder).free
    return found


def _check_disk(
    config: Config,
    rows: Rows,
    cache: CachePlan | None,
    train: TrainPlan | None,
    free: dict[str, int],
    refused: list[str],
) -> None:
    """What the disks that are seen from here cannot take."""
    if cache is not None and "cache.store" in free and rows.bytes > free["cache.store"]:
        assert config.cache is not None
        refused.append(
            f"cache.store={config.cache.store!r} has {free['cache.store']:,} bytes free, but the "
            f"store takes {rows.bytes:,}; lower cache.num_tokens, name fewer cache.hookpoints, or "
            "another disk"
        )
    if train is not None:
        needed = sum(size for what, size in train.disk.items() if what != "exports")
        if needed > free["output"]:
            refused.append(
                f"output={config.output!r} has {free['output']:,} bytes free, but checkpoints and "
                f"SAEs take {needed:,}; lower train.keep_checkpoints, or name another disk"
            )


def rounds(groups: list[list[Bundle]]) -> int:
    """Bundles that the busiest group trains one after another."""
    return max((len(group) for group in groups), default=0)


def hours(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{math.ceil(seconds / 86400)} days"
