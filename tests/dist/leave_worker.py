"""Worker: leaves the processes of a verb; the first is slow to finish its part."""

from __future__ import annotations

import time
from pathlib import Path

from flash_sae_dist.launch.entry import processes
from flash_sae_dist.parallel.mesh import make_mesh
from flash_sae_dist.training.job import load_config
from tests.dist.ranks import worker


def gloo_threads() -> int:
    """How many threads of process groups this process has, by Linux's names for them."""
    names = [p.read_text() for p in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def run(config: str) -> dict[str, float]:
    written = 0.0
    with processes(load_config(config, [])) as accelerator:
        make_mesh(None, 1, device=accelerator.device)
        up = gloo_threads()
        if accelerator.is_main_process:
            time.sleep(2)
            written = time.time()
    return {"written": written, "left": time.time(), "up": up, "left_up": gloo_threads()}


if __name__ == "__main__":
    worker(run)
