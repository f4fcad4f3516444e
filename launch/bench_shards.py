"""One SAE's step on several GPUs beside one: time, what it sends, and whether its losses agree.

    accelerate launch --num_processes 2 -m flash_sae_dist.launch.bench_shards [--shape wide]
    ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 -m \
        flash_sae_dist.launch.bench_shards --cpu --shape tiny

First the first process alone, then P shards, P replicas, and P/2 x 2 from 4 processes on, all with
the same weights and batches. `ms`: wall time of a step in a synchronised loop, the slowest rank's,
median of blocks. `eager`: a step without a CUDA graph in which each collective is waited for;
`wire`: what it spends in collectives, the wait for slower ranks included; `compute`: the rest.
`sent`: bytes that a rank contributes to collectives in a step, counted around torch.distributed,
beside the planner's figure. `losses`: largest relative difference from one process's over the first
20 steps. With `--weak` the latents grow with the shards: `x one` is 1 where nothing is lost.
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from ..parallel.mesh import Mesh, make_mesh
from ..planner.memory import work_of
from ..planner.wire import step_sent
from ..training.job import Config, parse_config
from ..training.metrics import PhaseTimer
from ..training.step import SAETraining
from .bench_timing import print_table, write_json
from .bench_training import (
    SHAPES,
    Shape,
    dead_latents,
    make_training,
    no_graph_,
    shape_of,
    step_kind,
    still_dead,
)
from .bench_wire import Sent, measure_sent
from .entry import processes

MORE_SHAPES: dict[str, Shape] = {
    "f1m": (8192, 2304, 1_048_576, 64),
    "tiny": (256, 16, 64, 4),  # for CPUs
}
DEFAULT = ("gpt2", "seed", "wide")
_LOSS_STEPS = 20
_WIRE_STEPS = 7
_BATCHES = 4  # that timed steps take in turns
T = TypeVar("T")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _several() -> None:
    """One SAE on several GPUs."""


class _Place(NamedTuple):
    """Where an SAE is trained."""

    replicas: int
    shards: int

    def __str__(self) -> str:
        if self.replicas * self.shards == 1:
            return "one process"
        if self.replicas == 1:
            return f"{self.shards} shards"
        many = f"{self.replicas} replicas"
        return many if self.shards == 1 else f"{many} x {self.shards} shards"


class _Run(NamedTuple):
    """What is asked for."""

    shape: Shape
    device: torch.device
    steps: int
    blocks: int
    dead: float
    options: dict[str, Any]  # of TrainConfig
    weak: bool = False

    def at(self, place: _Place) -> _Run:
        """The same in a place: with `weak` each shard has as many latents as one process."""
        n, d, f, k = self.shape
        return self._replace(shape=(n, d, f * place.shards, k)) if self.weak else self


class _Found(NamedTuple):
    """What one rank measured in one place."""

    losses: list[float]
    blocks_ms: list[float]
    kind: str
    peak_gib: float
    woken: int
    sent: Sent


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_all(found: T) -> list[T]:
    """What each process has, by rank. Collective; so is all that follows."""
    told: list[Any] = [found] * _world()
    if dist.is_initialized():
        dist.all_gather_object(told, found)
    return told


@functools.cache
def _mesh(place: _Place, device: torch.device) -> Mesh:
    """Made once: the communicators of a mesh serve all shapes."""
    if place.replicas * place.shards == 1:
        return Mesh.single()
    # Of several groups the first alone is measured.
    return make_mesh(place.shards, place.replicas, device=device, several_groups=True)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(run: _Run, mesh: Mesh, step: int) -> Tensor:
    """This replica's part of a step's batch."""
    n, d, *_ = run.shape
    generator = torch.Generator(run.device).manual_seed(1_000_003 + step)
    x = torch.randn(n, d, generator=generator, device=run.device)
    rows = n // mesh.num_replicas
    x = x[mesh.replica * rows : (mesh.replica + 1) * rows].clone()
    return x if run.device.type == "cuda" else x.double()


def _losses(run: _Run, training: SAETraining, timer: PhaseTimer) -> list[float]:
    """FVU and dead latents' loss of each of the first steps."""
    seen = [training.step(_batch(run, training.mesh, i), timer) for i in range(_LOSS_STEPS)]
    values = torch.stack([torch.stack([m.fvu.double(), m.aux.double()]) for m in seen])
    return [float(v) for v in values.flatten().cpu()]


