"""What the project wrote, found below a folder and compared with its checksums byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import interop
from .activations.damage import damages
from .activations.records import GEOMETRY, Records
from .activations.store import ActivationStore, Shape
from .config.base import ConfigError, UserError
from .files import CHECKSUMS, check_checksums, read_json
from .models import load_sae
from .models.saved import CONFIG_FILE, WEIGHTS_FILE
from .training import checkpoint, made_of
from .training.metrics import split_metrics
from .training.records import Status, read_job, read_status, read_store_config

Advance = Callable[[int], None]
# Weights of exports whose folder has checksums; others are known by their cfg.json.
_EXPORTED = {"sae_weights.safetensors", "ae.pt", "params.npz", "params.safetensors", "config.yaml"}
_JOB_FILES = ("job.yaml", "store.json", "status.json", "metrics.jsonl")


class Thing(NamedTuple):
    """Something that the project wrote."""

    kind: str  # store, checkpoint, sae, export, job, report
    path: str


def found_in(path: str) -> list[Thing]:
    """What is to be checked at a folder and below it. Raises ConfigError where that is nothing."""
    if "://" in path:
        if Shape.read(Records(path)) is None:
            raise ConfigError(f"{path!r} holds no activation store; check the address")
        return [Thing("store", path)]
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{path!r} is no folder; name one that this project wrote")
    try:
        things = list(_walk(root))
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read: {e.strerror}; check its rights") from e
    if not things:
        raise ConfigError(f"{path!r} holds nothing that this project wrote; check the path")
    return things


def _walk(folder: Path) -> Iterator[Thing]:
    kind = _kind(folder)
    if kind is not None:
        yield Thing(kind, str(folder))
    # What is inside these is theirs.
    if kind in ("store", "checkpoint", "sae", "export"):
        return
    if kind != "report" and (folder / CHECKSUMS).is_file():
        yield Thing("report", str(folder))
    for below in sorted(p for p in folder.iterdir() if p.is_dir()):
        if below.suffix != ".partial":
            yield from _walk(below)


def _kind(folder: Path) -> str | None:
    names = {p.name for p in folder.iterdir()}
    records = folder / "records"
    if (records / GEOMETRY).is_file() or {"records", "activations"} <= names:
        return "store"
    if folder.name.startswith("step-") and folder.suffix == "":
        return "checkpoint"
    if "cfg.json" in names or (CHECKSUMS in names and names & _EXPORTED):
        return "export"
    if WEIGHTS_FILE in names:
        return "export" if CHECKSUMS in names else "sae"
    if folder.name == "sae" and CONFIG_FILE in names:
        return "sae"
    ours = (folder / "sae" / CONFIG_FILE).is_file() or any(folder.glob("checkpoints/step-*[0-9]"))
    if {"job.yaml", "status.json"} & names or ours:
        return "job"
    return "report" if CHECKSUMS in names else None


def size_of(thing: Thing) -> int:
    """Bytes of what is checked, those of a store on another machine not counted."""
    if "://" in thing.path:
        return 0
    folder = Path(thing.path)
    if thing.kind in ("job", "report"):
        return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check(thing: Thing, advance: Advance) -> list[str]:
    """What is damaged in one of the things found, each in a sentence."""
    checks = {
        "store": _store,
        "checkpoint": _checkpoint,
        "sae": _sae,
        "export": _export,
        "job": _job,
        "report": _report,
    }
    try:
        return list(checks[thing.kind](thing.path, advance))
    except (UserError, ValueError) as e:
        return [" ".join(str(e).split())]
    except OSError as e:
        return [f"{e.filename or thing.path} cannot be read: {e.strerror}; check disk and rights"]


def _store(path: str, advance: Advance) -> Iterator[str]:
    for damage in damages(ActivationStore.open(path), advance):
        yield str(damage)


def _checkpoint(path: str, advance: Advance) -> Iterator[str]:
    del advance
    try:
        checkpoint._verify(Path(path).absolute())
    except checkpoint.DamagedCheckpointError as e:
        yield f"{e}; remove that folder, a resumed run takes the checkpoint before it"


def _sae(path: str, advance: Advance) -> Iterator[str]:
    del advance
    try:
        load_sae(path)
    except ValueError as e:
        yield f"{e}; the same `train` or `grid` again writes it anew from its last checkpoint"
    yield from _made_of(Path(path))


def _made_of(folder: Path) -> Iterator[str]:
    try:
        made_of.read(folder)
    except UserError as e:
        yield str(e)


def _export(path: str, advance: Advance) -> Iterator[str]:
    del advance
    # Of several layers there is no one SAE to read.
    if not check_checksums(Path(path)) or not (Path(path) / "config.yaml").exists():
        interop.read(path)
    yield from ()


def _job(path: str, advance: Advance) -> Iterator[str]:
    del advance
    folder = Path(path)
    yield from _made_of(folder)
    for read in (read_job, read_store_config, read_status):
        try:
            read(folder)
        except UserError as e:
            yield str(e)
    if not (folder / "job.yaml").is_file():
        yield f"{folder}/job.yaml is missing; restore it, or train that job anew"
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        yield from _metrics(folder, metrics)
    if (folder / "evaluation.json").is_file() and not (folder / CHECKSUMS).exists():
        try:
            read_json(folder / "evaluation.json")
        except ValueError as e:
            yield f"{folder}/evaluation.json is damaged ({e}); run `flash-sae evaluate` again"


def _metrics(folder: Path, metrics: Path) -> Iterator[str]:
    lines, bad = split_metrics(metrics.read_bytes())
    if bad:
        numbers = ", ".join(map(str, bad))
        yield f"{metrics} is damaged in line {numbers}; restore it, or leave those lines out"
    try:
        status: Status | None = read_status(folder)
    except UserError:
        status = None
    last = lines[-1]["step"] if lines else 0
    if status is not None and status.state == "finished" and last != status.total_steps:
        yield (
            f"{metrics} is cut short: it ends at step {last} of {status.total_steps}; restore it, "
            "or do without its end"
        )


def _report(path: str, advance: Advance) -> Iterator[str]:
    del advance
    folder = Path(path)
    try:
        check_checksums(folder)
        if (folder / "evaluation.json").is_file():
            json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except ValueError as e:
        yield f"{folder}: {e}; run `flash-sae evaluate` again"
