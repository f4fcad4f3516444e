"""Decoder and whole training step, timed beside other implementations in the same run.

    python -m flash_sae_dist.launch.bench_step decode [--shape gpt2] [--json FILE]
    python -m flash_sae_dist.launch.bench_step step [--peers ours] [--against CHECKOUT]

fp32 master weights, bf16 compute; medians of CUDA event times of the device alone, as in a loop
that keeps it busy, L2 emptied before each: of a graph's replay where a step is captured. Peers are
dense PyTorch (eager and compiled), sparsify where it is installed, and a Triton decoder in the
style of OpenAI's sparse_autoencoder (bench_openai.py); all train with fused Adam, remove the
gradient along decoder rows and renormalise them. By architecture: SAELens's training classes and
sparsify's transcoders, where they are installed (`--peers "'s "`; bench_peers.py).

`x exact`: beside the row "ours, fused, exact" of the same run. `x ours`: a peer beside ours of its
architecture. `extra MiB`: most allocated in an
eager step above what is allocated between steps; `more`: less the exact row's. `graph MiB`: what
is reserved but not allocated once a step is captured: the graph's pool, held between steps.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..kernels import ops
from ..training.optim import project_decoder_grad_, renormalise_decoder_
from .bench_against import compare
from .bench_peers import BY_ARCHITECTURE, Step, fused_adam, sparsify_step
from .bench_timing import host_ms, kernel_us, median_ms, print_table, write_json
from .bench_training import SHAPES, OurStep, Shape, no_graph_, random_sae, shape_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ShapeOption = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}, or nN-dD-fF-kK.")
]
PeersOption = Annotated[
    str,
    typer.Option(
        help="Only rows whose name contains this; of another library's class (SAELens's, "
        "sparsify's) also the row of ours of its architecture. `'s ` means all of these."
    ),
]
JsonOption = Annotated[Path | None, typer.Option(help="Write the table here, too.")]


def _batch(n: int, d: int) -> Tensor:
    return torch.randn(n, d, device="cuda")


def _autocast() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def _dense_step(shape: Shape, compiled: bool) -> Step:
    n, d, f, k = shape
    sae = random_sae(shape)
    optimizer, x = fused_adam(sae), _batch(n, d)

    def loss_of(x: Tensor) -> Tensor:
        pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc).relu()
        values, indices = pre.topk(k, dim=1)
        acts = torch.zeros_like(pre).scatter(1, indices, values)
        recon = acts @ sae.W_dec + sae.b_dec
        return (x - recon).float().square().sum() / (x - x.mean(0)).square().sum()

    loss_fn: Callable[[Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
    return _autograd_step(sae, optimizer, lambda: loss_fn(x))


def _autograd_step(
    sae: Any, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
) -> Step:
    def step() -> None:
        with _autocast():
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        project_decoder_grad_(sae)
        optimizer.step()
        renormalise_decoder_(sae)
        # At the end, so that dense gradients count as a step's memory.
        optimizer.zero_grad(set_to_none=True)

    return step


def _openai_step(shape: Shape) -> Step:
    """Dense encoder with torch.topk, Triton gathers, sparse gradients with atomics, fused Adam."""
    from . import bench_openai

    n, d, f, k = shape
    sae, x = random_sae(shape), _batch(n, d)
    optimizer = fused_adam(sae)

    def loss_of() -> Tensor:
        centred = (x - sae.b_dec).bfloat16()
        values, indices = bench_openai.encode(centred, sae.W_enc, sae.b_enc, k)
        recon = bench_openai.decode(values, indices, sae.W_dec.bfloat16()) + sae.b_dec
        return (x - recon).square().sum() / (x - x.mean(0)).square().sum()

    return _autograd_step(sae, optimizer, loss_of)


def _fused_step(shape: Shape) -> OurStep:
    """The exact step; bench_against.py times what bears this name in other checkouts."""
    return OurStep(shape)


PEERS: dict[str, Callable[[Shape], Step]] = {
    "dense PyTorch": lambda s: _dense_step(s, compiled=False),
    "dense PyTorch, compiled": lambda s: _dense_step(s, compiled=True),
    "sparsify, fused Adam": sparsify_step,
    "OpenAI-style Triton, fused Adam": _openai_step,
    **{name: make for name, (_, make) in BY_ARCHITECTURE.items()},
}
EXACT = "ours, fused, exact"
_BF16: dict[str, Any] = {"moment_dtype": "bfloat16"}
OURS: dict[str, dict[str, Any]] = {  # options of OurStep
    EXACT: {},
    "ours, fused, exact, no graph": {"graph": False},
    "ours, fused, one latent on every token": {"everywhere": True},
    "ours, fused, fp8 search": {"search": "fp8"},
    "ours, fused, lazy": {"adam_mode": "lazy"},
    "ours, fused, bf16 moments": _BF16,
    "ours, fused, lazy, bf16 moments": {"adam_mode": "lazy"} | _BF16,
    "ours, clipped to norm 1": {"grad_clip": 1.0},
    "ours, 4 micro-batches": {"micro_batches": 4},
    **{
        f"ours, {kind}, {share} dead": {"dead_latents": option, "dead": dead}
        for kind, option in (("AuxK", "auxk"), ("ghost", "ghost"))
        for share, dead in (("a tenth", 0.1), ("a third", 1 / 3), ("nine tenths", 0.9))
    },
    "ours, autograd and fused Adam": {"engine": "autograd"},
    **{
        f"ours, {name}": {"architecture": key}
        for name, key in (
            ("BatchTopK", "batch_topk"),
            ("Matryoshka", "matryoshka"),
            ("JumpReLU, mean L0 64", "jumprelu"),
            ("ReLU, mean L0 64", "relu"),
            ("Gated, mean L0 64", "gated"),
        )
    },
    "ours, transcoder": {"transcodes": True},
    "ours, skip transcoder": {"transcodes": True, "skip": True},
}


def _extra_mib(step: Step) -> float:
    """Most allocated in an eager step above what is allocated between steps."""
    if isinstance(step, OurStep):
        no_graph_(step.training)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def _measure(make: Callable[[], Step], repeats: int) -> dict[str, Any]:
    """Time and memory of one step; the first calls compile, warm up and capture."""
    try:
        step = make()
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 2**20
        found: dict[str, Any] = {"ms": median_ms(step, repeats, ahead=True)}
        about = step.about() if isinstance(step, OurStep) else {}
        found["extra MiB"] = _extra_mib(step)
        if about.get("step") == "graph":
            found["graph MiB"] = held
        return found | about
    except Exception as e:
        # A peer that is absent, or what does not fit, is a row of the table, not the run's end.
        if not isinstance(e, (ImportError, torch.OutOfMemoryError)):
            traceback.print_exc()
        return {"ms": float("nan"), "remark": f"{type(e).__name__}: {e}"[:80]}


def _chosen(word: str) -> list[str]:
    """Rows of ours to time: the exact one, those whose name contains the word, and those of the
    architectures of other libraries' classes whose name does.
    """
    beside = {ours for peer, (ours, _) in BY_ARCHITECTURE.items() if word in peer}
    return [name for name in OURS if name == EXACT or word in name or name in beside]


def _rows(shape: Shape, word: str, repeats: int) -> list[dict[str, Any]]:
    """Rows whose name contains the word, ours beside the exact one, which is always among them."""
    rows: list[dict[str, Any]] = []
    exact: dict[str, Any] = {}
    ours: dict[str, float] = {}
    for name in _chosen(word):
        found = _alone(lambda o=OURS[name]: OurStep(shape, **o), repeats)  # type: ignore[misc]
        exact, ours[name] = exact or found, found["ms"]
        row: dict[str, Any] = {"implementation": name, "ms": found["ms"]}
        row["x exact"] = found["ms"] / exact["ms"]
        if "extra MiB" in found and "extra MiB" in exact:
            row |= {"extra MiB": 0.0, "more": found["extra MiB"] - exact["extra MiB"]}
        rows.append(row | found)
    for name, make in PEERS.items():
        if word in name:
            found = _alone(lambda m=make: m(shape), repeats)  # type: ignore[misc]
            beside = BY_ARCHITECTURE[name][0] if name in BY_ARCHITECTURE else EXACT
            row = {"implementation": name, "ms": found["ms"], "x ours": found["ms"] / ours[beside]}
            rows.append(row | found)
    return rows


def _alone(make: Callable[[], Step], repeats: int) -> dict[str, Any]:
    """`_measure`, and then all memory is free again."""
    found = _measure(make, repeats)
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return found


@app.command()
def step(
    shape: ShapeOption = None,
    peers: PeersOption = "",
    kernels: Annotated[
        bool, typer.Option(help="List the kernels of each row of ours, too, without a graph.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Another checkout, whose fused step is timed in turns.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 20,
    json: JsonOption = None,
) -> None:
    """A whole training step: loss, gradients, Adam, unit-norm decoder."""
    rows: list[dict[str, Any]] = []
    shapes = {name: shape_of(name) for name in shape or list(SHAPES)}
    for name, sizes in shapes.items():
        for row, options in OURS.items() if kernels else ():
            if peers in row:
                _show_kernels(f"{row}, {name}", OurStep(sizes, **options | {"graph": False}))
        found = _rows(sizes, peers, repeats)
        print_table(f"Training step, {name}", found, width=140)
        rows += [{"shape": name, **row} for row in found]
        if json is not None:
            # After each shape: a run that is cut short has what it measured.
            write_json(json, "Training step", rows)
    if against is not None:
        beside = compare(shapes, against, repeats)
        _show(f"Fused step, exact, beside {against}", beside, None)
        if json is not None:
            write_json(json, "Training step", rows, against=beside)


def _show_kernels(title: str, call: Callable[[], Any]) -> None:
    print_table(title, [{"kernel": n[:60], "us": us} for n, us in kernel_us(call).items()])


def _show(title: str, rows: list[dict[str, Any]], json: Path | None) -> None:
    print_table(title, rows)
    if json is not None:
        write_json(json, title, rows)


Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dense_decode(acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
    dense = acts.new_zeros(acts.shape[0], W_dec.shape[0]).scatter(1, idx, acts)
    return dense @ W_dec


def _decoder(name: str) -> Decoder:
    if name == "dense PyTorch":
        return _dense_decode
    if name == "dense PyTorch, compiled":
        return torch.compile(_dense_decode)
    if name == "sparsify":
        from sparsify.xformers import xformers_embedding_bag

        return lambda acts, idx, W: xformers_embedding_bag(idx, W, acts)
    if name == "OpenAI-style Triton":
        from . import bench_openai

        return bench_openai.decode
    return ops.sparse_decode


DECODERS = (
    "dense PyTorch",
    "dense PyTorch, compiled",
    "sparsify",
    "OpenAI-style Triton",
    "ours",
)


def _measure_decoder(
    name: str, shape: Shape, repeats: int, kernels: bool
) -> dict[str, float | str]:
    n, d, f, k = shape
    gen = torch.Generator("cuda").manual_seed(0)
    idx = torch.stack([torch.randperm(f, generator=gen, device="cuda")[:k] for _ in range(n)])
    acts = torch.rand(n, k, generator=gen, device="cuda").bfloat16().requires_grad_()
    W_dec = nn.Parameter(torch.randn(f, d, generator=gen, device="cuda").bfloat16())
    grad = torch.randn(n, d, generator=gen, device="cuda").bfloat16()
    try:
        decode = _decoder(name)

        def both() -> None:
            acts.grad = W_dec.grad = None
            decode(acts, idx, W_dec).backward(grad)  # type: ignore[no-untyped-call]

        with torch.no_grad():
            forward = median_ms(lambda: decode(acts, idx, W_dec), repeats, ahead=True)
        whole = median_ms(both, repeats, ahead=True)
        if kernels:
            _show_kernels(f"Decoder forward + backward, {name}, {shape}", both)
        return {
            "forward ms": forward,
            "forward+backward ms": whole,
            "launching both takes the host ms": host_ms(both),
        }
    except (ImportError, RuntimeError, TypeError) as e:
        return {"forward ms": float("nan"), "remark": f"{type(e).__name__}: {e}"[:80]}


@app.command()
def decode(
    shape: ShapeOption = None,
    peers: PeersOption = "",
    kernels: Annotated[bool, typer.Option(help="List each one's kernels, too.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls.")] = 20,
    json: JsonOption = None,
) -> None:
    """The decoder alone, bf16 weights: forward, and forward with dense gradients written."""
    rows: list[dict[str, Any]] = []
    for name in shape or list(SHAPES)[:3]:
        for row in DECODERS:
            if peers in row:
                result = _measure_decoder(row, shape_of(name), repeats, kernels)
                rows.append({"shape": name, "implementation": row, **result})
                gc.collect()
                torch.cuda.empty_cache()
    _show("Decoder", rows, json)


if __name__ == "__main__":
    app()
