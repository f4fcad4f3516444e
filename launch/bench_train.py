"""The job `train` timed beside what it is made of in the same run: the step alone on one batch, the
loader alone, and sparsify's step where it is installed.

    python -m flash_sae_dist.launch.bench_train train [--shape gpt2] [--jobs 8] [--json FILE]

Without a store one of random rows is made, of --gib GiB, under --folder (memory, by default), and
removed again. `train, windows` is the median of what metrics.jsonl holds, `train, whole` all steps
with their pauses, without start and final save. With --jobs there are so many SAEs, of different k,
on one stream of batches: their rates, and that of the step, are SAE-tokens a second. Rates are of
wall time.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..training.job import parse_config
from ..training.metrics import read_metrics
from .bench_load import load_rate, store_for
from .bench_peers import sparsify_step
from .bench_timing import print_table, write_json
from .bench_training import SHAPES, OurStep, Shape, shape_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _several() -> None:
    """The job beside its limits."""


def step_rate(step: Callable[[], Any], tokens: int, device: torch.device, seconds: float) -> float:
    """Tokens/s of a step repeated for so many seconds, of the best of three parts."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(4):
        step()
    best = 0.0
    for _ in range(3):
        begin, made = wait(), 0
        while made == 0 or time.perf_counter() - begin < seconds / 3:
            step()
            made += 1
            if made % 20 == 0:
                wait()
        best = max(best, made * tokens / (wait() - begin))
    return best


def job_rates(data: dict[str, Any], folder: Path, device: torch.device) -> tuple[float, float]:
    """Tokens/s of a job's windows (median) and of all of its steps, by its own records."""
    from accelerate import Accelerator

    from ..grid.runner import run_jobs

    config = parse_config(data | {"output": str(folder)})
    grid = config.grid is not None
    jobs = run_jobs(config, Accelerator(cpu=device.type == "cpu"), grid=grid)
    lines = read_metrics(jobs[0].folder / "metrics.jsonl")
    # The first window compiles and captures.
    windows = [line["tokens_per_s"] for line in lines[1:]] or [lines[0]["tokens_per_s"]]
    tokens = [line["tokens"] for line in lines]
    seconds = [
        (b - a) / line["tokens_per_s"]
        for a, b, line in zip([0, *tokens[:-1]], tokens, lines, strict=True)
    ]
    first = 1 if len(lines) > 1 else 0
    whole = (tokens[-1] - (tokens[0] if first else 0)) / sum(seconds[first:])
    return statistics.median(windows), whole


@app.command()
def train(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, or nN-dD-fF-kK.")] = "gpt2",
    store: Annotated[str, typer.Option(help="A store; left out, one is made.")] = "",
    hookpoint: Annotated[str, typer.Option(help="A hookpoint of that store.")] = "",
    folder: Annotated[str, typer.Option(help="Where store and job are written.")] = "/dev/shm",
    gib: Annotated[float, typer.Option(help="Size of the store that is made.")] = 16.0,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; 0 is one epoch.")] = 0,
    preload: Annotated[str, typer.Option(help="As train.preload.")] = "none",
    jobs: Annotated[int, typer.Option(help="SAEs of different k on the same batches.")] = 1,
    log_every: Annotated[int, typer.Option(help="As train.log_every.")] = 50,
    seconds: Annotated[float, typer.Option(help="Time of each part timed alone.")] = 6.0,
    peers: Annotated[bool, typer.Option(help="Time sparsify's step, too.")] = True,
    cpu: Annotated[bool, typer.Option(help="Time the CPU.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """The whole job: tokens/s beside the step and the loader alone."""
    if bool(store) != bool(hookpoint):
        raise typer.BadParameter("--store and --hookpoint go together")
    if jobs < 1:
        raise typer.BadParameter(f"--jobs {jobs}: give 1 or more")
    sizes = shape_of(shape)
    device = torch.device("cpu" if cpu else "cuda")
    table = _alone(sizes, device, seconds, peers)
    with store_for(store, hookpoint, folder, gib, sizes[1], "") as (opened, name):
        batches, _ = load_rate(opened, name, sizes[0], "none", 0.01, device)
        table.append({"what": "loader alone, preload=none", "tokens/s": batches * sizes[0]})
        with tempfile.TemporaryDirectory(dir=folder) as output:
            data = _job(sizes, str(opened.path), name, tokens or opened.rows, preload, jobs)
            data["train"]["log_every"] = log_every
            windows, whole = job_rates(data, Path(output), device)
    table.append({"what": "train, windows", "tokens/s": jobs * windows})
    table.append({"what": "train, whole", "tokens/s": jobs * whole})
    for row in table:
        row["x step"] = row["tokens/s"] / table[0]["tokens/s"]
    title = f"Train, {shape}, {jobs} SAE(s), preload={preload}"
    print_table(title, table)
    if json is not None:
        write_json(json, title, table)


def _alone(sizes: Shape, device: torch.device, seconds: float, peers: bool) -> list[dict[str, Any]]:
    steps: dict[str, Callable[[], Callable[[], Any]]] = {
        "step alone": lambda: OurStep(sizes, device)
    }
    if peers and importlib.util.find_spec("sparsify") is not None:
        steps["sparsify's step alone"] = lambda: sparsify_step(sizes, device.type)
    return [
        {"what": what, "tokens/s": step_rate(make(), sizes[0], device, seconds)}
        for what, make in steps.items()
    ]


def _job(
    sizes: Shape, store: str, hookpoint: str, tokens: int, preload: str, jobs: int
) -> dict[str, Any]:
    """A run's config; with several jobs the values of k lie about the shape's own."""
    n, _, f, k = sizes
    steps = max(1, tokens // n)
    train = {"batch_tokens": n, "num_tokens": steps * n, "preload": preload}
    train |= {"warmup_steps": min(100, steps), "checkpoint_every": steps + 1}
    data: dict[str, Any] = {"store": store, "trackers": [], "sae": {"d_sae": f, "k": k}}
    if jobs == 1:
        return data | {"train": train | {"hookpoint": hookpoint}}
    first = max(1, k - jobs // 2)
    values = {"sae.k": list(range(first, first + jobs))}
    return data | {"train": train, "grid": {"hookpoints": [hookpoint], "values": values}}


if __name__ == "__main__":
    app()
