"""Worker: trains an SAE as `train` does on the GPUs of a launch; returns what each process's took,
beside what the planner says.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.launch.bench_cache import make_model, make_text
from flash_sae_dist.launch.bench_stream import OneHookpoint
from flash_sae_dist.launch.bench_training import _DEAD_SCALE, _local, _with_dead, dead_latents
from flash_sae_dist.parallel.mesh import end_groups
from flash_sae_dist.planner.devices import Launch, launch_here, memory_of
from flash_sae_dist.planner.memory import memory_of_rank, work_of
from flash_sae_dist.planner.streaming import stream_plan
from flash_sae_dist.planner.timing import step_time
from flash_sae_dist.training.job import Config, parse_config
from flash_sae_dist.training.metrics import read_metrics
from flash_sae_dist.training.step import SAETraining


def train(config: Config, accelerator: Accelerator, share: float) -> tuple[float, int]:
    """Milliseconds of a step and the dead latents that were listed in the end."""
    made: list[SAETraining] = []
    usual = SAETraining.__init__
    assert config.sae is not None
    mask = dead_latents(config.sae.width(1), share) if share else None

    def init(self: SAETraining, *args: Any, **kwargs: Any) -> None:
        usual(self, *args, **kwargs)
        made.append(self)
        if mask is not None:
            self.dead.tokens_since_fired.masked_fill_(_local(mask, self.sae), 10**12)

    with patch.object(SAETraining, "__init__", init), _with_dead(_DEAD_SCALE, mask):
        (job,) = run_jobs(config, accelerator, grid=False)
    lines = read_metrics(job.folder / "metrics.jsonl")
    assert config.train is not None
    # Behind the first half kernels are compiled, graphs captured, dead latents listed. A stream's
    # model runs in some windows and not in others: their mean.
    seconds = [1 / line["tokens_per_s"] for line in lines[len(lines) // 2 :]]
    ms = 1e3 * config.train.batch_tokens * statistics.mean(seconds)
    return ms, made[0].dead.num_listed


def planned(config: Config, launch: Launch, share: float) -> dict[str, float]:
    """Bytes of a process and milliseconds of a step by the planner's account."""
    assert config.train is not None
    replicas = config.train.num_replicas
    if config.train.source == "stream":
        assert config.cache is not None
        found = stream_plan(config, launch)
        (width,) = found.widths.values()
        work = work_of("x", config, width, found.dtype, on_gpu=launch.on_gpu)
        work = found.beside(work, config.cache)
    else:
        store = ActivationStore.open(config.store_path())
        work = work_of("x", config, store.width("rows"), store.dtype, on_gpu=launch.on_gpu)
    shards = launch.processes // replicas
    memory = memory_of_rank(work, shards, replicas, dead=share)
    return {
        "planned ms": step_time(work, launch, shards, replicas, dead=share).ms,
        "planned peak": memory.peak,
    }


def run(data: str, share: str, model: str) -> dict[str, float]:
    """data: a config; share: of its latents that are dead; model: width and blocks of the model to
    be made where the config has it, or nothing.
    """
    accelerator, config = Accelerator(), parse_config(json.loads(data))
    device = accelerator.device
    if model:
        assert config.model is not None
        assert config.train is not None
        folder = Path(config.model.name)
        if accelerator.is_main_process:
            folder.mkdir(parents=True)
            width, blocks = (int(size) for size in model.split("x"))
            make_model(folder, OneHookpoint(width, blocks), device)
            make_text(folder / "text.jsonl", 2 * config.train.num_tokens)
        accelerator.wait_for_everyone()
    launch = launch_here(device, accelerator.num_processes, memory_of(device))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ms, listed = train(config, accelerator, float(share))
    peak = torch.cuda.max_memory_allocated(device) - before
    told = {"ms": ms, "peak": peak, "reserved": torch.cuda.max_memory_reserved(device)}
    return told | {"listed": listed} | planned(config, launch, float(share))


if __name__ == "__main__":
    # That the tests' ranks have.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    try:
        torch.save(run(*sys.argv[2:]), sys.argv[1])
    finally:
        end_groups()
