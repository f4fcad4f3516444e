"""What a language model predicts of a text's own tokens, and how well."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.base import ConfigError
from .language_model import LanguageModel, run_model

_TOKENS_AT_ONCE = 2048


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


class Predictions(NamedTuple):
    """What a model says of the tokens that it predicts."""

    logits: Tensor  # [M, V], in the model's type
    targets: Tensor  # [M] int64


def predictions(
    lm: LanguageModel,
    ids: Tensor,  # [B, T] int64
    attention: Tensor,  # [B, T] bool
    masked: Tensor | None = None,  # [B, T] bool, the tokens to hide and guess (masked-lm)
    counted: Tensor | None = None,  # [B, T] bool, of a causal-lm the tokens that count; None: all
) -> Predictions:
    """Logits of the predicted tokens. causal-lm: every token after the first of each sequence;
    masked-lm: the tokens in `masked`. Differentiable. Raises ConfigError for an encoder without a
    head for them.
    """
    check_has_loss(lm)
    if lm.causal:
        logits = run_model(lm, ids, attention).logits[:, :-1]
        target, used = ids[:, 1:], attention[:, 1:]
        used = used if counted is None else used & counted[:, 1:]
    else:
        assert masked is not None
        hidden = ids.masked_fill(masked, lm.tokenizer.mask_token_id)
        logits = run_model(lm, hidden, attention).logits
        target, used = ids, masked & attention
    return Predictions(logits[used], target[used])


def cross_entropy(found: Predictions) -> Tensor:
    """Sum of the cross-entropy in nats, float64."""
    total = torch.zeros((), dtype=torch.float64, device=found.logits.device)
    for logits, targets in zip(*_parts(*found), strict=True):
        total += F.cross_entropy(logits.float(), targets, reduction="sum")
    return total


def divergence(clean: Predictions, other: Predictions) -> Tensor:
    """Sum of the Kullback-Leibler divergence KL(clean || other) in nats, float64."""
    total = torch.zeros((), dtype=torch.float64, device=clean.logits.device)
    for first, second in zip(*_parts(clean.logits, other.logits), strict=True):
        p, q = (F.log_softmax(logits.float(), dim=1) for logits in (first, second))
        total += F.kl_div(q, p, reduction="sum", log_target=True)
    return total


def _parts(*tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    # In float32 a whole batch's logits take gigabytes where the vocabulary is large.
    return tuple(torch.split(tensor, _TOKENS_AT_ONCE) for tensor in tensors)
