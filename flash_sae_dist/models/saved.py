"""An SAE on disk: its config and its weights as one safetensors file, each shard's rows written by
their owner.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import check_readable, checksum, read_json, replacing
from ..parallel import agree
from ..parallel.mesh import Mesh
from ..sums import Part, combine
from ..tensor_files import Layout, Spec

logger = logging.getLogger(__name__)
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "config.json"


def save_weights(
    file: Path,
    rows: Mapping[str, Tensor],  # [d_sae_local, ...], this shard's
    whole: Mapping[str, Tensor],  # the same on every shard
    mesh: Mesh,
) -> str:
    """Writes tensors of all shards, renamed into place; returns the file's crc32c in hex.

    The shards of replica 0 write their rows at their place, so no rank holds more than its own.
    Tensors that share memory (tied weights) are written one by one. The folder must be one that
    every member sees. Collective over the members; an error that any of them meets is raised on
    all.
    """
    specs = {name: Spec.of(t) for name, t in {**rows, **whole}.items()}
    for name, (dtype, shape) in [(name, specs[name]) for name in rows]:
        specs[name] = Spec(dtype, (shape[0] * mesh.num_shards, *shape[1:]))
    layout = Layout(specs)
    with ExitStack() as stack:

        def begin() -> tuple[str, Part] | None:
            if not mesh.is_lead:
                return None
            partial = stack.enter_context(replacing(file))
            return str(partial), layout.begin(partial)

        begun = agree.by_member(begin, mesh)[0]
        assert begun is not None

        def write() -> list[Part]:
            if mesh.replica:
                return []
            partial, own = Path(begun[0]), {} if mesh.shard else whole
            first = mesh.shard * next((len(t) for t in rows.values()), 0)
            return layout.write(partial, rows, first) + layout.write(partial, own)

        written = agree.by_member(write, mesh)
        # The lead's rename, where it may fail as well.
        agree.by_member(stack.close, mesh)
    return combine([begun[1], *(part for parts in written for part in parts)])


def check_sae_folder(path: Path) -> None:
    """Raises ValueError, with what to name instead, where a folder is none of an SAE;
    UnreadableError where its files cannot be read now."""
    if check_readable(path / CONFIG_FILE):
        check_readable(path / WEIGHTS_FILE)
        return
    if path.is_file():
        raise ValueError(f"{path} is a file; name the folder that holds it, {path.parent}")
    if (path / "sae" / CONFIG_FILE).is_file():
        raise ValueError(f"{path} holds an SAE in its folder sae; name {path / 'sae'}")
    what = f"has no {CONFIG_FILE}" if path.is_dir() else "does not exist"
    raise ValueError(
        f"{path} {what}: it holds no whole SAE; name a folder such as OUTPUT/HOOKPOINT/sae"
    )


def read_spec(folder: Path) -> dict[str, Any]:
    """The config.json of a saved SAE. Raises OSError, or ValueError where it is damaged."""
    return read_json(folder / CONFIG_FILE)


def check_weights(folder: Path, expected: str | None) -> None:
    """Compares a saved SAE's weights with the crc32c of its config.json; SAEs of 0.1.0 have none.
    Raises ValueError where they differ.
    """
    if expected is None:
        logger.info("%s has no checksum, its weights are not compared", folder)
    elif checksum(folder / WEIGHTS_FILE) != expected:
        raise ValueError(f"{WEIGHTS_FILE} does not hold what was written: its crc32c changed")


def is_whole(folder: str | Path) -> bool:
    """Whether a folder holds what an SAE's `save` writes, none of it cut short. Reads no weights:
    `load` compares them with their checksum.

    Raises UnreadableError where files are there and cannot be read now.
    """
    path = Path(folder)
    if not all([check_readable(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]):
        return False
    try:
        read_spec(path)
        with safe_open(path / WEIGHTS_FILE, framework="pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False
