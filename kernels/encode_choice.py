"""Which of the encoder's designs a call takes: what `tune` found the fastest for its shape on this
GPU, else the first that encode_topk.py names, which is a function of the shape alone.

Results of two designs differ by rounding, so one run must not change between them, nor two ranks of
one SAE: `tune` measures, nothing else does, and keeps what it found in a file; who trains on
several ranks tunes on one of them and tells the others, who `use` it.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Design = Callable[[], tuple[Tensor, Tensor]]

# Another design than the first must be faster by this factor: times differ from run to run.
_MARGIN = 0.95
_CALLS = 7
_AHEAD_BYTES, _AHEAD = 64 << 20, 60


class Shape(NamedTuple):
    """What a choice is made for; an entry's name in the file with the GPU and the versions."""

    N: int
    D: int
    F: int
    k: int
    dtype: str

    @classmethod
    def of(cls, x: Tensor, W_enc: Tensor, k: int) -> Shape:
        """The shape of a call."""
        N, D = x.shape
        return cls(N, D, W_enc.shape[0], k, str(x.dtype).removeprefix("torch."))


_CHOSEN: dict[Shape, str] = {}


def use(shape: Shape, name: str) -> None:
    """From now on this process's calls of a shape take a design, where it takes them."""
    _CHOSEN[shape] = name


def pick(shape: Shape, designs: dict[str, Design]) -> str:
    """The name of the design to take."""
    chosen = _CHOSEN.get(shape)
    return chosen if chosen in designs else next(iter(designs))


def cache_file() -> Path:
    """Where choices are kept: `flash_sae_dist/encoder.json` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flash_sae_dist" / "encoder.json"


def _read(file: Path) -> dict[str, Any]:
    """The entries of a file; none where it is missing or is not what `_write` wrote."""
    try:
        entries = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        logger.warning("%s cannot be read (%s): the encoder is timed anew", file, e)
        return {}
    if not isinstance(entries, dict):
        logger.warning("%s holds no entries: the encoder is timed anew", file)
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict) and "design" in v}


def _write(file: Path, entry: str, value: dict[str, Any]) -> None:
    """Adds an entry. What another process adds at the same moment may be lost: it is found anew."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_read(file) | {entry: value}, indent=1, sort_keys=True)
        partial.write_text(text + "\n")
        os.replace(partial, file)
    except OSError as e:
        logger.warning("%s cannot be written (%s): the next run times the encoder anew", file, e)


def median_us(design: Design) -> float:
    """Median microseconds of a call on the current CUDA device; waits for the device."""
    times: list[float] = []
    ahead = torch.empty(_AHEAD_BYTES, dtype=torch.int8, device="cuda")
    for i in range(_CALLS + 2):
        # The device is busy while the host launches, so that its time alone is taken; the L2 cache
        # is emptied.
        for _ in range(_AHEAD):
            ahead.zero_()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        design()
        end.record()
        end.synchronize()
        if i >= 2:  # the first compile and warm up
            times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def _where() -> str:
    """The GPU and the versions that a time depends on."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"


def tune(
    shape: Shape,
    designs: dict[str, Design],
    *,
    file: Path | None = None,
    time_us: Callable[[Design], float] = median_us,
) -> str:
    """The fastest design of a shape: from the file, else by timing each and keeping it there. The
    first of them unless another is faster by more than a twentieth."""
    if len(designs) == 1:
        return next(iter(designs))
    file = file or cache_file()
    entry = ", ".join([_where(), *(f"{name}={size}" for name, size in shape._asdict().items())])
    kept = _read(file).get(entry)
    if kept is not None and kept["design"] in designs:
        return str(kept["design"])
    times = {name: time_us(design) for name, design in designs.items()}
    first, best = next(iter(times)), min(times, key=lambda name: times[name])
    name = best if times[best] < _MARGIN * times[first] else first
    _write(file, entry, {"design": name, "us": {n: round(us, 1) for n, us in times.items()}})
    return name
