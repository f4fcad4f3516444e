"""Writes checkpoints beside training: a state is copied to the host between two steps, a thread
writes and publishes it while training goes on.

Threads of several ranks meet on the file system alone, never in a collective, whose order is the
training's: each writes its shard's files into one `.partial` folder, then a record of them; the
lead's waits for all records, writes the manifest and renames the folder; the others' wait for that
manifest. What one of them fails of, its record tells the others. Records bear a word of this
launch, so that none of a killed one's is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from .. import files, tensor_files
from ..config.base import UserError
from ..ending import sentence_of
from ..parallel import agree
from ..parallel.mesh import Mesh
from .checkpoint import FORMAT, MANIFEST, TrainingState, found_in, manifest_checksum, step_folder
from .host_memory import Copied, HostMemory, HostShare

logger = logging.getLogger(__name__)
# A shard is written as files of about this size, by several threads: of one file a system writes
# some 3 GB/s, whatever the disk.
_FILE_BYTES = 1 << 30
# Each sum holds Python's lock for 0.1 ms, which training wants, too.
_THREADS = 4
# Seconds for which a rank waits for the others' parts once its own is written.
_PATIENCE_S = 1800.0
# Seconds given to all that is being written when training ends with an error; where several ranks
# train together the others may be gone.
GRACE_S, GRACE_TOGETHER_S = 60.0, 5.0


class _LeftError(Exception):
    """Training has ended meanwhile."""


class CheckpointWriter:
    """Writes one SAE's checkpoints, one at a time; see the module. Made collectively."""

    def __init__(
        self, name: str, folder: Path, state: TrainingState | None, mesh: Mesh,
        device: torch.device, keep: int, share: HostShare,
        published: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """state tells for what memory is made, of a share of the host's, and without it training
        waits for each checkpoint; published is called, by a thread, with each step published. The
        folder must be one that every member sees.
        """
        self.name, self.folder, self.mesh, self.keep = name, folder, mesh, keep
        self._begun_s, self._copied_s = 0.0, 0.0  # of this thread and of the writing one
        self._published = published
        self._launch = agree.from_lead(uuid4().hex, mesh)
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None
        self._left = threading.Event()
        self._memory: HostMemory | None = None
        if mesh.replica == 0 and state is not None:
            self._memory = HostMemory(name, _tensors(state, mesh), device, share)

    @property
    def blocked_s(self) -> float:
        """Seconds that training has waited for checkpoints."""
        return self._begun_s + self._copied_s

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, as far as this rank knows."""
        return self._error is not None

    def begin(self, state: TrainingState) -> None:
        """Begins to write a checkpoint of `state.info["step"]`, which removes all but the newest
        ones when it is published. The steps that come may change the state at once. Waits for a
        checkpoint that is being written, and raises what that failed of.
        """
        step, began = int(state.info["step"]), time.perf_counter()
        if self._thread is not None and self._thread.is_alive() and self.mesh.is_lead:
            logger.info(
                "%s: the checkpoint of step %d waits for that of step %d, which is being written",
                self.name, step, self._step,
            )  # fmt: skip
        self.wait()
        self._step = step
        copied = None
        tensors = _tensors(state, self.mesh)
        if self._memory is not None:
            copied = self._memory.copy(tensors)
        self._thread = threading.Thread(
            target=self._run, args=(state.info, tensors, copied), name="checkpoint", daemon=True
        )
        self._thread.start()
        if self.mesh.replica == 0 and copied is None:
            # Written from the device's memory, which the next step would change.
            self._thread.join()
        self._begun_s += time.perf_counter() - began

    def wait(self, seconds: float | None = None) -> None:
        """Waits until what was begun is published, and raises what it failed of."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self, seconds: float = GRACE_S) -> None:
        """Ends it: what is being written is given some seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._left.set()
            if self._thread.is_alive():
                return
        if self._memory is not None:
            self._memory.close()

    def _run(self, info: dict[str, Any], tensors: dict[str, Tensor], copied: Copied | None) -> None:
        final = step_folder(self.folder, self._step)
        partial = final.with_name(f"{final.name}.{self._launch}.partial")
        try:
            if self.mesh.replica == 0:
                if copied is not None:
                    self._copied_s += copied.wait()
                    tensors = copied.tensors
                written = write_shard(partial, tensors, info, self.mesh, self._left)
                files.write_json(partial / _record(self.mesh.shard), {"files": written})
            if self.mesh.is_lead:
                self._publish(partial, final, info)
            else:
                self._await(partial, lambda: self._is_out(final) or None)
            self._published(self._step)
        except _LeftError:
            return
        except Exception as e:
            with suppress(OSError):
                self._tell_failure(partial, e)
            self._error = e

    def _publish(self, partial: Path, final: Path, info: dict[str, Any]) -> None:
        records = self._await(partial, lambda: _records(partial, self.mesh.num_shards))
        written = [file for record in records for file in record["files"]]
        manifest = {"format": FORMAT, "launch": self._launch, "info": info, "files": written}
        manifest["crc32c"] = manifest_checksum(manifest)
        for shard in range(self.mesh.num_shards):
            (partial / _record(shard)).unlink()
        files.write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        files.rename(partial, final)
        # Those of later steps are damaged, or this one would not be made anew.
        made = [path for path in found_in(self.folder) if path <= final]
        for old in made[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _is_out(self, final: Path) -> bool:
        """Whether this launch has published a checkpoint; a later one may have replaced it."""
        try:
            # Names alone: the lead may be removing older ones.
            names = [n for n in os.listdir(self.folder) if re.fullmatch(r"step-\d+", n)]
        except FileNotFoundError:
            # The first replica, which alone writes, has not made the folder yet.
            return False
        later = [self.folder / name for name in names if name >= final.name]
        return any(_launch_of(path) == self._launch for path in later)

    def _await(self, partial: Path, look: Callable[[], Any]) -> Any:
        """What a look at the folder finds, once it does. Raises UserError where another rank failed
        or does not come."""
        last, pause = time.monotonic() + _PATIENCE_S, 0.01
        while (found := look()) is None:
            if (failure := _failure(partial)) is not None:
                raise UserError(failure)
            if self._left.wait(pause):
                raise _LeftError
            if time.monotonic() > last:
                raise UserError(
                    f"the checkpoint of step {self._step} of {self.name} is not whole: other "
                    f"processes' parts did not come to {partial} within {_PATIENCE_S:.0f} s; "
                    "does every process see that folder?"
                )
            pause = min(2 * pause, 0.2)
        return found

    def _tell_failure(self, partial: Path, error: Exception) -> None:
        """Leaves a word for the others."""
        if self.mesh.members == 1:
            shutil.rmtree(partial, ignore_errors=True)
            return
        told = sentence_of(error) or f"another process failed: {type(error).__name__}: {error}"
        files.write_json(partial / f"failed-{self.mesh.member}.json", {"error": told})


def write_shard(
    folder: Path,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    mesh: Mesh,
    left: threading.Event | None = None,  # set where nobody waits for it any more
) -> list[dict[str, Any]]:
    """Writes a shard's tensors, those of rows and of the whole named apart, as one file or more of
    some of its rows each; returns the manifest's records of them.
    """
    rows = {name: t for name, t in tensors.items() if name.startswith("rows.")}
    whole = {name: t for name, t in tensors.items() if name not in rows}
    num_rows = int(info["d_sae"]) // mesh.num_shards
    size = sum(t.nbytes for t in rows.values())
    count = max(1, min(num_rows, -(-size // _FILE_BYTES)))
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> dict[str, Any]:
        if left is not None and left.is_set():
            # The interpreter's end waits for all that a pool was given.
            raise _LeftError
        start, stop = (num_rows * n // count for n in (number, number + 1))
        some = {name: t[start:stop] for name, t in rows.items()} | (whole if number == 0 else {})
        index, first = mesh.shard * count + number, mesh.shard * num_rows + start
        name = f"shard-{index:05d}-of-{mesh.num_shards * count:05d}.safetensors"
        try:
            crc = tensor_files.save(folder / name, some)
        except Exception:
            # Room for a word to the others, where the disk is full.
            (folder / name).unlink(missing_ok=True)
            raise
        return {"name": name, "crc32c": crc, "first_row": first, "num_rows": stop - start}

    with ThreadPoolExecutor(min(_THREADS, count)) as pool:
        return list(pool.map(write, range(count)))


def _tensors(state: TrainingState, mesh: Mesh) -> dict[str, Tensor]:
    """What this rank writes, by its name in the files."""
    tensors = {f"rows.{name}": t for name, t in state.rows.items()}
    if mesh.shard == 0:
        tensors |= {f"whole.{name}": t for name, t in state.whole.items()}
    return tensors if mesh.replica == 0 else {}


def _record(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def _records(partial: Path, num_shards: int) -> list[dict[str, Any]] | None:
    """The records of all shards; None before they are there."""
    try:
        return [files.read_json(partial / _record(shard)) for shard in range(num_shards)]
    except OSError as e:
        if files.is_absent(e):
            return None
        raise


def _failure(partial: Path) -> str | None:
    """What another rank said that it failed of. The folder may be renamed at any moment."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(partial)):
            if name.startswith("failed-") and name.endswith(".json"):
                return str(files.read_json(partial / name)["error"])
    return None


def _launch_of(final: Path) -> str | None:
    """The word of the launch that published a checkpoint, if one is there."""
    try:
        return str(json.loads((final / MANIFEST).read_text()).get("launch"))
    except (OSError, ValueError, AttributeError):
        return None
