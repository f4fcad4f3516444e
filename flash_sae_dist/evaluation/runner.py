"""Evaluates every finished SAE under an output folder, divided among the processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..activations.language_model import (
    LanguageModel,
    load_language_model,
)
from ..activations.model_loss import check_has_loss
from ..activations.origin import text_digest
from ..activations.probe import probe
from ..activations.store import ActivationStore, store_of
from ..activations.text import TokenTable, held_out_table, token_table
from ..activations.tokenising import making_of
from ..config.base import sources_of
from ..config.run import EvaluateConfig
from ..files import check_writable
from ..identity import versions
from ..parallel import agree
from ..progress import progress_bar
from ..training.job import Config
from .finished import (
    FinishedSAE,
    check_loaded_model,
    check_same_model,
    finished_saes,
    warn_of_other_text,
)
from .given import GivenSAE, given_saes
from .loss_recovered import CleanPredictions, LossMeter, num_batches
from .metrics import measure
from .report import evaluation_record, write_evaluation, write_report
from .results import natural, write_results
from .rows import EvaluationRows, ModelRows, StoreRows
from .unseen import MeasuredRows, measured_rows, warn_of_rows

logger = logging.getLogger(__name__)


def run_evaluation(config: Config, accelerator: Any) -> list[dict[str, Any]]:
    """Measures all finished SAEs, or those of evaluate.saes, and writes the report; returns its
    records on every process. Collective.

    Raises ConfigError before any work where the store or the model is not the SAEs' own.
    """
    output = Path(config.output)
    store = _store(config)
    saes = _saes(config, store)
    agree.first_checks(lambda: check_writable("output", output))
    with_losses = _with_losses(config, store, accelerator)
    if with_losses and store is not None:
        agree.first_checks(lambda: check_same_model(config, store))
        if accelerator.is_main_process:
            warn_of_other_text(config, store)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Neighbours share a hookpoint, and with it the clean and the zero loss.
    saes.sort(key=lambda s: s.hookpoint)
    mine = saes[len(saes) * rank // world : len(saes) * (rank + 1) // world]
    records = _measure_all(config, store, mine, accelerator, with_losses)
    everyone: list[dict[str, Any]] = gather_object(records) if world > 1 else records
    everyone.sort(key=lambda r: natural(r["job"]))
    if accelerator.is_main_process:
        write_report(output, everyone)
        write_results(output, everyone)
    accelerator.wait_for_everyone()
    return everyone


def _store(config: Config) -> ActivationStore | None:
    """The store to measure on; None where the config has a model in its place. Collective."""
    if config.evaluate.saes and config.model is not None and not config.names_store():
        return None
    return agree.after_first(lambda: store_of(config))


def _saes(config: Config, store: ActivationStore | None) -> list[FinishedSAE | GivenSAE]:
    """What is measured. Raises ConfigError where it does not fit the rows."""
    cfg, output = config.evaluate, Path(config.output)
    if not cfg.saes:
        assert store is not None
        finished = finished_saes(output)
        for sae in finished:
            sae.check_fits(store)
        return [*finished]
    if store is None:
        config.need("model", "text", "cache", verb="evaluate")
        return [*given_saes(cfg, output, None)]
    return [*given_saes(cfg, output, store.widths)]


def _measure_all(
    config: Config,
    store: ActivationStore | None,
    mine: list[FinishedSAE | GivenSAE],
    accelerator: Any,
    with_losses: bool,
) -> list[dict[str, Any]]:
    """The records of this process's SAEs."""
    cfg, device = config.evaluate, accelerator.device
    hookpoints = list(dict.fromkeys(found.hookpoint for found in mine))
    lm, text = None, None
    if with_losses or store is None:
        tapped = [n for name in hookpoints for n in sources_of(name)]
        if store is None:
            tapped = [n for sae in mine for n in sae.hookpoints]
        lm, text = _language_model(config, store, device, list(dict.fromkeys(tapped)))
    rows = _rows(config, store, lm, text, mine)
    work = sum(r.count(cfg.num_tokens) for r in rows)
    # The loss is that of a model with one SAE in it.
    hookpoints = [name for name in hookpoints if len(sources_of(name)) == 1]
    if with_losses and text is not None:
        work += int(text.ids.size) * (len(mine) + 2 * len(hookpoints))
    records = []
    with progress_bar("evaluate", work, "tokens", accelerator.is_main_process) as bar:
        meters = _meters(config, lm, text, hookpoints, bar.advance) if with_losses else {}
        for sae, read in zip(mine, rows, strict=True):
            meter = None if sae.target is not None else meters.get(sae.hookpoint)
            records.append(_evaluate(sae, cfg, read, meter, device, bar.advance))
    return records


