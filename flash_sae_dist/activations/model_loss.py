"""The loss of a language model over a text's own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.base import ConfigError
from .language_model import LanguageModel, run_model


def check_has_loss(lm: LanguageModel) -> None:
    """Raises ConfigError for an encoder without a language-modelling head, or without a token to
    hide others behind.
    """
    if lm.task == "none" or lm.two_streams:
        raise ConfigError(
            "evaluate.loss_sequences: this model has no language-modelling head over the text's "
            "own tokens to measure a loss with; set evaluate.loss_sequences=0"
        )
    if not lm.causal and lm.tokenizer.mask_token_id is None:
        raise ConfigError(
            "evaluate.loss_sequences: this model's tokenizer has no mask token to measure a "
            "masked-LM loss with; set evaluate.loss_sequences=0"
        )


@torch.no_grad()
def language_model_loss(
    lm: LanguageModel,
    ids: Tensor,  # [B, T] int64
    attention: Tensor,  # [B, T] bool
    masked: Tensor | None = None,  # [B, T] bool, the tokens to hide and guess (masked-lm)
) -> tuple[Tensor, int]:
    """Sum of the cross-entropy in nats over predicted tokens, and their number.

    causal-lm: every token after the first of each sequence; masked-lm: the tokens in `masked`.
    Raises ConfigError for an encoder without a language-modelling head.
    """
    check_has_loss(lm)
    if lm.causal:
        logits = run_model(lm, ids, attention).logits[:, :-1]
        target, used = ids[:, 1:], attention[:, 1:]
    else:
        assert masked is not None
        hidden = ids.masked_fill(masked, lm.tokenizer.mask_token_id)
        logits = run_model(lm, hidden, attention).logits
        target, used = ids, masked & attention
    losses = F.cross_entropy(logits[used].float(), target[used], reduction="sum")
    return losses.double(), int(used.sum())
