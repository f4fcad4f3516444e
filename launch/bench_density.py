"""Dense and sparse steps of an architecture that selects by threshold, at several shares of active
latents: where they take as long, training/engines/density.py switches from one to the other.

    flash-sae bench density [--shape 1024,768,24576] [--share 0.1] [--cpu]
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..config.train import FusedTrainConfig
from ..models.relu import ReLUConfig
from ..parallel.mesh import Mesh
from ..training.metrics import PhaseTimer
from ..training.step import SAETraining
from .bench_timing import print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_WARM_STEPS = 6
_SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


@app.callback()
def _several() -> None:
    """Kernels beside their peers."""


def make_training(shape: tuple[int, int, int], share: float, device: torch.device) -> SAETraining:
    """A ReLU SAE of which a share of the latents is active on normal rows."""
    tokens, d_in, d_sae = shape
    cfg = FusedTrainConfig(num_tokens=10**9, batch_tokens=tokens, lr=1e-9, warmup_steps=0)
    sae = ReLUConfig(architecture="relu", d_sae=d_sae)
    training = SAETraining(sae, cfg, d_in, Mesh.single(), device, rms=1.0)
    # Pre-activations of unit rows are standard normal.
    training.sae.b_enc.data.fill_(-statistics.NormalDist().inv_cdf(1 - share))
    return training


def step_ms(training: SAETraining, x: Tensor, *, dense: bool, repeats: int) -> float:
    """Time of a step in one form: on a CPU the median of the time that all of the process's threads
    worked, so that others on the machine do not count; on a GPU the wall time of a loop, once a
    graph is captured where one is.
    """
    engine, timer = training.engine, PhaseTimer(x.device, enabled=False)
    assert engine.density is not None
    engine.density.is_dense = dense
    if x.is_cuda:
        for _ in range(_WARM_STEPS):
            engine.step(x, timer)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            engine.step(x, timer)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / repeats
    times = []
    for turn in range(repeats + 1):
        begin = time.process_time()
        engine.step(x, timer)
        if turn:
            times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times)


@app.command()
def density(
    shape: Annotated[str, typer.Option(help="N,D,F: tokens, width, latents.")] = "1024,768,24576",
    share: Annotated[list[float] | None, typer.Option(help="Active latents of all.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 5,
    cpu: Annotated[bool, typer.Option(help="On the CPU.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """ReLU's steps, dense and sparse, by the share of latents that are active."""
    sizes = tuple(int(size) for size in shape.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise typer.BadParameter(f"--shape {shape} is no shape; give N,D,F, as 1024,768,24576")
    device = torch.device("cpu" if cpu else "cuda")
    x = torch.randn(sizes[0], sizes[1], generator=torch.Generator().manual_seed(0)).to(device)
    rows: list[dict[str, Any]] = []
    for part in share or _SHARES:
        training = make_training((sizes[0], sizes[1], sizes[2]), part, device)
        dense, sparse = (
            step_ms(training, x, dense=form, repeats=repeats) for form in (True, False)
        )
        l0 = part * sizes[2]
        rows.append({"share": part, "L0": l0, "dense ms": dense, "sparse ms": sparse})
        rows[-1]["sparse / dense"] = sparse / dense
    print_table(f"ReLU's step, {shape} on {device.type}", rows)
    if json is not None:
        write_json(json, "density", rows)


if __name__ == "__main__":
    app()
