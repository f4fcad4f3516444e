"""The loop: one stream of batches, one or many SAEs stepped on each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from .. import ending
from ..activations.aligned import AlignedLoaders
from ..activations.feed import BatchFeed
from ..activations.loader import ActivationLoader
from ..activations.store import ActivationStore
from ..activations.stream import ModelRows, Rows
from ..activations.stream_buffer import StreamedBatches
from ..activations.token_batches import TokenBatches
from ..config.base import UserError, sources_of
from ..parallel.mesh import Mesh
from ..progress import progress_bar
from .calibration import held_out_batches
from .checkpoint_writer import GRACE_S, GRACE_TOGETHER_S
from .host_memory import HostShare
from .member import Member
from .metrics import HostCopy, LoggedStep, LogMetrics, Pace, PhaseTimer, StepMetrics
from .pauses import Pauses
from .records import Job, hookpoint_of, hookpoints_of, record_failure

logger = logging.getLogger(__name__)
_Source = AlignedLoaders | StreamedBatches | TokenBatches
_Made = tuple[Member, StepMetrics, PhaseTimer]  # a step of one job


class Spent:
    """What the seconds of a training went into."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def mark(self, what: str) -> None:
        """What began at the mark before ends."""
        now = time.perf_counter()
        self._seconds[what], self._last = now - self._last, now

    def told(self, blocked_s: float) -> str:
        """One line: for checkpoints the part of the steps' time that these waited."""
        shown = [f"{what} {seconds:.1f} s" for what, seconds in self._seconds.items()]
        return ", ".join([*shown, f"of which checkpoints held up {blocked_s:.1f} s"])


