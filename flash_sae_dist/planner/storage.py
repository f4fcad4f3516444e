"""What training takes of a host's memory and of the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .memory import Work, kept_bytes

# The ring of activations/loader.py.
LOADER_BYTES = 256 << 20
# Of the state that is kept, what no checkpoint holds.
_NOT_SAVED = ("compute copies", "gradients", "counters")


def checkpoint_bytes(work: Work) -> int:
    """One checkpoint: parameters, moments, averages; of each latent an int64 and a bool."""
    kept = kept_bytes(work, 1)
    return sum(size for name, size in kept.items() if name not in _NOT_SAVED) + 9 * work.d_sae


def sae_bytes(work: Work) -> int:
    """A finished SAE: float32."""
    return 4 * (2 * work.d_sae * work.d_in + work.d_sae + work.d_in)


def num_checkpoints(work: Work) -> int:
    """Checkpoints that are kept at the end."""
    return min(work.train.keep_checkpoints, -(-work.steps // work.train.checkpoint_every))


def disk_bytes(work: Work, folder: Path | None = None) -> int:
    """What training a job to its end adds to the disk: its checkpoints, one more while it is
    renamed, and its SAE, less what its folder holds already.
    """
    whole = (num_checkpoints(work) + 1) * checkpoint_bytes(work) + sae_bytes(work)
    is_there = folder is not None and folder.is_dir()
    found = folder.rglob("*.safetensors") if is_there and folder is not None else iter(())
    return max(0, whole - sum(file.stat().st_size for file in found))


def host_bytes(
    works: Sequence[Work], num_shards: int, num_replicas: int, preloaded: int = 0
) -> dict[str, int]:
    """Host memory of a process that trains jobs together: the loader's ring, the copy that a
    checkpoint is written from, what ZeRO offloads, rows that stay.
    """
    copies = sum(checkpoint_bytes(work) for work in works) // num_shards
    found = {"loader": LOADER_BYTES, "checkpoint's copy": copies}
    # Master weights, two moments, the gradient, the weights on their way back.
    offloaded = sum(5 * sae_bytes(work) for work in works if work.offloads)
    if offloaded:
        found["offloaded"] = offloaded // (num_shards * num_replicas)
    return found | {"rows": preloaded} if preloaded else found
