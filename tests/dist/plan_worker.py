"""Worker: two ranks of a grid that see other things in its folders; returns plan or error."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file

from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.grid import plan
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.models.saved import WEIGHTS_FILE
from flash_sae_dist.parallel.mesh import make_mesh
from flash_sae_dist.training import made_of
from flash_sae_dist.training.job import Config, load_config
from flash_sae_dist.training.records import Job
from tests.dist.ranks import worker

ERRORS = {
    "ConfigError": ConfigError("a mistake"),
    "UserError": UserError("it is damaged"),
    "OSError": OSError("disk lost"),
    "RuntimeError": RuntimeError("a bug"),
}


def run(config: str, case: str) -> Any:
    """The second rank sees every SAE finished, the first none, or it meets an error."""
    rank, device = dist.get_rank(), torch.device("cpu")

    def is_finished(job: Job) -> bool:
        if case != "finished":
            raise ERRORS[case]
        return rank == 1

    if case == "auto":
        return _auto(load_config(config, ["train.num_shards=auto"]))
    plan.is_finished = is_finished
    mesh = make_mesh(1, 1, device=device, several_groups=True)
    try:
        cfg = load_config(config)
        store = ActivationStore.open(cfg.store_path())
        made = plan.agreed_plan(cfg, store, mesh, device, grid=True)
    except Exception as e:
        return [type(e).__name__, str(e)]
    groups = [[job.name for bundle in group for job in bundle.jobs] for group in made.groups]
    return [sorted(made.unfinished), groups]


def _auto(config: Config) -> list[Any]:
    """Trains on the mesh that is found; what it was, the job's digest, its weights."""
    found = plan.with_mesh(config, torch.device("cpu"), dist.get_world_size(), grid=False)
    (job,) = run_jobs(config, Accelerator(cpu=True), grid=False)
    record = made_of.read(job.folder)
    assert found.train is not None
    assert record is not None
    weights = load_file(job.folder / "sae" / WEIGHTS_FILE)
    return [found.train.num_shards, found.train.num_replicas, record["digest"], weights["W_dec"]]


if __name__ == "__main__":
    worker(run)
