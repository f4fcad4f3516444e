"""A verb whose second process fails while the first waits for it in a collective."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flash_sae_dist.launch.entry import processes, verb_main
from flash_sae_dist.training.job import Config


def run(config: Config) -> None:
    """Fail."""
    with processes(config) as accelerator:
        if accelerator.process_index == 1:
            raise RuntimeError("the second's mistake")
        x = torch.ones(1, device=accelerator.device)
        dist.all_reduce(x)
        float(x)


if __name__ == "__main__":
    verb_main(run)
