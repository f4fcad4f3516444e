"""Checkpoints: safetensors files of some rows each, checksummed, renamed into place, loadable on
any number of shards. `checkpoint_writer.py` writes them.

A checkpoint is a folder `step-00001000/` with `shard-00000-of-00002.safetensors` ... and
`manifest.json`, which is written last and names each file's crc32c and rows, and its own crc32c. No
pickles; a flipped byte is refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from crc32c import crc32c
from safetensors import safe_open
from torch import Tensor

from .. import files
from ..config.base import UserError
from ..parallel.mesh import Mesh

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
# Manifests of format 1 have no checksum of their own.
FORMAT = 2


class TrainingState(NamedTuple):
    """The state of one SAE's training on one rank."""

    rows: dict[str, Tensor]  # [d_sae_local, ...], this shard's rows
    whole: dict[str, Tensor]  # the same on every rank
    info: dict[str, Any]  # plain values


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are missing, torn or changed."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return folder / f"step-{step:08d}"


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """crc32c of a manifest's values, its own left out."""
    rest = {key: value for key, value in manifest.items() if key != "crc32c"}
    # As JSON reads it: lists for tuples, text for numbers that are keys.
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True)
    return f"{crc32c(text.encode()):08x}"


def _gather(record: dict[str, Any], mesh: Mesh) -> list[dict[str, Any]]:
    if mesh.members == 1:
        return [record]
    records: list[Any] = [None] * mesh.members
    dist.all_gather_object(records, record, group=mesh.member_group)
    return records


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder. Raises UnreadableError where it cannot be looked into now."""
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name)]
    except OSError as e:
        if files.is_absent(e):
            return []
        raise files.unreadable(folder, e) from e
    found = [folder / name for name in sorted(names)]
    return [path for path in found if files.check_readable(path / MANIFEST)]


def _verify(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if manifest["format"] not in (1, FORMAT):
            raise DamagedCheckpointError(f"{path} has format {manifest['format']}, not {FORMAT}")
        if manifest["format"] == FORMAT and manifest["crc32c"] != manifest_checksum(manifest):
            raise DamagedCheckpointError(f"{path / MANIFEST} is damaged: its crc32c changed")
        if step_folder(path.parent, int(manifest["info"]["step"])) != path:
            raise DamagedCheckpointError(f"{path} is of step {manifest['info']['step']}")
        for file in manifest["files"]:
            if files.checksum(path / file["name"]) != file["crc32c"]:
                raise DamagedCheckpointError(
                    f"{path / file['name']} is damaged: its crc32c changed"
                )
    except DamagedCheckpointError:
        raise
    except OSError as e:
        if not files.is_absent(e):
            raise files.unreadable(e.filename or path, e) from e
        raise DamagedCheckpointError(f"{path} is not a whole checkpoint: {e}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise DamagedCheckpointError(f"{path} is not a whole checkpoint: {e}") from e
    return manifest


def newest_info(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint with a whole manifest says of itself; its tensors are not read."""
    for path in reversed(found_in(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format"] == 1 or manifest["crc32c"] == manifest_checksum(manifest):
                info: dict[str, Any] = manifest["info"]
                return info
        except (OSError, KeyError, TypeError, ValueError):
            continue
    return None


def newest_step(folder: Path, mesh: Mesh) -> int | None:
    """Step of the newest checkpoint whose checksums hold; damaged ones are passed over with a
    warning. Raises UnreadableError where one is there and cannot be read now.

    The lead looks and tells the others. Collective over the members.
    """
    step: int | None = None
    error: files.UnreadableError | None = None
    try:
        if mesh.is_lead:
            step = _newest_whole(folder)
    except files.UnreadableError as e:
        error = e
    told = _gather({"step": step, "error": error and str(error)}, mesh)[0]
    if told["error"] is not None:
        raise error or files.UnreadableError(told["error"])
    found: int | None = told["step"]
    return found


def _newest_whole(folder: Path) -> int | None:
    for path in reversed(found_in(folder)):
        try:
            return int(_verify(path)["info"]["step"])
        except DamagedCheckpointError as e:
            logger.warning("%s; going back to the checkpoint before it", e)
    return None


def load(folder: Path, step: int, first_row: int, num_rows: int) -> TrainingState:
    """Reads rows first_row .. first_row + num_rows of a verified checkpoint, whatever number of
    shards wrote it.

    Raises DamagedCheckpointError where the files do not hold those rows.
    """
    path = step_folder(folder, step)
    manifest = json.loads((path / MANIFEST).read_text())
    parts: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}
    covered = 0
    for file in manifest["files"]:
        start = max(first_row, file["first_row"]) - file["first_row"]
        stop = min(first_row + num_rows, file["first_row"] + file["num_rows"]) - file["first_row"]
        with safe_open(path / file["name"], framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                kind, _, name = key.partition(".")
                if kind == "whole":
                    whole[name] = f.get_tensor(key)
                elif stop > start:
                    parts.setdefault(name, []).append(f.get_slice(key)[start:stop])
        covered += max(0, stop - start)
    if covered != num_rows:
        raise DamagedCheckpointError(f"{path} holds {covered} of the {num_rows} rows asked for")
    rows = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return TrainingState(rows, whole, manifest["info"])
