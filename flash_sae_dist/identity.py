"""What things are made of: checksums of content, digests over them, what differs in words.

Paths have no part in an identity: the same content elsewhere is the same, other content under the
same path is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from crc32c import crc32c

from .config.base import UserError
from .files import write_text

logger = logging.getLogger(__name__)

# Every key of a config is of one of these kinds; tests/test_identity.py fails for one that is not.
# Keys of `train` that change what a step computes, as all of `sae` do: another value is another
# job.
STEP_KEYS = frozenset(
    f"train.{key}"
    for key in (
        *("hookpoint", "batch_tokens", "seed", "lr", "warmup_steps", "decay_fraction", "grad_clip"),
        *("adam_betas", "adam_eps", "adam_mode", "moment_dtype", "ema_decay", "engine"),
        *("precision", "dead_latents", "aux_coef", "k_aux", "dead_after_tokens", "normalize"),
        *("subtract_mean", "target", "schedule", "schedule_cycles", "min_lr_rate"),
        *("optimizer", "weight_decay", "loss", "fvu_coef", "encoder_scale"),
        *("holdout", "source", "buffer_tokens", "init_from"),
    )
)
# Keys that decide a store's rows by their own values.
ROW_KEYS = frozenset(
    f"cache.{key}"
    for key in (
        *("hookpoints", "num_tokens", "context_length", "batch_sequences", "drop_special_tokens"),
        *("shard_mib", "dtype", "seed", "skip_first_tokens", "max_norm_ratio"),
    )
) | {"model.quantization"}
# Keys that name content, which is compared in their place: checksums of weights, tokenizer, text.
NAMING_KEYS = frozenset(
    [f"model.{key}" for key in ("name", "revision", "gguf_file", "task", "dtype", "adapter")]
    + [f"text.{key}" for key in ("source", "name", "subset", "split", "column", "paths")]
    + [f"text.{key}" for key in ("tokens_column", "messages_column", "mixture", "revision")]
)
# Keys that may change from one launch to the next: how long, how spread, how logged, where.
FREE_KEYS = frozenset(
    [f"train.{key}" for key in ("num_tokens", "num_shards", "num_replicas", "micro_batches")]
    + [f"train.{key}" for key in ("log_every", "checkpoint_every", "keep_checkpoints")]
    + [
        f"train.{key}"
        for key in ("checkpoint_minutes", "rendezvous_timeout_s", "heartbeat_s", "preload")
    ]
    + ["train.deepspeed_config"]
    # The learning rate that it comes to is compared.
    + ["train.lr_rule"]
    + ["text.streaming", "cache.store", "cache.memory_gib", "store", "output", "trackers"]
    + ["store_cache.folder", "store_cache.gib"]
    + ["model.trust_remote_code", "model.device_map"]
    + [f"evaluate.{key}" for key in ("rows", "num_tokens", "batch_tokens", "loss_sequences")]
    + [f"features.{key}" for key in ("saes", "latents", "num_tokens", "batch_tokens", "nearest")]
    + [f"features.{key}" for key in ("top_examples", "quantile_examples", "context_tokens")]
    + ["features.output_tokens"]
    + ["evaluate.saes", "evaluate.hookpoint", "evaluate.k"]
    + ["export.formats", "export.directory"]
    + [f"grid.{key}" for key in ("hookpoints", "values", "points", "exclude", "overrides")]
)

_PACKAGES = ("torch", "transformers", "tokenizers", "zarr", "numpy", "triton")
_BLOCK = 1 << 24
# A file that was changed this shortly before may change again within one tick of its clock.
_SETTLED_NS = 2 * 10**9
_TOLD_BYTES = 4 << 30


class Difference(NamedTuple):
    """A part in which two things differ."""

    part: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.part}={self.now!r} differs from {self.was!r}"


def digest(value: Any) -> str:
    """A short checksum of plain data: the same on every machine and in every order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def plain(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples, text for numbers that are keys."""
    return json.loads(json.dumps(value))


def difference(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    parts: Iterable[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Difference | None:
    """The first part in which two identities differ; of a mapping the key, as `part key`.

    A part that one of them lacks stands for its default where it has one (what older versions did
    not know), else it is unknown and differs from nothing.
    """
    was, now = {**(defaults or {}), **was}, {**(defaults or {}), **now}
    for part in sorted(was.keys() & now.keys()) if parts is None else parts:
        before, after = was.get(part), now.get(part)
        if part not in was or part not in now or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            key = next(k for k in sorted(before | after) if before.get(k) != after.get(k))
            return Difference(f"{part} {key}", before.get(key), after.get(key))
        return Difference(part, before, after)
    return None


def versions() -> dict[str, str]:
    """The versions of the libraries that numbers depend on, those that are installed."""
    from . import __version__

    found = {"flash_sae_dist": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tell_other_versions(what: str, was: Mapping[str, str]) -> None:
    """One log line where something was made with other libraries than these."""
    now = versions()
    other = [f"{name} {was[name]}, now {now[name]}" for name in sorted(was.keys() & now.keys())
             if was[name] != now[name]]  # fmt: skip
    if other:
        logger.info("%s was made with other versions: %s", what, "; ".join(other))


def stamp(path: Path) -> list[int]:
    """Size, times and inode of a file: another content has another stamp."""
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino]


def checksums(path: Path) -> list[list[str]]:
    """[name, checksum] of each tensor of a safetensors file, of another file one of its whole.

    Names, types, shapes and bytes alone have a part in it, so that a model that was cut into other
    files is the same. What a file of this size, time and inode gave before is kept in the user's
    cache folder: a big model is read once.
    """
    before = stamp(path)
    entry = _entry(before)
    kept = _read_entry(entry, before) if entry else None
    if kept is not None:
        return kept
    if before[0] > _TOLD_BYTES:
        logger.info("reading %s once for its checksum (%.1f GB)", path, before[0] / 1e9)
    found = _tensors(path) if path.suffix == ".safetensors" else [["", _crc32c(path)]]
    if entry and stamp(path) == before and time.time_ns() - before[1] > _SETTLED_NS:
        try:
            write_text(entry, json.dumps({"stamp": before, "checksums": found}))
        except OSError as e:
            logger.warning("%s cannot be written (%s): %s is read again", entry, e, path)
    return found


def private_folder() -> Path | None:
    """Where checksums are kept: a folder of the user's cache that no one else can read or write;
    None where there is none.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(root) if root else Path.home() / ".cache") / "flash_sae_dist" / "checksums"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # the latter of a user who has no home
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return folder if mine and not found.st_mode & 0o077 else None


