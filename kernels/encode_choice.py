"""Which of the encoder's designs a call takes: what `tune` found the fastest for its shape on this
GPU, else the first that encode_topk.py names, which measures nothing.

Results of two designs differ by rounding, so one run must not change between them, nor two ranks of
one SAE. `tune` alone measures. What it found it keeps in the user's cache folder, for later runs;
who trains on several ranks tunes on one and tells the others, who `use` it, and keeps it with the
checkpoint. In a process a choice stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Design = Callable[[], tuple[Tensor, Tensor]]

# To be raised when a design gets faster: what was found before is then found anew.
_VERSION = 3
# Another design than the first must be faster by this factor: times differ from run to run.
_MARGIN = 0.95
_CALLS = 7
_AHEAD_BYTES, _AHEAD = 32 << 20, 100


class Shape(NamedTuple):
    """What a choice is made for."""

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


def chosen(shape: Shape) -> str | None:
    """What is used for a shape, if anything was chosen."""
    return _CHOSEN.get(shape)


def pick(shape: Shape, designs: dict[str, Design]) -> str:
    """The name of the design to take."""
    name = _CHOSEN.get(shape)
    return name if name in designs else next(iter(designs))


def cache_folder() -> Path | None:
    """Where choices are kept: `flash_sae_dist/encoder` in the user's cache folder; None for a user
    who has no home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "flash_sae_dist" / "encoder"
    except RuntimeError:
        return None


class _Entry:
    """What was found for a shape, a GPU and the versions: a file of its own, so that processes do
    not overwrite one another's."""

    def __init__(self, folder: Path, about: str) -> None:
        self.about = about
        self.file = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"

    def read(self) -> str | None:
        """The design; None where there is no such file or it is not what `write` wrote."""
        try:
            entry = json.loads(self.file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            logger.warning("%s cannot be read (%s): the encoder is timed anew", self.file, e)
            return None
        if not isinstance(entry, dict) or entry.get("about") != self.about:
            logger.warning("%s is no choice of a design: the encoder is timed anew", self.file)
            return None
        name = entry.get("design")
        return name if isinstance(name, str) else None

    def write(self, design: str, us: dict[str, float]) -> None:
        """Keeps a design and the times it was chosen by."""
        entry = {"about": self.about, "design": design, "us": us}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.file.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as f:
                f.write(json.dumps(entry, indent=1) + "\n")
            os.replace(partial, self.file)
        except OSError as e:
            logger.warning("%s cannot be written (%s): another run times anew", self.file, e)


def median_us(design: Design) -> float:
    """Median microseconds of a call on the current CUDA device; waits for the device."""
    times: list[float] = []
    ahead = torch.empty(_AHEAD_BYTES, dtype=torch.int8, device="cuda")
    for i in range(_CALLS + 2):
        # The device is busy while the host launches, so that its time alone is taken, and little of
        # the inputs is left in the L2 cache.
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


def _about(shape: Shape, designs: dict[str, Design], device: torch.device | None) -> str:
    """All that a time depends on."""
    import triton

    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cpu"
    sizes = ", ".join(f"{name}={size}" for name, size in shape._asdict().items())
    versions = f"torch {torch.__version__}, triton {triton.__version__}, choices {_VERSION}"
    return f"{gpu}, {versions}, {sizes}, of {' '.join(designs)}"


def tune(
    shape: Shape,
    designs: dict[str, Design],
    *,
    device: torch.device | None = None,
    folder: Path | None = None,
    time_us: Callable[[Design], float] = median_us,
) -> str:
    """The fastest design of a shape: what this process uses, else what the cache folder holds, else
    by timing each; the first of them unless another is faster by more than a twentieth.

    A design that fails is left out with a warning.
    """
    known = _CHOSEN.get(shape)
    if known in designs:
        return known
    first = next(iter(designs))
    if len(designs) == 1:
        return first
    from triton.errors import TritonError

    folder = folder or cache_folder()
    entry = _Entry(folder, _about(shape, designs, device)) if folder else None
    kept = entry.read() if entry else None
    if kept in designs:
        return kept
    times: dict[str, float] = {}
    for name, design in designs.items():
        try:
            times[name] = round(time_us(design), 1)
        except (RuntimeError, TritonError) as e:
            logger.warning("the encoder's design %s failed (%s): it is left out", name, e)
    if not times:
        return first
    best = min(times, key=lambda name: times[name])
    fastest = first if times[best] >= _MARGIN * times.get(first, float("inf")) else best
    if entry and len(times) == len(designs):
        entry.write(fastest, times)
    return fastest
