"""Worker: leaves the processes of a verb; the first is slow to finish its part."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flash_sae_dist.config_file import load_config
from flash_sae_dist.launch.entry import processes
from tests.dist.ranks import worker


def run(config: str) -> dict[str, float]:
    written = 0.0
    with processes(load_config(config, [])) as accelerator:
        if accelerator.is_main_process:
            time.sleep(2)
            written = time.time()
    return {"written": written, "left": time.time()}


if __name__ == "__main__":
    worker(run)
