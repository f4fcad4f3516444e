"""The plan of a launch: expand a config into jobs, check that they fit, place them on the groups.

The first process makes it and broadcasts it, so that ranks never disagree on what is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

from ..activations.store import ActivationStore
from ..activations.stream import ModelRows, Rows
from ..config.base import ConfigError, nearest_name, sources_of
from ..config.train import TrainConfig
from ..files import check_space, check_writable
from ..models.saved import CONFIG_FILE, check_weights, read_spec
from ..parallel import agree
from ..parallel.mesh import Mesh
from ..planner.devices import GIB, Launch, launch_here, memory_of
from ..planner.memory import BUFFER, Memory, Work, work_of
from ..planner.search import DOUBT, check_memory, fits, meshes, need, splits
from ..planner.storage import disk_bytes
from ..planner.timing import Cost, bundle_seconds, cost_of
from ..training.defaults import with_defaults
from ..training.engine import check_engine, check_installed
from ..training.initial import read_initial
from ..training.job import Config
from ..training.made_of import as_begun, check_same_job
from ..training.member import is_finished
from ..training.optim import warmup_steps
from ..training.records import Job, hookpoint_of, hookpoints_of, width_of
from .expansion import expand

logger = logging.getLogger(__name__)
_ALL = 1 << 62  # bytes that anything fits


class Bundle(NamedTuple):
    """Jobs that are trained together on each batch: of one hookpoint of a store, or of several of a
    model that runs meanwhile."""

    jobs: list[Job]
    cost: float  # seconds, as planner/timing.py has them


class Plan(NamedTuple):
    """What a launch does."""

    jobs: list[Job]
    unfinished: set[str]  # names
    groups: list[list[Bundle]]  # the unfinished jobs, by device group


def agreed_plan(
    config: Config, rows: Rows, mesh: Mesh, device: torch.device, *, grid: bool
) -> Plan:
    """The first process's plan, on all of them; an error that it meets is raised on all. Collective
    over all processes.
    """
    launch = agreed_launch(mesh.members * mesh.num_groups, device)
    return agree.from_first(lambda: make_plan(config, rows, mesh, launch, device, grid=grid))


def agreed_launch(processes: int, device: torch.device) -> Launch:
    """What this launch runs on. Collective over all processes."""
    # The least over all ranks: a bundle has to fit any of them.
    return launch_here(device, processes, min(agree.from_all(memory_of(device))))


def make_plan(
    config: Config, rows: Rows, mesh: Mesh, launch: Launch, device: torch.device, *, grid: bool
) -> Plan:
    """The plan of `train` or `grid`. Raises ConfigError or another UserError before any work when
    something does not fit.
    """
    jobs = jobs_of(config, rows.hookpoints, grid=grid, where=rows.where)
    for job in jobs:
        check_installed(_train(job))
    check_fit(jobs, rows.widths, mesh)
    check_writable("output", config.output)
    jobs = [as_begun(job, width_of(job, rows.widths)) for job in jobs]
    for job in jobs:
        check_same_job(job, rows, device)
    unfinished = [job for job in jobs if not _is_intact(job)]
    works = works_of(unfinished, rows.widths, rows.dtype, launch)
    for job in unfinished:
        check_memory(works[job.name], mesh.num_shards, mesh.num_replicas, launch, varied(job, grid))
        if not (job.folder / "job.yaml").exists():
            check_schedule(job)
    needed = sum(disk_bytes(works[job.name], job.folder) for job in unfinished)
    what = "what is written for checkpoints (train.keep_checkpoints) and SAEs"
    check_space("output", config.output, needed, what)
    buffer = _buffers(rows, bundle_memory(launch)) if isinstance(rows, ModelRows) else None
    groups = place(unfinished, works, launch, mesh.num_shards, mesh.num_replicas, buffer)
    return Plan(jobs, {job.name for job in unfinished}, groups)


def varied(job: Job, grid: bool) -> set[str]:
    """Keys of a job that another key of its config decides."""
    assert job.config.sae is not None
    found = job.config.grid.varied_keys() if grid and job.config.grid is not None else set()
    return found | ({"sae.d_sae"} if job.config.sae.expansion_factor is not None else set())


def jobs_of(
    config: Config, hookpoints: list[str], *, grid: bool, where: str = "the store"
) -> list[Job]:
    """The jobs of `grid`, or the one of `train`. Raises ConfigError."""
    return expand(config, hookpoints, where) if grid else [train_job(config, hookpoints, where)]


def works_of(
    jobs: list[Job], widths: dict[str, int], dtype: str, launch: Launch
) -> dict[str, Work]:
    """What of each job decides what it takes, by its name."""
    return {
        job.name: work_of(
            job.name, job.config, width_of(job, widths), dtype, on_gpu=launch.on_gpu
        )
        for job in jobs
    }  # fmt: skip


def _is_intact(job: Job) -> bool:
    """Whether a job's SAE was written and still is what was written: its weights are read. One that
    is not is written anew from the last checkpoint.
    """
    folder = job.folder / "sae"
    if not is_finished(job):
        return False
    try:
        check_weights(folder, read_spec(folder).get("weights_crc32c"))
    except ValueError as e:
        logger.warning("%s is damaged: %s; it is written anew from the last checkpoint", folder, e)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        return False
    return True


def train_job(config: Config, hookpoints: list[str], where: str = "the store") -> Job:
    """The one job of `train`. Raises ConfigError where its hookpoint is not in the store, or where
    hookpoints come from."""
    config.need("sae", "train", verb="train")
    config.check_complete("train")
    assert config.train is not None
    name = config.train.hookpoint
    if name is None:
        raise ConfigError(
            f"train.hookpoint is missing: name one of {where}: {', '.join(hookpoints)}"
        )
    for one in sources_of(name):
        if one not in hookpoints:
            raise ConfigError(
                f"train.hookpoint={one!r} is not in {where}{nearest_name(one, hookpoints)}"
            )
    return Job(name, Path(config.output) / name, config)


def _check_sequences(job: Job) -> None:
    """Raises ConfigError where a batch of the model's own loss is no whole sequences."""
    train, cache = job.config.train, job.config.cache
    if train is None or train.loss == "fvu" or cache is None:
        return
    batch, length = train.batch_tokens, cache.context_length
    if batch % length:
        raise ConfigError(
            f"train.loss={train.loss!r} takes whole sequences, but train.batch_tokens={batch} is "
            f"no multiple of cache.context_length={length}; set it to "
            f"{max(1, round(batch / length)) * length}"
        )


