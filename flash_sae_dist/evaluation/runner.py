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
from .loss_recovered import LossMeter
from .metrics import measure
from .plots import natural
from .report import evaluation_record, write_evaluation, write_report

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
    lm, text = None, None
    if with_losses:
        hookpoints = list(dict.fromkeys(found.hookpoint for found in mine))
        lm, text = _language_model(config, store, accelerator.device, hookpoints)
    passes = len(mine) + 2 * len({s.hookpoint for s in mine})
    num_tokens = min(cfg.num_tokens, store.kept_rows)
    work = num_tokens * len(mine) + (text.ids.size * passes if text is not None else 0)
    meters: dict[str, LossMeter] = {}
    records = []
    with progress_bar("evaluate", work, "tokens", accelerator.is_main_process) as bar:
        for sae in mine:
            if lm is not None and sae.target is None and sae.hookpoint not in meters:
                assert text is not None
                assert config.cache is not None
                size = config.cache.batch_sequences
                meters[sae.hookpoint] = LossMeter(lm, sae.hookpoint, text, size, bar.advance)
            meter = None if sae.target is not None else meters.get(sae.hookpoint)
            records.append(_evaluate(sae, cfg, store, meter, accelerator.device, bar.advance))
    everyone: list[dict[str, Any]] = gather_object(records) if world > 1 else records
    everyone.sort(key=lambda r: natural(r["job"]))
    if accelerator.is_main_process:
        write_report(output, everyone)
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


def _evaluate(
    found: FinishedSAE,
    cfg: EvaluateConfig,
    store: ActivationStore,
    meter: LossMeter | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    sae = found.load(device)
    # Never more than the store holds: a row measured twice is no new evidence.
    num_tokens = min(cfg.num_tokens, store.kept_rows)
    num_steps = -(-num_tokens // cfg.batch_tokens)
    options: dict[str, Any] = {"seed": -1 & 0x7FFFFFFF, "num_steps": num_steps, "device": device}
    size = -(-num_tokens // num_steps)
    loader = AlignedLoaders(
        lambda name: ActivationLoader(store, name, batch_tokens=size, **options), found.hookpoints
    )

    def batches() -> Iterator[tuple[Tensor, ...]]:
        left = num_tokens
        for batch in loader:
            # The loader's passes are of one size; the last may reach beyond what was asked for.
            rows = tuple(part[:left].to(device, non_blocking=True) for part in batch)
            yield rows
            left -= len(rows[0])
            advance(len(rows[0]))

    with loader:
        metrics = measure(sae, batches())
    loss = meter.measure(sae) if meter is not None else None
    if found.target is not None:
        logger.info("%s is a transcoder: the loss recovered is left out", found.name)
    record = evaluation_record(
        found.name, found.hookpoint, getattr(sae.config, "k", None), sae.d_sae, metrics, loss
    )
    record["made_of"] = _made_of(found, store, meter)
    write_evaluation(found.folder, record)
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]
