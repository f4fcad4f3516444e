"""The encoder timed beside the bare matmul and other encoders in the same run.

    python -m flash_sae_dist.launch.bench encode [--shape gpt2] [--json FILE]

bf16 inputs; medians of CUDA event times of the device alone, L2 emptied before each call. `matmul`
is cuBLAS's alone with its output written; the ratios are against it. `host ms` is what launching a
call costs the host: what a loop without a CUDA graph sees where it exceeds the device's time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from ..kernels import ops
from ..kernels.dispatch import implementation
from ..kernels.encode_plan import make_plan
from ..kernels.shapes import num_programs
from .bench_timing import host_ms, kernel_us, median_ms, print_table, write_json

SHAPES = {  # N, D, F, k
    "seed": (1024, 4096, 65536, 64),
    "gpt2": (4096, 768, 24576, 32),
    "wide": (8192, 4096, 131072, 64),
    "odd-2304": (777, 2304, 16384, 20),
    "odd-3584": (4096, 3584, 100_000, 100),
    "odd-5120": (2048, 5120, 1_048_576, 64),
    "odd-16384": (16384, 2304, 16384, 20),
    "k-256": (4096, 2304, 65536, 256),
    "few-128": (128, 4096, 65536, 64),
    "few-190": (190, 4096, 65536, 64),
    "few-512": (512, 2304, 16384, 20),
    "few-gpt2": (512, 768, 24576, 32),
}
DATA = ("normal", "trained", "heavy", "sorted", "equal", "group")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _several() -> None:
    """Kernels beside their peers."""


def _shape(name: str) -> tuple[int, int, int, int]:
    """N, D, F, k of a named shape, or as given. Raises typer.BadParameter for anything else."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        n, d, f, k = (int(size) for size in name.split(","))
    except ValueError:
        n = d = f = k = 0
    if min(n, d, f, k) < 1 or k > f:
        raise typer.BadParameter(
            f"--shape {name} is no shape; give one of {', '.join(SHAPES)}, or N,D,F,k such as "
            "900,2304,16384,20"
        )
    return n, d, f, k


