"""The loop: one stream of batches, one or many SAEs stepped on each."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import ending
from ..activations.feed import BatchFeed
from ..activations.loader import ActivationLoader
from ..activations.store import ActivationStore
from ..models.base import SparseCoder
from ..parallel import collectives
from ..parallel.mesh import Mesh
from ..progress import progress_bar
from . import checkpoint, made_of
from .metrics import HostCopy, LoggedStep, LogMetrics, MetricsLog, Pace, PhaseTimer, StepMetrics
from .pauses import Pauses
from .records import (
    Job,
    State,
    Status,
    record_failure,
    write_job,
    write_status,
)
from .step import SAETraining

logger = logging.getLogger(__name__)
_Made = tuple["Member", StepMetrics, PhaseTimer]  # a step of one job


class Member:
    """One job in the loop: its training state, files and fate."""

    def __init__(self, job: Job, store: ActivationStore, mesh: Mesh, device: torch.device) -> None:
        assert job.config.sae is not None
        assert job.config.train is not None
        self.job, self.mesh, self.cfg = job, mesh, job.config.train
        hookpoint = self.cfg.hookpoint
        assert hookpoint is not None
        d_in, rms = store.width(hookpoint), store.root_mean_square(hookpoint)
        self.training = SAETraining(job.config.sae, self.cfg, d_in, mesh, device, rms=rms)
        self.error: str | None = None
        self.made_of = made_of.made_of(job.config, store, device)
        logged = 0
        step = self.saved = checkpoint.newest_step(self.checkpoints, mesh)
        if step is not None:
            sae = self.training.sae
            state = checkpoint.load(self.checkpoints, step, sae.first_latent, sae.d_sae_local)
            if (was := state.info.get("made_of")) is not None:
                made_of.check_same(f"{job.folder}'s checkpoint of step {step}", was, self.made_of)
                if mesh.is_lead:
                    made_of.tell_longer(job, was, step, self.training.peak_lr)
            elif mesh.is_lead:
                logger.info("%s: its checkpoints are older than identities", job.name)
            logged = state.info.get("logged", 0)
            self.training.load_state(state)
            if mesh.is_lead:
                logger.info("%s: resumed at step %d", job.name, step)
        ending.keeps(self.kept())
        curve = job.folder / "metrics.jsonl"
        self.log = MetricsLog(curve, step or 0, logged, enabled=mesh.is_lead)
        if mesh.is_lead:
            write_job(job, store.config)
            made_of.write(job.folder, self.made_of)
        self.write_status()

    @property
    def checkpoints(self) -> Path:
        """Folder of this job's checkpoints."""
        return self.job.folder / "checkpoints"

    @property
    def done(self) -> bool:
        """True when every step has been made, or none will be."""
        return self.error is not None or self.training.step_index >= self.training.total_steps

    def write_status(self, step: int | None = None, *, unfinished: State = "running") -> None:
        """Writes status.json on the lead: finished is what has its SAE written."""
        if self.mesh.is_lead:
            t, whole = self.training, is_finished(self.job)
            state: State = "failed" if self.error else "finished" if whole else unfinished
            step = t.step_index if step is None else step
            write_status(self.job, Status(state, step, t.total_steps, self.error))

    def step(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        """One step on the replica's batch."""
        return self.training.step(x, timer)

    def fail(self, reason: str, step: int) -> None:
        """Ends this job, which failed at a step, and lets the others go on."""
        self.error = reason
        if self.mesh.is_lead:
            logger.error("%s failed: %s", self.job.name, reason)
        self.write_status(step)

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the state between two steps. Collective over the members."""
        state = self.training.state()
        state.info["made_of"] = self.made_of
        state.info["logged"] = self.log.last
        checkpoint.save(self.checkpoints, state, self.mesh, self.cfg.keep_checkpoints)
        self.saved = self.training.step_index
        ending.keeps(self.kept())

    def kept(self) -> str:
        """What of this job a launch that ends now leaves, and how it goes on."""
        if not self.saved:
            return f"{self.job.name} has no checkpoint yet: the same command begins it anew"
        return (
            f"{checkpoint.step_folder(self.checkpoints, self.saved)} is kept, and the same command "
            "goes on from it"
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
                out = type(sae).from_config(sae.config, sae.d_in)
            out.load_state_dict(whole, assign=True)
            folder = self.job.folder / "sae"
            # Gone while the weights are replaced, last when they are: without it they are written
            # again.
            (folder / made_of.MADE_OF).unlink(missing_ok=True)
            out.save(folder)
            made_of.write(folder, self.made_of)
        self.write_status()


class Trainer:
    """Trains the SAEs of several jobs on one hookpoint from one stream of batches.

    The jobs share hookpoint, batch_tokens, num_tokens, seed, holdout, preload, log_every and
    checkpoint_every. Every method is collective over the members of the mesh. Where one rank trains
    several jobs, one that fails leaves the others alone; else its error is raised.
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
        # Other ranks may wait inside a collective that an error has left.
        self.isolates = mesh.members == 1 and len(jobs) > 1
        self.members: list[Member] = []
        self.unread: list[tuple[Member, LoggedStep]] = []
        for job in jobs:
            with self._fails_alone(job):
                self.members.append(Member(job, store, mesh, device))

    def run(self) -> None:
        """Steps every job to its end, then writes its SAE."""
        if not self.members:
            return
        self.total_steps = self.members[0].training.total_steps
        start = min(m.training.step_index for m in self.members)
        num_steps = self.total_steps - start
        loader = ActivationLoader(
            self.store,
            self.hookpoint,
            batch_tokens=self.cfg.batch_tokens,
            seed=self.cfg.seed,
            start_step=start,
            num_steps=num_steps,
            rank=self.mesh.member,
            num_ranks=self.mesh.members,
            device=self.device,
            holdout=self.cfg.holdout,
            preload=self.cfg.preload,
        )
        title = f"train {self.hookpoint} ({len(self.members)} SAEs)"
        total, mesh = num_steps * self.cfg.batch_tokens, self.mesh
        feed = BatchFeed(loader, num_steps, mesh, self.device)
        bar_ = progress_bar(title, total, "tokens", mesh.is_lead, shared=mesh.num_groups > 1)
        with loader, feed, bar_ as bar:
            try:
                self._loop(iter(feed), start, bar.advance)
            finally:
                self._read_logged()
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
            self._read_logged()
            reason = record_failure(job, e)
            if member is not None:
                member.error = reason

    def _loop(self, batches: Iterator[Tensor], start: int, advance: Callable[[int], None]) -> None:
        pace = Pace(self.device)
        pauses = Pauses(self.mesh, self.device, self.cfg.checkpoint_minutes)
        for step in range(start, self.total_steps):
            if all(member.error for member in self.members):
                return
            pause = pauses.before(step)
            if pause.signal:
                self._stop(step, pause.signal)
            if pause.checkpoint:
                self._checkpoint(step, due=True)
            logged = (step + 1) % self.cfg.log_every == 0 or step + 1 == self.total_steps
            data = PhaseTimer(self.device, enabled=logged)
            x = next(batches)
            data.mark("data")
            pace.tokens += self.cfg.batch_tokens
            results: list[_Made] = []
            for member in self.members:
                if member.done or member.training.step_index > step:
                    continue
                timer = PhaseTimer(self.device, enabled=logged)
                with self._fails_alone(member.job, member):
                    results.append((member, member.step(x, timer), timer))
            if logged:
                self._log(step + 1, results, data, pace)
                pace = Pace(self.device)
            self._checkpoint(step + 1)
            advance(self.cfg.batch_tokens)

    def _log(self, step: int, results: list[_Made], data: PhaseTimer, pace: Pace) -> None:
        """Writes what the step logged before measured; sends this step's metrics to the host."""
        pace.stop()
        self._read_logged()
        for member, metrics, timer in results:
            if member.error is None:
                t = member.training
                scalars, phases = HostCopy([*metrics, t.dead.count()]), (data, timer)
                logged = LoggedStep(step, t.last_lr, t.sae.d_sae, scalars, phases, pace)
                self.unread.append((member, logged))

    def _read_logged(self) -> None:
        """Writes the metrics that are on their way; by the next log they have long arrived."""
        unread, self.unread = self.unread, []
        for member, logged in unread:
            step, values = logged.step, logged.values()
            member.log.append({"step": step, "tokens": step * self.cfg.batch_tokens, **values})
            self.log_metrics(member.job.name, values, step)
            if not math.isfinite(fvu := values["fvu"]):
                member.fail(f"fvu is {fvu} at step {step}; lower train.lr, check the store", step)

    def _stop(self, step: int, number: int) -> None:
        """Raises StopRequested between two steps, with a checkpoint of the one before."""
        self._checkpoint(step, due=True)
        for member in self.members:
            if member.error is None:
                member.write_status(unfinished="stopped")
        ready = [member for member in self.members if member.error is None]
        name = ending.name_of(number)
        if not ready:
            failed = "; ".join(f"{m.job.name} failed: {m.error}" for m in self.members)
            raise ending.StopRequested(number, f"stopped by {name} at step {step}; {failed}")
        others = f" and of {len(ready) - 1} SAEs beside it" if len(ready) > 1 else ""
        at = f"step {step} of {self.total_steps} of {ready[0].job.name}{others}"
        if step == 0:
            at = f"the first step of {ready[0].job.name}{others}"
        sentence = f"stopped by {name} before {at}; {ready[0].kept()}"
        if self.mesh.is_lead and self.mesh.group:
            # The first process tells of its own alone.
            logger.warning(sentence)
        raise ending.StopRequested(number, sentence)

    def _checkpoint(self, step: int, *, due: bool = False) -> None:
        if not due and step % self.cfg.checkpoint_every and step != self.total_steps:
            return
        # A resumed run keeps the lines up to its checkpoint: they are there before it is.
        self._read_logged()
        for member in self.members:
            t = member.training
            if member.error is None and t.step_index == step and (member.saved or 0) != step:
                with self._fails_alone(member.job, member):
                    if not t.is_finite():
                        member.fail(f"a weight is not finite at step {step}; lower train.lr", step)
                        continue
                    member.save_checkpoint()
                    member.write_status()


def is_finished(job: Job) -> bool:
    """True when a job's SAE has been written after all of its steps, and is still whole."""
    return made_of.is_finished(job, whole=SparseCoder.is_whole(job.folder / "sae"))
