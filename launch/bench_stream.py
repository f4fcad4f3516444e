"""Training from a running model (`train.source=stream`) timed beside the model and the steps alone.

    python -m flash_sae_dist.launch.bench_stream stream [--tokens 8000000] [--folder /dev/shm]

The model is that of `bench cache`, the SAEs are of its hookpoint at 7 sixteenths. `forward` calls
it in bfloat16 up to that hookpoint and keeps nothing, `steps` takes one batch again and again;
`stream` is the rate of `grid` behind the first third of its steps. The limit is 1 / (the time of a
token's forward + that of its steps), both of the same run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..config.train import FusedTrainConfig
from ..models.topk import TopKConfig
from ..parallel.mesh import Mesh
from ..training.metrics import PhaseTimer
from ..training.step import SAETraining
from .bench_cache import CONTEXT, SEQUENCES, ModelShape, bare_rate, make_model, make_text
from .bench_timing import print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_WARM_STEPS = 20


@app.callback()
def _several() -> None:
    """Streams beside their limits."""


class OneHookpoint(ModelShape):
    """A Llama of which one block's output is read."""

    @property
    def hookpoints(self) -> list[str]:
        """That of the block at 7 sixteenths."""
        return super().hookpoints[:1]


def steps_rate(
    count: int, batch: int, width: int, sae: TopKConfig, steps: int, device: torch.device
) -> float:
    """Tokens a second of steps of several SAEs alone, each on the same batch."""
    cfg = FusedTrainConfig(num_tokens=10**9, batch_tokens=batch)
    trainings = [SAETraining(sae, cfg, width, Mesh.single(), device, rms=1.0) for _ in range(count)]
    x = torch.randn(batch, width, device=device, dtype=torch.bfloat16)
    start = 0.0
    for step in range(_WARM_STEPS + steps):
        if step == _WARM_STEPS:
            _wait(device)
            start = time.perf_counter()
        for training in trainings:
            training.step(x, PhaseTimer(device, enabled=False))
    _wait(device)
    return batch * steps / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_rate(
    folder: Path, shape: ModelShape, count: int, batch: int, sae: TopKConfig, tokens: int,
    buffer_tokens: int, device: torch.device,
) -> float:  # fmt: skip
    """Tokens a second of a grid of several SAEs, as its verb makes them."""
    from accelerate import Accelerator

    from ..grid.runner import run_jobs
    from ..training.job import parse_config

    output = folder / f"run-{count}"
    data: dict[str, Any] = {
        "output": str(output),
        "model": {"name": str(folder)},
        "text": {"source": "files", "paths": [str(folder / "text.jsonl")]},
        "cache": {
            **{"hookpoints": shape.hookpoints},
            **{"context_length": CONTEXT, "batch_sequences": SEQUENCES},
        },
        "sae": sae.model_dump(exclude_unset=True),
        "train": {
            **{"source": "stream", "num_tokens": tokens, "batch_tokens": batch},
            **{"buffer_tokens": buffer_tokens, "warmup_steps": 0, "checkpoint_every": 10**9},
        },
        "grid": {"values": {"train.lr": [1e-4 * (1 + number) for number in range(count)]}},
        "trackers": [],
    }
    jobs = run_jobs(parse_config(data), Accelerator(cpu=device.type == "cpu"), grid=True)
    lines = (jobs[0].folder / "metrics.jsonl").read_text().splitlines()
    # Each tells of as many steps.
    found = [1 / float(json.loads(line)["tokens_per_s"]) for line in lines][len(lines) // 3 :]
    shutil.rmtree(output)
    return len(found) / sum(found)


@app.command()
def stream(
    tokens: Annotated[int, typer.Option(help="Tokens that are trained on.")] = 8_000_000,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 4096,
    latents: Annotated[int, typer.Option(help="Latents of each SAE.")] = 16_384,
    k: Annotated[int, typer.Option(help="Active latents a token.")] = 32,
    saes: Annotated[str, typer.Option(help="Numbers of SAEs, one run each.")] = "1,8",
    buffer_tokens: Annotated[int, typer.Option(help="train.buffer_tokens.")] = 2**18,
    width: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 2048,
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 16,
    folder: Annotated[Path, typer.Option(help="Where a scratch folder is made.")] = Path(
        "/dev/shm"
    ),
    passes: Annotated[int, typer.Option(help="Passes and steps that are timed alone.")] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table, too.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Time the CPU.")] = False,
) -> None:
    """Streams of one SAE and of several beside the forward pass and the steps alone."""
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    shape, sae = OneHookpoint(width, blocks), TopKConfig(k=k, d_sae=latents)
    folder = Path(tempfile.mkdtemp(prefix="flash-sae-bench-", dir=folder))
    make_model(folder, shape, device)
    make_text(folder / "text.jsonl", tokens + buffer_tokens)
    rows: list[dict[str, Any]] = []
    for count in (int(number) for number in saes.split(",")):
        forward = bare_rate(folder, shape, device, passes)
        alone = steps_rate(count, batch, width, sae, passes, device)
        limit = 1 / (1 / forward + 1 / alone)
        rate = stream_rate(folder, shape, count, batch, sae, tokens, buffer_tokens, device)
        rates = {"forward": forward, "steps": alone, "limit": limit, "stream": rate}
        rows.append({"SAEs": count, **rates, "x limit": rate / limit})
        # A run takes a minute: what is there is told.
        print(f"{count} SAEs: {rate:,.0f} of {limit:,.0f} tokens/s", flush=True)
    title = f"Stream, tokens/s, Llama of {blocks} blocks of width {width}, {latents} latents, k={k}"
    print_table(title, rows)
    if json_file is not None:
        write_json(json_file, title, rows)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app()
