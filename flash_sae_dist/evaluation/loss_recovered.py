"""How much of the language model's loss an SAE keeps when the model goes on with its
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..activations.language_model import LanguageModel, replace_activations
from ..activations.model_loss import language_model_loss
from ..activations.text import TokenTable
from ..models.base import SparseCoder


class LossRecovered(NamedTuple):
    """Mean cross-entropy in nats over `tokens` predicted tokens."""

    tokens: int
    clean: float  # the model as it is
    spliced: float  # the SAE's reconstruction in place of the activations
    zero: float  # zeros in their place

    @property
    def recovered(self) -> float:
        """`(zero - spliced) / (zero - clean)`: 1 for a perfect SAE, 0 for zeros, NaN where zeros
        cost nothing or even lower the loss: there is nothing to recover.
        """
        lost = self.zero - self.clean
        return (self.zero - self.spliced) / lost if lost > 0 else math.nan


class LossMeter:
    """Measures SAEs of one hookpoint on the same sequences; the clean and the zero loss are
    measured once.

    Only positions whose activations the store would keep are replaced, by the SAE as by zeros:
    padding and special tokens, which SAEs never saw, stay as they are. A masked LM hides 15% of
    those positions, the same every time.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hookpoint: str,
        table: TokenTable,
        batch_sequences: int,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.lm, self.hookpoint, self.table = lm, hookpoint, table
        self.batch_sequences, self.advance = batch_sequences, advance
        self.hidden = (np.random.default_rng(0).random(table.keep.shape) < 0.15) & table.keep
        self._known: dict[str, tuple[float, int]] = {}

    def measure(self, sae: SparseCoder) -> LossRecovered:
        """Losses without, with, and with zeros for, an SAE's reconstruction."""
        clean, tokens = self._once("clean", None)
        zero, _ = self._once("zero", torch.zeros_like)
        spliced, _ = self._loss(lambda rows: _reconstruct(sae, rows))
        return LossRecovered(tokens, clean, spliced, zero)

    def _once(self, name: str, change: Callable[[Tensor], Tensor] | None) -> tuple[float, int]:
        if name not in self._known:
            self._known[name] = self._loss(change)
        return self._known[name]

    @torch.no_grad()
    def _loss(self, change: Callable[[Tensor], Tensor] | None) -> tuple[float, int]:
        total, count = 0.0, 0
        for at in range(0, len(self.table.ids), self.batch_sequences):
            rows = slice(at, at + self.batch_sequences)
            ids = self._tensor(self.table.ids[rows].astype(np.int64))
            attention = self._tensor(self.table.attention[rows])
            keep, hidden = self._tensor(self.table.keep[rows]), self._tensor(self.hidden[rows])
            if change is None:
                loss, tokens = language_model_loss(self.lm, ids, attention, hidden)
            else:
                with replace_activations(self.lm, self.hookpoint, _only(keep, change)):
                    loss, tokens = language_model_loss(self.lm, ids, attention, hidden)
            total, count = total + float(loss), count + tokens
            self.advance(ids.numel())
        return total / max(1, count), count

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.lm.device)


def _reconstruct(sae: SparseCoder, rows: Tensor) -> Tensor:
    # The model's bfloat16 is not the SAE's: FVU and the rest are measured in its own precision.
    with torch.autocast(rows.device.type, enabled=False):
        return sae(rows.to(sae.W_dec.dtype)).recon.to(rows.dtype)  # type: ignore[no-any-return]


def _only(keep: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def replaced(activations: Tensor) -> Tensor:
        out = activations.clone()
        out[keep] = change(activations[keep])
        return out

    return replaced
