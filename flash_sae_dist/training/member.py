"""One job in the loop: its training, its files and its fate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import ending
from ..activations.store import ActivationStore
from ..activations.stream import ModelRows, Rows
from ..config.base import sources_of
from ..models.base import SparseCoder
from ..parallel import agree
from ..parallel.mesh import Mesh
from . import checkpoint, made_of
from .checkpoint_writer import CheckpointWriter
from .host_memory import HostShare
from .metrics import MetricsLog, PhaseTimer, StepMetrics
from .records import Job, State, Status, write_job, write_status
from .spliced import SplicedModel
from .step import SAETraining

logger = logging.getLogger(__name__)


class Member:
    """One job in the loop: its training state, files and fate."""

    def __init__(
        self, job: Job, rows: Rows, mesh: Mesh, device: torch.device, share: HostShare
    ) -> None:
        assert job.config.sae is not None
        assert job.config.train is not None
        self.job, self.mesh, self.cfg = job, mesh, job.config.train
        hookpoint = self.cfg.hookpoint
        assert hookpoint is not None
        self.error: str | None = None
        self.made_of = made_of.made_of(job.config, rows, device, job.begun_tokens)
        step = self.saved = checkpoint.newest_step(self.checkpoints, mesh)
        self.published = step or 0
        names, crosses = sources_of(hookpoint), len(sources_of(hookpoint)) > 1
        sources = [rows.width(name) for name in names]
        self.training = SAETraining(
            job.config.sae,
            self.cfg,
            sum(sources),
            mesh,
            device,
            d_out=None if self.cfg.target is None else rows.width(self.cfg.target),
            sources=sources if crosses else (),
            rms=None if crosses else rows.root_mean_square(hookpoint),
            mean=None if crosses else self._mean_of(rows, hookpoint),
            drawn=step is None,
        )
        self._set_other_units(rows, names if crosses else [])
        self._splice(rows, hookpoint)
        logged = 0 if step is None else self._resume(step)
        ending.keeps(self.kept())
        curve = job.folder / "metrics.jsonl"
        self.log = MetricsLog(curve, step or 0, logged, enabled=mesh.is_lead)
        if mesh.is_lead:
            made_of.write(job.folder, self.made_of)  # first: job.yaml alone is of older versions
            write_job(job, rows.config)
        self.write_status()
        self.writer = CheckpointWriter(
            job.name, self.checkpoints, None if self.done else self.training.state(), mesh, device,
            self.cfg.keep_checkpoints, share, self._is_published,
        )  # fmt: skip

    def _mean_of(self, rows: Rows, hookpoint: str) -> Tensor | None:
        """The mean row of a hookpoint [d_in] where it is to be subtracted; None of a stream, which
        knows none yet.
        """
        if not self.cfg.subtract_mean or not isinstance(rows, ActivationStore):
            return None
        return torch.from_numpy(rows.mean(hookpoint))

    def _set_other_units(self, rows: Rows, sources: list[str]) -> None:
        """Those of a transcoder's target, or of a crosscoder's hookpoints."""
        if sources:
            rms = [rows.root_mean_square(name) for name in sources]
            means = [self._mean_of(rows, name) for name in sources]
            self.training.set_source_units(rms, means)
        if (target := self.cfg.target) is None:
            return
        if (known := rows.root_mean_square(target)) is not None:
            self.training.set_target_rms(known, self._mean_of(rows, target))

    def _splice(self, rows: Rows, hookpoint: str) -> None:
        """Gives the model to a training by what it loses."""
        if self.cfg.loss != "fvu":
            assert isinstance(rows, ModelRows)
            self.training.splice(SplicedModel(rows.lm, hookpoint, self.cfg.loss))

    def beside(self) -> dict[str, Tensor]:
        """What the last step measured beside StepMetrics, scalars on the device by name."""
        engine = self.training.engine
        found = {} if engine.model_loss is None else {"model_loss": engine.model_loss}
        if engine.source_fvus is not None:
            names = [f"fvu/{name}" for name in sources_of(self.cfg.hookpoint or "")]
            found |= dict(zip(names, engine.source_fvus, strict=True))
        return found

    def _resume(self, step: int) -> int:
        """Goes on from the checkpoint of a step; returns the last step that it has a metrics line
        of."""
        sae, job, mesh = self.training.sae, self.job, self.mesh
        state = agree.patiently(
            lambda: checkpoint.load(self.checkpoints, step, sae.first_latent, sae.d_sae_local),
            # The lead has just verified it.
            0 if mesh.is_lead else agree.LAG_S,
        )
        if (was := state.info.get("made_of")) is not None:
            made_of.check_same(f"{job.folder}'s checkpoint of step {step}", was, self.made_of)
            if mesh.is_lead:
                made_of.tell_longer(job, was, step, self.training.peak_lr)
        elif mesh.is_lead:
            logger.info("%s: its checkpoints are older than identities", job.name)
        self.training.load_state(state)
        if mesh.is_lead:
            logger.info("%s: resumed at step %d", job.name, step)
        return int(state.info.get("logged", 0))

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

    def step(self, rows: Mapping[str, Tensor], timer: PhaseTimer) -> StepMetrics:
        """One step on the replica's batch, which has the rows of each hookpoint."""
        assert self.cfg.hookpoint is not None
        y = None if self.cfg.target is None else rows[self.cfg.target]
        return self.training.step(side_by_side(rows, self.cfg.hookpoint), timer, y)

    def fail(self, reason: str, step: int) -> None:
        """Ends this job, which failed at a step, and lets the others go on."""
        self.error = reason
        if self.mesh.is_lead:
            logger.error("%s failed: %s", self.job.name, reason)
        self.write_status(step)

    def save_checkpoint(self) -> None:
        """Begins to write a checkpoint of the state between two steps. Waits for the one before
        it, and raises what that failed of.
        """
        state = self.training.state()
        state.info["made_of"] = self.made_of
        state.info["logged"] = self.log.last
        self.writer.begin(state)
        self.saved = self.training.step_index

    def _is_published(self, step: int) -> None:
        self.published = step
        ending.keeps(self.kept())

    def kept(self) -> str:
        """What of this job a launch that ends now leaves, and how it goes on."""
        if not self.published:
            return f"{self.job.name} has no checkpoint yet: the same command begins it anew"
        return (
            f"{checkpoint.step_folder(self.checkpoints, self.published)} is kept, and the same "
            "command goes on from it"
        )

    def save_final(self) -> None:
        """Writes the SAE to `sae/`, each shard its rows. Collective over the members."""
        folder, sae = self.job.folder / "sae", self.training.sae
        # Gone while the weights are replaced, and last when they are: without it they are written
        # again.
        agree.by_lead(lambda: (folder / made_of.MADE_OF).unlink(missing_ok=True), self.mesh)
        weights = {n: t.to(torch.float32) for n, t in self.training.final_weights().items()}
        sae.save(folder, weights)
        self.writer.wait()
        agree.by_lead(lambda: made_of.write(folder, self.made_of), self.mesh)
        self.write_status()


def side_by_side(rows: Mapping[str, Tensor], hookpoint: str) -> Tensor:
    """The rows of a hookpoint, or of all that it joins."""
    first, *others = [rows[name] for name in sources_of(hookpoint)]
    return torch.cat([first, *others], dim=1) if others else first


def is_finished(job: Job) -> bool:
    """True when a job's SAE has been written after all of its steps, and is still whole."""
    return made_of.is_finished(job, whole=SparseCoder.is_whole(job.folder / "sae"))
