"""Adam with moments of 8 bits, bitsandbytes's (Dettmers et al. 2022, arXiv 2110.02861).

It keeps a scale of BLOCK elements each, in the order of memory. A matrix whose rows are whole
blocks is then stepped the same on any number of shards, bit for bit, and its scales are as many a
row, so that checkpoints hold them as rows. Moments of vectors stay float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.base import ConfigError
from ..config.train import TrainConfig

BLOCK = 256
_MOST = 2**31 - 1  # its kernels count elements in 32 bits
_SCALES = ("absmax1", "absmax2")
_LIBRARY = "bitsandbytes"


def wants_eight_bit(cfg: TrainConfig) -> bool:
    """Whether a config asks for it."""
    return getattr(cfg, "moment_dtype", "float32") == "8bit"


def check_eight_bit(cfg: TrainConfig, *shapes: Sequence[int]) -> None:
    """Raises ConfigError where it is asked for and cannot be for matrices of these shapes: rows
    that are no whole blocks, more elements than the library counts, or it is not there.
    """
    if not wants_eight_bit(cfg):
        return
    other = "set train.moment_dtype=float32, or bfloat16 with train.engine=fused"
    for rows, width in shapes:
        if width % BLOCK:
            raise ConfigError(
                f"train.moment_dtype='8bit' keeps a scale of {BLOCK} elements, and a row of width "
                f"{width} is no multiple of that; {other}"
            )
        if rows * width > _MOST:
            raise ConfigError(
                f"train.moment_dtype='8bit': a matrix of {rows} x {width} has more than the "
                f"{_MOST} elements that bitsandbytes counts; raise train.num_shards, or {other}"
            )
    if importlib.util.find_spec(_LIBRARY) is None:
        raise ConfigError(
            "train.moment_dtype='8bit' needs bitsandbytes; pip install "
            "'flash_sae_dist[quantization]', or set train.moment_dtype=float32"
        )


def eight_bit_adam(
    groups: list[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Adam, with what decay the groups have decoupled; its state is there before its first step."""
    kind = importlib.import_module(_LIBRARY).optim.Adam8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=1)
    for number, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            if param.ndim == 2:
                optimizer.init_state(group, param, number, place)  # type: ignore[attr-defined]
            else:
                # It goes on from what it finds, in the type that that is of.
                moments = {n: torch.zeros_like(param, dtype=torch.float32) for n in names_of(param)}
                optimizer.state[param] = {"step": 0, **moments}
    return optimizer


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is such an Adam."""
    return type(optimizer).__module__.partition(".")[0] == _LIBRARY


def names_of(param: Tensor) -> tuple[str, ...]:
    """What it keeps of a parameter: moments, and of matrices their scales."""
    return ("state1", "state2", *(_SCALES if param.ndim == 2 else ()))


def kept(optimizer: torch.optim.Optimizer, param: Tensor, name: str) -> Tensor:
    """A moment of a parameter's shape, or its scales a row, by reference."""
    found: Tensor = optimizer.state[param][name]
    return found.view(len(param), -1) if name in _SCALES else found


def load_(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: dict[str, Tensor], step: int
) -> None:
    """Puts back what `kept` gave after so many steps."""
    for name, param in module.named_parameters():
        for moment in names_of(param):
            kept(optimizer, param, moment).copy_(state[f"{moment}.{name}"])
        optimizer.state[param]["step"] = step
