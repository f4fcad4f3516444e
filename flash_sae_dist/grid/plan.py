"""The plan of a launch: expand a config into jobs, check that they fit, place them on the groups.

The first process makes it and broadcasts it, so that ranks never disagree on what is finished.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..activations.store import ActivationStore
from ..config.base import ConfigError, match_names, nearest_name
from ..config.train import TrainConfig
from ..files import check_space, check_writable
from ..models.base import CONFIG_FILE, check_weights, read_spec
from ..parallel import agree
from ..parallel.mesh import Mesh
from ..training.engine import choose_engine
from ..training.job import Config, with_values
from ..training.made_of import check_same_job
from ..training.member import is_finished
from ..training.records import Job

logger = logging.getLogger(__name__)
# fp32 weights, gradients and two moments, and a 2-byte compute copy, of two [d_sae, d_in] matrices.
_BYTES_A_WEIGHT = 4 * 4 + 2


class Bundle(NamedTuple):
    """Jobs that are trained together on each batch of one hookpoint."""

    jobs: list[Job]
    cost: float


class Plan(NamedTuple):
    """What a launch does."""

    jobs: list[Job]
    unfinished: set[str]  # names
    groups: list[list[Bundle]]  # the unfinished jobs, by device group


def agreed_plan(config: Config, mesh: Mesh, device: torch.device, *, grid: bool) -> Plan:
    """The first process's plan, on all of them; an error that it meets is raised on all. Collective
    over all processes.
    """
    # The least over all ranks: a bundle has to fit any of them.
    memory = min(agree.from_all(usable_memory(device)))
    return agree.from_first(lambda: make_plan(config, mesh, memory, device, grid=grid))


def make_plan(
    config: Config, mesh: Mesh, memory_bytes: int, device: torch.device, *, grid: bool
) -> Plan:
    """The plan of `train` or `grid`. Raises ConfigError or another UserError before any work when
    something does not fit.
    """
    store = ActivationStore.open(config.store_path())
    hookpoints = store.hookpoints
    jobs = expand(config, hookpoints) if grid else [train_job(config, hookpoints)]
    widths = {name: store.width(name) for name in hookpoints}
    check_fit(jobs, widths, mesh)
    check_writable("output", config.output)
    for job in jobs:
        check_same_job(job, store, device)
    unfinished = [job for job in jobs if not _is_intact(job)]
    for job in unfinished:
        check_memory(job, widths[str(_train(job).hookpoint)], mesh, memory_bytes)
        if not (job.folder / "job.yaml").exists():
            check_schedule(job)
    needed = sum(disk_bytes(job, widths[str(_train(job).hookpoint)]) for job in unfinished)
    what = "what is written for checkpoints (train.keep_checkpoints) and SAEs"
    check_space("output", config.output, needed, what)
    bundles = make_bundles(unfinished, widths, mesh.num_shards, memory_bytes)
    return Plan(jobs, {job.name for job in unfinished}, assign(bundles, mesh.num_groups))


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


def train_job(config: Config, hookpoints: list[str]) -> Job:
    """The one job of `train`. Raises ConfigError where its hookpoint is not in the store."""
    config.need("sae", "train", verb="train")
    config.check_complete("train")
    assert config.train is not None
    name = config.train.hookpoint
    if name is None:
        raise ConfigError(
            f"train.hookpoint is missing: name one of the store's: {', '.join(hookpoints)}"
        )
    if name not in hookpoints:
        raise ConfigError(
            f"train.hookpoint={name!r} is not in the store{nearest_name(name, hookpoints)}"
        )
    return Job(name, Path(config.output) / name, config)


def _matched(pattern: str, hookpoints: list[str]) -> list[str]:
    """The store's hookpoints that a pattern names, as it would name modules in cache.hookpoints:
    `layers.*` are the blocks' outputs alone, `layers.*:input` their inputs.
    """
    stem, colon, side = pattern.partition(":")
    if colon and side not in ("input", "output"):
        raise ConfigError(f"grid.hookpoints: {pattern!r} must end in :input, :output or nothing")
    suffix = ":input" if side == "input" else ""
    parted = [name.partition(":") for name in hookpoints]
    names = [name for name, colon, end in parted if colon + end == suffix]
    return [name + suffix for name in match_names(stem, names)]


def expand(config: Config, hookpoints: list[str]) -> list[Job]:
    """The jobs of `grid`: every hookpoint of the store that a pattern names, with every
    combination of values.

    Each combination is checked as a config of its own. Raises ConfigError on a pattern that names
    nothing or a combination that does not fit.
    """
    config.need("sae", "train", "grid", verb="grid")
    assert config.grid is not None
    matched: list[str] = []
    for pattern in config.grid.hookpoints:
        found = hookpoints if pattern == "*" else _matched(pattern, hookpoints)
        if not found:
            raise ConfigError(
                f"grid.hookpoints: {pattern!r} is not in the store"
                f"{nearest_name(pattern, hookpoints)}"
            )
        matched += [name for name in found if name not in matched]
    keys = list(config.grid.values)
    jobs = []
    for hookpoint in matched:
        for choice in itertools.product(*config.grid.values.values()):
            values = dict(zip(keys, choice, strict=True))
            label = ",".join(f"{key.partition('.')[2]}={value}" for key, value in values.items())
            name = f"{hookpoint}/{label}" if label else hookpoint
            _check_name(name, list(values))
            resolved = with_values(config, {"train.hookpoint": hookpoint, **values})
            jobs.append(Job(name, Path(config.output) / name, resolved))
    return jobs


def _check_name(name: str, keys: list[str]) -> None:
    """Raises ConfigError for a job whose folder no file system takes."""
    for part in name.split("/"):
        if (size := len(os.fsencode(part))) > 255:
            raise ConfigError(
                f"grid.values gives a folder name of {size} bytes ({part[:60]!r}...), and file "
                f"systems take 255; move keys with one value ({', '.join(keys)[:200]}) to their "
                "sections, or split the grid"
            )


def check_fit(jobs: list[Job], widths: dict[str, int], mesh: Mesh) -> None:
    """Raises ConfigError where a job does not fit the mesh, its hookpoint or its engine."""
    for job in jobs:
        assert job.config.sae is not None
        assert job.config.train is not None
        d_in = widths[str(job.config.train.hookpoint)]
        choose_engine(job.config.train, d_in)
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
    if cfg.warmup_steps > steps:
        raise ConfigError(
            f"train.warmup_steps={cfg.warmup_steps} exceeds the {steps} steps of "
            f"train.num_tokens={cfg.num_tokens} at train.batch_tokens={cfg.batch_tokens}, so the "
            f"learning rate never gets to train.lr; set train.warmup_steps={steps // 10} or so"
        )


def check_memory(job: Job, d_in: int, mesh: Mesh, memory_bytes: int) -> None:
    """Raises ConfigError for what no memory of this kind can hold: twice what a bundle may take."""
    cfg, sae = _train(job), job.config.sae
    assert sae is not None
    batch = cfg.batch_tokens // mesh.num_replicas * d_in * 2
    # Weights, and moments of two bytes: the least of any engine.
    weights = 2 * sae.width(d_in) * d_in * (4 + 2 * 2) // mesh.num_shards
    for key, value, needed in (
        ("train.batch_tokens", cfg.batch_tokens, batch),
        ("sae.d_sae", sae.width(d_in), weights),
    ):
        if needed > (limit := max(2 * memory_bytes, 1 << 30)):
            raise ConfigError(
                f"{key}={value} takes {needed:,} bytes a process at width {d_in}, but its memory "
                f"has about {limit:,}; lower it, or use more processes"
            )


def disk_bytes(job: Job, d_in: int) -> int:
    """Bytes that training a job to its end adds to the disk: its checkpoints, one more while it is
    renamed, and its SAE, less what is there already."""
    cfg, sae = _train(job), job.config.sae
    assert sae is not None
    weights = 2 * sae.width(d_in) * d_in
    moment = 2 if getattr(cfg, "moment_dtype", None) == "bfloat16" else 4
    average = 4 if getattr(cfg, "ema_decay", None) else 0
    steps = -(-cfg.num_tokens // cfg.batch_tokens)
    kept = min(cfg.keep_checkpoints, -(-steps // cfg.checkpoint_every))
    whole = (kept + 1) * weights * (4 + 2 * moment + average) + 4 * weights
    found = job.folder.rglob("*.safetensors") if job.folder.is_dir() else iter(())
    return max(0, whole - sum(file.stat().st_size for file in found))


def usable_memory(device: torch.device) -> int:
    """Bytes that one bundle may take on this rank: most of the free device memory, half of the
    host's share.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 * local)


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
        often = (t.log_every, t.checkpoint_every, t.checkpoint_minutes)
        key = (t.hookpoint, t.batch_tokens, t.num_tokens, t.seed, t.holdout, t.preload, *often)
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
    """Longest first, each to the group with the least work so far."""
    groups: list[list[Bundle]] = [[] for _ in range(num_groups)]
    loads = [0.0] * num_groups
    for bundle in sorted(bundles, key=lambda b: -b.cost):
        least = loads.index(min(loads))
        groups[least].append(bundle)
        loads[least] += bundle.cost
    return groups
