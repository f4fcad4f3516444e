"""The autograd engine: PyTorch's autograd and an optimizer over dense gradients, torch.optim.Adam's
with the same arithmetic as the fused engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config.train import TrainConfig
from ...kernels.dispatch import implementation
from ...kernels.reference import Dense
from ...models.base import Codes, SparseCoder
from ...models.dead_latents import DeadLatents
from ...models.losses import (
    auxk_loss,
    fvu_loss,
    inverse_variance,
    inverted,
    residual_sums,
    source_fvus,
    source_sums,
    total_variance,
)
from ...models.sparsity import Batch
from ...models.threshold import ThresholdCoder
from ...parallel.collectives import all_reduce_
from ...parallel.selection import global_limits
from .. import eight_bit
from ..dense_optimizers import make_optimizer, moments_of
from ..metrics import PhaseTimer, StepMetrics
from ..optim import (
    clip_grads_,
    project_decoder_grad_,
    renormalise_decoder_,
    sum_grads_over_replicas_,
)
from ..schedule_free import ScheduleFreeSign
from .base import Engine
from .density import Density


class Shared(NamedTuple):
    """What the micro-batches of a step share."""

    batch: Batch
    inverse_residual: Tensor | None  # scalar, AuxK's normaliser; None where nothing is revived


class Losses(NamedTuple):
    """What a micro-batch comes to."""

    loss: Tensor  # scalar, with its graph
    shown: Tensor  # [4] of StepMetrics, shares of the batch's, and the model's loss if there is one
    active: Codes
    of_sources: Tensor | None  # source_sums, of a crosscoder


class AutogradEngine(Engine):
    """Dense gradients; any optimizer that torch has would do."""

    def __init__(
        self,
        sae: SparseCoder,
        dead: DeadLatents,
        cfg: TrainConfig,
        *,
        lr: float,
        k_aux: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self.sae, self.dead, self.cfg, self.k_aux = sae, dead, cfg, k_aux
        self.compute_dtype = compute_dtype
        self.optimizer: torch.optim.Optimizer = make_optimizer(sae, cfg, lr)
        self.unit = 1.0
        # What the model loses with a reconstruction, of rows as the engine gets them.
        self.end_loss: Callable[[Tensor], Tensor] | None = None
        self.ramp = torch.ones_like(sae.b_dec[0], requires_grad=False)
        self.density = Density.of(sae)

    def set_unit(self, unit: float) -> None:
        """See Engine."""
        self.unit = unit
        if "eps" in self.optimizer.param_groups[1]:
            self.optimizer.param_groups[1]["eps"] = self.cfg.adam_eps / unit
        self.set_lr(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """See Engine."""
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr * self.unit if number == 1 else lr

    def moments_of(self, param: Tensor) -> tuple[str, ...]:
        """See Engine."""
        return moments_of(self.optimizer, param)

    def kept(self, param: Tensor, moment: str) -> Tensor | None:
        """See Engine."""
        if eight_bit.is_eight_bit(self.optimizer):
            return eight_bit.kept(self.optimizer, param, moment)
        return super().kept(param, moment)

    @torch.no_grad()
    def average(self, param: Tensor) -> Tensor:
        """See Engine."""
        if isinstance(self.optimizer, ScheduleFreeSign):
            return self.optimizer.average(param)
        return param

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """See Engine."""
        if eight_bit.is_eight_bit(self.optimizer):
            for name, param in self.sae.named_parameters():
                param.detach().copy_(state[name])
            eight_bit.load_(self.optimizer, self.sae, state, step)
            return
        super().load_state(state, step)
        if isinstance(self.optimizer, ScheduleFreeSign):
            self.optimizer.count = step

    def step(self, x: Tensor, timer: PhaseTimer, y: Tensor | None = None) -> StepMetrics:
        """See Engine."""
        sae, mesh = self.sae, self.sae.mesh
        x = x.to(sae.b_dec.dtype)
        y = x if y is None else y.to(sae.b_dec.dtype)
        shared = self._shared(x, y)
        self._begin()
        shown = torch.zeros(4 + (self.end_loss is not None), dtype=x.dtype, device=x.device)
        of_sources: list[Tensor] = []
        active: list[Codes] = []
        parts = self._parts(x, y)
        for number, part in enumerate(parts, 1):
            loss, terms, codes, own = self._forward(*part, shared)
            timer.mark("forward")
            self._backward(loss, is_last=number == len(parts))
            timer.mark("backward")
            shown += terms
            active.append(codes)
            of_sources += [] if own is None else [own]
        self._update()
        self.sae.observe_(active)
        values = torch.cat([codes.values for codes in active])
        latents = torch.cat([codes.latents for codes in active])
        self.dead.update_(values, latents, x.shape[0] * mesh.num_replicas)
        all_reduce_(shown, mesh.replica_group, mesh.num_replicas)
        all_reduce_(shown[2], mesh.shard_group, mesh.num_shards)
        if self.density is not None:
            self.density.saw_(shown[2])
        timer.mark("optimizer")
        if of_sources:
            sums, tokens = torch.stack(of_sources).sum(dim=0), shared.batch.tokens
            shown = torch.cat([shown, source_fvus(sums, sae.sources, tokens, mesh).to(shown)])
        return self.shown(shown)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == self.sae.b_dec.dtype:
            return nullcontext()
        return torch.autocast(self.sae.b_dec.device.type, dtype=self.compute_dtype)

    def _revives(self) -> bool:
        return self.cfg.dead_latents == "auxk" and self.dead.any_listed

    def _parts(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches, of a dense step also blocks that its memory allows; what the model
        loses is of the whole batch.
        """
        count = self.cfg.micro_batches
        if self.density is not None and self.density.is_dense and self.end_loss is None:
            count = max(count, -(-len(x) // self.density.block))
        return list(zip(x.chunk(count), y.chunk(count), strict=True))

    def _candidates(self, x: Tensor) -> Codes:
        if self.density is not None and self.density.is_dense:
            assert isinstance(self.sae, ThresholdCoder)
            return self.sae.dense_candidates(x)
        return self.sae.candidates(x)

    def _shared(self, x: Tensor, y: Tensor) -> Shared:
        sae, tokens = self.sae, x.shape[0] * self.sae.mesh.num_replicas
        inverse = inverted(total_variance(y, sae.mesh))
        l0 = self._l0(x) / tokens if sae.needs_l0 else None
        batch = Batch(inverse, tokens, self.unit, self.ramp, l0)
        return Shared(batch, self._inverse_residual(x, y) if self._revives() else None)

    @torch.no_grad()
    def _l0(self, x: Tensor) -> Tensor:
        """Active latents of the whole batch, which take a pass of their own. Collective."""
        mesh, total = self.sae.mesh, torch.zeros((), dtype=x.dtype, device=x.device)
        for part, _ in self._parts(x, x):
            with self._autocast():
                total += (self.sae.activate(self._candidates(part)).values > 0).sum()
        all_reduce_(total, mesh.member_group, mesh.members)
        return total

    @torch.no_grad()
    def _inverse_residual(self, x: Tensor, y: Tensor) -> Tensor:
        """AuxK's normaliser over the whole batch, whose residual takes a forward pass of its own:
        the micro-batches' gradients then add up to the batch's.
        """
        sums, squares = torch.zeros_like(y[0]), torch.zeros((), dtype=x.dtype, device=x.device)
        for part, target in self._parts(x, y):
            with self._autocast():
                codes = self.sae.activate(self._candidates(part))
                residual = target - self.sae.decode(self.sae.main_codes(codes), part)
            found = residual_sums(residual, self.sae.mesh)
            sums, squares = sums + found[0], squares + found[1]
        return inverse_variance(sums, squares, x.shape[0] * self.sae.mesh.num_replicas)

    def _forward(self, x: Tensor, y: Tensor, shared: Shared) -> Losses:
        """A micro-batch x with target rows y."""
        with self._autocast():
            return self._losses(x, y, shared)

    def _losses(self, x: Tensor, y: Tensor, shared: Shared) -> Losses:
        sae, batch = self.sae, shared.batch
        found = self._candidates(x)
        codes = sae.activate(found)
        recons = sae.nested(codes, x)
        fvus = torch.stack([fvu_loss(y, recon, batch.inverse) for recon in recons])
        loss = (fvus * fvus.new_tensor(sae.level_weights)).sum()
        of_model = []
        if self.end_loss is not None:
            of_model = [self.end_loss(recons[sae.main_level])]
            loss = self.cfg.fvu_coef * loss + of_model[0]
        penalty = sae.penalty(y, found, codes, batch)
        if sae.penalises_dead and self.dead.any_listed:
            lost = sae.dead_penalty(x, self.dead.rows, self.dead.left_out(), batch)
            penalty = penalty + lost
        aux = torch.zeros((), dtype=x.dtype, device=x.device)
        if shared.inverse_residual is not None:
            residual = (y - recons[sae.main_level]).detach()
            aux = auxk_loss(residual, self._aux_recon(x), shared.inverse_residual)
        codes = sae.main_codes(codes)
        l0 = (codes.values > 0).sum().to(x.dtype) / batch.tokens
        shown = torch.stack([fvus[sae.main_level], aux, l0, penalty, *of_model]).detach()
        active: Codes = codes._replace(values=codes.values.detach())
        if isinstance(active, Dense):
            active = active.most()
        own = None
        if sae.sources:
            rows = y.detach() - sae.b_dec.detach()
            own = source_sums(y - recons[sae.main_level].detach(), rows, sae.sources)
        return Losses(loss + penalty + self.cfg.aux_coef * aux, shown, active, own)

    def _aux_recon(self, x: Tensor) -> Tensor:
        """What each token's k_aux best listed latents make of the residual [N, d_in], no b_dec."""
        sae, dead = self.sae, self.dead
        pre = sae.pre_activations(x, dead.rows, dead.bias(sae.b_enc))
        with torch.no_grad():
            raw, none = pre.detach(), torch.zeros_like(pre[0])
            k = self.k_aux if dead.num_listed > self.k_aux else None
            limits = None
            if k is not None and sae.mesh.num_shards > 1:
                limits = global_limits(raw, none, k, sae.mesh)
            select = implementation("select_dead", raw)
            taken = select(raw, none, k, False, raw.dtype, limits) != 0
        return sae.combine_rows(pre.relu() * taken, dead.rows)

    def _begin(self) -> None:
        """Drops the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds a micro-batch's gradients up."""
        del is_last
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        """The optimizer's step, from the gradients of all micro-batches."""
        sum_grads_over_replicas_(self.sae)
        if not self.sae.transcodes:
            project_decoder_grad_(self.sae)
        if self.cfg.grad_clip is not None:
            clip_grads_(self.sae, self.cfg.grad_clip, self.unit)
        self.optimizer.step()
        if not self.sae.transcodes:
            renormalise_decoder_(self.sae)
        self.sae.project_()