class Trainer:
    """Trains the SAEs of several jobs from one stream of batches: of a hookpoint of a store, or of
    several hookpoints of a model that runs meanwhile.

    The jobs share source (of a store also hookpoint), batch_tokens, num_tokens, seed, holdout,
    preload, buffer_tokens, log_every and checkpoint_every. Every method is collective over the
    members of the mesh. Where one rank trains several jobs, one that fails leaves the others alone;
    else its error is raised.
    """

    def __init__(
        self,
        jobs: list[Job],
        rows: Rows,
        mesh: Mesh,
        device: torch.device,
        log_metrics: LogMetrics,
        share: HostShare,  # of the host's memory, for checkpoints
        *,
        bar: bool = True,  # shows its progress
    ) -> None:
        cfg = jobs[0].config.train
        assert cfg is not None
        self.cfg, self.rows = cfg, rows
        self.hookpoints = list(dict.fromkeys(name for job in jobs for name in hookpoints_of(job)))
        self.mesh, self.device, self.log_metrics = mesh, device, log_metrics
        self.has_bar = bar and mesh.is_lead
        # Other ranks may wait inside a collective that an error has left.
        self.isolates = mesh.members == 1 and len(jobs) > 1
        self.members: list[Member] = []
        self.unread: list[tuple[Member, LoggedStep]] = []
        self._spent = Spent()
        with self._ends_writers():
            for job in jobs:
                with self._fails_alone(job):
                    self.members.append(Member(job, rows, mesh, device, share))

    def run(self) -> None:
        """Steps every job to its end, then writes its SAE."""
        if not self.members:
            return
        with self._ends_writers():
            self._train()
            for member in self.members:
                if member.error is None:
                    with self._fails_alone(member.job, member):
                        hookpoint = hookpoint_of(member.job)
                        held = (self.rows, hookpoint, self.cfg, self.mesh, self.device)
                        member.training.calibrate(held_out_batches(*held))
                        member.save_final()
        for member in self.members:
            member.writer.close()
        self._spent.mark("final save")
        if self.mesh.is_lead:
            blocked = sum(member.writer.blocked_s for member in self.members)
            logger.info("%s: %s", self._what(), self._spent.told(blocked))

    def _what(self) -> str:
        first, *others = self.hookpoints
        return f"{len(self.hookpoints)} hookpoints" if others else first

    @contextmanager
    def _ends_writers(self) -> Iterator[None]:
        """Lets checkpoints that are being written end, where an error ends the work."""
        try:
            yield
        except BaseException:
            # Together: one slow disk would have each of them wait its time behind the others.
            last = time.monotonic() + (GRACE_S if self.mesh.members == 1 else GRACE_TOGETHER_S)
            for member in self.members:
                member.writer.close(max(0.0, last - time.monotonic()))
                if member.error is None:
                    ending.keeps(member.kept())
            raise

    def _train(self) -> None:
        self.total_steps = self.members[0].training.total_steps
        start = min(m.training.step_index for m in self.members)
        num_steps = self.total_steps - start
        source, mesh = self._source(start, num_steps), self.mesh
        title = f"train {self._what()} ({len(self.members)} SAEs)"
        total = num_steps * self.cfg.batch_tokens
        feed = BatchFeed(source, num_steps, mesh, self.device)
        bar_ = progress_bar(title, total, "tokens", self.has_bar, shared=mesh.num_groups > 1)
        with source, feed, bar_ as bar:
            batches = self._begun(feed, source)
            try:
                self._loop(batches, start, bar.advance)
            finally:
                self._read_logged()
        self._spent.mark("steps")

    def _source(self, start: int, num_steps: int) -> _Source:
        """What gives this rank's rows of the batches."""
        if isinstance(self.rows, ModelRows) and self.cfg.loss != "fvu":
            return self.rows.token_batches(self.cfg, start, self.mesh)
        if isinstance(self.rows, ModelRows):
            return self.rows.batches(self.hookpoints, self.cfg, start, self.mesh, self.device)
        return AlignedLoaders(lambda name: self._loader(name, start, num_steps), self.hookpoints)

    def _loader(self, hookpoint: str, start: int, num_steps: int) -> ActivationLoader:
        assert isinstance(self.rows, ActivationStore)
        return ActivationLoader(
            self.rows,
            hookpoint,
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

    def _begun(self, feed: BatchFeed, source: _Source) -> Iterator[dict[str, Tensor]]:
        """The batches by hookpoint. With the first of a stream come the statistics that a store
        would have told.
        """
        for number, batch in enumerate(feed):
            if number == 0 and isinstance(source, StreamedBatches):
                self._set_units(source)
            if isinstance(source, TokenBatches):
                # Each SAE has the model run on it.
                batch = batch * len(self.hookpoints)
            yield dict(zip(self.hookpoints, batch, strict=True))

    def _set_units(self, source: StreamedBatches) -> None:
        for member in self.members:
            with self._fails_alone(member.job, member):
                names = sources_of(hookpoint_of(member.job))
                rms, *others = [source.root_mean_square(name) for name in names]
                if others and not member.training.has_rms():
                    member.training.set_source_units([rms, *others])
                elif rms is not None and not member.training.has_rms():
                    member.training.set_rms(rms)
                target = member.cfg.target
                rms = None if target is None else source.root_mean_square(target)
                if rms is not None:
                    member.training.set_target_rms(rms)

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

    def _loop(
        self, batches: Iterator[dict[str, Tensor]], start: int, advance: Callable[[int], None]
    ) -> None:
        pace = Pace(self.device)
        pauses = Pauses(self.mesh, self.device, self.cfg.checkpoint_minutes, self._is_unwritten)
        for step in range(start, self.total_steps):
            if all(member.error for member in self.members):
                return
            pause = pauses.before(step)
            if pause.failed:
                self._raise_unwritten()
            if pause.signal:
                self._stop(step, pause.signal)
            if pause.checkpoint:
                self._checkpoint(step, due=True)
            logged = (step + 1) % self.cfg.log_every == 0 or step + 1 == self.total_steps
            data = PhaseTimer(self.device, enabled=logged)
            try:
                rows = next(batches)
            except ending.StopAsked:
                self._stop(step, ending.requested())
            data.mark("data")
            pace.tokens += self.cfg.batch_tokens
            results: list[_Made] = []
            for member in self.members:
                if member.done or member.training.step_index > step:
                    continue
                timer = PhaseTimer(self.device, enabled=logged)
                with self._fails_alone(member.job, member):
                    results.append((member, member.step(rows, timer), timer))
            if logged:
                self._log(step + 1, results, data, pace)
                pace = Pace(self.device)
            if step == start:
                self._spent.mark("start")
            self._checkpoint(step + 1)
            advance(self.cfg.batch_tokens)

    def _is_unwritten(self) -> bool:
        return any(member.writer.failed for member in self.members if member.error is None)

    def _raise_unwritten(self) -> None:
        """Raises why a checkpoint could not be written, on all members, or ends that job alone."""
        together, last = self.mesh.members > 1, time.monotonic() + GRACE_TOGETHER_S
        for member in self.members:
            if together or member.writer.failed:
                with self._fails_alone(member.job, member):
                    member.writer.wait(max(0.0, last - time.monotonic()))
        if together:
            raise UserError("another process could not write a checkpoint")

    def _log(self, step: int, results: list[_Made], data: PhaseTimer, pace: Pace) -> None:
        """Writes what the step logged before measured; sends this step's metrics to the host."""
        pace.stop()
        self._read_logged()
        for member, metrics, timer in results:
            if member.error is None:
                t = member.training
                beside, phases = member.beside(), (data, timer)
                scalars = HostCopy([*metrics, *beside.values(), t.dead.count()])
                logged = LoggedStep(
                    step, t.last_lr, t.sae.d_sae, scalars, tuple(beside), phases, pace
                )
                self.unread.append((member, logged))

    def _read_logged(self) -> None:
        """Writes the metrics that are on their way; by the next log they have long arrived."""
        unread, self.unread = self.unread, []
        for member, logged in unread:
            step, values = logged.step, logged.values()
            member.log.append({"step": step, "tokens": step * self.cfg.batch_tokens, **values})
            self.log_metrics(member.job.name, values, step)
            if not math.isfinite(fvu := values["fvu"]):
                member.fail(f"fvu is {fvu} at step {step}; lower train.lr, check the rows", step)

    def _stop(self, step: int, number: int) -> NoReturn:
        """Raises StopRequested between two steps, with a checkpoint of the one before."""
        self._checkpoint(step, due=True)
        for member in self.members:
            if member.error is None:
                with self._fails_alone(member.job, member):
                    member.writer.wait()
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
