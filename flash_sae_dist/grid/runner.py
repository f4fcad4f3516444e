"""Trains a list of jobs on the running processes; one job or many take the same path."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import ending
from ..activations.store import store_of
from ..activations.stream import Rows, open_stream
from ..config.base import ConfigError, UserError
from ..evaluation.results import write_results
from ..files import locked
from ..parallel import agree
from ..parallel.mesh import Mesh, make_mesh, with_index
from ..progress import process_seconds
from ..training.host_memory import HostShare
from ..training.job import Config
from ..training.member import is_finished
from ..training.metrics import read_metrics
from ..training.records import (
    DamagedRecordError,
    Job,
    forget_failure,
    read_status,
    record_failure,
)
from ..training.trainer import Trainer
from .handout import bundles_for
from .live import shown
from .plan import Plan, agreed_plan, with_mesh
from .trackers import Trackers

logger = logging.getLogger(__name__)


class JobsFailedError(UserError):
    """Some SAEs failed; their status.json tell why."""


class BusyError(UserError):
    """Another launch is at work in the folder of a job."""


def run_jobs(config: Config, accelerator: Any, *, grid: bool) -> list[Job]:
    """Trains what a config describes, skipping jobs that are finished; returns the jobs with their
    folders.

    One job's failure is recorded in its status.json and the others go on. Raises ConfigError
    before any work when something does not fit, and JobsFailedError at the end when a job failed.
    Collective over all processes.
    """
    verb = "grid" if grid else "train"
    config.need("sae", "train", verb=verb)
    assert config.train is not None
    device = with_index(accelerator.device)
    config = with_mesh(config, device, accelerator.num_processes, grid=grid)
    assert config.train is not None
    assert not isinstance(config.train.num_shards, str)
    mesh = make_mesh(
        config.train.num_shards,
        config.train.num_replicas,
        device=device,
        several_groups=grid,
        rendezvous_s=config.train.rendezvous_timeout_s,
    )
    with _rows(config, accelerator, mesh, device) as rows:
        return _run(config, accelerator, rows, mesh, device, grid=grid)


@contextmanager
def _rows(config: Config, accelerator: Any, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
    """What the SAEs are trained on. Collective over all processes."""
    assert config.train is not None
    if config.train.source == "store":
        # A host that does not come to see the store ends all of them with its sentence.
        yield agree.after_first(lambda: store_of(config))
        return
    counts = [config.train.num_tokens]
    if config.grid is not None:
        counts += config.grid.all_values("train.num_tokens")
    with open_stream(config, max(counts), accelerator, mesh, device) as rows:
        yield rows


def _run(
    config: Config, accelerator: Any, rows: Rows, mesh: Mesh, device: torch.device, *, grid: bool
) -> list[Job]:
    """Plans the jobs, trains what is unfinished, tells of all. Collective over all processes."""
    plan = agreed_plan(config, rows, mesh, device, grid=grid)
    share = HostShare.agreed()
    todo = [job for job in plan.jobs if job.name in plan.unfinished]
    names = [job.name for job in todo]
    trackers = _trackers(accelerator, Path(config.output), plan, todo)
    if accelerator.is_main_process and names and (seconds := process_seconds()) is not None:
        logger.info("%d SAEs to train, %.1f s after this process began", len(names), seconds)
    # Jobs that are not a grid's have a bar.
    with shown(todo if grid else [], enabled=accelerator.is_main_process):
        mine, failed = _train(plan, rows, mesh, device, trackers, share, bar=not grid)
    if accelerator.is_main_process:
        _replay([job for job in todo if job.name not in mine], trackers)
        for job in plan.jobs:
            if job.name not in failed:
                print(_summary(job, new=job.name in plan.unfinished), flush=True)
    if grid and accelerator.is_main_process:
        write_results(Path(config.output))
    if failed:
        if accelerator.is_main_process:
            trackers.finish()
        # The launcher ends all when one ends badly: the first has told all by now.
        accelerator.wait_for_everyone()
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise JobsFailedError(f"{len(failed)} of {len(plan.jobs)} SAEs failed ({told})")
    return plan.jobs


def _train(
    plan: Plan,
    rows: Rows,
    mesh: Mesh,
    device: torch.device,
    trackers: Trackers,
    share: HostShare,
    *,
    bar: bool,
) -> tuple[set[str], dict[str, str]]:
    """Trains bundles until none is left; the names of this group's jobs, and the reasons of all
    groups' failed jobs by name. Collective over all processes.
    """
    mine: list[Job] = []
    only, busy = len(plan.jobs) == 1, dict[str, str]()
    for bundle in bundles_for(plan, mesh):
        mine += bundle.jobs
        try:
            _train_bundle(bundle.jobs, rows, mesh, device, trackers, share, only=only, bar=bar)
        except BusyError as e:
            # Not ours to write a reason into.
            busy |= {job.name: str(e) for job in bundle.jobs}
    led = [job for job in mine if mesh.is_lead]
    # Asked where they were written: a shared folder may show other hosts the files later.
    by_rank = agree.from_all(
        {j.name: busy.get(j.name) or _why_not(j) for j in led if not is_finished(j)}
    )
    failed = {name: reason for some in by_rank for name, reason in some.items()}
    return {job.name for job in mine}, failed


def _why_not(job: Job) -> str:
    status = read_status(job.folder)
    return (status and status.error) or "its SAE was not written"


def _summary(job: Job, *, new: bool) -> str:
    """A line that tells what became of a job, and where it is."""
    lines = read_metrics(job.folder / "metrics.jsonl")
    try:
        status = read_status(job.folder)
    except DamagedRecordError as e:
        logger.warning("%s; it only informs, and the SAE is whole", e)
        status = None
    names = ("fvu", "l0", "dead_fraction")
    shown = [f"{name} {lines[-1][name]:.4g}" for name in names if lines and name in lines[-1]]
    if status is not None and (not lines or lines[-1]["step"] != status.total_steps):
        # The last step is always logged: an earlier one's figures are not the SAE's.
        shown = ["its metrics.jsonl is cut short or damaged"]
    state = "trained" if new else "was trained before, nothing to do"
    return f"{job.name}: {state}; {', '.join([*shown, str(job.folder / 'sae')])}"


def _train_bundle(
    jobs: list[Job],
    rows: Rows,
    mesh: Mesh,
    device: torch.device,
    trackers: Trackers,
    share: HostShare,
    *,
    only: bool,  # the launch has no other job
    bar: bool = True,
) -> None:
    # Where several ranks train together, the others may wait inside a collective that a failing one
    # has left: the launch must end, not hang. An only job's error is best told as it is.
    ends = mesh.members > 1 or only
    try:
        with ending.deferred(), _held(jobs, mesh):
            Trainer(jobs, rows, mesh, device, trackers.log, share, bar=bar).run()
        return
    except BusyError:
        raise
    except Exception as e:
        together = isinstance(e, torch.OutOfMemoryError) and len(jobs) > 1 and not ends
        if not together:
            for job in jobs:
                if not is_finished(job):
                    record_failure(job, e)
            if ends:
                raise
            return
        logger.warning("%d SAEs did not fit the memory together; one by one now", len(jobs))
    # Outside the except clause, whose traceback holds the bundle's memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for job in jobs:
        if not is_finished(job):
            _train_bundle([job], rows, mesh, device, trackers, share, only=False, bar=bar)


@contextmanager
def _held(jobs: list[Job], mesh: Mesh) -> Iterator[None]:
    """Keeps other launches out of the jobs' folders. Raises BusyError where one is in them.
    Collective over the members."""
    with ExitStack() as locks:
        busy = None
        try:
            if mesh.is_lead:
                for job in jobs:
                    locks.enter_context(locked(job.folder, below=("sae", "checkpoints")))
                for job in jobs:
                    forget_failure(job)
        except ConfigError as e:
            busy = str(e)
        if busy := agree.from_lead(busy, mesh):
            raise BusyError(busy)
        yield


def _trackers(accelerator: Any, output: Path, plan: Plan, todo: list[Job]) -> Trackers:
    return Trackers(
        accelerator,
        {job.name: job.config.model_dump(mode="json") for job in todo},
        group=output.resolve().name,
        names=[job.name for job in plan.jobs],
    )


def _replay(jobs: list[Job], trackers: Trackers) -> None:
    """Trackers log on the main process alone: they get what other groups measured at the end."""
    for job in jobs:
        for line in read_metrics(job.folder / "metrics.jsonl"):
            values = {k: v for k, v in line.items() if k not in ("step", "tokens")}
            trackers.log(job.name, values, line["step"])
