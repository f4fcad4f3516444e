"""Keys of the section train that are left out stand for what is usual with the architecture."""

from __future__ import annotations

from typing import TypeVar

from ..config.base import ConfigError
from ..config.sae import SAEConfig
from ..config.train import TrainConfig
from ..models import ARCHITECTURES
from .optim import default_lr, optimizer_lr

_Train = TypeVar("_Train", bound=TrainConfig)


def with_defaults(train: _Train, sae: SAEConfig, d_in: int) -> _Train:
    """The section train of a job at a hookpoint of some width, nothing of it left to the
    architecture. Raises ConfigError where the architecture cannot do what it asks for.
    """
    kind = ARCHITECTURES[sae.architecture]
    usual, chosen = kind.defaults, train.dead_latents
    if chosen is not None and chosen not in kind.revivals:
        raise ConfigError(
            f"train.dead_latents={chosen!r} does nothing for sae.architecture="
            f"{sae.architecture!r}; choose one of {', '.join(sorted(kind.revivals))}, or drop it"
        )
    if train.target is not None and (train.dead_latents or "") in ("resample", "ghost"):
        raise ConfigError(
            f"train.dead_latents={train.dead_latents!r} takes directions of the input, which "
            f"train.target={train.target!r} does not have; choose auxk or none"
        )
    if train.target is not None and (scaled := kind.scaled_penalty(sae)):
        raise ConfigError(
            f"{scaled} penalises activations by their size, which train.target={train.target!r} "
            "makes void: a transcoder's decoder rows have any norm; choose topk, batch_topk, "
            "matryoshka, multi_topk or jumprelu with sae.sparsity=l0, target or quadratic and no "
            "sae.pre_act_coefficient, or drop train.target"
        )
    if sae.skip and train.target is None:
        raise ConfigError(
            "sae.skip=True is of transcoders alone; name their target as train.target, or drop it"
        )
    lr = optimizer_lr(train.optimizer, sae.width(d_in)) or usual.lr or default_lr(sae.width(d_in))
    decay = {"adamw": 0.01, "muon": 0.0}.get(train.optimizer)
    return train.model_copy(
        update={
            "lr": lr if train.lr is None else train.lr,
            "weight_decay": decay if train.weight_decay is None else train.weight_decay,
            "adam_betas": usual.adam_betas if train.adam_betas is None else train.adam_betas,
            "dead_latents": usual.dead_latents if chosen is None else chosen,
        }
    )
