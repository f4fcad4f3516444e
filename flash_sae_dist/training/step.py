"""One SAE's training: its state and one step, whatever the mesh."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.base import ConfigError
from ..config.sae import SAEConfig
from ..config.train import FusedTrainConfig, Precision, TrainConfig
from ..kernels import encode_choice
from ..models.dead_latents import DeadLatents
from ..models.losses import auxk_loss, fvu_loss, geometric_median, total_variance
from ..models.topk import TopKConfig, TopKSAE
from ..parallel import collectives
from ..parallel.mesh import Mesh
from .checkpoint import TrainingState
from .fused_step import FusedStep
from .optim import (
    clip_grads_,
    lr_at,
    make_optimizer,
    project_decoder_grad_,
    renormalise_decoder_,
    sum_grads_over_replicas_,
)
from .resample import resample_
from .sparse_adam import SparseAdam
from .timing import PhaseTimer
from .tuning import Choice, tune_encoder


class StepMetrics(NamedTuple):
    """What a step measured, left on the device."""

    fvu: Tensor  # scalar, over all replicas
    aux: Tensor  # scalar, AuxK or ghost loss over all replicas; 0 while no latent is dead
    l0: Tensor  # scalar, mean active latents a token


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
    ) -> None:
        self.cfg, self.mesh, self.device = cfg, mesh, device
        self.compute_dtype = resolve_precision(cfg.precision, device)
        self.master_dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        if not isinstance(sae_cfg, TopKConfig):
            raise ConfigError(f"sae.architecture={sae_cfg.architecture!r} cannot be trained yet")
        self.ema_decay = cfg.ema_decay if isinstance(cfg, FusedTrainConfig) else None
        self.sae = TopKSAE(
            d_in,
            sae_cfg.width(d_in),
            sae_cfg.k,
            mesh=mesh,
            dtype=self.master_dtype,
            device=device,
        )
        self.sae.reset_parameters(cfg.seed)
        self.optimizer = make_optimizer(self.sae, cfg, self.compute_dtype)
        self.peak_lr = float(self.optimizer.param_groups[0]["lr"])
        self.dead = DeadLatents(self.sae.d_sae_local, cfg.dead_after_tokens, mesh, device)
        self.k_aux = min(cfg.k_aux or max(1, d_in // 2), self.sae.d_sae)
        self.fused: FusedStep | None = None
        if isinstance(self.optimizer, SparseAdam):
            self.fused = FusedStep(
                self.sae,
                self.optimizer,
                self.dead,
                dead_latents="none" if cfg.dead_latents == "resample" else cfg.dead_latents,
                aux_coef=cfg.aux_coef,
                k_aux=self.k_aux,
            )
        self.total_steps = -(-cfg.num_tokens // cfg.batch_tokens)
        self.step_index = 0
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

    def is_finite(self) -> bool:
        """Whether every parameter is finite on every member (a host sync, for checkpoints).
        Collective.
        """
        finite = (
            torch.stack([p.isfinite().all() for p in self.sae.parameters()]).all().to(torch.int32)
        )
        collectives.all_reduce_(
            finite, self.mesh.member_group, self.mesh.members, dist.ReduceOp.MIN
        )
        return bool(finite)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == self.master_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor) -> None:
        """Puts b_dec at the geometric median of the first batch x [N/R, d_in]. Collective over the
        replicas.
        """
        rows = collectives.all_gather(
            x.to(self.master_dtype), self.mesh.replica_group, self.mesh.num_replicas
        )
        self.sae.b_dec.copy_(geometric_median(rows.flatten(0, 1)))
        if self.ema_decay is not None:
            self.optimizer.state[self.sae.b_dec]["ema"].copy_(self.sae.b_dec)

    def step(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        """One optimizer step on this replica's batch x [N/R, d_in]. Collective over the members;
        no host sync except in the first and where `DeadLatents.refresh` says so."""
        if self.step_index == 0:
            self.init_b_dec(x)
        if not self._tuned:
            self._tune(x)
        self.dead.refresh(self.step_index, self.step_index * self.cfg.batch_tokens)
        if self.cfg.dead_latents == "resample":
            self._resample(x)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        metrics = self._fused(x, timer) if self.fused else self._plain(x, timer)
        self.step_index += 1
        return metrics

    def _tune(self, x: Tensor) -> None:
        """Chooses the encoder's design, at this process's first step of this SAE."""
        self._tuned = True
        if isinstance(self.optimizer, SparseAdam):
            W_enc = self.optimizer.compute_weights[0]
        else:
            x, W_enc = x.chunk(self.cfg.micro_batches)[0], self.sae.W_enc
        k = min(self.sae.k, self.sae.d_sae_local)
        self._choice = tune_encoder(
            x, W_enc.detach(), self.sae.b_enc.detach(), k, self.compute_dtype, self.mesh
        )

    def _resample(self, x: Tensor) -> None:
        """Resamples when the tokens seen pass a multiple of dead_after_tokens."""
        seen, batch = self.step_index * self.cfg.batch_tokens, self.cfg.batch_tokens
        window = self.cfg.dead_after_tokens
        if seen // window == max(0, seen - batch) // window:
            return
        resample_(self.sae, self.optimizer, self.dead, x, self.cfg.seed + self.step_index)
        if isinstance(self.optimizer, SparseAdam):
            self.optimizer.refresh_copies_()

    def _fused(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        assert self.fused is not None
        # The kernels read any type; the reference computes in that of its input.
        found = self.fused(x if x.is_cuda else x.to(self.master_dtype), timer)
        return StepMetrics(found.fvu, found.aux, found.l0)

    def _plain(self, x: Tensor, timer: PhaseTimer) -> StepMetrics:
        x = x.to(self.master_dtype)
        variance = total_variance(x, self.mesh)
        self.optimizer.zero_grad(set_to_none=True)
        shown = torch.zeros(3, dtype=x.dtype, device=x.device)
        fired: list[tuple[Tensor, Tensor]] = []
        for part in x.chunk(self.cfg.micro_batches):
            with self._autocast():
                loss, terms, active = self._losses(part, variance, part.shape[0] / x.shape[0])
            timer.mark("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            timer.mark("backward")
            shown += terms
            fired.append(active)
        self._update()
        values, indices = (torch.cat(parts) for parts in zip(*fired, strict=True))
        self.dead.update_(values, indices, self.cfg.batch_tokens)
        collectives.all_reduce_(shown, self.mesh.replica_group, self.mesh.num_replicas)
        collectives.all_reduce_(shown[2], self.mesh.shard_group, self.mesh.num_shards)
        timer.mark("optimizer")
        return StepMetrics(*shown)

    def _losses(
        self, x: Tensor, variance: Tensor, share: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Loss of a micro-batch, its terms [fvu, aux, l0] as shares of the batch's, what fired.

        AuxK is normalised by the micro-batch's own residual; FVU by the whole batch's variance.
        """
        sae, mesh = self.sae, self.mesh
        use_aux = self.cfg.dead_latents == "auxk" and self.dead.any_dead
        aux = torch.zeros((), dtype=x.dtype, device=x.device)
        if use_aux:
            both = sae.encode_with_aux(x, self.dead.mask(), self.k_aux)
            values, indices = both.values, both.indices
            recon = sae.decode(values, indices)
            aux_recon = sae.combine(both.aux_values.relu(), both.aux_indices)
            aux = auxk_loss((x - recon).detach(), aux_recon, mesh) * share
        else:
            values, indices = sae.encode(x)
            recon = sae.decode(values, indices)
        fvu = fvu_loss(x, recon, variance)
        l0 = (values > 0).sum().to(x.dtype) * share / (x.shape[0] * mesh.num_replicas)
        terms = torch.stack([fvu.detach(), aux.detach(), l0])
        return fvu + self.cfg.aux_coef * aux, terms, (values, indices)

    def _update(self) -> None:
        sum_grads_over_replicas_(self.sae)
        project_decoder_grad_(self.sae)
        if self.cfg.grad_clip is not None:
            clip_grads_(self.sae, self.cfg.grad_clip)
        self.optimizer.step()
        renormalise_decoder_(self.sae)

    def _moments(self) -> tuple[str, ...]:
        average = () if self.ema_decay is None else ("ema",)
        return ("exp_avg", "exp_avg_sq", *average)

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to keep, this shard's rows: the parameters, or their running average."""
        named = dict(self.sae.named_parameters())
        if self.ema_decay is None:
            return {name: p.detach() for name, p in named.items()}
        weights: dict[str, Tensor] = {n: self.optimizer.state[p]["ema"] for n, p in named.items()}
        weights["W_dec"] = torch.nn.functional.normalize(weights["W_dec"], dim=1)
        return weights

    def state(self) -> TrainingState:
        """All that a resumed run needs, by reference: parameters, Adam's moments, counters,
        position.
        """
        rows: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, param in self.sae.named_parameters():
            target = whole if name == "b_dec" else rows
            target[name] = param.detach()
            for moment in self._moments():
                target[f"{moment}.{name}"] = self.optimizer.state[param][moment]
        rows["tokens_since_fired"] = self.dead.tokens_since_fired
        info: dict[str, Any] = {
            "step": self.step_index,
            "any_dead": self.dead.any_dead,
            "d_sae": self.sae.d_sae,
        }
        if self._choice is not None:
            shape, design = self._choice
            info["encoder"] = {"shape": list(shape), "design": design}
        return TrainingState(rows, whole, info)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """Puts back what `state` gave, on any number of shards."""
        for name, param in self.sae.named_parameters():
            source = state.whole if name == "b_dec" else state.rows
            param.copy_(source[name])
            moments = {m: source[f"{m}.{name}"] for m in self._moments()}
            step = torch.tensor(float(state.info["step"]))
            if self.fused is None:
                kept = {m: t.to(param) for m, t in moments.items()}
                self.optimizer.state[param] = {"step": step.to(param.device), **kept}
            else:
                for key, value in {"step": step, **moments}.items():
                    self.optimizer.state[param][key].copy_(value)
        if isinstance(self.optimizer, SparseAdam):
            self.optimizer.refresh_copies_()
        self.dead.tokens_since_fired.copy_(state.rows["tokens_since_fired"])
        self.dead.any_dead = state.info["any_dead"]
        self.step_index = state.info["step"]
        if (encoder := state.info.get("encoder")) is not None:
            # A run goes on with the design that it began with.
            shape = encode_choice.Shape(*encoder["shape"])
            if encode_choice.chosen(shape) is None:
                encode_choice.use(shape, encoder["design"])
