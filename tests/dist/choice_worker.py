"""Worker: each rank found another design for its encoder; returns which it uses."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from flash_sae_dist.kernels import encode_choice
from flash_sae_dist.parallel.mesh import make_mesh
from flash_sae_dist.training.tuning import agree
from tests.dist.ranks import worker


def run() -> str:
    mesh = make_mesh(None, 1, device=torch.device("cpu"))
    shape = encode_choice.Shape(128, 64, 4096, 8, "bfloat16")
    agree((shape, ("tiles", "library")[dist.get_rank()]), mesh)
    designs = dict.fromkeys(("fused", "tiles", "library"), lambda: None)
    return encode_choice.pick(shape, designs)  # type: ignore[arg-type]


if __name__ == "__main__":
    worker(run)
