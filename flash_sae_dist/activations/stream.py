"""Rows of a language model that runs while SAEs are trained on them: no store is written.

The text is tokenised ahead, as for a store, into `<output>/text-parts/<digest>`, where later
launches find it; every process has the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config.base import ConfigError, nearest_name
from ..config.data import CacheConfig
from ..config.run import RunConfig
from ..config.train import TrainConfig
from ..files import check_writable, locked
from ..identity import digest, versions
from ..parallel import agree
from ..parallel.mesh import Mesh
from ..progress import progress_bar
from .documents import documents
from .harvest import shared_origin, shared_parts, store_config
from .language_model import LanguageModel, load_language_model, resolve_hookpoints
from .origin import content_stamp, tokenizer_digest
from .probe import check_ids, probe
from .records import TEXT, Records
from .store import ActivationStore
from .stored_rows import float_dtype
from .stream_buffer import StreamedBatches
from .stream_order import BufferShape, Share, StreamOrder
from .text_parts import TextParts, digest_of, part_size
from .token_batches import TokenBatches
from .tokenising import Tokeniser, early_process, making_of

logger = logging.getLogger(__name__)
# Rows that the text is tokenised for beyond those that the steps take: processes do not take the
# same number from a part, and more is made when it is asked for.
_MARGIN = 1.05
_NO_LIMIT = 1 << 62
# Keys that are of stores alone.
_STORE_KEYS = ("store", "shard_mib", "memory_gib")


class ModelRows:
    """What a store is to training, of a model: its hookpoints, what their rows are made of, and
    batches of them.
    """

    where = "cache.hookpoints"

    def __init__(
        self,
        config: RunConfig,
        lm: LanguageModel,
        widths: dict[str, int],  # by hookpoint
        tokeniser: Tokeniser,
        parts: dict[str, Any],  # its identity
    ) -> None:
        assert config.cache is not None
        self.cache, self.config = config.cache, store_config(config)
        self.lm, self.widths, self.tokeniser, self._parts = lm, widths, tokeniser, parts
        self.dtype = config.cache.dtype  # of its rows, by its name

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints that cache.hookpoints names."""
        return list(self.widths)

    def width(self, hookpoint: str) -> int:
        """d_in of a hookpoint. Raises ConfigError naming the nearest one where it is not named."""
        if hookpoint not in self.widths:
            near = nearest_name(hookpoint, self.hookpoints)
            raise ConfigError(f"hookpoint {hookpoint!r} is not in {self.where}{near}")
        return self.widths[hookpoint]

    def root_mean_square(self, hookpoint: str) -> float | None:
        """None: nothing is known of rows before the first of them are made."""
        self.width(hookpoint)
        return None

    def made_of(self, hookpoint: str) -> dict[str, Any]:
        """What the rows of a hookpoint are, as `ActivationStore.made_of`. The first part of the
        text stands for all of it; the rows themselves have no checksum.
        """
        parts = self._parts | {"hookpoints": {hookpoint: self.width(hookpoint)}}
        return {"parts": parts, "rows": None, "versions": versions()}

    def shape(self, cfg: TrainConfig) -> BufferShape:
        """Of the buffer of each process. Raises ConfigError where it is less than a pass."""
        cache = self.cache
        return BufferShape.of(cfg.buffer_tokens, cache.batch_sequences, cache.context_length)

    def buffer_bytes(self, hookpoint: str, cfg: TrainConfig) -> int:
        """What the rows of a hookpoint take of the memory of a process's device."""
        if cfg.loss != "fvu":
            return 0
        return self.shape(cfg).rows * self.width(hookpoint) * float_dtype(self.dtype).itemsize

    def batches(
        self, hookpoints: list[str], cfg: TrainConfig, start_step: int, mesh: Mesh,
        device: torch.device,
    ) -> StreamedBatches:  # fmt: skip
        """This rank's rows of the batches from a step on."""
        share = Share(mesh.member, mesh.members)
        seeds, shape = (self.cache.seed, cfg.seed), self.shape(cfg)
        size, parts = self.cache.batch_sequences, self.tokeniser.parts
        order = StreamOrder(parts, shape, size, seeds, share, cfg.holdout, self._wait)
        widths = {name: self.width(name) for name in hookpoints}
        if mesh.is_lead:
            needed = sum(self.buffer_bytes(name, cfg) for name in hookpoints)
            logger.info(
                "train.source=stream: each process mixes %d tokens (train.buffer_tokens), %d times "
                "%d forward passes; their rows of %d hookpoints take %.3g GB of its device",
                shape.rows, shape.num_chunks, shape.passes, len(widths), needed / 1e9,
            )  # fmt: skip
        rows = cfg.batch_tokens // mesh.members
        return StreamedBatches(
            self.lm, widths, order, float_dtype(self.dtype), rows=rows, start_step=start_step,
            mesh=mesh, device=device,
        )  # fmt: skip

    def token_batches(self, cfg: TrainConfig, start_step: int, mesh: Mesh) -> TokenBatches:
        """Whole sequences of the batches from a step on, for train.loss ce and kl."""
        assert mesh.members == 1
        length = self.cache.context_length
        size = cfg.batch_tokens // length
        order = StreamOrder(
            self.tokeniser.parts, BufferShape(1, 1, size * length), size,
            (self.cache.seed, cfg.seed), Share(0, 1), cfg.holdout, self._wait,
        )  # fmt: skip
        return TokenBatches(order, length, start_step)

    def _wait(self, part: int) -> None:
        self.tokeniser.ask(part)
        self.tokeniser.wait()