def _measure(run: _Run, training: SAETraining) -> _Found:
    """Losses of the first steps, times of later ones, then what eager ones send."""
    timer = PhaseTimer(run.device, enabled=False)
    mesh, was_dead = training.mesh, still_dead(training)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = _losses(run, training, timer)
    batches = [_batch(run, mesh, i) for i in range(_BATCHES)]
    blocks: list[float] = []
    for _ in range(run.blocks):
        if mesh.members > 1:
            dist.barrier(group=mesh.member_group)
        _sync(run.device)
        begin = time.perf_counter()
        for i in range(run.steps):
            training.step(batches[i % _BATCHES], timer)
        _sync(run.device)
        blocks.append(1e3 * (time.perf_counter() - begin) / run.steps)
    kind = step_kind(training)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else 0.0
    woken = was_dead - still_dead(training)
    no_graph_(training)
    training.step(batches[0], timer)
    sent = measure_sent(lambda: training.step(batches[0], timer), run.device, _WIRE_STEPS)
    return _Found(losses, blocks, kind, peak, woken, sent)


def _attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """What a call makes, or the words of what it raised."""
    try:
        return make(), ""
    except Exception as e:
        if not isinstance(e, torch.OutOfMemoryError):
            traceback.print_exc()
        return None, f"{type(e).__name__}: {e}"[:120]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measured(run: _Run, place: _Place) -> tuple[list[_Found], str]:
    """What each rank of a place measured; nothing and a remark where an SAE does not fit.
    Collective over all processes, of which those outside the place wait."""
    n, _, f, _ = run.shape
    if f % place.shards or n % place.replicas:
        return [], f"{n} tokens or {f} latents cannot be split evenly"
    mesh = _mesh(place, run.device)
    found: _Found | None = None
    remark = ""
    training: SAETraining | None = None
    inside = mesh.group == 0 if mesh.members > 1 else _rank() == 0
    if inside:
        training, remark = _attempt(
            lambda: make_training(run.shape, mesh, run.device, dead=run.dead, **run.options)
        )
    remark = next(filter(None, _from_all(remark)), "")
    if training is not None and not remark:
        if mesh.members == 1:
            made = training
            found, remark = _attempt(lambda: _measure(run, made))
            del made
        else:
            # What fails on one rank leaves the others in a collective: it ends the launch.
            found = _measure(run, training)
    del training
    _free()
    remark = next(filter(None, _from_all(remark)), "")
    return [of for of in _from_all(found) if of is not None], remark


