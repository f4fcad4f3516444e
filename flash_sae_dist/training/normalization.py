"""What is done to rows before an SAE sees them, and undone in the weights that are written."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..config.train import TrainConfig
from ..models.base import SparseCoder
from ..parallel import collectives
from ..parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class Normalization:
    """`(x - mean) / divisor`, and `unit`, the root mean square of what comes of it, in which the
    engines take steps of the parameters that are in the data's units.

    The root mean square and the mean are the store's own; where there is none, and for the mean
    norm, the first batch's.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        mesh: Mesh,
        width: int,
        device: torch.device,
        *,
        divides: bool = False,
    ) -> None:
        """Rows of a transcoder's input and target, and of a crosscoder's hookpoints (divides), are
        divided in any case: their units differ.
        """
        # Stands in checkpoints for a mean that is not known yet.
        self.start = torch.zeros(width if cfg.subtract_mean else 0, dtype=torch.float64).to(device)
        divides = (divides or cfg.target is not None) and cfg.normalize == "none"
        self.kind = "unit_mean_square" if divides else cfg.normalize
        self.centres, self.mesh = cfg.subtract_mean, mesh
        self.rms: float | None = None  # of the rows as they are stored
        self.mean: Tensor | None = None  # [d_in]
        self.mean_norm: float | None = None  # of the rows without their mean

    @classmethod
    def none(cls, mesh: Mesh) -> Normalization:
        """Of rows that are in units of their own already."""
        found = cls.__new__(cls)
        found.kind, found.centres, found.mesh = "none", False, mesh
        found.rms, found.mean, found.mean_norm = 1.0, None, None
        return found

    @property
    def missing(self) -> bool:
        """Whether the first batch has to be measured."""
        lacks_norm = self.kind == "expected_norm" and self.mean_norm is None
        return self.rms is None or lacks_norm or (self.centres and self.mean is None)

    def measure(self, x: Tensor) -> None:
        """Takes what is missing from the first batch x [N/R, d_in]. A host sync; collective over
        the replicas.
        """
        mesh, wide = self.mesh, x.double()
        if self.rms is None:
            self.rms = _usable(math.sqrt(self._average(wide.square().mean())))
            if mesh.is_lead:
                logger.info(
                    "the root mean square of the activations, which scales the biases' learning "
                    "rate, is taken from the first batch: %.4g",
                    self.rms,
                )
        if self.centres and self.mean is None:
            mean = wide.mean(dim=0)
            collectives.all_reduce_(mean, mesh.replica_group, mesh.num_replicas)
            self.mean = mean / mesh.num_replicas
            if mesh.is_lead:
                logger.info(
                    "the mean activation, which train.subtract_mean subtracts, is taken from the "
                    "first batch: its norm is %.4g",
                    float(self.mean.norm()),
                )
        if self.kind == "expected_norm" and self.mean_norm is None:
            if self.mean is not None:
                wide = wide - self.mean
            self.mean_norm = _usable(self._average(wide.norm(dim=1).mean()))

    def _average(self, value: Tensor) -> float:
        collectives.all_reduce_(value, self.mesh.replica_group, self.mesh.num_replicas)
        return float(value) / self.mesh.num_replicas

    @property
    def centred_rms(self) -> float:
        """Root mean square of the rows without their mean; 1 where it is not known."""
        rms = 1.0 if self.rms is None else self.rms
        if self.mean is None:
            return rms
        left = rms**2 - float(self.mean.square().mean())
        return _usable(math.sqrt(max(0.0, left)))

    def divisor(self, d_in: int) -> float:
        """What rows are divided by."""
        if self.kind == "unit_mean_square":
            return self.centred_rms
        if self.kind == "expected_norm" and self.mean_norm is not None:
            return self.mean_norm / math.sqrt(d_in)
        return 1.0

    def unit(self, d_in: int) -> float:
        """Root mean square of what the engine gets."""
        return self.centred_rms / self.divisor(d_in)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as the engine gets them, in the master dtype where they change."""
        if self.mean is not None:
            x = x.to(dtype) - self.mean.to(x.device, dtype)
        divisor = self.divisor(x.shape[1])
        return x if divisor == 1 else x.to(dtype) / divisor

    def restored(self, x: Tensor) -> Tensor:
        """What `__call__` made x of."""
        x = x * self.divisor(x.shape[1])
        return x if self.mean is None else x + self.mean.to(x)

    def folded(self, weights: dict[str, Tensor], sae: SparseCoder) -> dict[str, Tensor]:
        """Weights [rows of this shard] for rows as they are stored."""
        divisor = self.divisor(sae.d_in)
        found = {n: w * divisor if n in sae.in_data_units else w for n, w in weights.items()}
        if self.mean is not None:
            # The encoder subtracts b_dec, so that it needs no more.
            found["b_dec"] = found["b_dec"] + self.mean.to(found["b_dec"])
        return found

    def unfolded(self, weights: dict[str, Tensor], sae: SparseCoder) -> dict[str, Tensor]:
        """What `folded` makes these weights of."""
        found = dict(weights)
        if self.mean is not None:
            found["b_dec"] = found["b_dec"] - self.mean.to(found["b_dec"])
        divisor = self.divisor(sae.d_in)
        return {n: w / divisor if n in sae.in_data_units else w for n, w in found.items()}

    def transcoded(
        self, weights: dict[str, Tensor], sae: SparseCoder, target: Normalization
    ) -> dict[str, Tensor]:
        """`folded` for a transcoder, whose target rows have a normalization of their own."""
        into, out = self.divisor(sae.d_in), target.divisor(sae.d_out)
        ratios = {"b_dec": out, "W_dec": out / into, "W_skip": out / into}
        in_units = {n: into for n in sae.in_data_units} | ratios
        found = {n: w * in_units.get(n, 1.0) for n, w in weights.items()}
        if target.mean is not None:
            found["b_dec"] = found["b_dec"] + target.mean.to(found["b_dec"])
        if self.mean is not None:
            mean = self.mean.to(found["W_enc"])
            found = sae.for_moved_input(found, found["W_enc"] @ mean)
            if "W_skip" in found:
                found["b_dec"] = found["b_dec"] - found["W_skip"] @ mean
        return found

    def state(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint keeps: tensors and plain values, their names with a prefix."""
        tensors = {}
        if self.centres:
            # Tensors of a checkpoint are the same before the first batch.
            tensors["subtracted_mean"] = self.start if self.mean is None else self.mean
        values = {"rms": self.rms, "mean_norm": self.mean_norm}
        tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        known = {name: value for name, value in values.items() if value is not None}
        return tensors, {f"{prefix}{name}": value for name, value in known.items()}

    def load_state(
        self, tensors: dict[str, Tensor], info: dict[str, Any], prefix: str = ""
    ) -> None:
        """Puts back what `state` gave; older checkpoints name no unit, it was 1."""
        self.rms = float(info.get(f"{prefix}rms", 1.0))
        self.mean_norm = info.get(f"{prefix}mean_norm")
        if self.centres and f"{prefix}subtracted_mean" in tensors:
            self.mean = tensors[f"{prefix}subtracted_mean"].double()


def _usable(value: float) -> float:
    """Rows that are all zero, or not finite, have no unit: 1."""
    return value if 0 < value < math.inf else 1.0
