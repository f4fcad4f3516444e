"""Evaluates every finished SAE under an output folder, divided among the processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..activations.aligned import AlignedLoaders
from ..activations.language_model import (
    LanguageModel,
    load_language_model,
)
from ..activations.loader import ActivationLoader
from ..activations.model_loss import check_has_loss
from ..activations.origin import text_digest
from ..activations.probe import probe
from ..activations.store import ActivationStore, store_of
from ..activations.text import TokenTable, held_out_table
from ..activations.tokenising import making_of
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
from .loss_recovered import CleanPredictions, LossMeter, num_batches
from .metrics import measure
from .report import evaluation_record, write_evaluation, write_report
from .results import natural, write_results
from .unseen import MeasuredRows, measured_rows, warn_of_rows

logger = logging.getLogger(__name__)


def run_evaluation(config: Config, accelerator: Any) -> list[dict[str, Any]]:
    """Measures all finished SAEs and writes the report; returns its records on every process.
    Collective.

    Raises ConfigError before any work where the store or the model is not the SAEs' own.
    """
    cfg, output = config.evaluate, Path(config.output)
    saes = finished_saes(output)
    store = agree.after_first(lambda: store_of(config))
    for sae in saes:
        sae.check_fits(store)
    agree.first_checks(lambda: check_writable("output", output))
    with_losses = _with_losses(config, store, accelerator)
    if with_losses:
        agree.first_checks(lambda: check_same_model(config, store))
        if accelerator.is_main_process:
            warn_of_other_text(config, store)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Neighbours share a hookpoint, and with it the clean and the zero loss.
    saes.sort(key=lambda s: s.hookpoint)
    mine = saes[len(saes) * rank // world : len(saes) * (rank + 1) // world]
    lm, text, hookpoints = None, None, list(dict.fromkeys(found.hookpoint for found in mine))
    if with_losses:
        lm, text = _language_model(config, store, accelerator.device, hookpoints)
    rows = [measured_rows(sae, store, cfg) for sae in mine]
    warn_of_rows(mine, rows)
    work, records = _num_tokens(mine, rows, cfg, text), []
    with progress_bar("evaluate", work, "tokens", accelerator.is_main_process) as bar:
        meters = _meters(config, lm, text, hookpoints, bar.advance)
        for sae, measured in zip(mine, rows, strict=True):
            place = _Place(store, measured, accelerator.device)
            meter = None if sae.target is not None else meters.get(sae.hookpoint)
            records.append(_evaluate(sae, cfg, place, meter, bar.advance))
    everyone: list[dict[str, Any]] = gather_object(records) if world > 1 else records
    everyone.sort(key=lambda r: natural(r["job"]))
    if accelerator.is_main_process:
        write_report(output, everyone)
        write_results(output, everyone)
    accelerator.wait_for_everyone()
    return everyone


def _with_losses(config: Config, store: ActivationStore, accelerator: Any) -> bool:
    """Whether losses are measured, too. Raises ConfigError where they should be and the config
    lacks a section; of imported rows they are left out then, which a log line says.
    """
    if not config.evaluate.loss_sequences:
        return False
    sections = ("model", "text", "cache")
    if not store.knows_model() and None in (config.model, config.text, config.cache):
        if accelerator.is_main_process:
            logger.info(
                "the loss recovered is left out: the rows of %s were imported, and the config has "
                "no sections %s of the model they are of",
                store.path,
                ", ".join(sections),
            )
        return False
    config.need(*sections, verb="evaluate")
    return True


def _language_model(
    config: Config, store: ActivationStore, device: torch.device, hookpoints: list[str]
) -> tuple[LanguageModel, TokenTable]:
    assert config.model is not None
    assert config.text is not None
    assert config.cache is not None
    lm = load_language_model(config.model, device)
    agree.together(lambda: check_loaded_model(config, lm, store))
    check_has_loss(lm)
    probe(lm, hookpoints, config.cache.context_length)
    making = making_of(config, lm.tokenizer, causal=lm.causal)
    table = held_out_table(
        making,
        # Numbers of imported documents are not those of the text.
        after_documents=store.num_documents() if store.knows_model() else 0,
        num_sequences=config.evaluate.loss_sequences,
    )
    return lm, table


def _made_of(found: FinishedSAE, store: ActivationStore, meter: LossMeter | None) -> dict[str, Any]:
    """What an evaluation is of: the SAE, the store's rows, the text of the losses, versions."""
    sae, rows = found.made_of(), store.made_of(found.hookpoint)
    return {
        "sae": sae["digest"] if sae else None,
        "store": {"parts": rows["parts"], "rows": rows["rows"]},
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


def _num_tokens(
    saes: list[FinishedSAE], rows: list[MeasuredRows], cfg: EvaluateConfig, text: TokenTable | None
) -> int:
    """Tokens that are run through SAEs and model."""
    stored = sum(min(cfg.num_tokens, r.available) for r in rows)
    if text is None:
        return stored
    return stored + int(text.ids.size) * (len(saes) + 2 * len({s.hookpoint for s in saes}))


class _Place(NamedTuple):
    """What an SAE is measured on, and where."""

    store: ActivationStore
    rows: MeasuredRows
    device: torch.device


def _evaluate(
    found: FinishedSAE,
    cfg: EvaluateConfig,
    place: _Place,
    meter: LossMeter | None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    store, rows, device = place
    sae = found.load(device)
    # Never more than there are: a row measured twice is no new evidence.
    num_tokens = min(cfg.num_tokens, rows.available)
    num_steps = -(-num_tokens // cfg.batch_tokens)
    options: dict[str, Any] = {"seed": -1 & 0x7FFFFFFF, "num_steps": num_steps, "device": device}
    options |= {"holdout": rows.holdout, "only_held_out": rows.holdout > 0}
    size = -(-num_tokens // num_steps)
    loader = AlignedLoaders(
        lambda name: ActivationLoader(store, name, batch_tokens=size, **options), found.hookpoints
    )

    def batches() -> Iterator[tuple[Tensor, ...]]:
        left = num_tokens
        for batch in loader:
            # The loader's passes are of one size; the last may reach beyond what was asked for.
            parts = tuple(part[:left].to(device, non_blocking=True) for part in batch)
            yield parts
            left -= len(parts[0])
            advance(len(parts[0]))

    with loader:
        metrics = measure(sae, batches())
    loss = meter.measure(sae) if meter is not None else None
    if found.target is not None:
        logger.info("%s is a transcoder: the loss recovered is left out", found.name)
    record = evaluation_record(
        found.name, found.hookpoint, getattr(sae.config, "k", None), sae.d_sae, metrics, loss
    )
    record |= {"rows": rows.told, "made_of": _made_of(found, store, meter)}
    write_evaluation(found.folder, record, metrics.density)
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]
