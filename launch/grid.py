"""`grid`: many SAEs, hookpoints x hyperparameters, from one store or one running model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Train an SAE for every hookpoint and every combination of grid.values, concurrently.

    SAEs of one hookpoint share each batch that is read, those of all hookpoints each forward pass
    where train.source=stream runs the model meanwhile; groups of train.num_shards x
    train.num_replicas processes take them longest first. Run again, it goes on with what is
    unfinished. grid.points, grid.exclude and grid.overrides say which combinations there are
    beside; a line a job is shown meanwhile, and report.html, results.csv and results.json are left
    in output.

    flash-sae grid configs/quickstart.yaml "grid.values={sae.k: [16, 32, 64]}"

    flash-sae grid configs/quickstart.yaml "grid.values={sae.architecture: [topk, batch_topk]}"

    accelerate launch -m flash_sae_dist.launch.grid configs/gemma-2-2b-grid.yaml
    """
    from ..grid.runner import run_jobs

    with processes(config, trackers=True) as accelerator:
        run_jobs(config, accelerator, grid=True)


if __name__ == "__main__":
    verb_main(run)
