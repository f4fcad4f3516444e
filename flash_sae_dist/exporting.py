"""Exports every finished SAE under an output folder, divided among the processes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from .activations.store import ActivationStore, store_of
from .config.base import ConfigError, UserError
from .evaluation.finished import FinishedSAE, finished_saes
from .files import check_writable
from .interop import FORMATS, save, thresholds
from .models.about import About
from .parallel import agree
from .training.job import Config

logger = logging.getLogger(__name__)
# Written for the SAEs of all hookpoints together, from rows of the store.
_SETS = "circuit_tracer"


class ExportedSAE(NamedTuple):
    """An SAE in another library's format."""

    name: str  # of the finished SAE
    format: str
    path: Path  # its folder, or its file where the format is one


def run_export(config: Config, accelerator: Any) -> list[ExportedSAE]:
    """Writes every finished SAE in the formats of export.formats, and returns what this process
    wrote. Collective.

    An SAE that a format cannot hold is left out of it, which is a warning. Raises ConfigError
    before anything is written where nothing is left.
    """
    root = Path(config.export.directory or Path(config.output) / "export")
    begins = begins_with_token(config)
    agree.first_checks(lambda: check_writable("export.directory", root))
    finished = finished_saes(Path(config.output))
    held = agree.from_first(lambda: _held(finished, config.export.formats))
    written = []
    for found, formats in held[accelerator.process_index :: accelerator.num_processes]:
        written += _write(config, found, formats, root, begins)
    in_sets = [found for found, formats in held if _SETS in formats]
    if accelerator.is_main_process and in_sets:
        written += _write_sets(config, in_sets, root)
    accelerator.wait_for_everyone()
    return written


def _write(
    config: Config, found: FinishedSAE, formats: list[str], root: Path, begins: bool
) -> list[ExportedSAE]:
    """Writes one SAE in those of the formats that have a place for each."""
    sae, about, written = found.load(), about_of(config, found, begins), []
    for name in formats:
        if name != _SETS:
            place = _hookpoint_last(found) if name == "sparsify" else found.name
            path = save(sae, root / name / place, name, about)
            written.append(ExportedSAE(found.name, name, path))
    return written


def _write_sets(config: Config, finished: list[FinishedSAE], root: Path) -> list[ExportedSAE]:
    """circuit-tracer's sets: a folder of layers for the SAEs of all hookpoints."""
    store, written = store_of(config), []
    for found in finished:
        sae = found.load()
        rows = thresholds.rows_of(store, found.hookpoint).to(sae.W_dec.dtype)
        contents = thresholds.with_thresholds(sae, rows)
        place = root / _SETS / _hookpoint_last(found).parent
        path = save(contents, place, _SETS, about_of(config, found, True))
        written.append(ExportedSAE(found.name, _SETS, path))
    return written


def about_of(config: Config, found: FinishedSAE, begins: bool) -> About:
    """What the config of a run tells of an SAE; begins: whether sequences began with a token."""
    return About(
        found.hookpoint,
        config.model.name if config.model else None,
        config.cache.context_length if config.cache else None,
        begins,
        found.target,
    )


def _held(
    finished: list[FinishedSAE], formats: tuple[str, ...]
) -> list[tuple[FinishedSAE, list[str]]]:
    """Each SAE with those of the formats that can hold it; the others are a warning an SAE. Raises
    ConfigError before anything is written where nothing is left.
    """
    held, reasons = [], []
    for found in finished:
        kept, refused = [], []
        for name in formats:
            try:
                FORMATS[name].check_holds(found.architecture(), found.spec(), found.name)
                kept.append(name)
            except ValueError as e:
                refused.append(str(e))
        if kept:
            held.append((found, kept))
        if refused:
            reasons.append("; ".join(refused))
    if reasons and not held:
        raise ConfigError(f"export.formats={list(formats)}: {reasons[0]}")
    for reason in reasons:
        logger.warning("left out of export.formats=%s: %s", list(formats), reason)
    return held


def begins_with_token(config: Config) -> bool:
    """What the store tells; true, as for most models, where it is not at hand."""
    try:
        return ActivationStore.open(config.store_path()).begins_with_token()
    except UserError:
        return True


def _hookpoint_last(found: FinishedSAE) -> Path:
    """sparsify takes all folders beside one another for hookpoints of one model, so SAEs of `train`
    have a folder of their own beside those of a grid's values.
    """
    name = Path(found.name)
    values = [part for part in name.parts if part != found.hookpoint]
    if name.name in ("", found.hookpoint):
        values.append("train")
    return Path(*values, found.hookpoint)