def _rows(
    config: Config,
    store: ActivationStore | None,
    lm: LanguageModel | None,
    text: TokenTable | None,
    saes: list[FinishedSAE | GivenSAE],
) -> list[EvaluationRows]:
    """The rows of each SAE."""
    if store is not None:
        measured = [
            measured_rows(found, store, config.evaluate)
            if isinstance(found, FinishedSAE)
            else MeasuredRows(0.0, store.kept_rows, "all rows of the store")
            for found in saes
        ]
        warn_of_rows(saes, measured)
        return [StoreRows(store, of) for of in measured]
    assert lm is not None
    assert text is not None
    assert config.model is not None
    assert config.cache is not None
    table = text
    if (wanted := config.evaluate.num_tokens) > int(text.keep.sum()):
        table = token_table(making_of(config, lm.tokenizer, causal=lm.causal), num_rows=wanted)
    hookpoints = list(dict.fromkeys(name for found in saes for name in found.hookpoints))
    shared = ModelRows(lm, config.model, table, hookpoints, config.cache.batch_sequences)
    return [shared] * len(saes)


def _with_losses(config: Config, store: ActivationStore | None, accelerator: Any) -> bool:
    """Whether losses are measured, too. Raises ConfigError where they should be and the config
    lacks a section; of imported rows they are left out then, and where it has none of them, which
    a log line says.
    """
    if not config.evaluate.loss_sequences:
        return False
    sections = ("model", "text", "cache")
    lacks = config.model is None and config.text is None
    if store is not None and not store.knows_model():
        lacks = None in (config.model, config.text, config.cache)
    if store is not None and lacks:
        if accelerator.is_main_process:
            logger.info(
                "the loss recovered is left out: the config has no sections %s of the model that "
                "the rows of %s are of",
                ", ".join(sections),
                store.path,
            )
        return False
    config.need(*sections, verb="evaluate")
    return True


def _language_model(
    config: Config, store: ActivationStore | None, device: torch.device, hookpoints: list[str]
) -> tuple[LanguageModel, TokenTable]:
    assert config.model is not None
    assert config.text is not None
    assert config.cache is not None
    lm = load_language_model(config.model, device)
    if store is not None:
        agree.together(lambda: check_loaded_model(config, lm, store))
    if config.evaluate.loss_sequences:
        check_has_loss(lm)
    probe(lm, hookpoints, config.cache.context_length)
    making = making_of(config, lm.tokenizer, causal=lm.causal)
    table = held_out_table(
        making,
        # Numbers of imported documents are not those of the text.
        after_documents=store.num_documents() if store is not None and store.knows_model() else 0,
        num_sequences=max(1, config.evaluate.loss_sequences),
    )
    return lm, table


def _made_of(
    found: FinishedSAE | GivenSAE, rows: EvaluationRows, meter: LossMeter | None
) -> dict[str, Any]:
    """What an evaluation is of: the SAE, the rows, the text of the losses, versions."""
    sae, read = found.made_of(), rows.made_of(found.hookpoint)
    return {
        "sae": sae["digest"] if sae else None,
        "store": {"parts": read["parts"], "rows": read["rows"]},
        "loss_text": text_digest(meter.table) if meter is not None else None,
        "versions": versions(),
    }


def _meters(
    config: Config,
    lm: LanguageModel | None,
    text: TokenTable | None,
    hookpoints: list[str],
    advance: Callable[[int], None],
) -> dict[str, LossMeter]:
    """By hookpoint; none without a model."""
    if lm is None or text is None:
        return {}
    assert config.cache is not None
    batch = config.cache.batch_sequences
    clean = CleanPredictions(num_batches(text, batch))
    return {name: LossMeter(lm, name, text, batch, advance, clean) for name in hookpoints}


def _evaluate(
    found: FinishedSAE | GivenSAE,
    cfg: EvaluateConfig,
    rows: EvaluationRows,
    meter: LossMeter | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    sae = found.load(device)
    num_tokens = rows.count(cfg.num_tokens)

    def counted(batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            yield tuple(part.to(device, non_blocking=True) for part in batch)
            advance(len(batch[0]))

    with rows.batches(found.hookpoints, num_tokens, cfg.batch_tokens, device) as batches:
        metrics = measure(sae, counted(batches))
    loss = meter.measure(sae) if meter is not None else None
    kind = "transcoder" if found.target is not None else "crosscoder"
    if len(found.hookpoints) > 1:
        logger.info("%s is a %s: the loss recovered is left out", found.name, kind)
    record = evaluation_record(
        found.name, found.hookpoint, getattr(sae.config, "k", None), sae.d_sae, metrics, loss
    )
    if metrics.source_fvus:
        record["source_fvus"] = dict(zip(found.hookpoints, metrics.source_fvus, strict=True))
    record |= {"rows": rows.told, "made_of": _made_of(found, rows, meter)}
    write_evaluation(found.folder, record, metrics.density)
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]
