"""Losses and gradients of sparsify's SparseCoder: `python -m tests.peers.of_sparsify`."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tests.peers import case

_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}


def run(given: dict[str, Tensor], *, dead: bool, target: str | None, **config: Any) -> Any:
    """One forward and backward pass; the sums are the trainer's, its alpha 1/32."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(
        case.D, SparseCoderConfig(num_latents=case.F, k=case.K, **config), dtype=torch.float64
    )
    with torch.no_grad():
        for name, param in sae.named_parameters():
            param.copy_(given[_NAMES.get(name, name)])
    out = sae(
        given["x"],
        None if target is None else given[target],
        dead_mask=given["dead"] if dead else None,
    )
    (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
    found = {"fvu": out.fvu, "auxk": out.auxk_loss, "multi_topk": out.multi_topk_fvu}
    for name, param in sae.named_parameters():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        found[f"grad.{_NAMES.get(name, name)}"] = grad
    return found


def cases() -> dict[str, dict[str, Tensor]]:
    """TopK with and without AuxK, MultiTopK, transcoders with and without a skip connection."""
    given = case.make()
    return {
        "topk": run(given, dead=False, target=None),
        "topk_aux": run(given, dead=True, target=None),
        "multi_topk": run(given, dead=False, target=None, multi_topk=True),
        "transcoder": run(given, dead=False, target="y", transcode=True),
        "skip_transcoder": run(given, dead=False, target="y", transcode=True, skip_connection=True),
    }


if __name__ == "__main__":
    # Read when the library is imported: without a GPU its Triton decoder does not run.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    case.keep("sparsify", cases(), version("eai-sparsify"))
