"""Worker: two ranks choose their encoder's design; returns what became of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from flash_sae_dist.kernels import encode_choice, encode_topk
from flash_sae_dist.parallel.mesh import make_mesh
from flash_sae_dist.training import tuning
from tests.dist.ranks import worker


def run(case: str) -> str:
    """The first rank alone measures: it finds tiles, or fails."""
    mesh = make_mesh(None, 1, device=torch.device("cpu"))
    shape = encode_choice.Shape(128, 64, 4096, 8, "bfloat16")

    def tune(*args: Any) -> tuple[encode_choice.Shape, str]:
        assert dist.get_rank() == 0
        if case == "no memory":
            raise torch.OutOfMemoryError
        if case == "fails":
            raise ValueError("a mistake")
        return shape, "tiles"

    encode_topk.tune = tune
    tuning.use_kernels = lambda like: True
    x, W_enc, b_enc = torch.zeros(128, 64), torch.zeros(4096, 64), torch.zeros(4096)
    try:
        tuning.tune_encoder(x, W_enc, b_enc, 8, torch.bfloat16, mesh)
    except ValueError as e:
        return str(e)
    designs = dict.fromkeys(("fused", "tiles", "library"), lambda: None)
    return encode_choice.pick(shape, designs)  # type: ignore[arg-type]


if __name__ == "__main__":
    worker(run)
