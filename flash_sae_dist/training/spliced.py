"""End-to-end losses: the model goes on with an SAE's reconstruction, and what it then predicts is
the loss (Braun et al. 2024, arXiv 2405.12241).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..activations.language_model import LanguageModel, hook, replace_activations
from ..activations.model_loss import Predictions, cross_entropy, divergence, predictions
from ..activations.token_batches import Sequences


class SplicedModel:
    """A frozen causal language model whose activations at one hookpoint an SAE replaces.

    A batch takes two passes: one of the model as it is, which gives the rows to reconstruct and,
    for kl, what it predicts; and one with the reconstruction in their place, through whose rest the
    gradient comes back. Positions without a row (padding, special tokens, held-out documents) go on
    with the activations that the model has there.
    """

    def __init__(self, lm: LanguageModel, hookpoint: str, loss: Literal["ce", "kl"]) -> None:
        self.lm, self.hookpoint, self.kind = lm, hookpoint, loss
        lm.model.requires_grad_(False)
        self._batch: Sequences | None = None
        self._clean: Predictions | None = None

    @torch.no_grad()
    def begin(self, packed: Tensor) -> Tensor:  # [S, 4 T] -> [n, d_in]
        """The rows of a batch of `TokenBatches`, in the model's type."""
        batch, rows = Sequences.of(packed.to(self.lm.device)), []

        def take(activations: Tensor) -> None:
            # Models may add in place afterwards; indexing copies.
            rows.append(activations.to(self.lm.device)[batch.trained])

        handle = hook(self.lm.model, self.hookpoint, take)
        try:
            clean = self._predictions(batch)
        finally:
            handle.remove()
        self._batch, self._clean = batch, clean if self.kind == "kl" else None
        return rows[0]

    def loss(self, recon: Tensor) -> Tensor:  # [n, d_in] -> scalar
        """Mean cross-entropy, or mean divergence from what the model itself predicts, in nats a
        token, of the batch begun last with rows recon; differentiable.
        """
        batch = self._batch
        assert batch is not None

        def replaced(activations: Tensor) -> Tensor:
            out = activations.clone()
            out[batch.trained] = recon.to(out.dtype)
            return out

        with replace_activations(self.lm, self.hookpoint, replaced):
            found = self._predictions(batch)
        clean = self._clean
        total = cross_entropy(found) if clean is None else divergence(clean, found)
        return (total / max(1, len(found.targets))).to(recon.dtype)

    def _predictions(self, batch: Sequences) -> Predictions:
        return predictions(self.lm, batch.ids, batch.attention, counted=batch.counted)
