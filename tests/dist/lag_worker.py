"""Worker: the second rank sees a store's folder two seconds later than the first."""

from __future__ import annotations

import os
import time

import torch.distributed as dist

from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.parallel import agree
from tests.dist.ranks import worker


def run(path: str, link: str) -> int:
    """The store's rows."""
    began = time.monotonic()

    def look() -> ActivationStore:
        if time.monotonic() - began > 2 and not os.path.lexists(link):
            os.symlink(path, link)
        return ActivationStore.open(path if dist.get_rank() == 0 else link)

    return agree.after_first(look).rows


if __name__ == "__main__":
    worker(run)
