"""`cache`: a language model's activations, once, into the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Run text through a language model and store its activations at many hookpoints.

    Each process writes its own shards. Run again after an interruption, it goes on with the shards
    that are not recorded; run on a finished store, it makes again what was lost or cut short since
    (`flash-sae verify STORE` compares all data with their checksums). Reads the
    sections model, text and cache.

    flash-sae cache configs/gpt2-small.yaml cache.num_tokens=1000000

    accelerate launch -m flash_sae_dist.launch.cache configs/gpt2-small.yaml
    """
    from ..activations.harvest import run_cache
    from ..parallel.mesh import with_index
    from ..planner.caching import check_launch

    config.need("model", "text", "cache", verb="cache")
    with processes(config) as accelerator:
        check_launch(config, with_index(accelerator.device), accelerator.num_processes)
        run_cache(config, accelerator)


if __name__ == "__main__":
    verb_main(run)
