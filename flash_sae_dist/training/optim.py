"""Learning rate, clipping and the unit-norm constraint on decoder rows, for dense gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.train import Optimizer, TrainConfig
from ..models.base import SparseCoder
from ..parallel import collectives

# The steps of Gao et al.'s larger runs, 40 billion tokens in batches of 131,072.
_TOPK_STEPS = 300_000
_USUAL_WARMUP = 1000
# Beyond, latents die that short runs do not revive.
_MOST_TIMES = 8


def default_lr(d_sae: int) -> float:
    """`2e-4 / sqrt(d_sae / 2**14)`, the field's scaling with width (Gao et al. 2024)."""
    return float(2e-4 / (d_sae / 2**14) ** 0.5)


def optimizer_lr(optimizer: Optimizer, d_sae: int) -> float | None:
    """What sparsify 1.3 takes with an optimizer, whatever the architecture; None where the
    architecture decides.
    """
    if optimizer == "signum":
        return float(5e-3 / (d_sae / 2**14) ** 0.5)
    return 2e-3 if optimizer == "muon" else None


def budget_lr(
    d_sae: int, steps: int, lr: float | None = None, lr_steps: int = _TOPK_STEPS
) -> float:
    """lr (`default_lr` where it is left out), which is of runs of lr_steps, times
    sqrt(lr_steps / steps) in shorter ones, at most 8 times the TopK family's and what that gets in
    as many steps: docs/notes/quality.md has the trials.
    """
    most = default_lr(d_sae) * max(1.0, min(_MOST_TIMES, math.sqrt(_TOPK_STEPS / steps)))
    if lr is None:
        return most
    return max(lr, min(most, lr * math.sqrt(lr_steps / steps)))


def warmup_steps(total_steps: int, cfg: TrainConfig) -> int:
    """Steps of linear warm-up, train.warmup_steps or what is usual."""
    if cfg.warmup_steps is None:
        return min(_USUAL_WARMUP, total_steps // 20)
    return cfg.warmup_steps


def lr_at(step: int, total_steps: int, peak: float, cfg: TrainConfig) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then as train.schedule says, or as
    it is with a schedule-free optimizer.
    """
    rising = warmup_steps(total_steps, cfg)
    warm = min(1.0, (step + 1) / rising) if rising else 1.0
    if cfg.schedule == "constant" or cfg.optimizer == "signum":
        return peak * warm
    if cfg.schedule == "warmup_stable_decay":
        decay_steps = round(total_steps * cfg.decay_fraction)
        cool = min(1.0, (total_steps - step) / decay_steps) if decay_steps else 1.0
        return peak * warm * cool
    if step < rising:
        return peak * warm
    return peak * _left(step - rising, total_steps - rising, rising, cfg)


def _left(step: int, total_steps: int, rising: int, cfg: TrainConfig) -> float:
    """Part of the peak at a step behind a warm-up of so many, by the formulas of transformers."""
    if cfg.schedule == "inverse_sqrt":
        # It begins where the rise over the warm-up ends; 10,000 steps stand for none.
        scale = rising or 10_000
        return 1 / math.sqrt(1 + step / scale)
    after = min(1.0, step / max(1, total_steps))
    if cfg.schedule == "linear":
        return 1 - after
    if cfg.schedule == "cosine_with_restarts":
        after = 1.0 if after >= 1 else after * cfg.schedule_cycles % 1
    left = (1 + math.cos(math.pi * after)) / 2
    if cfg.schedule == "cosine_with_min_lr":
        return left * (1 - cfg.min_lr_rate) + cfg.min_lr_rate
    return left


@torch.no_grad()
def project_rows_(grad: Tensor, rows: Tensor) -> Tensor:
    """Removes from a gradient [F, D] its part along each of the (unit-norm) rows [F, D], in place;
    returns it.
    """
    along = (grad * rows).sum(dim=1, keepdim=True)
    return grad.addcmul_(rows, along, value=-1)


def project_decoder_grad_(sae: SparseCoder) -> None:
    """Removes from each decoder row's gradient its part along the (unit-norm) row, in place."""
    assert sae.W_dec.grad is not None
    project_rows_(sae.W_dec.grad, sae.W_dec)


@torch.no_grad()
def renormalise_decoder_(sae: SparseCoder) -> None:
    """Scales each decoder row back to unit norm, in place."""
    norms = sae.W_dec.norm(dim=1, keepdim=True)
    sae.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))


@torch.no_grad()
def clip_grads_(sae: SparseCoder, largest: float, unit: float = 1.0) -> None:
    """Scales the gradients in place so that their norm over all shards is at most `largest`, as
    torch.nn.utils.clip_grad_norm_ does on one; those of the biases count times unit.
    """
    grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    squares = {
        n: (g * unit if n in sae.in_data_units else g).square().sum() for n, g in grads.items()
    }
    total = torch.stack([s for n, s in squares.items() if sae.roles[n] == "rows"]).sum()
    collectives.all_reduce_(total, sae.mesh.shard_group, sae.mesh.num_shards)
    # b_dec's gradient, and W_skip's, is the same on every shard and counts once.
    total = total + torch.stack([s for n, s in squares.items() if sae.roles[n] == "whole"]).sum()
    factor = (largest / (total.sqrt() + 1e-6)).clamp_max(1.0)
    for grad in grads.values():
        grad.mul_(factor)


@torch.no_grad()
def sum_grads_over_replicas_(sae: SparseCoder) -> None:
    """Adds up the replicas' gradients in place: each holds its share of the batch's loss."""
    grads: list[Tensor] = [p.grad for p in sae.parameters() if p.grad is not None]
    for grad in grads:
        collectives.all_reduce_(grad, sae.mesh.replica_group, sae.mesh.num_replicas)
