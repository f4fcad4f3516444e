"""`flash-sae features` of all latents beside `flash-sae evaluate`, on the same rows and SAE.

    python -m flash_sae_dist.launch.bench_features features [--rows 4000000] [--folder /dev/shm]

Rows are sums of some of the SAE's own decoder rows, a few of which are used far more often than
most, and noise. `rows/s` is that of the pass over the store alone, `seconds` all of the verb within
a process that has run it before: without starting Python, and for `features` with text, JSON and
page. There is no language model: `evaluate` measures no losses, `features` shows the numbers of
tokens and no output tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch import Tensor

from ..activations.store import make_geometry
from ..activations.writer import StoreWriter, row_sums
from ..evaluation import runner as evaluation
from ..features import runner as features_runner
from ..grid.runner import run_jobs
from ..models.topk import TopKSAE
from ..training.job import Config, parse_config
from .bench_timing import print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
HOOKPOINT = "rows"
_SHARD_MIB, _DOCUMENT_ROWS, _VOCABULARY = 64.0, 500, 50_000
_NOISE = 0.1


@app.callback()
def _several() -> None:
    """Verbs beside each other."""


def make_sae(width: int, latents: int, k: int, device: torch.device) -> TopKSAE:
    """An SAE that finds the decoder rows that a mixture is made of."""
    return TopKSAE(d_in=width, d_sae=latents, k=k).to(device)


def mixtures(sae: TopKSAE, rows: int, generator: torch.Generator) -> Tensor:
    """Rows [n, D] of bfloat16, each of k decoder rows; how often one is used falls with its number,
    over the first 1/256 of them to a half.
    """
    device, k = sae.W_dec.device, sae.k
    often = 1 / (torch.arange(sae.d_sae, device=device) + sae.d_sae / 256)
    used = torch.multinomial(often, rows * k, replacement=True, generator=generator).view(rows, k)
    sizes = torch.randn(rows, k, device=device, generator=generator).exp()
    made = torch.nn.functional.embedding_bag(
        used, sae.W_dec.detach(), per_sample_weights=sizes, mode="sum"
    )
    noise = torch.randn(made.shape, device=device, generator=generator)
    return (made + _NOISE * noise).bfloat16()


def make_store(path: Path, sae: TopKSAE, rows: int) -> int:
    """A store of about so many mixtures, whose tokens stand in documents; how many there are."""
    geometry = make_geometry(rows, sae.d_in, 2, _SHARD_MIB)
    shard = geometry.shard_rows
    geometry = geometry._replace(rows=max(1, rows // shard) * shard)
    writer = StoreWriter(str(path), {"made": "bench features"}, create=True)
    writer.create(geometry, {HOOKPOINT: sae.d_in}, "bfloat16", {})
    rng, generator = np.random.default_rng(0), torch.Generator(sae.W_dec.device).manual_seed(0)
    documents = shard // _DOCUMENT_ROWS + 1
    for number in range(geometry.num_shards):
        made, place = mixtures(sae, shard, generator).cpu(), rng.permutation(shard)
        arrays = {
            f"activations/{HOOKPOINT}": made.view(torch.uint16).numpy(),
            "tokens/ids": rng.integers(_VOCABULARY, size=shard).astype(np.int32),
            "tokens/document": (number * documents + place // _DOCUMENT_ROWS).astype(np.int32),
            "tokens/position": (place % _DOCUMENT_ROWS).astype(np.int32),
        }
        crcs = {name: writer.write_rows(geometry, number, name, v) for name, v in arrays.items()}
        writer.record_shard(geometry, number, crcs, {HOOKPOINT: row_sums(made)})
    writer.finish(geometry, [HOOKPOINT], geometry.num_shards * documents)
    return geometry.rows


def prepare(folder: Path, rows: int, sizes: tuple[int, int, int], device: torch.device) -> Config:
    """A store and a finished SAE in a folder, and the config of both verbs."""
    width, latents, k = sizes
    sae = make_sae(width, latents, k, device)
    rows = make_store(folder / "rows.zarr", sae, rows)
    sae.cpu().save(folder / "begin")
    batch = min(4096, rows)
    train = {"hookpoint": HOOKPOINT, "init_from": str(folder / "begin"), "lr": 1e-9}
    data: dict[str, Any] = {
        "output": str(folder / "run"),
        "store": str(folder / "rows.zarr"),
        "trackers": [],
        "sae": {"d_sae": latents, "k": k},
        "train": train | {"num_tokens": batch, "batch_tokens": batch, "warmup_steps": 0},
        "evaluate": {"rows": "all", "num_tokens": rows, "loss_sequences": 0},
        "features": {"num_tokens": rows, "output_tokens": 0},
    }
    return parse_config(data)


@contextmanager
def timed(module: Any, name: str) -> Iterator[list[float]]:
    """Seconds of the calls of a module's function."""
    seconds: list[float] = []
    whole: Callable[..., Any] = getattr(module, name)

    def run(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return whole(*args, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    with mock.patch.object(module, name, run):
        yield seconds


def rates(config: Config, accelerator: Any, rows: int) -> list[dict[str, Any]]:
    """What both verbs take for the rows."""
    verbs: tuple[tuple[str, Any, str, Callable[..., Any]], ...] = (
        ("evaluate", evaluation, "measure", evaluation.run_evaluation),
        ("features", features_runner, "collect", features_runner.run_features),
    )
    found: list[dict[str, Any]] = []
    for verb, module, of, run in verbs:
        with timed(module, of) as seconds:
            start = time.perf_counter()
            run(config, accelerator)
            whole = time.perf_counter() - start
        row = {"verb": verb, "rows/s": rows / seconds[-1], "pass s": seconds[-1]}
        found.append(row | {"seconds": whole})
    return found


@app.command()
def features(
    rows: Annotated[int, typer.Option(help="Rows of the store.")] = 4_000_000,
    width: Annotated[int, typer.Option(help="d_in.")] = 768,
    latents: Annotated[int, typer.Option(help="d_sae.")] = 24_576,
    k: Annotated[int, typer.Option(help="Active latents a row.")] = 32,
    folder: Annotated[str, typer.Option(help="Where store and results lie meanwhile.")] = "",
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, too.")] = None,
) -> None:
    """`features` beside `evaluate`: rows/s of the pass, seconds of the verb."""
    accelerator = Accelerator(cpu=cpu)
    with tempfile.TemporaryDirectory(dir=folder or None) as made:
        config = prepare(Path(made), rows, (width, latents, k), accelerator.device)
        run_jobs(config, accelerator, grid=False)
        stored = config.features.num_tokens
        # Kernels are compiled, modules imported.
        few = {"num_tokens": min(stored, 50_000)}
        small = config.model_copy(
            update={
                "evaluate": config.evaluate.model_copy(update=few),
                "features": config.features.model_copy(update=few | {"latents": (0,)}),
            }
        )
        rates(small, accelerator, few["num_tokens"])
        found = rates(config, accelerator, stored)
    title = f"{stored} rows of width {width}, {latents} latents, k={k}"
    print_table(title, found)
    if json is not None:
        write_json(json, title, found)


if __name__ == "__main__":
    app()
