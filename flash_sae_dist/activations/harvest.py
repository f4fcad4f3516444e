"""The cache job: text through a language model into the store; resumable, the same for any number
of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from .. import ending
from ..config.base import ConfigError, UserError
from ..config.data import CacheConfig
from ..config.run import RunConfig
from ..files import check_space, check_writable
from ..identity import FREE_KEYS, difference, tell_other_versions, versions
from ..parallel import agree
from ..parallel.mesh import with_index
from ..progress import progress_bar
from .documents import documents
from .growing import grow_
from .language_model import (
    LanguageModel,
    load_language_model,
    load_tokenizer,
    model_commit,
    model_dtype,
    resolve_hookpoints,
    weights_checksum,
)
from .norm_limits import NormLimits, resolve_ratios, told, union
from .origin import (
    content_stamp,
    loaded_parts,
    model_parts,
    row_parts,
    text_is_here,
    tokenizer_digest,
)
from .pipeline import MAX_NORM_RATIO, Pipeline, Rate, most_shard_bytes
from .probe import check_ids, probe
from .records import CONFIG, TEXT, held
from .remote import Objects
from .row_plan import RowPlan, shards_a_unit
from .store import Geometry, Origin, Shape, TextShape, make_geometry, storage_dtype
from .stored_rows import float_dtype
from .text import begin_token
from .text_parts import TextParts, digest_of, made_parts, part_size
from .tokenising import Tokeniser, making_of
from .writer import StoreWriter
from .writer import difference as other_keys

logger = logging.getLogger(__name__)


def store_config(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides a store's content, flat."""
    assert config.cache is not None
    assert config.text is not None
    assert config.model is not None
    flat: dict[str, Any] = {}
    for section in ("model", "text", "cache"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            if f"{section}.{key}" not in FREE_KEYS - {"text.streaming"}:
                flat[f"{section}.{key}"] = value
    return flat


def run_cache(config: RunConfig, accelerator: Any) -> Rate | None:
    """Runs the whole cache job, or what is left of it; how fast this process made its rows, None
    where nothing was left. Collective over all processes.

    Raises ConfigError before any work when something does not fit, or another launch is at it.
    """
    config.need("model", "text", "cache", verb="cache")
    assert config.model is not None
    assert config.cache is not None
    config.cache.rows_to_store()
    writer = StoreWriter(config.cache.path(), store_config(config), create=True)
    if accelerator.is_main_process:
        writer.restore_config()
    if writer.is_complete():
        agree.first_checks(lambda: _check_still_same(config, writer))
        if accelerator.is_main_process:
            print(f"{writer.path} is complete; nothing to do")
        return None
    _check_folder(writer)
    lm = load_language_model(config.model, with_index(accelerator.device))
    hookpoints = resolve_hookpoints(lm.model, config.cache.hookpoints)
    resolve_ratios(MAX_NORM_RATIO, config.cache.max_norm_ratio, hookpoints)
    widths = probe(lm, hookpoints, config.cache.context_length)
    agree.first_checks(lambda: _check_text(config, writer, lm))
    with ExitStack() as lock:
        one = held(writer.records, writer.path)
        agree.first_checks(lambda: lock.enter_context(one))
        if accelerator.is_main_process:
            lock.enter_context(_nothing_left(writer))
        return _fill(config, accelerator, writer, lm, widths)


@contextmanager
def _nothing_left(writer: StoreWriter) -> Iterator[None]:
    """Takes back the text where a mistake shows before a new store is begun."""
    # In an object store the owner's record lies among them.
    is_new = writer.records.local and not writer.records.files.sizes("records")
    try:
        yield
    except ConfigError:
        if is_new and writer.begun() is None:
            writer.records.files.remove_all("text")
            writer.records.files.remove_all("records")
        raise


def _check_text(config: RunConfig, writer: StoreWriter, lm: LanguageModel) -> None:
    """Reads the first document of a text that nothing was made of yet: what is wrong with its keys
    leaves no folder behind.
    """
    assert config.text is not None
    if writer.begun() is None:
        next(documents(config.text, lm.tokenizer), None)


def _fill(
    config: RunConfig,
    accelerator: Any,
    writer: StoreWriter,
    lm: LanguageModel,
    widths: dict[str, int],  # by hookpoint
) -> Rate:
    """Makes the shards that are not there yet."""
    assert config.cache is not None
    first, making = accelerator.is_main_process, making_of(config, lm.tokenizer, causal=lm.causal)
    size = part_size(config.cache.context_length, config.cache.batch_sequences)
    text = TextParts(writer.records, config.cache.context_length, size)
    origin, parts = shared_origin(lm), shared_parts(config, lm, accelerator)
    parts["hookpoints"] = widths
    rows = config.cache.rows_to_store()
    about = _provenance(config, lm)
    agree.first_checks(lambda: _take_up(config, writer, about, origin, parts, text))
    with Tokeniser(config, making, text, writer.path, num_rows=rows, first=first) as tokeniser:
        stamp = _first_text(config, writer, tokeniser, lm, widths, accelerator)
        shape, shape_of_text = _shape(config.cache, writer, text, widths)
        agree.first_checks(lambda: _check_space(writer, shape))
        if first:
            identity = {"parts": parts, "stamp": stamp, "versions": versions()}
            writer.create(
                shape.geometry, widths, shape.dtype, about, origin, identity, shape_of_text
            )
        tokeniser.follow()
        accelerator.wait_for_everyone()
        todo = writer.missing(shape)
        if todo and first:
            writer.reopen()
        accelerator.wait_for_everyone()
        unit, cache = shape_of_text.shards_a_unit, config.cache
        plan = RowPlan(text, shape.geometry, unit, cache.seed, cache.batch_sequences)
        with Pipeline(lm, widths, plan, cache, writer) as pipeline:
            rate = _write_shards(accelerator, pipeline, tokeniser, todo)
    accelerator.wait_for_everyone()
    if first:
        _finish(writer, plan, list(widths))
    accelerator.wait_for_everyone()
    return rate


def _take_up(
    config: RunConfig,
    writer: StoreWriter,
    about: dict[str, Any],
    origin: Origin,
    parts: dict[str, Any],
    text: TextParts,
) -> None:
    """Compares a store that was begun with what there is, and takes back what is to be longer."""
    _check_begun(writer, origin, parts, text)
    if writer.grows:
        assert config.cache is not None
        grow_(writer, text, config.cache.rows_to_store(), about, content_stamp(config))


def _check_begun(
    writer: StoreWriter, origin: Origin, parts: dict[str, Any], text: TextParts
) -> None:
    """Raises ConfigError where a store was begun with other things than these, or by a version
    that put its rows in another order.
    """
    if (begun := writer.begun()) is None:
        return
    writer.check_origin(origin)
    writer.check_identity(parts)
    if "text" not in begun or begun["text"]["part_sequences"] != text.size:
        raise ConfigError(
            f"cache.store={writer.path!r} was begun by another version, which put its rows in "
            "another order; remove it, or go on with that version"
        )
    if (before := writer.identity()) is not None:
        tell_other_versions(f"the first part of {writer.path}", before["versions"])


def _first_text(
    config: RunConfig,
    writer: StoreWriter,
    tokeniser: Tokeniser,
    lm: LanguageModel,
    widths: dict[str, int],
    accelerator: Any,
) -> str | None:
    """Tokenises as much as tells how the store is cut; the stamp of the files that are read.
    Collective.
    """
    assert config.cache is not None
    # Before anything is read: what changes from here on has another stamp.
    stamp = content_stamp(config)
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            marker = {"config": _digest(config), "stamp": stamp}
            _check_same_text(writer, tokeniser, marker)
            most = config.cache.rows_to_store()
            enough = min(most, geometry_of(config.cache, widths, 2**62).enough_rows)
            with progress_bar("tokenise", enough, "tokens", enabled=True) as bar:
                tokeniser.begin(enough, bar.advance, lambda: writer.records.write(TEXT, marker))
                if bar.done < bar.total:
                    bar.show(bar.total, f"all {bar.done} tokens of the text")
            check_ids(lm, max(part.largest for part in tokeniser.parts.known()))
        # The others wait: they are told of whatever a tokenizer raises, too.
        except Exception as e:
            error = e
    agree.raise_together(error)
    return stamp


def _check_same_text(
    writer: StoreWriter,
    tokeniser: Tokeniser,
    marker: dict[str, Any],  # of which config and files the text is now
) -> None:
    """Takes back parts that an earlier launch made of another text, and raises ConfigError where
    rows were made of them.
    """
    parts, before = tokeniser.parts, writer.records.read(TEXT)
    if not parts.known():
        return
    if before != marker or marker["stamp"] is None:
        if writer.begun() is not None:
            logger.info("the text lies in other files than when %s was begun", writer.path)
            tokeniser.compare()
        else:
            parts.drop()
            return
    writer.records.write(TEXT, marker)


def _shape(
    cfg: CacheConfig, writer: StoreWriter, text: TextParts, widths: dict[str, int]
) -> tuple[Shape, TextShape]:
    """How the rows that the text gives are cut; a store that was begun goes on as it was cut."""
    if (begun := writer.begun()) is not None:
        shape = Shape.read(writer.records)
        assert shape is not None
        return shape, TextShape(**begun["text"])
    rows = cfg.rows_to_store()
    rows = min(rows, text.rows_before[-1]) if text.ended else rows
    geometry = geometry_of(cfg, widths, rows)
    unit = shards_a_unit(geometry.num_shards)
    shape_of_text = TextShape(text.size, text.context_length, unit)
    return Shape(geometry, cfg.dtype, widths), shape_of_text


def geometry_of(cfg: CacheConfig, widths: dict[str, int], rows: int) -> Geometry:
    """How a store of rows at hookpoints of these widths is cut."""
    itemsize = storage_dtype(cfg.dtype).itemsize
    row_bytes = float_dtype(cfg.dtype).itemsize * sum(widths.values())
    most_rows = most_shard_bytes(cfg.memory_gib) // row_bytes
    return make_geometry(rows, max(widths.values()), itemsize, cfg.shard_mib, most_rows)


def _finish(writer: StoreWriter, plan: RowPlan, hookpoints: list[str]) -> None:
    """Writes the row of each token, and the records that the store is whole."""
    text, known = plan.parts, plan.parts.known()
    limits = NormLimits.read(writer.records)
    over = writer.left_out(plan.geometry) if limits is not None else {}
    left_out = union(over)
    for number in range(len(known)):
        rows = plan.rows_of_part(number)
        rows[np.isin(rows, left_out)] = -1
        text.add_rows(number, rows)
    sequences = sum(part.sequences for part in known)
    documents = max(part.documents for part in known)
    writer.finish(plan.geometry, hookpoints, documents, (sequences, digest_of(known)))
    if over:
        logger.info("%s", told(MAX_NORM_RATIO, plan.geometry.rows, over))


def shared_parts(config: RunConfig, lm: LanguageModel, accelerator: Any) -> dict[str, Any]:
    """What the rows are made of; one process a host reads its files. Collective.

    Raises ConfigError where hosts have other files than one another.
    """
    assert config.model is not None
    mine: dict[str, Any] | None = None
    if accelerator.is_local_main_process:
        mine = loaded_parts(config.model, lm) | row_parts(config)
    everyone = [parts for parts in agree.from_all(mine) if parts is not None]
    for other in everyone[1:]:
        if found := difference(everyone[0], other):
            raise ConfigError(
                f"{found} on another host, whose rows one store would mix; give all hosts the same"
            )
    first: dict[str, Any] = everyone[0]
    return first


def _check_still_same(config: RunConfig, writer: StoreWriter) -> None:
    """Raises ConfigError where a finished store was made of another model or text than lie at the
    config's paths now. Loads the tokenizer at most, and that only where a file has changed.
    """
    assert config.model is not None
    assert config.cache is not None
    if (before := writer.identity()) is None:
        logger.info("%s is older than identities: its names alone are compared", writer.path)
        return
    stamp = content_stamp(config)
    if stamp is not None and stamp == before["stamp"]:
        return
    named = writer.config == writer.records.read(CONFIG)
    parts = model_parts(config.model)
    if parts is None:
        what = f"{writer.path}: model.name={config.model.name!r} is not found on this machine"
        if not named:
            raise ConfigError(f"{what}, and was not its name when that store was made; name it so")
        logger.info("%s, so nothing compares it with the store's", what)
        return
    if config.model.dtype != "auto":
        parts["model dtype"] = config.model.dtype
    writer.check_identity(parts)
    _check_still_same_text(config, writer, before["parts"])


def _check_still_same_text(config: RunConfig, writer: StoreWriter, before: dict[str, Any]) -> None:
    """The rest of `_check_still_same`: tokenises the text anew."""
    assert config.model is not None
    assert config.cache is not None
    assert config.text is not None
    tokenizer = load_tokenizer(config.model)
    task = before["model task"] if config.model.task == "auto" else config.model.task
    writer.check_identity({"tokenizer": tokenizer_digest(tokenizer), "model task": task})
    if not text_is_here(config.text):
        # Its name is all that there is to compare without the network.
        named, asked = (
            {key: value for key, value in flat.items() if key.startswith("text.")}
            for flat in (writer.records.read(CONFIG) or {}, writer.config)
        )
        if (error := other_keys(writer.path, named, asked, FREE_KEYS)) is not None:
            raise error
        return
    begun = writer.begun() or {}
    if "text" not in begun:
        logger.info("%s is of an earlier version: its text is not compared", writer.path)
        return
    logger.info("model or text lie in other files than when %s was made: comparing", writer.path)
    making = making_of(config, tokenizer, causal=task == "causal-lm")
    size = begun["text"]["part_sequences"]
    made = [part for _, part in made_parts(making, size, config.cache.rows_to_store(), [])]
    writer.check_identity({"text": digest_of(made)})


def _write_shards(
    accelerator: Any, pipeline: Pipeline, tokeniser: Tokeniser, todo: list[int]
) -> Rate:
    """Makes this process's part of the missing shards."""
    world, geometry = accelerator.num_processes, pipeline.plan.geometry
    title = f"cache {len(pipeline.widths)} hookpoints"
    total = sum(stop - start for start, stop in map(geometry.shard_range, todo))
    kept = _Kept(pipeline, len(todo), world)
    pipeline.recorded = kept.add
    bar_ = progress_bar(title, total, "tokens", accelerator.is_main_process)
    with ending.deferred(), bar_ as bar:

        def stop_if_asked() -> None:
            if number := ending.requested():
                pipeline.drain()
                name = ending.name_of(number)
                raise ending.StopRequested(number, f"stopped by {name}; {ending.kept()}")

        def advance(rows: int) -> None:
            # The processes' parts are alike: the bar shows the first's progress as everyone's.
            bar.advance(world * rows)
            stop_if_asked()

        def wait() -> None:
            stop_if_asked()
            tokeniser.wait()

        pipeline.plan.wait = wait
        pipeline.limits = agree.from_first(pipeline.find_limits)
        rate = pipeline.make(todo, accelerator.process_index, world, advance)
        if accelerator.is_main_process and pipeline.plan.geometry.rows < geometry.rows:
            bar.show(bar.total, f"all {bar.done} tokens of the text")
    if accelerator.is_main_process:
        _tell_end_of_text(pipeline)
    logger.info("rows made: %s", rate)
    return rate


def _tell_end_of_text(pipeline: Pipeline) -> None:
    if (rows := pipeline.plan.geometry.rows) < pipeline.num_tokens:
        logger.warning(
            "the text ends after %d stored tokens, before cache.num_tokens=%d",
            rows,
            pipeline.num_tokens,
        )


class _Kept:
    """Counts shards that are whole, and says so should the launch end early."""

    def __init__(self, pipeline: Pipeline, missing: int, world: int) -> None:
        self.plan, self.path, self.world = pipeline.plan, pipeline.writer.path, world
        self.done = self.plan.geometry.num_shards - missing
        self.lock = threading.Lock()
        self._tell()

    def add(self, shard: int) -> None:
        with self.lock:
            self.done += 1
            self._tell()

    def _tell(self) -> None:
        total = self.plan.geometry.num_shards
        told = f"{self.done} of {total} shards are kept in {self.path}"
        told += " with what the other processes made" if self.world > 1 else ""
        ending.keeps(f"{told}, and the same command makes the others")


def _check_folder(writer: StoreWriter) -> None:
    """Raises ConfigError, on all processes, where one cannot write the store's folder: models load
    and texts are tokenised for long. Of an object store, RemoteError.
    """
    error: UserError | None = None
    try:
        if isinstance(writer.records.files, Objects):
            writer.records.files.check_writable()
        else:
            check_writable("cache.store", writer.records.root)
    except UserError as e:
        error = e
    agree.raise_together(error)


def _check_space(writer: StoreWriter, shape: Shape) -> None:
    """Raises ConfigError where the disk cannot take the shards that are missing."""
    if writer.records.local:
        todo, needed = writer.missing(shape), 0
        for name in shape.arrays():
            row_bytes = shape.row_bytes(name)
            needed += sum(shape.geometry.file_bytes(shard, row_bytes) for shard in todo)
        check_space("cache.store", writer.records.root, needed, "what is left of the store")


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(store_config(config), sort_keys=True).encode()).hexdigest()


def shared_origin(lm: LanguageModel) -> Origin:
    """The model, which is the same in all processes. Collective.

    Raises ConfigError where hosts have other files than one another.
    """
    origin = Origin(model_commit(lm), model_dtype(lm), weights_checksum(lm))
    everyone = agree.from_all(origin)
    words = {
        "model_dtype": "model.dtype=auto is another type",
        "model_crc32c": "model.name holds other weights",
    }
    for key, what in words.items():
        if len({getattr(other, key) for other in everyone}) > 1:
            raise ConfigError(
                f"{what} on some hosts than on others, whose rows one store would mix; "
                "give all hosts the same"
            )
    return origin


def _provenance(config: RunConfig, lm: LanguageModel) -> dict[str, Any]:
    return {
        "config": store_config(config),
        "model_commit": model_commit(lm),
        "tokenizer": type(lm.tokenizer).__name__,
        "begin_token": begin_token(lm.tokenizer, lm.causal) is not None,
        "task": lm.task,
        "versions": versions(),
    }
