"""One SAE's training: its state and one step, whatever the mesh."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.sae import SAEConfig
from ..config.train import Precision, TrainConfig
from ..kernels import encode_choice
from ..models import ARCHITECTURES
from ..models.dead_latents import DeadLatents
from ..models.losses import geometric_median
from ..parallel import collectives
from ..parallel.mesh import Mesh
from .checkpoint import TrainingState
from .engine import make_engine
from .metrics import PhaseTimer, StepMetrics
from .optim import lr_at
from .resample import resample_
from .tuning import Choice, tune_encoder

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

    def __init__(
        self,
        sae_cfg: SAEConfig,
        cfg: TrainConfig,
        d_in: int,
        mesh: Mesh,
        device: torch.device,
        *,
        rms: float | None = None,
        drawn: bool = True,
    ) -> None:
        """rms is the root mean square of the data's elements; left out, that of the first batch.
        Without initial weights drawn it waits for `load_state`.
        """
        self.cfg, self.mesh, self.device = cfg, mesh, device
        self.compute_dtype = resolve_precision(cfg.precision, device)
        self.master_dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        self.sae = ARCHITECTURES[sae_cfg.architecture].from_config(
            sae_cfg,
            d_in,
            mesh=mesh,
            dtype=self.master_dtype,
            device=device,
            seed=cfg.seed if drawn else None,
        )
        self.dead = DeadLatents(self.sae.d_sae_local, cfg.dead_after_tokens, mesh, device)
        self.engine = make_engine(self.sae, self.dead, cfg, self.compute_dtype)
        self.optimizer = self.engine.optimizer
        self.peak_lr = float(self.optimizer.param_groups[0]["lr"])
        self.total_steps = -(-cfg.num_tokens // cfg.batch_tokens)
        self.step_index = 0
        self._rms: float | None = None
        if rms is not None:
            self.set_rms(rms)
        self._tuned = False
        self._choice: Choice | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return lr_at(self.step_index, self.total_steps, self.peak_lr, self.cfg)

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
        return self._rms is not None

    def set_rms(self, rms: float) -> None:
        """Makes the data's root mean square the unit of the biases' steps, or of the rows. Rows
        that are all zero, or not finite, have none: 1.
        """
        self._rms = rms if 0 < rms < math.inf else 1.0
        self.engine.set_unit(1.0 if self._divides else self._rms)

    @property
    def _divides(self) -> bool:
        return self.cfg.normalize == "unit_mean_square"

    @property
    def _unit(self) -> float:
        """Root mean square of the rows that the engine gets."""
        return 1.0 if self._divides or self._rms is None else self._rms

    def _measure_rms(self, x: Tensor) -> float:
        """Root mean square of the first batch. A host sync; collective over the replicas."""
        square = x.double().square().mean()
        collectives.all_reduce_(square, self.mesh.replica_group, self.mesh.num_replicas)
        rms = math.sqrt(float(square / self.mesh.num_replicas))
        if self.mesh.is_lead:
            logger.info(
                "the root mean square of the activations, which scales the biases' learning rate, "
                "is taken from the first batch: %.4g",
                rms,
            )
        return rms

    @torch.no_grad()
    def init_b_dec(self, x: Tensor) -> None:
        """Puts b_dec at the geometric median of the first batch x [N/R, d_in]. Collective over the
        replicas.
        """
        rows = collectives.all_gather(
            x.to(self.master_dtype), self.mesh.replica_group, self.mesh.num_replicas
        )
        self.sae.b_dec.copy_(geometric_median(rows.flatten(0, 1), unit=self._unit))
        if "ema" in self.engine.moments:
            self.optimizer.state[self.sae.b_dec]["ema"].copy_(self.sae.b_dec)
        self.engine.refresh_()

    def step(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        """One optimizer step on this replica's batch x [N/R, d_in]. Collective over the members;
        no host sync but in the first (the encoder's choice, the capture of a graph), every 100
        steps for the list of dead latents, and where latents are resampled.
        """
        if self._rms is None:
            self.set_rms(self._measure_rms(x))
        assert self._rms is not None
        if self._divides:
            x = x.to(self.master_dtype) / self._rms
        if self.step_index == 0:
            self.init_b_dec(x)
        if not self._tuned:
            self._tune(x)
        if self._choice is not None:
            # Another SAE of this process may go on with another design for the same shape.
            encode_choice.use(*self._choice)
        if self.cfg.dead_latents == "resample":
            self._resample(x)
        elif self.cfg.dead_latents != "none":
            self.dead.refresh(self.step_index, self.step_index * self.cfg.batch_tokens)
        self.engine.set_lr(self.lr)
        metrics = self.engine.step(x, timer)
        self.step_index += 1
        return metrics

    def _tune(self, x: Tensor) -> None:
        """Chooses the encoder's design, at this process's first step of this SAE: a run goes on
        with that which it began with, where its shape is still the same.
        """
        self._tuned = True
        if (k := self.sae.encoder_k) is None:
            return
        x, W_enc = x.chunk(self.cfg.micro_batches)[0], self.engine.encoder_weights
        shape = encode_choice.Shape.of(x.to(self.compute_dtype), W_enc, k)
        if self._choice is not None and self._choice[0] == shape:
            return
        self._choice = tune_encoder(
            x, W_enc, self.sae.b_enc.detach(), k, self.compute_dtype, self.mesh
        )

    def _resample(self, x: Tensor) -> None:
        """Resamples when the tokens seen pass a multiple of dead_after_tokens."""
        seen, batch = self.step_index * self.cfg.batch_tokens, self.cfg.batch_tokens
        window = self.cfg.dead_after_tokens
        if seen // window == max(0, seen - batch) // window:
            return
        seed = self.cfg.seed + self.step_index
        resample_(self.engine, self.dead, x, seed, self._unit)

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to keep, this shard's rows, for rows as they are stored: the parameters, or
        their running average.
        """
        weights = self.engine.weights()
        if self._divides and self._rms is not None:
            for name in self.sae.in_data_units & weights.keys():
                weights[name] = weights[name] * self._rms
        return weights

    def state(self) -> TrainingState:
        """All that a resumed run needs, by reference: parameters, Adam's moments, counters,
        position.
        """
        rows: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for key, value in self.engine.state().items():
            role = self.sae.roles[key.rpartition(".")[2]]
            (rows if role == "rows" else whole)[key] = value
        rows["tokens_since_fired"] = self.dead.tokens_since_fired
        rows["listed_dead"] = self.dead.listed()
        info: dict[str, Any] = {
            "step": self.step_index,
            "d_sae": self.sae.d_sae,
        }
        if self._rms is not None:
            info["rms"] = self._rms
        if self._choice is not None:
            shape, design = self._choice
            info["encoder"] = {"shape": list(shape), "design": design}
        return TrainingState(rows, whole, info)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """Puts back what `state` gave, on any number of shards."""
        # A run goes on in the unit that it began with; older checkpoints name none, it was 1.
        self.set_rms(float(state.info.get("rms", 1.0)))
        self.engine.load_state(state.rows | state.whole, state.info["step"])
        self.dead.tokens_since_fired.copy_(state.rows["tokens_since_fired"])
        listed = state.rows.get("listed_dead")
        if listed is None:
            # Checkpoints of 0.1.0 have no list: the dead latents of the last look are near those of
            # now.
            listed = self.dead.mask() & bool(state.info.get("any_dead"))
        self.dead.list_(listed.to(self.device))
        self.step_index = state.info["step"]
        if (encoder := state.info.get("encoder")) is not None:
            self._choice = encode_choice.Shape(*encoder["shape"]), encoder["design"]
