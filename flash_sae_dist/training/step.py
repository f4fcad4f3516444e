"""One SAE's training: its state and one step, whatever the mesh."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.sae import SAEConfig
from ..config.train import Precision, TrainConfig
from ..models import ARCHITECTURES
from ..models.batch_topk import BatchTopK
from ..models.crosscoder import Crosscoder
from ..models.dead_latents import DeadLatents
from ..parallel import collectives
from ..parallel.mesh import Mesh
from .calibration import calibrate_
from .checkpoint import TrainingState
from .defaults import with_defaults
from .engine import make_engine
from .engines.autograd import AutogradEngine
from .initial import begin_from_
from .metrics import PhaseTimer, StepMetrics
from .normalization import Normalization
from .optim import lr_at
from .resample import resample_
from .spliced import SplicedModel

logger = logging.getLogger(__name__)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Compute dtype: auto is bfloat16 on CUDA devices, else float32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


class SAETraining:
    """An SAE with its optimizer, schedule, dead-latent counters and position: all that a step
    changes.
    """

    spliced: SplicedModel | None = None
    # Deviations and means that the tokens of a step were standardised by.
    _of_tokens: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        sae_cfg: SAEConfig,
        cfg: TrainConfig,
        d_in: int,
        mesh: Mesh,
        device: torch.device,
        *,
        d_out: int | None = None,
        sources: Sequence[int] = (),
        rms: float | None = None,
        mean: Tensor | None = None,
        drawn: bool = True,
    ) -> None:
        """rms is the root mean square of the data's elements, mean [d_in] what may be subtracted;
        left out, those of the first batch. d_out is the width of a transcoder's target, sources
        are those of a crosscoder's hookpoints, whose units `set_source_units` tells. Without
        initial weights drawn it waits for `load_state`.
        """
        self.cfg = cfg = with_defaults(cfg, sae_cfg, d_in)
        self.mesh, self.device = mesh, device
        self.compute_dtype = resolve_precision(cfg.precision, device)
        self.master_dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        place: dict[str, Any] = {"sources": sources} if sources else {"d_out": d_out}
        place |= {"mesh": mesh, "dtype": self.master_dtype, "device": device}
        place["seed"] = cfg.seed if drawn and cfg.init_from is None else None
        self.sae = ARCHITECTURES[sae_cfg.architecture].from_config(sae_cfg, d_in, **place)
        if drawn and cfg.init_from is not None:
            begin_from_(self.sae, cfg.init_from)
        self.dead = DeadLatents(self.sae.d_sae_local, cfg.dead_after_tokens, mesh, device)
        self.engine = make_engine(self.sae, self.dead, cfg, self.compute_dtype)
        self.optimizer = self.engine.optimizer
        self.peak_lr = float(self.optimizer.param_groups[0]["lr"])
        self.total_steps = -(-cfg.num_tokens // cfg.batch_tokens)
        self.step_index = 0
        own = Normalization.none(mesh) if sources else Normalization(cfg, mesh, d_in, device)
        self.normalization = own
        self.target = None if d_out is None else Normalization(cfg, mesh, d_out, device)
        self.sources = [Normalization(cfg, mesh, n, device, divides=True) for n in sources]
        if self.sources or self.sae.config.input_norm != "none":
            rms = 1.0  # of the rows that the engine gets
        if rms is not None:
            self.set_rms(rms, mean)

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return lr_at(self.step_index, self.total_steps, self.peak_lr, self.cfg)

    @property
    def ramp(self) -> float:
        """Part of the sparsity's coefficient in the coming step: a linear rise from 0."""
        steps = self.sae.sparsity_warmup * self.total_steps
        return min(1.0, self.step_index / steps) if steps else 1.0

    @property
    def last_lr(self) -> float:
        """Learning rate of the step that was made last."""
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter is finite on every member (a host sync, for checkpoints).
        Collective.
        """
        # Of the largest magnitude, which bears what is not finite: `isfinite` of a whole matrix
        # takes six bytes an element beside it.
        largest = [torch.linalg.vector_norm(p, math.inf) for p in self.sae.parameters()]
        finite = torch.stack(largest).isfinite().all().to(torch.int32)
        collectives.all_reduce_(
            finite, self.mesh.member_group, self.mesh.members, dist.ReduceOp.MIN
        )
        return bool(finite)

    def has_rms(self) -> bool:
        """Whether the data's root mean square is known."""
        return all(n.rms is not None for n in [self.normalization, *self.sources])

    def set_rms(self, rms: float, mean: Tensor | None = None) -> None:
        """Tells the data's root mean square, by which parameters in its units take their steps, and
        its mean [d_in] where that is subtracted. Rows that are all zero, or not finite, have none:
        1.
        """
        if self.sae.config.input_norm != "none":
            rms = 1.0
        self.normalization.rms = rms if 0 < rms < math.inf else 1.0
        if self.normalization.centres and mean is not None:
            self.normalization.mean = mean.to(self.device, torch.float64)
        self._set_units()

    def set_target_rms(self, rms: float, mean: Tensor | None = None) -> None:
        """`set_rms` of a transcoder's target rows."""
        assert self.target is not None
        self.target.rms = rms if 0 < rms < math.inf else 1.0
        if self.target.centres and mean is not None:
            self.target.mean = mean.to(self.device, torch.float64)

    def set_source_units(
        self, rms: Sequence[float | None], means: Sequence[Tensor | None] | None = None
    ) -> None:
        """`set_rms` of each of a crosscoder's hookpoints, as far as they are known."""
        for n, own, mean in zip(self.sources, rms, means or [None] * len(rms), strict=True):
            if own is not None:
                n.rms = own if 0 < own < math.inf else 1.0
            if n.centres and mean is not None:
                n.mean = mean.to(self.device, torch.float64)
        self._set_sources()

    def _set_sources(self) -> None:
        if not any(n.missing for n in self.sources):
            assert isinstance(self.sae, Crosscoder)
            widths, means = self.sae.sources, [n.mean for n in self.sources]
            scales = [n.divisor(width) for n, width in zip(self.sources, widths, strict=True)]
            self.sae.set_sources_(scales, means)

    def _set_units(self) -> None:
        self.engine.set_unit(self._unit)
        self.sae.set_unit(self._unit)

    @property
    def _unit(self) -> float:
        """Root mean square of the rows that the engine gets."""
        return self.normalization.unit(self.sae.d_in)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor, y: Tensor | None = None) -> None:
        """Begins what the first batch x [N/R, d_in] (of a transcoder with y [N/R, d_out]) decides,
        such as b_dec at its geometric median. Collective over the replicas.
        """
        rows, target = (
            collectives.all_gather(
                part.to(self.master_dtype), self.mesh.replica_group, self.mesh.num_replicas
            ).flatten(0, 1)
            for part in (x, x if y is None else y)
        )
        self.sae.begin_(rows, target, self._unit)
        if self.cfg.encoder_scale == "least_squares":
            self._scale_encoder(x.to(self.master_dtype))
        self.engine.begin_()

    @torch.no_grad()
    def _scale_encoder(self, x: Tensor) -> None:
        """Scales the encoder so that the reconstruction of the first batch is as long as fits best.
        Collective over the members.
        """
        sae, mesh = self.sae, self.mesh
        recon = sae.combine(sae.main_codes(sae.activate(sae.candidates(x))))
        sums = torch.stack([((x - sae.b_dec) * recon).sum(), recon.square().sum()])
        collectives.all_reduce_(sums, mesh.replica_group, mesh.num_replicas)
        scale = sums[0] / sums[1]
        # Rows that are all alike have no direction to reconstruct.
        sae.scale_encoder_(torch.where(scale.isfinite() & (scale > 0), scale, 1.0))

    @torch.no_grad()
    def _into_units(self) -> None:
        """Turns given weights, which are for rows as they are stored, into those of rows as the
        engine gets them.
        """
        found = self.normalization.unfolded(self.sae.state_dict(), self.sae)
        for name, own in self.sae.state_dict().items():
            own.copy_(found[name])
        self.engine.begin_()

    def splice(self, model: SplicedModel) -> None:
        """Trains by what the model loses with reconstructions: `step` takes batches of
        `TokenBatches` from now on.
        """
        assert isinstance(self.engine, AutogradEngine)
        self.spliced = model

        def lost(recon: Tensor) -> Tensor:
            recon = self.normalization.restored(recon)
            if self._of_tokens is not None:
                recon = recon * self._of_tokens[0] + self._of_tokens[1]
            return model.loss(recon)

        self.engine.end_loss = lost

    def _prepared(self, x: Tensor) -> Tensor:
        """Rows as the engine gets them."""
        return self.normalization(self.sae.normalise(x)[0], self.master_dtype)

    def step(self, x: Tensor, timer: PhaseTimer, y: Tensor | None = None) -> StepMetrics:
        """One optimizer step on this replica's batch x [N/R, d_in], of a transcoder with its target
        rows y [N/R, d_out]. Collective over the members; no host sync but in the first (the capture
        of a graph), every 100 steps for the list of dead latents, and where latents are resampled.
        """
        if self.spliced is not None:
            x = self.spliced.begin(x)
        if self.normalization.missing:
            self.normalization.measure(x)
            self._set_units()
        if any(n.missing for n in self.sources):
            parts = torch.split(x, list(self.sae.sources), dim=1)
            for n, part in zip(self.sources, parts, strict=True):
                n.measure(part)
            self._set_sources()
        x, self._of_tokens = self.sae.normalise(x)
        x = self.normalization(x, self.master_dtype)
        if self.target is not None:
            assert y is not None
            if self.target.missing:
                self.target.measure(y)
            y = self.target(y, self.master_dtype)
        if self.step_index == 0 and self.cfg.init_from is None:
            self.init_b_dec(x, y)
        elif self.step_index == 0:
            self._into_units()
        if self.cfg.dead_latents == "resample":
            self._resample(x)
        elif self.cfg.dead_latents != "none" or self.sae.penalises_dead:
            self.dead.refresh(self.step_index, self.step_index * self.cfg.batch_tokens)
        self.engine.set_lr(self.lr)
        self.engine.set_ramp(self.ramp)
        self.engine.choose_form(self.step_index)
        metrics = self.engine.step(x, timer, y)
        self.step_index += 1
        return metrics

    def _resample(self, x: Tensor) -> None:
        """Resamples when the tokens seen pass a multiple of dead_after_tokens."""
        seen, batch = self.step_index * self.cfg.batch_tokens, self.cfg.batch_tokens
        window = self.cfg.dead_after_tokens
        if seen // window == max(0, seen - batch) // window:
            return
        seed = self.cfg.seed + self.step_index
        resample_(self.engine, self.dead, x, seed, self._unit)

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Tensor]] | None) -> None:
        """Sets thresholds a latent from rows that training left out, for the weights that are kept;
        without rows they stay at the moving average. Collective over the members.
        """
        sae = self.sae
        if not isinstance(sae, BatchTopK):
            return
        kept = self.engine.weights()
        trained = {n: p.detach().clone() for n, p in sae.named_parameters() if self.engine.averages}
        try:
            for name in trained:
                sae.get_parameter(name).copy_(kept[name])
            done = batches is not None and calibrate_(
                sae, lambda: (self._prepared(x) for x in batches())
            )
        finally:
            for name, param in trained.items():
                sae.get_parameter(name).copy_(param)
        if not done and self.mesh.is_lead:
            reason, cure = "no rows are held out", "with train.holdout"
            if self.cfg.source == "stream":
                reason, cure = "a stream gives no held-out rows", "trained from a store"
            logger.warning(
                "%s: every latent has the threshold %.4g of the moving average; %s each has its "
                "own", reason, float(sae.mean_threshold), cure,
            )  # fmt: skip

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to keep, this shard's rows, for rows as they are stored: the parameters, or
        their running average.
        """
        weights = self.engine.weights() | dict(self.sae.named_buffers())
        if self.target is not None:
            return self.normalization.transcoded(weights, self.sae, self.target)
        return self.normalization.folded(weights, self.sae)

    def _normalizations(self) -> list[tuple[Normalization, str]]:
        """Each with what its names begin with in a checkpoint."""
        others = [(n, f"source{at}_") for at, n in enumerate(self.sources)]
        others += [] if self.target is None else [(self.target, "target_")]
        return [(self.normalization, ""), *others]

    def state(self) -> TrainingState:
        """All that a resumed run needs, by reference: parameters, Adam's moments, counters,
        position.
        """
        rows: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for key, value in self.engine.state().items():
            role = self.sae.roles[key.rpartition(".")[2]]
            (rows if role == "rows" else whole)[key] = value
        for name, buffer in self.sae.named_buffers():
            (rows if self.sae.roles[name] == "rows" else whole)[name] = buffer
        rows["tokens_since_fired"] = self.dead.tokens_since_fired
        rows["listed_dead"] = self.dead.listed()
        info: dict[str, Any] = {
            "step": self.step_index,
            "d_sae": self.sae.d_sae,
        }
        if (density := self.engine.density) is not None:
            whole["l0_share"], info["is_dense"] = density.share, density.is_dense
        if self.engine.room:
            info["room"] = self.engine.room
        if len(self.dead.rows):
            info["dead_room"] = len(self.dead.rows)
        for normalization, prefix in self._normalizations():
            tensors, values = normalization.state(prefix)
            whole |= tensors
            info |= values
        return TrainingState(rows, whole, info)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """Puts back what `state` gave, on any number of shards."""
        # A run goes on in the unit that it began with; older checkpoints name none, it was 1.
        for normalization, prefix in self._normalizations():
            normalization.load_state(state.whole, state.info, prefix)
        self._set_units()
        self.engine.load_state(state.rows | state.whole, state.info["step"])
        for name, buffer in self.sae.named_buffers():
            buffer.copy_((state.rows | state.whole)[name])
        if (density := self.engine.density) is not None and "l0_share" in state.whole:
            density.share.copy_(state.whole["l0_share"])
            density.is_dense = state.info["is_dense"]
        self.engine.room = int(state.info.get("room", 0))
        self.dead.tokens_since_fired.copy_(state.rows["tokens_since_fired"])
        listed = state.rows.get("listed_dead")
        if listed is None:
            # Checkpoints of 0.1.0 have no list: the dead latents of the last look are near those of
            # now.
            listed = self.dead.mask() & bool(state.info.get("any_dead"))
        self.dead.make_room(int(state.info.get("dead_room", 0)))
        self.dead.list_(listed.to(self.device))
        self.step_index = state.info["step"]
