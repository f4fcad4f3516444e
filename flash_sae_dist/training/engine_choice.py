"""The one place where `train.engine` is decided."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..config.base import ConfigError
from ..config.train import FusedTrainConfig, TrainConfig

# Widest row of kernels/sparse_adam.py.
_MAX_WIDTH = 16384


class EngineChoice(NamedTuple):
    """The engine of a training, and why it is not the fused one where auto had to leave it."""

    engine: Literal["fused", "autograd"]
    reason: str | None = None


def choose_engine(cfg: TrainConfig, d_in: int) -> EngineChoice:
    """auto is the fused engine unless something really needs autograd.

    Raises ConfigError where a key that only the fused engine has meets something that needs
    autograd.
    """
    if not isinstance(cfg, FusedTrainConfig):
        return EngineChoice("autograd")
    reason = _needs_autograd(cfg, d_in)
    if reason is None:
        return EngineChoice("fused")
    if key := _fused_only(cfg):
        raise ConfigError(
            f"train.{key}={getattr(cfg, key)!r} needs the fused engine, but {reason}; "
            f"drop train.{key}"
        )
    return EngineChoice("autograd", reason)


def _needs_autograd(cfg: FusedTrainConfig, d_in: int) -> str | None:
    if d_in > _MAX_WIDTH:
        return f"its kernels take widths up to {_MAX_WIDTH}, not {d_in}"
    # TODO(#16): delete this loop when the fused engine clips, accumulates and replicates.
    for key, default in {"num_replicas": 1, "grad_clip": None, "micro_batches": 1}.items():
        if getattr(cfg, key) != default:
            return f"it has no train.{key}={getattr(cfg, key)!r} yet"
    return None


def _fused_only(cfg: FusedTrainConfig) -> str | None:
    """A key that is set to what only the fused engine does."""
    if cfg.dead_latents == "ghost":
        return "dead_latents"
    if cfg.engine == "fused":
        return "engine"
    own = FusedTrainConfig.model_fields.keys() - TrainConfig.model_fields.keys()
    fields = FusedTrainConfig.model_fields
    return next((key for key in sorted(own) if getattr(cfg, key) != fields[key].default), None)