def _inputs(shape: tuple[int, int, int, int], data: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc whose activations are distributed as `data` says."""
    n, d, f, _ = shape
    x = torch.randn(n, d, device="cuda").bfloat16()
    W = (torch.randn(f, d, device="cuda", dtype=torch.bfloat16) / d**0.5).bfloat16()
    b = 0.1 * torch.randn(f, device="cuda")
    if data == "heavy":
        W *= 1 / torch.randn(f, 1, device="cuda").abs().clamp_min(1e-2).bfloat16()
    elif data == "trained":
        # As in an SAE on a language model: some hundred of a row's activations are positive.
        x *= torch.exp(0.25 * torch.randn(n, 1, device="cuda")).bfloat16()
        b -= 2.6
    elif data == "sorted":
        b = torch.linspace(0, 100, f, device="cuda")
    elif data == "equal":
        W.zero_()
        b.fill_(1.0)
    elif data == "group":
        b[f // 2 : f // 2 + 64] += 50
    return x, W, b


def _peers(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Callable[[], Any]]:
    bias = b.bfloat16()
    peers: dict[str, Callable[[], Any]] = {
        "linear + relu + topk": lambda: F.linear(x, W, bias).relu().topk(k, dim=1)
    }
    try:
        from sparsify.fused_encoder import fused_encoder
    except ImportError:
        return peers
    peers["sparsify"] = lambda: fused_encoder(x, W, bias, k, "topk")
    return peers


def _of_a_batch(
    x: Tensor, W: Tensor, b: Tensor, k: int, peers: bool
) -> dict[str, Callable[[], Any]]:
    """The N k largest of all tokens, and all above their least."""
    found = ops.batch_topk_encode(x, W, b, k)
    least, bias = found.values[found.values > 0].min(), b.bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "ours, batch rule": lambda: ops.batch_topk_encode(x, W, b, k),
        "ours, threshold": lambda: ops.threshold_encode(x, W, b, least, 2 * len(x) * k),
    }
    if peers:
        calls["linear + relu + topk of all"] = lambda: (
            F.linear(x, W, bias).relu().flatten().topk(len(x) * k, sorted=False)
        )
    return calls


def _plain(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The filter for GPUs of any kind, where it takes the inputs."""
    from ..kernels import encode

    if (plan := make_plan(*x.shape, W.shape[0], k, num_programs(x.device))) is None:
        return {}
    return {"ours, plain filter": lambda: encode.run("plain", plan, x, W, b, k)}


def _fp8(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The search by e4m3 products, from W_enc and from its e4m3 copy alone."""
    rows, scale = implementation("quantise_rows", W)(W)
    search = implementation("fp8_topk_encode", W)
    return {
        "ours, fp8 search": lambda: search(x, W, b, k),
        "ours, quantized": lambda: search(x, rows, b, k, scale),
    }


def _found(call: Callable[[], Any], latents: Tensor) -> float:
    """The share of the exact selection that a search's has."""
    own = call()[1].long()
    hits = [
        (part[:, :, None] == want[:, None]).any(1).sum()
        for part, want in zip(torch.split(own, 256), torch.split(latents.long(), 256), strict=True)
    ]
    return float(torch.stack(hits).sum()) / latents.numel()


def _extra_mib(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@app.command()
def encode(
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}; or N,D,F,k.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(DATA)}.")] = None,
    peers: Annotated[bool, typer.Option(help="Time other encoders, too.")] = True,
    batch: Annotated[
        bool, typer.Option(help="Time the batch rule and the threshold rule, too.")
    ] = False,
    plain: Annotated[bool, typer.Option(help="Time the filter for other GPUs, too.")] = False,
    fp8: Annotated[
        bool, typer.Option(help="Time the search by fp8, too, and count what of the k it finds.")
    ] = False,
    kernels: Annotated[bool, typer.Option(help="List the kernels of ours, too.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls.")] = 20,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """Encoder and top-k: ours, the bare matmul, other encoders."""
    table: list[dict[str, Any]] = []
    shapes = {name: _shape(name) for name in shape or list(SHAPES)[:3]}
    for name, (n, _, f, k) in shapes.items():
        for kind in data or ["normal"]:
            x, W, b = _inputs(shapes[name], kind)
            out = torch.empty(n, f, device="cuda", dtype=torch.bfloat16)
            bare = median_ms(
                lambda x=x, W=W, out=out: torch.mm(x, W.T, out=out),  # type: ignore[misc]
                repeats,
                ahead=True,
            )
            del out
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda x=x, W=W, b=b, k=k: ops.topk_encode(x, W, b, k)  # type: ignore[misc]
            }
            if batch:
                calls |= _of_a_batch(x, W, b, k, peers)
            if plain:
                calls |= _plain(x, W, b, k)
            searches = _fp8(x, W, b, k) if fp8 else {}
            calls |= searches
            if peers:
                calls |= _peers(x, W, b, k)
            table.append({"shape": name, "data": kind, "what": "matmul", "ms": bare, "ratio": 1.0})
            for what, call in calls.items():
                ms = median_ms(call, repeats, ahead=True)
                row = {"shape": name, "data": kind, "what": what, "ms": ms, "ratio": ms / bare}
                table.append({**row, "host ms": host_ms(call), "extra MiB": _extra_mib(call)})
                if what in searches:
                    table[-1]["found"] = _found(call, calls["ours"]().latents)
                if kernels and what.startswith("ours"):
                    rows = [{"kernel": n[:60], "us": us} for n, us in kernel_us(call).items()]
                    print_table(f"{what}, {name}, {kind}", rows)
    print_table("Encoder", table)
    if json is not None:
        write_json(json, "encode", table)


if __name__ == "__main__":
    app()