def check_fit(jobs: list[Job], widths: dict[str, int], mesh: Mesh) -> None:
    """Raises ConfigError where a job does not fit the mesh, its hookpoint or its engine."""
    for job in jobs:
        assert job.config.sae is not None
        assert job.config.train is not None
        d_in = width_of(job, widths)
        if (target := job.config.train.target) is not None and target not in widths:
            raise ConfigError(
                f"train.target={target!r} is no hookpoint here{nearest_name(target, list(widths))}"
            )
        train = with_defaults(job.config.train, job.config.sae, d_in)
        check_engine(train, mesh, job.config.sae)
        if train.init_from is not None and not is_finished(job):
            read_initial(train.init_from, job.config.sae, d_in)
        d_sae = job.config.sae.width(d_in)
        if d_sae % mesh.num_shards:
            up = -(-d_sae // mesh.num_shards) * mesh.num_shards
            raise ConfigError(
                f"{job.name}: sae.d_sae={d_sae} is not divisible by the {mesh.num_shards} shards; "
                f"use {up}, or change train.num_shards"
            )
        batch = job.config.train.batch_tokens
        if batch % mesh.members:
            raise ConfigError(
                f"train.batch_tokens={batch} is not divisible by the {mesh.members} processes of "
                f"one SAE; use {-(-batch // mesh.members) * mesh.members}"
            )
        _check_sequences(job)

        rows = batch // mesh.num_replicas
        if job.config.train.micro_batches > rows:
            raise ConfigError(
                f"train.micro_batches={job.config.train.micro_batches} exceeds the {rows} tokens "
                f"of train.batch_tokens={batch} that a replica has; lower it"
            )


def _train(job: Job) -> TrainConfig:
    assert job.config.train is not None
    return job.config.train


def check_schedule(job: Job) -> None:
    """Raises ConfigError where a new job would end before its learning rate is up."""
    cfg = _train(job)
    steps = -(-cfg.num_tokens // cfg.batch_tokens)
    if warmup_steps(steps, cfg) > steps:
        raise ConfigError(
            f"train.warmup_steps={cfg.warmup_steps} exceeds the {steps} steps of "
            f"train.num_tokens={cfg.num_tokens} at train.batch_tokens={cfg.batch_tokens}, so the "
            f"learning rate never gets to train.lr; set train.warmup_steps={steps // 10} or so"
        )


def place(
    jobs: list[Job],
    works: dict[str, Work],
    launch: Launch,
    num_shards: int,
    num_replicas: int,
    buffer: Callable[[Job], int] | None = None,  # bytes of a stream's rows of a job's hookpoint
) -> list[list[Bundle]]:
    """The bundles of each group of processes: of as many jobs as end the last group first, the most
    where that makes no difference, for a bundle reads its rows once. Those of a stream are dealt to
    all groups, each of which runs the model once, if its jobs fit together.
    """
    costs = {j.name: cost_of(works[j.name], launch, num_shards, num_replicas) for j in jobs}
    num_groups = launch.processes // (num_shards * num_replicas)
    if buffer is not None:
        for job in jobs:
            # The buffer raises where it alone is too much.
            _check_both(job, need(works[job.name], num_shards, num_replicas), buffer(job), launch)
        share = max(1, -(-len(jobs) // num_groups))
        bundles = make_bundles(jobs, costs, bundle_memory(launch), share, buffer)
        if (more := len(bundles) - len(make_bundles(jobs, costs, _ALL, share))) > 0:
            logger.info(
                "%d SAEs do not all fit the memory beside one another and their buffers: the model "
                "runs %d times more on the text", len(jobs), more,
            )  # fmt: skip
        return assign(bundles, num_groups)
    fullest = make_bundles(jobs, costs, bundle_memory(launch))
    best = assign(fullest, num_groups)
    most = max((len(bundle.jobs) for bundle in fullest), default=1)
    if num_groups == 1:
        return best
    # Four bundles a group are even enough.
    finest = min(most, -(-4 * num_groups // len(fullest)) if fullest else 1)
    for limit in sorted({-(-most // parts) for parts in range(2, finest + 1)}, reverse=True):
        groups = assign(make_bundles(jobs, costs, bundle_memory(launch), limit), num_groups)
        if seconds_of(groups) < seconds_of(best):
            best = groups
    return best


def _check_both(job: Job, takes: Memory, buffer: int, launch: Launch) -> None:
    """Raises ConfigError where an SAE and a stream's rows do not fit beside one another."""
    others = takes.peak - takes.model.get(BUFFER, 0)
    if others + buffer > DOUBT * launch.memory:
        raise ConfigError(
            f"{job.name}: train.buffer_tokens={_train(job).buffer_tokens} takes "
            f"{buffer / GIB:,.1f} GiB of a process's memory beside the SAE's "
            f"{others / GIB:,.1f}, but {launch.memory / GIB:,.1f} GiB are free; lower "
            "train.buffer_tokens, train.batch_tokens or sae.d_sae, or use more shards"
        )


def _stream_of(job: Job) -> tuple[object, ...]:
    """What jobs have to share to read the same batches."""
    t = _train(job)
    # One forward pass gives the rows of every hookpoint.
    hookpoint = (t.hookpoint, t.target) if t.source == "store" else None
    read = (hookpoint, t.batch_tokens, t.num_tokens, t.seed, t.holdout, t.preload, t.buffer_tokens)
    return (*read, t.log_every, t.checkpoint_every, t.checkpoint_minutes)


def make_bundles(
    jobs: list[Job],
    costs: dict[str, Cost],
    memory: int,
    most: int | None = None,
    buffer: Callable[[Job], int] | None = None,
) -> list[Bundle]:
    """Puts jobs that read the same batches together: as many as fit some bytes on each rank beside
    one another and the buffers of their hookpoints, `most` at the most, and at least one.
    """
    streams: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        streams.setdefault(_stream_of(job), []).append(job)

    def bundle(together: list[Job]) -> Bundle:
        return Bundle(together, bundle_seconds([costs[job.name] for job in together]))

    def taken(together: list[Job]) -> int:
        first, *others = (costs[job.name].memory for job in together)
        hooks = {tuple(hookpoints_of(job)): job for job in together}.values()
        rows = 0
        if buffer is not None:
            rows = sum(buffer(job) for job in hooks) - first.model.get(BUFFER, 0)
            # A batch has the rows of every hookpoint.
            rows += (len(hooks) - 1) * sum(costs[together[0].name].memory.feed.values())
        return first.peak + sum(other.own for other in others) + rows

    bundles = []
    for stream in streams.values():
        together: list[Job] = []
        for job in stream:
            if together and (taken([*together, job]) > memory or len(together) == most):
                bundles.append(bundle(together))
                together = []
            together.append(job)
        bundles.append(bundle(together))
    return bundles


def _buffers(rows: ModelRows, memory: int) -> Callable[[Job], int]:
    """What a stream's rows of a job's hookpoint take of a process. That raises ConfigError where
    it is more than some bytes.
    """

    def buffer(job: Job) -> int:
        cfg = _train(job)
        names = sources_of(hookpoint_of(job))
        if (needed := sum(rows.buffer_bytes(name, cfg) for name in names)) > memory:
            raise ConfigError(
                f"train.buffer_tokens={cfg.buffer_tokens} takes {needed:,} bytes at width "
                f"{width_of(job, rows.widths)}, but a process has about {memory:,}; set it to "
                f"{cfg.buffer_tokens * memory // (2 * needed)} or less"
            )
        return needed

    return buffer


def bundle_memory(launch: Launch) -> int:
    """Bytes that one bundle may take on each rank: most of the free device memory, half of the
    host's share.
    """
    return int(launch.memory * (0.8 if launch.on_gpu else 0.5))


def assign(bundles: list[Bundle], num_groups: int) -> list[list[Bundle]]:
    """Longest first, each to the group with the least work so far."""
    groups: list[list[Bundle]] = [[] for _ in range(num_groups)]
    loads = [0.0] * num_groups
    for bundle in sorted(bundles, key=lambda b: -b.cost):
        least = loads.index(min(loads))
        groups[least].append(bundle)
        loads[least] += bundle.cost
    return groups


def seconds_of(groups: list[list[Bundle]]) -> float:
    """Time until the last group is done."""
    return max((sum(bundle.cost for bundle in group) for group in groups), default=0.0)


def choose_mesh(
    jobs: list[Job],
    works: dict[str, Work],
    launch: Launch,
    *,
    grid: bool,
    finished: Collection[str] = (),  # jobs that need no memory any more
) -> tuple[int, int]:
    """P shards x R replicas for train.num_shards=auto: those with which all jobs fit and the last
    one is done first. Raises ConfigError where none fits, telling why the most shards do not.
    """
    train = _train(jobs[0])
    todo = [job for job in jobs if job.name not in finished]
    # DeepSpeed's engine takes all processes for each SAE.
    several = grid and all(work.engine != "deepspeed" for work in works.values())
    replicas = train.num_replicas if "num_replicas" in train.model_fields_set else None
    pairs = [
        pair
        for pair in meshes(launch.processes, replicas, several_groups=several)
        if all(splits(work, *pair) for work in works.values())
    ]
    if not pairs:
        raise ConfigError(
            f"train.num_shards=auto: no shards x replicas of {launch.processes} processes divide "
            f"sae.d_sae={works[jobs[0].name].d_sae} and train.batch_tokens={train.batch_tokens} "
            "evenly; change one of them or the number of processes"
        )
    fitting = [
        pair for pair in pairs if all(fits(works[job.name], *pair, launch.memory) for job in todo)
    ]
    for job in todo:
        if not fitting:
            check_memory(works[job.name], *max(pairs), launch, varied(job, grid))

    return min(fitting, key=lambda p: (seconds_of(place(todo, works, launch, *p)), p))


def with_mesh(config: Config, device: torch.device, processes: int, *, grid: bool) -> Config:
    """A config whose train.num_shards is a number: auto is looked for by the first process, and all
    have what it found. Collective over all processes where it is auto.
    """
    assert config.train is not None
    if config.train.num_shards != "auto":
        return config
    launch = agreed_launch(processes, device)

    def choose() -> tuple[int, int]:
        store = ActivationStore.open(config.store_path())
        jobs = jobs_of(config, store.hookpoints, grid=grid)
        works = works_of(jobs, store.widths, store.dtype, launch)
        finished = {job.name for job in jobs if _is_intact(job)}
        found = choose_mesh(jobs, works, launch, grid=grid, finished=finished)
        logger.info(
            "train.num_shards=auto: %d shards x %d replicas an SAE on %d processes", *found,
            launch.processes,
        )  # fmt: skip
        return found

    return on_mesh(config, *agree.from_first(choose))


def on_mesh(config: Config, num_shards: int, num_replicas: int) -> Config:
    """A config with these shards and replicas."""
    assert config.train is not None
    update = {"num_shards": num_shards, "num_replicas": num_replicas}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})
