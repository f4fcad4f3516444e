"""Decoder and whole training step, timed beside other implementations in the same run.

    python -m flash_sae_dist.launch.bench_step decode [--shape gpt2] [--json FILE]
    python -m flash_sae_dist.launch.bench_step step

fp32 master weights, bf16 compute; medians of CUDA event times of the device alone, as in a loop
that keeps it busy, L2 emptied before each. Peers are dense PyTorch (eager and
compiled), sparsify where it is installed, and a Triton decoder in the style of OpenAI's
sparse_autoencoder (bench_openai.py); all train with fused Adam, remove the gradient along decoder
rows and renormalise them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..kernels import ops
from ..models.dead_latents import DeadLatents
from ..models.losses import fvu_loss, total_variance
from ..models.topk import TopKSAE
from ..parallel.mesh import Mesh
from ..training.fused_step import FusedStep
from ..training.optim import project_decoder_grad_, renormalise_decoder_
from ..training.sparse_adam import SparseAdam
from .bench_timing import host_ms, kernel_us, median_ms, print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

SHAPES = {  # N, D, F, k
    "seed": (1024, 4096, 65536, 64),
    "gpt2": (4096, 768, 24576, 32),
    "wide": (8192, 4096, 131072, 64),
}
LR = 1e-4
ShapeOption = Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}.")]
PeersOption = Annotated[str, typer.Option(help="Only rows whose name contains this word.")]
JsonOption = Annotated[Path | None, typer.Option(help="Write the table here, too.")]
Step = Callable[[], Any]


class _RandomSAE(TopKSAE):
    """Drawn on the device: a benchmark does not need weights that are the same on every mesh."""

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        self.W_dec.normal_()
        renormalise_decoder_(self)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()


def _batch(n: int, d: int) -> Tensor:
    return torch.randn(n, d, device="cuda")


def _autocast() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def _dense_step(shape: tuple[int, ...], compiled: bool) -> Step:
    n, d, f, k = shape
    sae = _RandomSAE(d, f, k, device="cuda")
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10, fused=True)
    x = _batch(n, d)

    def loss_of(x: Tensor) -> Tensor:
        pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc).relu()
        values, indices = pre.topk(k, dim=1)
        acts = torch.zeros_like(pre).scatter(1, indices, values)
        recon = acts @ sae.W_dec + sae.b_dec
        return (x - recon).float().square().sum() / (x - x.mean(0)).square().sum()

    loss_fn: Callable[[Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
    return _autograd_step(sae, optimizer, lambda: loss_fn(x))


def _autograd_step(
    sae: TopKSAE, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
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


def _plain_step(shape: tuple[int, ...]) -> Step:
    """Our kernels through autograd, any torch optimizer."""
    n, d, f, k = shape
    sae, x = _RandomSAE(d, f, k, device="cuda"), _batch(n, d)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10, fused=True)
    return _autograd_step(
        sae, optimizer, lambda: fvu_loss(x, sae(x).recon, total_variance(x, sae.mesh))
    )


def _openai_step(shape: tuple[int, ...]) -> Step:
    """Dense encoder with torch.topk, Triton gathers, sparse gradients with atomics, fused Adam."""
    from . import bench_openai

    n, d, f, k = shape
    sae, x = _RandomSAE(d, f, k, device="cuda"), _batch(n, d)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10, fused=True)

    def loss_of() -> Tensor:
        centred = (x - sae.b_dec).bfloat16()
        values, indices = bench_openai.encode(centred, sae.W_enc, sae.b_enc, k)
        recon = bench_openai.decode(values, indices, sae.W_dec.bfloat16()) + sae.b_dec
        return fvu_loss(x, recon, total_variance(x, sae.mesh))

    return _autograd_step(sae, optimizer, loss_of)


def _sparsify_step(shape: tuple[int, ...]) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    n, d, f, k = shape
    coder = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k), device="cuda")
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR, eps=6.25e-10, fused=True)
    x = _batch(n, d)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _fused_step(
    shape: tuple[int, ...],
    *,
    lazy: bool = False,
    moments: torch.dtype = torch.float32,
    everywhere: bool = False,
    graph: bool = True,
    dead: bool = False,
) -> Step:
    n, d, f, k = shape
    sae, x = _RandomSAE(d, f, k, device="cuda"), _batch(n, d)
    if everywhere:
        sae.b_enc.data[7] = 100.0
    counters = DeadLatents(f, 10_000_000, Mesh.single(), torch.device("cuda"))
    if dead:
        counters.tokens_since_fired[: f // 10] = 20_000_000
        counters.any_dead = True
        sae.b_enc.data[: f // 10] = -100.0
    optimizer = SparseAdam(sae, LR, lazy=lazy, moment_dtype=moments)
    step = FusedStep(sae, optimizer, counters, dead_latents="auxk" if dead else "none", graph=graph)
    return lambda: step(x)


STEPS: dict[str, Callable[[tuple[int, ...]], Step]] = {
    "dense PyTorch": lambda s: _dense_step(s, compiled=False),
    "dense PyTorch, compiled": lambda s: _dense_step(s, compiled=True),
    "sparsify, fused Adam": _sparsify_step,
    "OpenAI-style Triton, fused Adam": _openai_step,
    "ours, autograd and fused Adam": _plain_step,
    "ours, fused, exact": _fused_step,
    "ours, fused, exact, no graph": lambda s: _fused_step(s, graph=False),
    "ours, fused, one latent on every token": lambda s: _fused_step(s, everywhere=True),
    "ours, fused, AuxK with a tenth dead": lambda s: _fused_step(s, dead=True),
    "ours, fused, lazy": lambda s: _fused_step(s, lazy=True),
    "ours, fused, bf16 moments": lambda s: _fused_step(s, moments=torch.bfloat16),
    "ours, fused, lazy, bf16 moments": lambda s: _fused_step(s, lazy=True, moments=torch.bfloat16),
}


def _measure(make: Callable[[], Step], repeats: int) -> dict[str, float | str]:
    """Time and extra memory of one step; the first calls compile and warm up."""
    try:
        step = make()
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        step()
        return {"ms": median_ms(step, repeats, ahead=True), "extra MiB": extra}
    except (ImportError, RuntimeError, TypeError) as e:
        # A peer that is absent or does not fit is a row of the table, not the end of the run.
        return {"ms": float("nan"), "remark": f"{type(e).__name__}: {e}"[:80]}


@app.command()
def step(
    shape: ShapeOption = None,
    peers: PeersOption = "",
    kernels: Annotated[bool, typer.Option(help="List the fused step's kernels, too.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 20,
    json: JsonOption = None,
) -> None:
    """A whole training step: loss, gradients, Adam, unit-norm decoder."""
    rows: list[dict[str, Any]] = []
    for name in shape or list(SHAPES):
        if kernels:
            _show_kernels(f"Fused step, {name}", _fused_step(SHAPES[name], graph=False))
        for row, make in STEPS.items():
            if peers in row:
                result = _measure(lambda make=make, s=SHAPES[name]: make(s), repeats)  # type: ignore[misc]
                rows.append({"shape": name, "implementation": row, **result})
                gc.collect()
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    _show("Training step", rows, json)


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
    name: str, shape: tuple[int, ...], repeats: int, kernels: bool
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
    for name in shape or list(SHAPES):
        for row in DECODERS:
            if peers in row:
                result = _measure_decoder(row, SHAPES[name], repeats, kernels)
                rows.append({"shape": name, "implementation": row, **result})
                gc.collect()
                torch.cuda.empty_cache()
    _show("Decoder", rows, json)


if __name__ == "__main__":
    app()
