"""The loop: one stream of batches, one or many SAEs stepped on each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations.loader import ActivationLoader
from ..activations.store import ActivationStore
from ..models.topk import TopKSAE
from ..parallel import collectives
from ..parallel.mesh import Mesh
from ..progress import progress_bar
from . import checkpoint
from .records import (
    Job,
    LogMetrics,
    MetricsLog,
    State,
    Status,
    record_failure,
    write_job,
    write_status,
)
from .step import SAETraining, StepMetrics
from .timing import PhaseTimer

logger = logging.getLogger(__name__)


class Member:
    """One job in the loop: its training state, files and fate."""

    def __init__(
        self, job: Job, store_config: dict[str, Any], d_in: int, mesh: Mesh, device: torch.device
    ) -> None:
        assert job.config.sae is not None
        assert job.config.train is not None
        self.job, self.mesh, self.cfg = job, mesh, job.config.train
        self.training = SAETraining(job.config.sae, self.cfg, d_in, mesh, device)
        self.error: str | None = None
        step = checkpoint.newest_step(self.checkpoints, mesh)
        if step is not None:
            sae = self.training.sae
            state = checkpoint.load(self.checkpoints, step, sae.first_latent, sae.d_sae_local)
            self.training.load_state(state)
            if mesh.is_lead:
                logger.info("%s: resumed at step %d", job.name, step)
        self.log = MetricsLog(job.folder / "metrics.jsonl", step or 0, enabled=mesh.is_lead)
        if mesh.is_lead:
            write_job(job, store_config)
        self.write_status()

    @property
    def checkpoints(self) -> Path:
        """Folder of this job's checkpoints."""
        return self.job.folder / "checkpoints"

    @property
    def done(self) -> bool:
        """True when every step has been made, or none will be."""
        return self.error is not None or self.training.step_index >= self.training.total_steps

    def write_status(self) -> None:
        """Writes status.json on the lead: finished is what has its SAE written."""
        if self.mesh.is_lead:
            t, whole = self.training, is_finished(self.job)
            state: State = "failed" if self.error else "finished" if whole else "running"
            write_status(self.job, Status(state, t.step_index, t.total_steps, self.error))

    def step(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        """One step on the replica's batch."""
        return self.training.step(x, timer)

    def fail(self, reason: str) -> None:
        """Ends this job and lets the others go on."""
        self.error = reason
        if self.mesh.is_lead:
            logger.error("%s failed: %s", self.job.name, reason)
        self.write_status()

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the state between two steps. Collective over the members."""
        checkpoint.save(
            self.checkpoints, self.training.state(), self.mesh, self.cfg.keep_checkpoints
        )

    def save_final(self) -> None:
        """Gathers the shards on the lead and writes the SAE to `sae/`. Collective over the shard
        group.
        """
        sae, mesh = self.training.sae, self.mesh
        whole = {}
        for name, rows in self.training.final_weights().items():
            if name != "b_dec":
                rows = collectives.all_gather(rows, mesh.shard_group, mesh.num_shards).flatten(0, 1)
            whole[name] = rows.to("cpu", torch.float32)
        if mesh.is_lead:
            with torch.device("meta"):
                out = TopKSAE(sae.d_in, sae.d_sae, sae.k)
            out.load_state_dict(whole, assign=True)
            out.save(self.job.folder / "sae")
        self.write_status()


class Trainer:
    """Trains the SAEs of several jobs on one hookpoint from one stream of batches.

    The jobs share hookpoint, batch_tokens, num_tokens, seed, log_every and checkpoint_every. Every
    method is collective over the members of the mesh. Where one rank trains several jobs, one that
    fails leaves the others alone; else its error is raised.
    """

    def __init__(
        self,
        jobs: list[Job],
        store: ActivationStore,
        mesh: Mesh,
        device: torch.device,
        log_metrics: LogMetrics,
    ) -> None:
        cfg = jobs[0].config.train
        assert cfg is not None
        assert cfg.hookpoint is not None
        self.cfg, self.hookpoint, self.store = cfg, cfg.hookpoint, store
        self.mesh, self.device, self.log_metrics = mesh, device, log_metrics
        d_in = store.width(self.hookpoint)
        # Other ranks may wait inside a collective that an error has left.
        self.isolates = mesh.members == 1 and len(jobs) > 1
        self.members: list[Member] = []
        for job in jobs:
            with self._fails_alone(job):
                self.members.append(Member(job, store.config, d_in, mesh, device))

    def run(self) -> None:
        """Steps every job to its end, then writes its SAE."""
        if not self.members:
            return
        self.total_steps = self.members[0].training.total_steps
        start = min(m.training.step_index for m in self.members)
        loader = ActivationLoader(
            self.store,
            self.hookpoint,
            batch_tokens=self.cfg.batch_tokens,
            seed=self.cfg.seed,
            start_step=start,
            num_steps=self.total_steps - start,
            rank=self.mesh.member,
            num_ranks=self.mesh.members,
            device=self.device,
        )
        title = f"train {self.hookpoint} ({len(self.members)} SAEs)"
        total = (self.total_steps - start) * self.cfg.batch_tokens
        mesh = self.mesh
        bar_ = progress_bar(title, total, "tokens", mesh.is_lead, shared=mesh.num_groups > 1)
        with loader, bar_ as bar:
            self._loop(loader, start, bar.advance)
        for member in self.members:
            if member.error is None:
                with self._fails_alone(member.job, member):
                    member.save_final()

    @contextmanager
    def _fails_alone(self, job: Job, member: Member | None = None) -> Iterator[None]:
        """Records an error as the job's own where it may; memory that all fill is no job's own."""
        try:
            yield
        except Exception as e:
            if not self.isolates or isinstance(e, torch.OutOfMemoryError):
                raise
            if member is not None:
                member.error = record_failure(job, e)
            else:
                record_failure(job, e)

    def _loop(self, loader: ActivationLoader, start: int, advance: Callable[[int], None]) -> None:
        batches = iter(loader)
        since, tokens = time.perf_counter(), 0
        for step in range(start, self.total_steps):
            if all(member.error for member in self.members):
                return
            logged = (step + 1) % self.cfg.log_every == 0 or step + 1 == self.total_steps
            timer = PhaseTimer(self.device, enabled=logged)
            x = collectives.gather_batch(next(batches), self.mesh)
            timer.mark("data")
            shared_ms = timer.milliseconds() if logged else {}
            tokens += self.cfg.batch_tokens
            results: list[tuple[Member, StepMetrics, PhaseTimer]] = []
            for member in self.members:
                if member.done or member.training.step_index > step:
                    continue
                timer = PhaseTimer(self.device, enabled=logged)
                with self._fails_alone(member.job, member):
                    results.append((member, member.step(x, timer), timer))
            if logged:
                self._log(step + 1, results, shared_ms, tokens / (time.perf_counter() - since))
                since, tokens = time.perf_counter(), 0
            self._checkpoint(step + 1)
            advance(self.cfg.batch_tokens)

    def _log(
        self,
        step: int,
        results: list[tuple[Member, StepMetrics, PhaseTimer]],
        shared_ms: dict[str, float],
        tokens_per_s: float,
    ) -> None:
        for member, metrics, timer in results:
            training = member.training
            dead = float(training.dead.count()) / training.sae.d_sae
            values = {name: float(value) for name, value in metrics._asdict().items()}
            values |= {"dead_fraction": dead, "lr": training.last_lr, "tokens_per_s": tokens_per_s}
            phases = shared_ms | timer.milliseconds()
            values |= {f"ms/{phase}": ms for phase, ms in phases.items()}
            member.log.append({"step": step, "tokens": step * self.cfg.batch_tokens, **values})
            self.log_metrics(member.job.name, values, step)
            if not math.isfinite(values["fvu"]):
                reason = f"fvu is {values['fvu']} at step {step}; lower train.lr, check the store"
                member.fail(reason)

    def _checkpoint(self, step: int) -> None:
        if step % self.cfg.checkpoint_every and step != self.total_steps:
            return
        for member in self.members:
            if member.error is None and member.training.step_index == step:
                with self._fails_alone(member.job, member):
                    if not member.training.is_finite():
                        member.fail(f"a weight is not finite at step {step}; lower train.lr")
                        continue
                    member.save_checkpoint()
                    member.write_status()


def is_finished(job: Job) -> bool:
    """True when a job's SAE has been written, and is still whole."""
    return TopKSAE.is_whole(job.folder / "sae")
