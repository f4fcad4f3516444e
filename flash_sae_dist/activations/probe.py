"""One forward pass of a model before any work, with its longest sequence: what its hookpoints give,
and whether each row is that of the token beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config.base import ConfigError, UserError
from .language_model import LanguageModel, check_context_length, hook, run_model
from .text import begin_token


class _Seen:
    """What a pass showed: each hookpoint's calls and last activations, the ids that embeddings
    got."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self.embedded: dict[str, list[Tensor]] = {}

    def keep(self, hookpoint: str) -> Callable[[Tensor], None]:
        def store(value: Tensor) -> None:
            self.calls[hookpoint] = self.calls.get(hookpoint, 0) + 1
            self.values[hookpoint] = value.detach().clone()

        return store

    def embed(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def store(_: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                self.embedded.setdefault(name, []).append(args[0].detach().clone())

        return store


def probe(
    lm: LanguageModel, hookpoints: list[str], context_length: int
) -> dict[str, int]:  # hookpoint -> width
    """Widths of the hookpoints. Raises ConfigError where the model cannot be run on sequences of
    context_length tokens, or where a hookpoint has no row for each token: a module that runs more
    than once a pass, that is not given the text's ids, or gives tensors of another shape.
    """
    check_context_length(lm, context_length)
    ids = probe_ids(lm, context_length)
    # Another token in the middle: what does not depend on it is not of that token.
    middle, other = context_length // 2, ids.clone()
    unlike = ids[0][ids[0] != ids[0, middle]]
    other[:, middle] = unlike[-1] if len(unlike) else ids[0, middle]
    first, second = _passed(lm, hookpoints, ids), _passed(lm, hookpoints, other)
    for hookpoint in hookpoints:
        _check_calls(lm, hookpoint, first.calls.get(hookpoint, 0))
        _check_shape(hookpoint, first.values[hookpoint], ids)
    _check_ids(first, second, ids)
    for hookpoint in hookpoints:
        before, after = first.values[hookpoint][:, middle], second.values[hookpoint][:, middle]
        if bool((ids != other).any()) and torch.equal(before, after):
            raise ConfigError(
                f"cache.hookpoints: {hookpoint!r} gives the same row whatever token stands there, "
                "so its rows are not those of the text's tokens; name another module"
            )
    return {name: first.values[name].shape[-1] for name in hookpoints}


def probe_ids(lm: LanguageModel, length: int) -> Tensor:  # [2, T] int64
    """Two sequences of ordinary tokens as long as those of the text, the tokenizer's first token
    ahead. Raises ConfigError for a tokenizer that is not the model's.
    """
    size = embedding_size(lm)
    tokens = set(lm.tokenizer.get_vocab().values())
    special = set(lm.tokenizer.all_special_ids)
    # Tokens added later, such as one for padding, may well lie beyond; they are checked when used.
    added = set(getattr(lm.tokenizer, "added_tokens_decoder", {}))
    beyond = [t for t in tokens - added if size is not None and t >= size]
    own = [begin_token(lm.tokenizer, lm.causal), lm.tokenizer.eos_token_id]
    own += [] if lm.causal else [lm.tokenizer.sep_token_id, lm.tokenizer.pad_token_id]
    beyond += [t for t in own if t is not None and size is not None and t >= size]
    if beyond:
        raise ConfigError(
            f"model.name: the tokenizer has ids up to {max(beyond)}, but the model has embeddings "
            f"for 0 .. {(size or 0) - 1} alone; use the tokenizer that belongs to the model"
        )
    usual = sorted(t for t in tokens - special - added if size is None or t < size) or [0]
    ids = [usual[(7 * i) % len(usual)] for i in range(length)]
    if (begin := begin_token(lm.tokenizer, lm.causal)) is not None:
        ids[0] = begin
    return torch.tensor([ids, ids], device=lm.device)


def embedding_size(lm: LanguageModel) -> int | None:
    """Token ids that the model has embeddings for, None where it does not say."""
    try:
        table = lm.model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None


def check_ids(lm: LanguageModel, largest: int) -> None:
    """Raises ConfigError where the text has a token that the model has no embedding for."""
    size = embedding_size(lm)
    if size is not None and largest >= size:
        raise ConfigError(
            f"model.name: the text has the token {largest} "
            f"({lm.tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings for "
            f"0 .. {size - 1} alone; use the tokenizer that belongs to the model, or leave that "
            "token out of the text"
        )


@torch.no_grad()
def _passed(lm: LanguageModel, hookpoints: list[str], ids: Tensor) -> _Seen:
    """A whole pass. Raises ConfigError where the model raises anything."""
    seen = _Seen()
    with _watching(lm, hookpoints, seen):
        try:
            run_model(lm, ids, torch.ones_like(ids, dtype=torch.bool))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as e:  # each model has errors of its own
            told = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            raise ConfigError(
                f"cache.context_length={ids.shape[1]}: a forward pass of the model fails on "
                f"sequences of that many token ids ({told}); {_cure(lm, ids)}"
            ) from e
    return seen


def _cure(lm: LanguageModel, ids: Tensor) -> str:
    """The longest sequence that the model takes, looked for by halving."""
    if lm.device.type != "cpu":
        return "lower it, or name another model"  # after a device's assertion nothing runs
    works, fails = 0, ids.shape[1]
    while fails - works > 1:
        length = (works + fails) // 2
        part = ids[:, :length]
        try:
            run_model(lm, part, torch.ones_like(part, dtype=torch.bool))
            works = length
        except Exception:
            fails = length
    return f"set it to {works} or less" if works > 1 else "name another model"


@contextmanager
def _watching(lm: LanguageModel, hookpoints: list[str], seen: _Seen) -> Iterator[None]:
    handles = [hook(lm.model, h, seen.keep(h)) for h in hookpoints]
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_pre_hook(seen.embed(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_calls(lm: LanguageModel, hookpoint: str, calls: int) -> None:
    if calls == 1:
        return
    if calls:
        raise ConfigError(
            f"cache.hookpoints: {hookpoint!r} runs {calls} times in one forward pass, so its rows "
            "would be of no one place in the model; name a module that runs once"
        )
    if lm.two_streams:
        raise ConfigError(
            f"cache.hookpoints: {hookpoint!r} is no part of the encoder, and the decoder reads "
            "other tokens than the text's; name a module inside the encoder"
        )
    raise ConfigError(f"cache.hookpoints: {hookpoint!r} is never called in a forward pass")


def _check_shape(hookpoint: str, value: Tensor, ids: Tensor) -> None:
    # Two sequences: a tensor without a batch dimension would pass with one.
    if value.ndim != 3 or value.shape[:2] != ids.shape:
        raise ConfigError(
            f"cache.hookpoints: {hookpoint!r} gives a tensor of shape {list(value.shape)}, "
            f"not [batch, tokens, width] = [{ids.shape[0]}, {ids.shape[1]}, width]; "
            "name another module"
        )


def _check_ids(first: _Seen, second: _Seen, ids: Tensor) -> None:
    """What embeddings get of a text's tokens must be the text's tokens: positions and kinds do not
    depend on them.
    """
    for name, given in first.embedded.items():
        again = second.embedded.get(name, [])
        for one, two in zip(given, again, strict=False):
            if one.shape == two.shape and torch.equal(one, two):
                continue
            # XLNet embeds them with tokens ahead.
            if not torch.equal(one, ids) and not torch.equal(one, ids.T):
                raise ConfigError(
                    f"model.name: the model changes the token ids before it embeds them (in "
                    f"{name!r}), so its rows are not those of the text's tokens; use a model that "
                    "takes them as they are"
                )
