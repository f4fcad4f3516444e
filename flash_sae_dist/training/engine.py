"""The one place where `train.engine` is decided and an engine is made."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal, NamedTuple

import torch

from ..config.base import ConfigError
from ..config.deepspeed import read_deepspeed
from ..config.sae import SAEConfig
from ..config.train import DeepSpeedTrainConfig, FusedTrainConfig, TrainConfig
from ..kernels.dispatch import fp8_obstacle
from ..models import ARCHITECTURES
from ..models.base import SparseCoder
from ..models.dead_latents import DeadLatents
from ..parallel.mesh import Mesh
from .engines.autograd import AutogradEngine
from .engines.base import Engine
from .engines.fused import FusedEngine
from .schedule_free import MOMENTUM
from .sparse_adam import SparseAdam

logger = logging.getLogger(__name__)


class EngineChoice(NamedTuple):
    """The engine of a training, and why it is not the fused one where auto had to leave it."""

    engine: Literal["fused", "autograd", "deepspeed"]
    reason: str | None = None


def choose_engine(cfg: TrainConfig, sae: SAEConfig | None = None) -> EngineChoice:
    """auto is the fused engine unless something really needs autograd: what the section sae asks
    for, an optimizer of dense gradients, or a loss of the model.

    Raises ConfigError where a key that only the fused engine has meets something that needs
    autograd.
    """
    if not isinstance(cfg, FusedTrainConfig):
        return EngineChoice("deepspeed" if isinstance(cfg, DeepSpeedTrainConfig) else "autograd")
    reason = None if sae is None else ARCHITECTURES[sae.architecture].autograd_reason(sae)
    if cfg.optimizer == "muon":
        reason = f"train.optimizer={cfg.optimizer!r} steps from dense gradients"
    if cfg.loss != "fvu":
        reason = f"the gradient of train.loss={cfg.loss!r} comes through the model"
    if reason is None:
        return EngineChoice("fused")
    if key := _fused_only(cfg):
        raise ConfigError(
            f"train.{key}={getattr(cfg, key)!r} needs the fused engine, but {reason}; "
            f"drop train.{key}"
        )
    return EngineChoice("autograd", reason)


def check_installed(cfg: TrainConfig) -> None:
    """Raises ConfigError where an engine's library is not there."""
    if isinstance(cfg, DeepSpeedTrainConfig) and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.engine='deepspeed' needs DeepSpeed; pip install 'flash_sae_dist[deepspeed]', or "
            "change train.engine"
        )


def check_engine(cfg: TrainConfig, mesh: Mesh, sae: SAEConfig | None = None) -> None:
    """Raises ConfigError as `choose_engine`, and where DeepSpeed is told or given what it cannot
    do.
    """
    engine = choose_engine(cfg, sae).engine
    if engine != "fused" and getattr(sae, "search", "exact") != "exact":
        raise ConfigError(
            f"sae.search='fp8' is the fused engine's, and this training's is {engine}; drop "
            "sae.search, or set train.engine=fused"
        )
    if cfg.loss != "fvu" and mesh.members > 1:
        raise ConfigError(
            f"train.loss={cfg.loss!r} runs the model with one whole SAE in it, but "
            f"train.num_shards={mesh.num_shards} x train.num_replicas={mesh.num_replicas} split "
            "it; set both to 1 (a grid takes one process for each SAE), or train.loss=fvu"
        )
    if not isinstance(cfg, DeepSpeedTrainConfig):
        return
    read_deepspeed(cfg, mesh.num_replicas)
    if mesh.num_groups > 1:
        raise ConfigError(
            f"train.engine='deepspeed' trains on all processes together, but train.num_shards="
            f"{mesh.num_shards} x train.num_replicas={mesh.num_replicas} leave "
            f"{mesh.num_groups} groups of them; raise train.num_replicas, or change train.engine"
        )


def _fused_only(cfg: FusedTrainConfig) -> str | None:
    """A key that is set to what only the fused engine does."""
    if cfg.dead_latents == "ghost":
        return "dead_latents"
    if cfg.engine == "fused":
        return "engine"
    own = FusedTrainConfig.model_fields.keys() - TrainConfig.model_fields.keys()
    fields = FusedTrainConfig.model_fields
    return next((key for key in sorted(own) if getattr(cfg, key) != fields[key].default), None)


def _check_device(sae: SparseCoder) -> None:
    """Raises ConfigError where its device lacks what the section sae asks for."""
    obstacle = fp8_obstacle(sae.W_dec.device)
    if obstacle is not None and getattr(sae.config, "search", "exact") != "exact":
        raise ConfigError(f"sae.search='fp8' cannot be here: {obstacle}; drop sae.search")


def make_engine(
    sae: SparseCoder, dead: DeadLatents, cfg: TrainConfig, compute_dtype: torch.dtype
) -> Engine:
    """The engine that a config asks for, whose keys that an architecture decides are filled in; one
    log line where auto is not the fused one. Raises ConfigError as `check_engine`.
    """
    check_engine(cfg, sae.mesh, sae.config)
    _check_device(sae)
    assert cfg.lr is not None
    assert cfg.adam_betas is not None
    assert cfg.dead_latents is not None
    k_aux = min(cfg.k_aux or max(1, sae.d_in // 2), sae.d_sae)
    engine, reason = choose_engine(cfg, sae.config)
    if reason is not None and sae.mesh.is_lead:
        logger.info("train.engine=auto is autograd, which is slower than fused: %s", reason)
    if isinstance(cfg, DeepSpeedTrainConfig):
        # Only here: most who install this have no DeepSpeed.
        from .engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(sae, dead, cfg, lr=cfg.lr, k_aux=k_aux, compute_dtype=compute_dtype)
    if engine == "autograd" or not isinstance(cfg, FusedTrainConfig):
        return AutogradEngine(sae, dead, cfg, lr=cfg.lr, k_aux=k_aux, compute_dtype=compute_dtype)
    sign = cfg.optimizer == "signum"
    optimizer = SparseAdam(
        sae, cfg.lr, betas=(MOMENTUM, 0.0) if sign else cfg.adam_betas, eps=cfg.adam_eps, sign=sign,
        lazy=cfg.adam_mode == "lazy",
        moment_dtype=getattr(torch, cfg.moment_dtype),
        compute_dtype=compute_dtype,
        ema_decay=cfg.ema_decay,
        decay=cfg.weight_decay or 0.0,
        grad_clip=cfg.grad_clip,
        seed=cfg.seed,
    )  # fmt: skip
    return FusedEngine(
        sae,
        optimizer,
        dead,
        dead_latents="none" if cfg.dead_latents == "resample" else cfg.dead_latents,
        aux_coef=cfg.aux_coef,
        k_aux=k_aux,
        micro_batches=cfg.micro_batches,
    )
