"""What a run leaves behind for people and for its own restart: job.yaml, status.json."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ..config.base import UserError, sources_of
from ..ending import sentence_of
from ..files import check_seal, read_json, write_json, write_text, yaml_text
from ..models.saved import CONFIG_FILE
from .job import Config, parse_config

logger = logging.getLogger(__name__)
State = Literal["running", "finished", "failed", "stopped"]


class DamagedRecordError(UserError):
    """A file of a job's folder that does not hold what was written."""


class Job(NamedTuple):
    """One SAE to train: a resolved config (train.hookpoint set) and the folder it lives in."""

    name: str
    folder: Path
    config: Config
    begun_tokens: int | None = None  # train.num_tokens of its first launch; None is this one


def hookpoint_of(job: Job) -> str:
    """The hookpoint that a job trains on; of a crosscoder several, joined by +."""
    assert job.config.train is not None
    assert job.config.train.hookpoint is not None
    return job.config.train.hookpoint


def hookpoints_of(job: Job) -> list[str]:
    """All hookpoints whose rows a job trains on: a transcoder's target is one, too."""
    assert job.config.train is not None
    target = job.config.train.target
    return [*sources_of(hookpoint_of(job)), *([target] if target is not None else [])]


def width_of(job: Job, widths: Mapping[str, int]) -> int:
    """d_in of a job, from the widths of hookpoints."""
    return sum(widths[name] for name in sources_of(hookpoint_of(job)))


class Status(NamedTuple):
    """How far a job is."""

    state: State
    step: int
    total_steps: int
    error: str | None = None


def write_job(job: Job, store_config: dict[str, Any]) -> None:
    """Writes `job.yaml`: the resolved config, which alone repeats the job; and `store.json`: what
    the store's rows are.
    """
    data = job.config.model_dump(mode="json", exclude_unset=True)
    write_json(job.folder / "store.json", store_config, indent=1)
    write_text(job.folder / "job.yaml", yaml_text(yaml.safe_dump(data, sort_keys=False)))


def _damaged(path: Path, error: Exception) -> DamagedRecordError:
    reason = " ".join(str(error).split())
    return DamagedRecordError(f"{path} is damaged ({reason}); restore it, or remove that folder")


def read_job(folder: Path) -> Config | None:
    """The config in `job.yaml`, None where there is none. Raises DamagedRecordError, or ConfigError
    where it is whole but of another version's keys or values.
    """
    path = folder / "job.yaml"
    try:
        text = path.read_bytes()
        check_seal(text)
        data = yaml.safe_load(text.decode())
        if not isinstance(data, dict):
            raise ValueError("it holds no keys")
    except FileNotFoundError:
        return None
    except (ValueError, yaml.YAMLError) as e:
        raise _damaged(path, e) from e
    return parse_config(data, str(path))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise _damaged(path, e) from e


def read_store_config(folder: Path) -> dict[str, Any] | None:
    """What `write_job` wrote of the store, or None before. Raises DamagedRecordError."""
    return _read_json(folder / "store.json")


def job_folders(output: Path) -> list[Path]:
    """Every folder under output that is a job's or holds an SAE, sorted; links to folders are
    followed, and a folder that is reached twice is found once.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    # Folders first: a link to one of them is the same job under another name.
    waiting: list[Path] = [output]
    links: list[Path] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            real = folder.resolve(strict=True)
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except (OSError, RuntimeError):
            continue
        if real in seen:
            continue
        seen.add(real)
        names = {entry.name for entry in entries}
        is_job = "job.yaml" in names or (folder / "sae" / CONFIG_FILE).is_file()
        if is_job:
            found.append(folder)
        for entry in entries:
            own = is_job and entry.name in ("checkpoints", "sae")
            if not own and "zarr.json" not in names and entry.is_dir():
                (links if entry.is_symlink() else waiting).append(folder / entry.name)
    return sorted(found)


def write_status(job: Job, status: Status) -> None:
    """Writes `status.json`."""
    write_json(job.folder / "status.json", status._asdict())


def forget_failure(job: Job) -> None:
    """An earlier launch's: this one's own reason is to be told. A status that is damaged is
    forgotten, too, since it only informs."""
    try:
        status = read_status(job.folder)
    except DamagedRecordError:
        status = Status("failed", 0, 0)
    if status is not None and status.state == "failed":
        write_status(job, status._replace(state="running", error=None))


def record_failure(job: Job, error: Exception) -> str:
    """Writes an error into `status.json` and tells it; returns it in one line."""
    sentence = sentence_of(error)
    reason = f"{type(error).__name__}: {sentence or error}"
    # What the user can set right is a sentence, which a traceback would bury.
    trace = error if sentence is None else None
    logger.error("%s failed: %s", job.name, reason, exc_info=trace)
    status = read_status(job.folder) or Status("running", 0, 0)
    # The first reason stands: other ranks then fail for want of this one.
    if status.state != "failed":
        write_status(job, Status("failed", status.step, status.total_steps, reason))
    return reason


def read_status(folder: Path) -> Status | None:
    """What `write_status` wrote, or None before a job's first step. Raises DamagedRecordError."""
    path = folder / "status.json"
    data = _read_json(path)
    try:
        return None if data is None else Status(**data)
    except TypeError as e:
        raise _damaged(path, e) from e
