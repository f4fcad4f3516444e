"""How much of the language model's loss an SAE keeps when the model goes on with its
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..activations.language_model import LanguageModel, replace_activations
from ..activations.model_loss import Predictions, cross_entropy, divergence, predictions
from ..activations.text import TokenTable
from ..models.base import SparseCoder

_KEPT_BYTES = 1 << 30


class LossRecovered(NamedTuple):
    """Mean cross-entropy, and mean divergence KL(clean || changed), in nats over `tokens` predicted
    tokens.
    """

    tokens: int
    clean: float  # the model as it is
    spliced: float  # the SAE's reconstruction in place of the activations
    zero: float  # zeros in their place
    kl_spliced: float
    kl_zero: float

    @property
    def recovered(self) -> float:
        """`(zero - spliced) / (zero - clean)`: 1 for a perfect SAE, 0 for zeros, NaN where zeros
        cost nothing or even lower the loss: there is nothing to recover.
        """
        lost = self.zero - self.clean
        return (self.zero - self.spliced) / lost if lost > 0 else math.nan

    @property
    def kl_recovered(self) -> float:
        """`1 - kl_spliced / kl_zero`: 1 where the model's predictions are its own, 0 where they are
        as far off as with zeros, NaN where zeros change nothing.
        """
        return 1 - self.kl_spliced / self.kl_zero if self.kl_zero > 0 else math.nan


class _Means(NamedTuple):
    loss: float
    kl: float
    tokens: int


class CleanPredictions:
    """What the model itself predicts of each batch of a text, which no hookpoint changes: kept on
    its device as far as all of it is not too large, else made again each time.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._kept: dict[int, Predictions] = {}

    def of(self, batch: int, make: Callable[[], Predictions]) -> Predictions:
        """Those of a batch."""
        if batch in self._kept:
            return self._kept[batch]
        found = make()
        if found.logits.nbytes * self.num_batches <= _KEPT_BYTES:
            self._kept[batch] = found
        return found


class LossMeter:
    """Measures SAEs of one hookpoint on the same sequences; the clean and the zero loss are
    measured once, the model's own predictions once for all meters that share `clean`.

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
        clean: CleanPredictions | None = None,
    ) -> None:
        self.clean = clean or CleanPredictions(num_batches(table, batch_sequences))
        self.lm, self.hookpoint, self.table = lm, hookpoint, table
        self.batch_sequences, self.advance = batch_sequences, advance
        self.hidden = (np.random.default_rng(0).random(table.keep.shape) < 0.15) & table.keep
        self._known: dict[str, _Means] = {}

    def measure(self, sae: SparseCoder) -> LossRecovered:
        """Losses without, with, and with zeros for, an SAE's reconstruction."""
        clean, zero = self._once("clean", None), self._once("zero", torch.zeros_like)
        spliced = self._means(lambda rows: _reconstruct(sae, rows))
        losses = clean.loss, spliced.loss, zero.loss
        return LossRecovered(clean.tokens, *losses, spliced.kl, zero.kl)

    def _once(self, name: str, change: Callable[[Tensor], Tensor] | None) -> _Means:
        if name not in self._known:
            self._known[name] = self._means(change)
        return self._known[name]

    @torch.no_grad()
    def _means(self, change: Callable[[Tensor], Tensor] | None) -> _Means:
        total, kl, count = 0.0, 0.0, 0
        for at in range(0, len(self.table.ids), self.batch_sequences):
            rows = slice(at, at + self.batch_sequences)
            ids = self._tensor(self.table.ids[rows].astype(np.int64))
            attention = self._tensor(self.table.attention[rows])
            keep, hidden = self._tensor(self.table.keep[rows]), self._tensor(self.hidden[rows])
            run = partial(predictions, self.lm, ids, attention, hidden)
            clean = found = self.clean.of(at // self.batch_sequences, run)
            if change is not None:
                with replace_activations(self.lm, self.hookpoint, _only(keep, change)):
                    found = run()
                kl += float(divergence(clean, found))
            total, count = total + float(cross_entropy(found)), count + len(found.targets)
            self.advance(ids.numel())
        return _Means(total / max(1, count), kl / max(1, count), count)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.lm.device)


def num_batches(table: TokenTable, batch_sequences: int) -> int:
    """Passes that a text takes."""
    return -(-len(table.ids) // batch_sequences)


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