def _entry(file_stamp: list[int]) -> Path | None:
    folder = private_folder()
    return folder / f"{digest(file_stamp)}.json" if folder else None


def _read_entry(entry: Path, file_stamp: list[int]) -> list[list[str]] | None:
    try:
        data = json.loads(entry.read_text())
        if data["stamp"] == file_stamp:
            return [[str(name), str(value)] for name, value in data["checksums"]]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as e:
        logger.warning("%s cannot be read (%s): the checksum is computed anew", entry, e)
    return None


def _crc32c(path: Path, start: int = 0, size: int | None = None) -> str:
    crc, left = 0, path.stat().st_size - start if size is None else size
    with path.open("rb") as f:
        f.seek(start)
        while left and (block := f.read(min(_BLOCK, left))):
            crc, left = crc32c(block, crc), left - len(block)
    return f"{crc:08x}"


def _tensors(path: Path) -> list[list[str]]:
    """A safetensors file: the length of its header in 8 bytes, the header in JSON, the tensors."""
    found = []
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = about["data_offsets"]
            crc = _crc32c(path, 8 + length + first, last - first)
            found.append([name, f"{about['dtype']} {about['shape']} {crc}"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is no whole safetensors file ({' '.join(str(e).split())}); fetch it again "
            "(a pointer of Git LFS looks like this)"
        ) from e
    return found