def formula_bytes(shape: Shape, place: _Place, dead: float, double: bool) -> float:
    """Bytes that the first rank contributes a step by the planner: compute in bf16 with float32
    sums, or all in float64.
    """
    n, d, f, k = shape
    train: dict[str, Any] = {"num_tokens": n, "batch_tokens": n}
    train["precision"] = "float64" if double else "bfloat16"
    train["dead_latents"] = "auxk" if dead else "none"
    config = parse_config({"output": ".", "sae": {"k": k, "d_sae": f}, "train": train})
    listed = int(dead_latents(f, dead)[: f // place.shards].sum()) if dead else 0
    work = work_of("", config, d, "float32", on_gpu=True)
    return sum(sent.bytes for sent in step_sent(work, place.shards, place.replicas, listed))


def difference(losses: list[float], one: list[float]) -> float:
    """Largest relative difference; infinite where either is not finite."""
    a, b = (torch.tensor(of, dtype=torch.float64) for of in (losses, one))
    if not bool((a.isfinite() & b.isfinite()).all()):
        return float("inf")
    return float(((a - b).abs() / b.abs().clamp_min(1e-300)).where(a != b, 0.0).max())


def _row(run: _Run, place: _Place, found: list[_Found], one: _Found | None) -> dict[str, Any]:
    """A place's row of the table."""
    first = found[0]
    ms = statistics.median(max(times) for times in zip(*(f.blocks_ms for f in found), strict=True))
    row: dict[str, Any] = {"where": str(place), "ms": ms}
    if one is not None or place == (1, 1):
        row["x one"] = ms / statistics.median((one or first).blocks_ms)
    row |= {"step": first.kind, "eager": first.sent.ms, "compute": first.sent.compute_ms}
    row["wire"] = first.sent.ms - first.sent.compute_ms
    row["peak GiB"] = max(f.peak_gib for f in found)
    row["sent MB"] = first.sent.bytes / 1e6
    if place.replicas * place.shards > 1:
        formula = formula_bytes(run.shape, place, run.dead, run.device.type != "cuda")
        row |= {"formula MB": formula / 1e6, "diff %": 100 * (first.sent.bytes / formula - 1)}
        if one is not None and not run.weak:
            row["losses"] = f"{max(difference(f.losses, one.losses) for f in found):.1e}"
    if any(f.woken for f in found):
        row["remark"] = f"{sum(f.woken for f in found)} dead latents fired"
    return row


def _shape_rows(
    run: _Run, name: str, places: list[_Place]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A shape's rows, and those of its collectives. Collective."""
    rows: list[dict[str, Any]] = []
    wire: list[dict[str, Any]] = []
    one: _Found | None = None
    for place in places:
        here = run.at(place)
        found, remark = _measured(here, place)
        if found:
            rows.append(_row(here, place, found, one))
            wire += [
                {
                    "where": str(place),
                    "collective": c.what,
                    "calls": c.calls,
                    "KB": c.bytes / 1e3,
                    "ms": c.ms,
                }
                for c in found[0].sent.collectives
            ]
            if place == (1, 1):
                one = found[0]
        else:
            rows.append({"where": str(place), "ms": float("nan"), "remark": remark})
        if _rank() == 0:
            # At once: a run that is cut short has told what it measured.
            print(f"{name}, {place}: {rows[-1]['ms']:.3f} ms {remark}", flush=True)
    return rows, wire


def _places(meshes: list[str] | None) -> list[_Place]:
    """One process, then those asked for as RxP, or the usual ones."""
    world = _world()
    wanted = [_Place(1, world), _Place(world, 1)] if world > 1 else []
    if world >= 4:
        wanted.append(_Place(world // 2, 2))
    if meshes:
        wanted = []
        for mesh in meshes:
            replicas, _, shards = mesh.partition("x")
            if not (replicas.isdecimal() and shards.isdecimal()):
                raise typer.BadParameter(f"--mesh {mesh} is no mesh; give RxP such as 1x2")
            wanted.append(_Place(int(replicas), int(shards)))
    return list(dict.fromkeys([_Place(1, 1), *wanted]))


def _bench(runs: dict[str, _Run], places: list[_Place], json: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    wire: list[dict[str, Any]] = []
    for name, run in runs.items():
        found, sent = _shape_rows(run, name, places)
        if _rank():
            continue
        dead = f", {run.dead:g} of the latents dead" if run.dead else ""
        print_table(f"One SAE on several: {name}{dead}", found, width=150)
        if sent:
            print_table(f"Collectives of an eager step: {name}{dead}", sent)
        rows += [{"shape": name, "dead": run.dead, **row} for row in found]
        wire += [{"shape": name, "dead": run.dead, **row} for row in sent]
        if json is not None:
            write_json(json, "One SAE on several", rows, collectives=wire)


@app.command()
def shards(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join([*SHAPES, *MORE_SHAPES])}, or nN-dD-fF-kK."),
    ] = None,
    dead: Annotated[float, typer.Option(help="Share of the latents that are dead.")] = 0.0,
    dead_latents: Annotated[str, typer.Option(help="auxk or ghost.")] = "auxk",
    mesh: Annotated[
        list[str] | None, typer.Option(help="Replicas x shards, such as 1x2; else all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a timed block.")] = 30,
    blocks: Annotated[int, typer.Option(help="Timed blocks.")] = 5,
    weak: Annotated[
        bool, typer.Option(help="As many latents a shard as the shape has, not in all.")
    ] = False,
    cpu: Annotated[bool, typer.Option(help="On CPUs through gloo, in float64.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the tables here, too.")] = None,
) -> None:
    """One SAE's step on several GPUs beside one."""
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    options: dict[str, Any] = {"precision": "float64"} if cpu else {}
    if dead:
        options["dead_latents"] = dead_latents
    names = shape or (["tiny"] if cpu else list(DEFAULT))
    sizes = {name: MORE_SHAPES.get(name) or shape_of(name) for name in names}
    try:
        with processes(Config(output=".")) as accelerator:
            device = torch.device(accelerator.device)
            runs = {
                name: _Run(size, device, steps, blocks, dead, options, weak)
                for name, size in sizes.items()
            }
            _bench(runs, _places(mesh), json)
    except BaseException:
        if not (dist.is_initialized() and dist.get_backend() == "nccl"):
            raise
        # At once: NCCL's end waits for the other processes, which may wait for this one.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    app(["shards", *sys.argv[1:]])
