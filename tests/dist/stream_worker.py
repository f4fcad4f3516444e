"""Worker: two shards in two replicas that train from the model itself; killed, they go on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from flash_sae_dist.activations.feed import BatchFeed
from flash_sae_dist.activations.stream import ModelRows, open_stream
from flash_sae_dist.grid.plan import train_job
from flash_sae_dist.parallel.mesh import Mesh, make_mesh
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.job import Config, load_config
from flash_sae_dist.training.member import Member
from flash_sae_dist.training.records import Job
from flash_sae_dist.training.trainer import Trainer
from tests.dist.ranks import worker

CPU = torch.device("cpu")
CUT_AT = 9


class CutError(Exception):
    """What ends a training."""


def read(rows: ModelRows, config: Config, mesh: Mesh) -> dict[str, Any]:
    """The replica's batches, and how many rows an epoch of this rank has."""
    assert config.train is not None
    assert config.train.hookpoint is not None
    steps = -(-config.train.num_tokens // config.train.batch_tokens)
    with (
        rows.batches([config.train.hookpoint], config.train, 0, mesh, CPU) as source,
        BatchFeed(source, steps, mesh, CPU) as feed,
    ):
        batches = torch.stack([x.clone() for (x,) in feed])
        epoch = sum(held for *_, held in source.order._passes(0))
    return {"batches": batches, "epoch": epoch, "place": [mesh.replica, mesh.shard]}


def curve(job: Job) -> list[list[float]]:
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["fvu"], line["l0"]] for line in lines]


def run(config_file: str) -> dict[str, Any]:
    """Batches, the curve of an unbroken training, that of one that was cut and goes on."""
    config = load_config(config_file)
    mesh, first = make_mesh(2, 2, device=CPU), dist.get_rank() == 0
    accelerator = SimpleNamespace(is_main_process=first, is_local_main_process=first)
    share = HostShare.agreed()
    with open_stream(config, 10**4, accelerator, mesh, CPU) as rows:
        found = read(rows, config, mesh)
        job = train_job(config, rows.hookpoints)
        whole, cut = (job._replace(folder=Path(config.output) / name) for name in ("whole", "cut"))

        def train(job: Job) -> Member:
            trainer = Trainer([job], rows, mesh, CPU, lambda *_: None, share)
            trainer.run()
            return trainer.members[0]

        found["rms"] = train(whole).training.normalization.rms
        step = Member.step

        def cut_off(self: Member, *args: Any) -> Any:
            if self.training.step_index == CUT_AT:
                self.writer.wait()
                raise CutError
            return step(self, *args)

        Member.step = cut_off  # type: ignore[method-assign]
        try:
            train(cut)
        except CutError:
            found["was_cut"] = True
        Member.step = step  # type: ignore[method-assign]
        train(cut)
        dist.barrier()
        return found | {"whole": curve(whole), "cut": curve(cut)}


if __name__ == "__main__":
    worker(run)
