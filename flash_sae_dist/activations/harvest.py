"""The cache job: text through a language model into the store; resumable, the same for any number
of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import ending
from ..config.base import ConfigError
from ..config.data import CacheConfig
from ..config.run import RunConfig
from ..files import (
    check_space,
    check_writable,
    checksum,
    locked,
    owned,
    private_folder,
    read_json,
    write_json,
)
from ..identity import FREE_KEYS, difference, tell_other_versions, versions
from ..parallel import agree
from ..progress import progress_bar
from .language_model import (
    LanguageModel,
    load_language_model,
    load_tokenizer,
    model_commit,
    model_dtype,
    resolve_hookpoints,
    weights_checksum,
)
from .origin import (
    content_stamp,
    loaded_parts,
    model_parts,
    row_parts,
    text_digest,
    text_is_here,
    tokenizer_digest,
)
from .pipeline import Pipeline, Rate, most_shard_bytes
from .probe import check_ids, probe
from .records import CONFIG, StoreOwner, check_lasts
from .row_plan import RowPlan
from .store import Geometry, Origin, Shape, make_geometry, storage_dtype
from .stored_rows import float_dtype
from .text import TokenTable, begin_token, token_table
from .writer import StoreWriter

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
    check_lasts(config.cache.store)
    writer = StoreWriter(config.cache.store, store_config(config), create=True)
    if accelerator.is_main_process:
        writer.restore_config()
    if writer.is_complete():
        agree.first_checks(lambda: _check_still_same(config, writer))
        if accelerator.is_main_process:
            print(f"{config.cache.store} is complete; nothing to do")
        return None
    _check_folder(writer)
    lm = load_language_model(config.model, accelerator.device)
    hookpoints = resolve_hookpoints(lm.model, config.cache.hookpoints)
    widths = probe(lm, hookpoints, config.cache.context_length)
    with ExitStack() as lock:
        held = owned(StoreOwner(writer.records), config.cache.store)
        if writer.records.local:
            held = locked(Path(writer.records.root), deep=True)
        agree.first_checks(lambda: lock.enter_context(held))
        return _fill(config, accelerator, writer, lm, widths)


def _fill(
    config: RunConfig,
    accelerator: Any,
    writer: StoreWriter,
    lm: LanguageModel,
    widths: dict[str, int],  # by hookpoint
) -> Rate:
    """Makes the shards that are not there yet."""
    assert config.cache is not None
    # Before anything is read: what changes from here on has another stamp.
    stamp = content_stamp(config)
    table = _shared_table(config, lm, accelerator, writer, stamp)
    check_ids(lm, int(table.ids.max()))
    hookpoints = list(widths)
    geometry = _geometry(config.cache, table, widths, accelerator, writer)
    origin = _shared_origin(lm, table)
    writer.check_origin(geometry, origin)
    shape = Shape(geometry, config.cache.dtype, widths)
    agree.first_checks(lambda: _check_space(writer, shape))
    parts = _shared_parts(config, lm, table, accelerator)
    parts |= {"hookpoints": widths, **geometry._asdict()}
    writer.check_identity(parts)
    if accelerator.is_main_process:
        identity = {"parts": parts, "stamp": stamp, "versions": versions()}
        _create(config, writer, lm, shape, origin, identity)
    accelerator.wait_for_everyone()
    todo = writer.missing(shape)
    if todo and accelerator.is_main_process:
        writer.reopen()
    accelerator.wait_for_everyone()
    plan = RowPlan(table, geometry, config.cache.seed, config.cache.batch_sequences)
    with Pipeline(lm, widths, plan, config.cache, writer) as pipeline:
        rate = _write_shards(accelerator, pipeline, todo)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(geometry, hookpoints, int(table.document.max()) + 1)
    if accelerator.is_local_main_process:
        shutil.rmtree(_table_folder(config, writer), ignore_errors=True)
    accelerator.wait_for_everyone()
    return rate


def _create(
    config: RunConfig,
    writer: StoreWriter,
    lm: LanguageModel,
    shape: Shape,
    origin: Origin,
    identity: dict[str, Any],
) -> None:
    """Begins the store, or tells what has changed since it was begun."""
    if (before := writer.identity()) is not None:
        tell_other_versions(f"the first part of {writer.path}", before["versions"])
    about = _provenance(config, lm)
    writer.create(shape.geometry, shape.widths, shape.dtype, about, origin, identity)


def _geometry(
    cfg: CacheConfig,
    table: TokenTable,
    widths: dict[str, int],
    accelerator: Any,
    writer: StoreWriter,
) -> Geometry:
    """How the rows that the text gives are cut; a store that was begun goes on as it was cut."""
    rows = min(cfg.num_tokens, int(table.keep.sum()))
    if rows < cfg.num_tokens and accelerator.is_main_process:
        logger.warning(
            "the text ends after %d stored tokens, before cache.num_tokens=%d",
            rows,
            cfg.num_tokens,
        )
    begun = Shape.read(writer.records)
    if begun is not None and begun.geometry.rows == rows:
        return begun.geometry
    itemsize = storage_dtype(cfg.dtype).itemsize
    row_bytes = float_dtype(cfg.dtype).itemsize * sum(widths.values())
    most_rows = most_shard_bytes(cfg.memory_gib) // row_bytes
    return make_geometry(rows, max(widths.values()), itemsize, cfg.shard_mib, most_rows)


def _shared_parts(
    config: RunConfig, lm: LanguageModel, table: TokenTable, accelerator: Any
) -> dict[str, Any]:
    """What the rows are made of; one process a host reads its files. Collective.

    Raises ConfigError where hosts have other files than one another.
    """
    assert config.model is not None
    mine: dict[str, Any] | None = None
    if accelerator.is_local_main_process:
        mine = loaded_parts(config.model, lm) | {"text": text_digest(table)} | row_parts(config)
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
        return
    logger.info("model or text lie in other files than when %s was made: comparing", writer.path)
    table = token_table(
        config.text,
        tokenizer,
        context_length=config.cache.context_length,
        causal=task == "causal-lm",
        drop_special_tokens=config.cache.drop_special_tokens,
        num_rows=config.cache.num_tokens,
    )
    writer.check_identity({"text": text_digest(table)})


def _write_shards(accelerator: Any, pipeline: Pipeline, todo: list[int]) -> Rate:
    """Makes this process's part of the missing shards."""
    world, geometry = accelerator.num_processes, pipeline.geometry
    mine = pipeline.plan.mine(todo, accelerator.process_index, world)
    title = f"cache {len(pipeline.widths)} hookpoints"
    # The processes' parts are alike: the bar shows the first's progress as everyone's.
    total = world * sum(stop - start for start, stop in map(geometry.shard_range, mine))
    done = geometry.num_shards - len(todo)
    kept = _Kept(pipeline.writer, geometry.num_shards, done, world)
    pipeline.recorded = kept.add
    bar_ = progress_bar(title, total, "tokens", accelerator.is_main_process)
    with ending.deferred(), bar_ as bar:

        def advance(rows: int) -> None:
            bar.advance(world * rows)
            if number := ending.requested():
                pipeline.drain()
                name = ending.name_of(number)
                raise ending.StopRequested(number, f"stopped by {name}; {ending.kept()}")

        rate = pipeline.make(mine, advance)
    logger.info("%d shards made, %s", len(mine), rate)
    return rate


