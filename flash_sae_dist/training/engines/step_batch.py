"""What a fused step hands from one of its parts to the next.

Legend: N tokens of this replica, R replicas, D d_in, S hookpoints of a crosscoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import DenseRows, PairGradients, PairOrder
from ...models.base import Codes
from .dead_step import AuxLoss
from .pair_forward import Forward


class Rows(NamedTuple):
    """A batch."""

    x: Tensor  # [N, D]
    y: Tensor  # [N, d_out] what is to come of it, of an SAE x itself

    def copied(self) -> Rows:
        """Memory for as much."""
        x = torch.empty_like(self.x)
        return Rows(x, x if self.y is self.x else torch.empty_like(self.y))

    def copy_(self, other: Rows) -> None:
        """Takes another batch's."""
        self.x.copy_(other.x)
        if self.y is not self.x:
            self.y.copy_(other.y)


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    rows: Rows
    metrics: Tensor  # as `_metrics`
    rest: tuple[torch.cuda.CUDAGraph, ...]  # of lists of varied lengths, see the engine
    number: Tensor | None  # pairs of the longest list


class Begun(NamedTuple):
    """A step up to the selection."""

    batch: StepBatch
    ready: torch.cuda.Event | None
    found: list[Codes]
    within: bool  # whether lists are of one length already


class StepBatch(NamedTuple):
    """What all micro-batches of a step share."""

    xc: Tensor  # [N, D] centred (a transcoder's as they are), in the compute dtype
    xc_all: Tensor  # [N * R, D], of all replicas, once the streams have met
    y: Tensor  # [N, d_out] what latents and b_dec are to give
    inverse: Tensor  # scalar, 1 / variance of all replicas' tokens; 0 where these are all equal
    scale: Tensor  # scalar, 2 * inverse
    tokens: int  # N * R
    kept: tuple[Tensor, ...]  # read by the side stream: not freed before the streams meet


class Made(NamedTuple):
    """A step up to the optimizer's, which changes nothing yet."""

    batch: StepBatch
    parts: list[Forward]
    pairs: PairGradients  # of all replicas
    order: PairOrder
    dead: DenseRows | None
    aux: AuxLoss | None
    alone: bool  # one micro-batch, one replica: its pairs are all pairs


class Totals(NamedTuple):
    """What metrics are made of, of this replica's tokens."""

    squares: Tensor  # scalar, of the residual
    active: Tensor  # scalar, active pairs of this shard
    penalty: Tensor  # scalar
    residual: Tensor  # [N, D]
