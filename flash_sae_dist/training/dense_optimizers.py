"""The optimizers of the autograd engine, which step from dense gradients, by train.optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.train import TrainConfig
from ..models.base import SparseCoder
from ..parallel.mesh import Mesh
from .eight_bit import check_eight_bit, eight_bit_adam, is_eight_bit, names_of, wants_eight_bit
from .muon import Muon
from .schedule_free import ScheduleFreeSign


def _groups(sae: SparseCoder, decay: float) -> list[dict[str, object]]:
    """Param groups: the matrices, what is in the data's units, what else there is."""
    named = list(sae.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2]
    in_units = [p for n, p in named if p.ndim != 2 and n in sae.in_data_units]
    others = [p for n, p in named if p.ndim != 2 and n not in sae.in_data_units]
    groups: list[dict[str, object]] = [{"params": matrices, "weight_decay": decay}]
    groups.append({"params": in_units, "weight_decay": 0.0})
    return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups


def make_optimizer(sae: SparseCoder, cfg: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """What train.optimizer names; its second group has the parameters in the data's units."""
    decay = cfg.weight_decay or 0.0
    groups = _groups(sae, decay if cfg.optimizer == "adamw" else 0.0)
    betas, eps = cfg.adam_betas or (0.9, 0.999), cfg.adam_eps
    if cfg.optimizer == "signum":
        return ScheduleFreeSign(groups, lr)
    if cfg.optimizer == "muon":
        rows: dict[Tensor, tuple[int, Mesh | None]] = {}
        for name, param in sae.named_parameters():
            if param.ndim == 2:
                split = sae.roles[name] == "rows"
                rows[param] = (sae.d_sae, sae.mesh) if split else (param.shape[0], None)
        return Muon(groups, lr, rows_of=rows, betas=betas, eps=eps, decay=decay)
    if wants_eight_bit(cfg):
        check_eight_bit(cfg, *(p.shape for p in sae.parameters() if p.ndim == 2))
        return eight_bit_adam(groups, lr=lr, betas=betas, eps=eps)
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=betas, eps=eps, fused=True)


def moments_of(optimizer: torch.optim.Optimizer, param: Tensor) -> tuple[str, ...]:
    """The names of what an optimizer keeps of a parameter, as large as it or as long."""
    if is_eight_bit(optimizer):
        return names_of(param)
    if isinstance(optimizer, ScheduleFreeSign):
        return ("z",)
    if isinstance(optimizer, Muon) and param in optimizer.rows_of:
        return ("momentum_buffer",)
    return ("exp_avg", "exp_avg_sq")