# What SAEs are trained on.
Rows = ActivationStore | ModelRows


@contextmanager
def open_stream(
    config: RunConfig, num_rows: int, accelerator: Any, mesh: Mesh, device: torch.device
) -> Iterator[ModelRows]:
    """A model and its text, which is tokenised ahead for so many rows while this is open.

    Raises ConfigError before any work where something does not fit, on all processes. Collective
    over all processes.
    """
    config.need("model", "text", "cache", verb="train.source=stream")
    assert config.model is not None
    assert config.cache is not None
    cache, first = config.cache, accelerator.is_main_process
    _check_keys(config, tell=first)
    model, size = config.model, part_size(cache.context_length, cache.batch_sequences)
    with early_process(num_rows * first, size, cache.context_length) as process:
        lm = agree.together(lambda: load_language_model(model, device))
        with _opened(config, lm, num_rows, accelerator, mesh, process) as rows:
            yield rows


@contextmanager
def _opened(
    config: RunConfig, lm: LanguageModel, num_rows: int, accelerator: Any, mesh: Mesh, process: Any
) -> Iterator[ModelRows]:
    assert config.cache is not None
    cache, first = config.cache, accelerator.is_main_process
    _check_loss(config, lm)
    hookpoints = resolve_hookpoints(lm.model, cache.hookpoints)
    widths = probe(lm, hookpoints, cache.context_length)
    agree.first_checks(lambda: _check_text(config, lm))
    shared_origin(lm)
    parts = shared_parts(config, lm, accelerator)
    place = str(Path(config.output) / "text-parts" / _text_digest(config, lm))
    text = TextParts(
        Records(place), cache.context_length, part_size(cache.context_length, cache.batch_sequences)
    )
    making = making_of(config, lm.tokenizer, causal=lm.causal)
    most = cache.num_tokens or _NO_LIMIT
    with ExitStack() as lock:
        agree.first_checks(lambda: lock.enter_context(locked(Path(place), deep=True)))
        with Tokeniser(
            config, making, text, place, num_rows=most, first=first, process=process
        ) as tokeniser:
            agree.first_checks(lambda: _begin(config, lm, tokeniser))
            tokeniser.follow(int(num_rows * _MARGIN))
            # Others may see it later: they wait for parts where they need them.
            parts["text"] = agree.from_first(lambda: digest_of(text.known()[:1]))
            agree.first_checks(lambda: _check_share(text, cache, mesh.members))
            yield ModelRows(config, lm, widths, tokeniser, parts)


