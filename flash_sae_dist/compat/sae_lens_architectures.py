"""SAEs of this library by SAELens's configs for training; what is not covered is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..models.batch_topk import BatchTopKConfig
from ..models.jumprelu import JumpReLUConfig
from ..models.matryoshka import MatryoshkaConfig
from .recipe import Watched, WatchedBatch, WatchedJumpReLU, WatchedMatryoshka, refuse


def _topk(cfg: Any, place: dict[str, Any]) -> Watched:
    return Watched(cfg.d_in, cfg.d_sae, cfg.k, **place)


def _batch_topk(cfg: Any, place: dict[str, Any]) -> WatchedBatch:
    refuse("SAELens", {"k": cfg.k}, {"k": round(cfg.k)})
    return WatchedBatch(BatchTopKConfig(d_sae=cfg.d_sae, k=round(cfg.k)), cfg.d_in, **place)


def _matryoshka(cfg: Any, place: dict[str, Any]) -> WatchedMatryoshka:
    whole = {"k": round(cfg.k), "use_matryoshka_aux_loss": False}
    refuse("SAELens", vars(cfg), whole)
    config = MatryoshkaConfig(
        d_sae=cfg.d_sae, k=whole["k"], prefix_widths=tuple(cfg.matryoshka_widths),
        prefix_losses="sum",
    )  # fmt: skip
    return WatchedMatryoshka(config, cfg.d_in, **place)


def _jumprelu(cfg: Any, place: dict[str, Any]) -> WatchedJumpReLU:
    modes = {"step": "l0", "quadratic": "quadratic"}
    covered = {"jumprelu_sparsity_loss_mode": tuple(modes), "pre_act_loss_coefficient": (None, 0)}
    refuse("SAELens", vars(cfg), {**covered, "dtype": ("float32", "torch.float32")})
    mode: Any = modes[cfg.jumprelu_sparsity_loss_mode]
    config = JumpReLUConfig(
        d_sae=cfg.d_sae, sparsity=mode, sparsity_coefficient=cfg.l0_coefficient,
        target_l0=cfg.target_l0 if mode == "quadratic" else None,
        bandwidth=cfg.jumprelu_bandwidth, ste_to_input=cfg.jumprelu_ste_to_input,
    )  # fmt: skip
    return WatchedJumpReLU(config, cfg.d_in, **place)


# By SAELens's name of an architecture.
MAKERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "topk": _topk,
    "batchtopk": _batch_topk,
    "matryoshka_batchtopk": _matryoshka,
    "jumprelu": _jumprelu,
}
