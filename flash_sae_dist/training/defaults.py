"""Keys of the section train that are left out stand for what is usual with the architecture."""

from __future__ import annotations

from typing import Literal, TypeVar

from ..config.base import ConfigError, sources_of
from ..config.sae import SAEConfig
from ..config.train import TrainConfig
from ..models import ARCHITECTURES
from ..models.crosscoder import Crosscoder, CrosscoderConfig
from .optim import budget_lr, default_lr, optimizer_lr

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
    _check_hookpoint(train, sae)
    if sae.skip and train.target is None:
        raise ConfigError(
            "sae.skip=True is of transcoders alone; name their target as train.target, or drop it"
        )
    _check_start(train, sae)
    decay = {"adamw": 0.01, "muon": 0.0}.get(train.optimizer)
    return train.model_copy(
        update={
            "lr": usual_lr(train, sae, d_in),
            "weight_decay": decay if train.weight_decay is None else train.weight_decay,
            "encoder_scale": train.encoder_scale or _usual_scale(train, sae),
            "adam_betas": usual.adam_betas if train.adam_betas is None else train.adam_betas,
            "dead_latents": usual.dead_latents if chosen is None else chosen,
        }
    )


def _check_hookpoint(train: TrainConfig, sae: SAEConfig) -> None:
    """Raises ConfigError where several hookpoints meet no crosscoder, or one meets one."""
    crosses, count = isinstance(sae, CrosscoderConfig), len(sources_of(train.hookpoint or ""))
    if crosses and train.target is not None:
        raise ConfigError(
            f"train.target={train.target!r} is of transcoders, and sae.architecture="
            f"{sae.architecture!r} gives the rows that it reads; drop it"
        )
    if crosses and train.loss != "fvu":
        raise ConfigError(
            f"train.loss={train.loss!r} puts the rows of one hookpoint back into the model, and "
            f"sae.architecture={sae.architecture!r} gives those of several; set train.loss=fvu"
        )
    if crosses and train.init_from is not None:
        raise ConfigError(
            f"train.init_from={train.init_from!r} begins SAEs alone, not sae.architecture="
            f"{sae.architecture!r}; drop it"
        )
    if crosses and train.hookpoint is not None and count == 1:
        raise ConfigError(
            f"sae.architecture={sae.architecture!r} reads several hookpoints, and train.hookpoint="
            f"{train.hookpoint!r} is one; join them by +, as layers.4+layers.8"
        )
    if count > 1 and not crosses:
        kinds = [name for name, of in ARCHITECTURES.items() if issubclass(of, Crosscoder)]
        raise ConfigError(
            f"train.hookpoint={train.hookpoint!r} joins hookpoints, which sae.architecture="
            f"{sae.architecture!r} cannot read; choose one of {', '.join(kinds)}"
        )


def usual_lr(train: TrainConfig, sae: SAEConfig, d_in: int) -> float:
    """train.lr, or what it stands for where it is left out: the optimizer's own, or else that of
    the architecture. Raises ConfigError where train.lr_rule has no rate to go by.
    """
    if train.lr is not None:
        return train.lr
    kind, d_sae = ARCHITECTURES[sae.architecture], sae.width(d_in)
    usual, whose = kind.defaults, f"sae.architecture={sae.architecture!r}"
    own, lr_steps = usual.lr, usual.lr_steps
    if (rate := optimizer_lr(train.optimizer, d_sae)) is not None:
        own, lr_steps, whose = rate, None, f"train.optimizer={train.optimizer!r}"
    if lr_steps is None:
        assert own is not None
        if train.lr_rule == "budget":
            raise ConfigError(
                f"train.lr_rule='budget' is of the TopK family and jumprelu with Adam, not of "
                f"{whose}, whose rate is {own:g}; give train.lr, or drop it"
            )
        return own
    tried = train.init_from is None and train.target is None and not issubclass(kind, Crosscoder)
    if (train.lr_rule or ("budget" if tried else "width")) == "width":
        return default_lr(d_sae) if own is None else own
    return budget_lr(d_sae, -(-train.num_tokens // train.batch_tokens), own, lr_steps)


def _usual_scale(train: TrainConfig, sae: SAEConfig) -> Literal["unit", "least_squares"]:
    return "unit" if _not_scaled(train, sae) else "least_squares"


def _not_scaled(train: TrainConfig, sae: SAEConfig) -> str | None:
    """What train.encoder_scale does not scale; None where it does."""
    kind = ARCHITECTURES[sae.architecture]
    if train.init_from is not None:
        return f"train.init_from={train.init_from!r}, whose encoder is given"
    if train.target is not None:
        return f"train.target={train.target!r}: a transcoder's decoder begins at zero"
    if issubclass(kind, Crosscoder):
        return f"crosscoders such as sae.architecture={sae.architecture!r}"
    if not kind.scales_encoder(sae):
        return "latents that are active above a threshold, of which half are at the start"
    return None


def _check_start(train: TrainConfig, sae: SAEConfig) -> None:
    """Raises ConfigError where train.encoder_scale scales nothing."""
    what = _not_scaled(train, sae)
    if train.encoder_scale == "least_squares" and what is not None:
        raise ConfigError(f"train.encoder_scale={train.encoder_scale!r} is not for {what}; drop it")
