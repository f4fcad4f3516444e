"""What makes a training step: the protocol of engines, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...models.base import SparseCoder
from ..metrics import PhaseTimer, StepMetrics
from .density import Density

# State that begins as a copy of its parameter, not at zero: what `weights` are then made of.
COPIES = frozenset({"z", "ema"})


class Engine(ABC):
    """Trains an SAE a batch a call; its optimizer's state bears the names of torch.optim's."""

    # Of every parameter; `moments_of` where they differ.
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    sae: SparseCoder
    optimizer: torch.optim.Optimizer
    room = 0
    """Slots of captured steps' lists, where their lengths vary; a checkpoint keeps it."""
    ramp: Tensor
    """Scalar on the device: the part of the sparsity's coefficient that its schedule gives."""

    @abstractmethod
    def step(self, x: Tensor, timer: PhaseTimer, y: Tensor | None = None) -> StepMetrics:
        """One optimizer step on this replica's batch x [N/R, d_in], of a transcoder with its target
        rows y [N/R, d_out]. Collective over the members; no host sync but where a graph is
        captured.
        """

    def shown(self, values: Tensor) -> StepMetrics:
        """A step's metrics: four, and behind them the model's loss where there is one, or of a
        crosscoder those by hookpoint [S], which are kept here.
        """
        if self.sae.sources:
            self.source_fvus = values[4:]
        elif len(values) > 4:
            self.model_loss = values[4]
        return StepMetrics(*values[:4])

    @property
    def averages(self) -> bool:
        """Whether `weights` are an average, and not the parameters."""
        return not COPIES.isdisjoint(self.moments_of(self.sae.W_dec))

    @property
    def encoder_weights(self) -> Tensor:
        """W_enc [d_sae_local, d_in] as the encoder's kernels get it."""
        return self.sae.W_enc.detach()

    @abstractmethod
    def set_unit(self, unit: float) -> None:
        """Gives the parameters that are in the data's units steps in this unit, the data's root
        mean square: training then does not depend on the data's scale. Adam's step is lr whatever
        the gradient's size, and under x -> s x the gradients of the matrices stay while those of
        the biases go with 1/s: theirs is lr * unit, with eps / unit. To be called before the first
        step and before `load_state`.
        """

    source_fvus: Tensor | None = None
    """FVU of each of a crosscoder's hookpoints [S] in the last step, on the device."""
    model_loss: Tensor | None = None
    """What the model lost in the last step, a scalar on the device; of train.loss ce and kl."""
    density: Density | None = None
    """Whether steps are dense or sparse; None where they are always sparse."""

    def choose_form(self, step: int) -> None:
        """Decides whether a step is dense or sparse; see Density."""
        if self.density is not None:
            self.density.choose(step)

    def set_lr(self, lr: float) -> None:
        """Learning rate of the coming steps, for data of root mean square 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def set_ramp(self, part: float) -> None:
        """Part of the sparsity's coefficient in the coming steps."""
        self.ramp.fill_(part)

    def refresh_(self) -> None:
        """Takes in parameters that others have changed."""
        return

    @torch.no_grad()
    def begin_(self) -> None:
        """Takes in parameters that others have set before the first step."""
        for param in self.sae.parameters():
            for moment in COPIES.intersection(self.moments_of(param)):
                if (kept := self.kept(param, moment)) is not None:
                    kept.copy_(param)
        self.refresh_()

    def moments_of(self, param: Tensor) -> tuple[str, ...]:
        """Names of the optimizer's state of a parameter that is as large as it, or as long."""
        del param
        return self.moments

    def kept(self, param: Tensor, moment: str) -> Tensor | None:
        """What the optimizer has of that name, by reference; None before its first step."""
        found: Tensor | None = self.optimizer.state[param].get(moment)
        return found

    def forget_(self, mask: Tensor) -> None:
        """Begins the optimizer's state of the latents in mask [d_sae_local] anew, whose parameters
        have been set. A running average stays.
        """
        for name, param in self.sae.named_parameters():
            for moment in set(self.moments_of(param)) - {"ema"}:
                kept = self.kept(param, moment)
                if self.sae.roles[name] == "rows" and kept is not None:
                    kept[mask] = param.detach()[mask].to(kept) if moment in COPIES else 0

    def average(self, param: Tensor) -> Tensor:
        """What is kept of a parameter."""
        return param

    def weights(self) -> dict[str, Tensor]:
        """The weights to keep, by name, this shard's rows: the parameters, or an average of them,
        an SAE's decoder rows at unit norm.
        """
        named = self.sae.named_parameters(remove_duplicate=False)
        weights = {name: self.average(p).detach() for name, p in named}
        if self.averages and not self.sae.transcodes:
            weights["W_dec"] = torch.nn.functional.normalize(weights["W_dec"], dim=1)
        return weights

    def state(self) -> dict[str, Tensor]:
        """Parameters by name and their moments as `MOMENT.NAME`, by reference."""
        out: dict[str, Tensor] = {}
        for name, param in self.sae.named_parameters():
            out[name] = param.detach()
            for moment in self.moments_of(param):
                # torch's optimizers make them at their first step.
                zero = param.detach().new_zeros(()).expand_as(param)
                start = param.detach() if moment in COPIES else zero
                kept = self.kept(param, moment)
                out[f"{moment}.{name}"] = start if kept is None else kept
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Puts back what `state` gave after `step` steps."""
        for name, param in self.sae.named_parameters():
            param.copy_(state[name])
            moments = {m: state[f"{m}.{name}"].to(param) for m in self.moments_of(param)}
            count = torch.tensor(float(step), device=param.device)
            self.optimizer.state[param] = {"step": count, **moments}