def _check_keys(config: RunConfig, *, tell: bool) -> None:
    """Raises ConfigError for keys that a stream cannot follow; names those that say nothing of
    it."""
    assert config.cache is not None
    if config.cache.dtype == "int8":
        raise ConfigError(
            "cache.dtype='int8' is a store's, and train.source=stream keeps rows in memory; set it "
            "to bfloat16"
        )
    if config.cache.max_norm_ratio is not None:
        raise ConfigError(
            f"cache.max_norm_ratio={config.cache.max_norm_ratio} is not known to "
            "train.source=stream, which keeps rows of any norm; drop it (cache.skip_first_tokens "
            "leaves out the first ones of a sequence)"
        )
    idle = [f"cache.{key}" for key in _STORE_KEYS if key in config.cache.model_fields_set]
    idle += ["store"] if config.store is not None else []
    if idle and tell:
        logger.info("train.source=stream reads no store: %s have no effect on it", ", ".join(idle))


def _check_loss(config: RunConfig, lm: LanguageModel) -> None:
    """Raises ConfigError where train.loss cannot be had of this model, or of such batches."""
    train, cache = getattr(config, "train", None), config.cache
    assert cache is not None
    if not isinstance(train, TrainConfig) or train.loss == "fvu":
        return
    key = f"train.loss={train.loss!r}"
    if not lm.causal:
        raise ConfigError(
            f"{key} is of what a causal language model predicts, and this one is none; set "
            "train.loss=fvu"
        )


def _check_text(config: RunConfig, lm: LanguageModel) -> None:
    """Reads the first document of the text: what is wrong with its keys leaves no folder behind."""
    assert config.text is not None
    check_writable("output", config.output)
    next(documents(config.text, lm.tokenizer), None)


def _text_digest(config: RunConfig, lm: LanguageModel) -> str:
    """Of the keys and the tokenizer that decide what the parts of the text hold."""
    assert config.text is not None
    cache = config.cache
    assert cache is not None
    return digest(
        [
            config.text.model_dump(mode="json", exclude={"streaming"}),
            *(cache.context_length, cache.batch_sequences, cache.num_tokens),
            *(cache.drop_special_tokens, cache.skip_first_tokens),
            *(lm.causal, tokenizer_digest(lm.tokenizer)),
        ]
    )


def _begin(config: RunConfig, lm: LanguageModel, tokeniser: Tokeniser) -> None:
    """Makes the first part of the text, or compares those that are there where the text's files
    have changed since. One process calls it.
    """
    parts, records = tokeniser.parts, tokeniser.parts.records
    # Before anything is read: what changes from here on has another stamp.
    marker = {"stamp": content_stamp(config)}
    if parts.known() and (records.read(TEXT) != marker or marker["stamp"] is None):
        logger.info("model or text lie in other files than when %s was begun", records.root)
        tokeniser.compare()
        records.write(TEXT, marker)
    with progress_bar("tokenise", parts.size * parts.context_length, "tokens", True) as bar:
        tokeniser.begin(1, bar.advance, lambda: records.write(TEXT, marker))
        bar.show(bar.total, f"{parts.rows_before[-1]} tokens")
    check_ids(lm, max(part.largest for part in parts.known()))


def _check_share(text: TextParts, cache: CacheConfig, num_ranks: int) -> None:
    """Raises ConfigError for a text that is too short to give each process a pass."""
    passes = sum(-(-part.sequences // cache.batch_sequences) for part in text.known())
    if text.ended and passes < num_ranks:
        raise ConfigError(
            f"the text is {passes} forward passes of cache.batch_sequences={cache.batch_sequences} "
            f"sequences, too few for {num_ranks} processes; lower cache.batch_sequences to "
            f"{max(1, cache.batch_sequences * passes // (2 * num_ranks))}, use fewer processes, or "
            "give more text"
        )
