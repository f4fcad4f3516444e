"""The fused step of this checkout and of another, timed in turns on one GPU.

Each checkout has a process that lives as long as the comparison: both compile once, and each in
its turn has the GPU's memory to itself.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __file__ as _package_file
from .bench_training import Shape

ROOT = Path(_package_file).absolute().parents[1]

# How often each is timed, in turns.
_ROUNDS = 2

# A step of several kinds of calls is warm after four: two eager ones, its capture, a replay.
_WORKER = """
import gc, sys
from pathlib import Path
import torch
import flash_sae_dist
assert Path(flash_sae_dist.__file__).is_relative_to(Path.cwd()), flash_sae_dist.__file__
from flash_sae_dist.launch.bench_step import _fused_step
from flash_sae_dist.launch.bench_timing import median_ms

def tune(n, d, f, k):
    # Training times the encoder's designs before its first step; a bare FusedStep does not.
    try:
        from flash_sae_dist.parallel.mesh import Mesh
        from flash_sae_dist.training.tuning import tune_encoder
        x, W = (torch.randn(m, d, device="cuda", dtype=torch.bfloat16) for m in (n, f))
        b = torch.zeros(f, device="cuda")
        tune_encoder(x, W / d**0.5, b, k, torch.bfloat16, Mesh.single())
    except (ImportError, TypeError) as e:
        print(f"the encoder is not timed first: {e}", file=sys.stderr)

for line in sys.stdin:
    *shape, repeats = map(int, line.split())
    if sys.argv[1] == "tune" and torch.cuda.is_available():
        tune(*shape)
    step = _fused_step(tuple(shape))
    for _ in range(4):
        step()
    ms = median_ms(step, repeats, ahead=True)
    del step
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print("ms", ms, flush=True)
"""


class Timer:
    """Times steps in a process of a checkout, which starts at the first call."""

    def __init__(self, root: Path, *, tune: bool) -> None:
        self._root, self._tune = root, tune
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        # `python -c` looks for modules in the current folder first, then in PYTHONPATH.
        paths = [str(self._root), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-c", _WORKER, "tune" if self._tune else ""],
            cwd=self._root,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ms(self, shape: Shape, repeats: int) -> float:
        """Median time of a step that has been warmed up. Raises RuntimeError where it fails; the
        next call then starts a process anew.
        """
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(*shape, repeats, file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith("ms "):
                    return float(line.split()[1])
        self.end()
        raise RuntimeError(f"the step of {self._root} failed, its own words are above")

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def compare(
    shapes: dict[str, Shape], other: Path, repeats: int, ours: Path = ROOT
) -> list[dict[str, Any]]:
    """A row a shape: medians of this checkout's and the other's times, taken in turns, and their
    ratio. A shape that fails is a row with a remark."""
    rows: list[dict[str, Any]] = []
    timers = (Timer(ours, tune=False), Timer(other.absolute(), tune=True))
    try:
        for name, shape in shapes.items():
            row: dict[str, Any] = {"shape": name}
            rows.append(row)
            try:
                times = [[t.ms(shape, repeats) for t in timers] for _ in range(_ROUNDS)]
            except RuntimeError as e:
                row["remark"] = str(e)
                continue
            a, b = (statistics.median(of) for of in zip(*times, strict=True))
            row |= {"ours ms": a, "other ms": b, "ours / other": a / b}
            row["in turns"] = "  ".join(f"{x:.3f} {y:.3f}" for x, y in times)
    finally:
        for timer in timers:
            timer.end()
    return rows