class _Kept:
    """Counts shards that are whole, and says so should the launch end early."""

    def __init__(self, writer: StoreWriter, total: int, done: int, world: int) -> None:
        self.writer, self.total, self.done, self.world = writer, total, done, world
        self.lock = threading.Lock()
        self._tell()

    def add(self, shard: int) -> None:
        with self.lock:
            self.done += 1
            self._tell()

    def _tell(self) -> None:
        told = f"{self.done} of {self.total} shards are kept in {self.writer.path}"
        told += " with what the other processes made" if self.world > 1 else ""
        ending.keeps(f"{told}, and the same command makes the others")


def _check_folder(writer: StoreWriter) -> None:
    """Raises ConfigError, on all processes, where one cannot write the store's folder: models load
    and texts are tokenised for long. Of an object store, only writing tells.
    """
    error = None
    if writer.records.local:
        try:
            check_writable("cache.store", writer.records.root)
        except ConfigError as e:
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


def _table_folder(config: RunConfig, writer: StoreWriter) -> Path:
    """Beside the records of a store on disk, else among the host's temporary files."""
    if writer.records.local:
        return Path(writer.records.root) / "records" / "text"
    return private_folder() / f"text-{_digest(config)[:16]}"


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(store_config(config), sort_keys=True).encode()).hexdigest()


# Tells of which config the token table is, and what is in its files: one that was killed early
# leaves no other sign.
_MARKER = "whole.json"


def _table_is_whole(folder: Path, digest: str) -> bool:
    """Whether an interrupted cache of this config left its token table, with every bit of it."""
    try:
        told = read_json(folder / _MARKER)
        if told.get("config") != digest:
            return False
        for name, crc in told["crc32c"].items():
            if checksum(folder / name) != crc:
                raise ValueError(f"{name} does not hold what was written: its crc32c changed")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, AttributeError) as e:
        logger.warning("%s is damaged: %s; the text is tokenised again", folder, e)
        return False
    return True


def _tokenise(config: RunConfig, lm: LanguageModel, *, shown: bool) -> TokenTable:
    assert config.cache is not None
    assert config.text is not None
    with progress_bar("tokenise", config.cache.num_tokens, "tokens", shown) as bar:
        table = token_table(
            config.text,
            lm.tokenizer,
            context_length=config.cache.context_length,
            causal=lm.causal,
            drop_special_tokens=config.cache.drop_special_tokens,
            num_rows=config.cache.num_tokens,
            advance=bar.advance,
        )
        if bar.done < bar.total:
            bar.show(bar.total, f"all {bar.done} tokens of the text")
    return table


def _shared_table(
    config: RunConfig,
    lm: LanguageModel,
    accelerator: Any,
    writer: StoreWriter,
    stamp: str | None,  # of the files that are read
) -> TokenTable:
    """Tokenises once a host, in its first process; the others map the files."""
    assert config.cache is not None
    assert config.text is not None
    folder = _table_folder(config, writer)
    first = accelerator.is_local_main_process
    if writer.records.local:
        first = accelerator.is_main_process
    # The marker tells of which config and files the table is.
    marker, digest = folder / _MARKER, f"{_digest(config)} {stamp}"
    error: Exception | None = None
    if first and not _table_is_whole(folder, digest):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _tokenise(config, lm, shown=accelerator.is_main_process).save(folder)
            sums = {file.name: checksum(file) for file in sorted(folder.iterdir())}
            write_json(marker, {"config": digest, "crc32c": sums})
        # The others wait: they are told of whatever a tokenizer raises, too.
        except Exception as e:
            error = e
    agree.raise_together(error)
    return TokenTable.load(folder)


def _shared_origin(lm: LanguageModel, table: TokenTable) -> Origin:
    """Text and model, which are the same in all processes. Collective.

    Raises ConfigError where hosts have other files than one another.
    """
    origin = Origin(table.checksum(), model_commit(lm), model_dtype(lm), weights_checksum(lm))
    everyone = agree.from_all(origin)
    words = {
        "text_crc32c": "text.paths or text.name gives another text",
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
