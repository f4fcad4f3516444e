"""`export`: every finished SAE in other libraries' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config.base import ConfigError, UserError
from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..evaluation.finished import FinishedSAE
    from ..models.about import About
    from ..training.job import Config


def run(config: Config) -> None:
    """Write every finished SAE under output in the formats of export.formats.

    SAELens loads `<directory>/sae_lens/<job>` with SAE.load_from_disk. sparsify loads the SAEs of
    all hookpoints with SparseCoder.load_many("<directory>/sparsify/<values>", local=True), where
    <values> are a grid's, such as k=16, or `train` for the SAEs of `train`; circuit-tracer loads a
    folder of the same name, whose thresholds are measured on the store. The others are
    `<directory>/<format>/<job>`. Several processes divide the SAEs among them.

    flash-sae export configs/quickstart.yaml "export.formats=[sae_lens]"
    """
    from ..evaluation.finished import finished_saes
    from ..files import check_writable
    from ..parallel import agree

    root = Path(config.export.directory or Path(config.output) / "export")
    begins = _begins_with_token(config)
    with processes(config) as accelerator:
        agree.first_checks(lambda: check_writable("export.directory", root))
        rank, world = accelerator.process_index, accelerator.num_processes
        finished = finished_saes(Path(config.output))
        agree.first_checks(lambda: _check_held(finished, config.export.formats))
        for found in finished[rank::world]:
            _write(config, found, root, begins)
        if accelerator.is_main_process and "circuit_tracer" in config.export.formats:
            _write_sets(config, finished, root)
        accelerator.wait_for_everyone()


def _write(config: Config, found: FinishedSAE, root: Path, begins: bool) -> None:
    """Writes one SAE in the formats that have a place for each."""
    from .. import interop

    sae, about = found.load(), _about(config, found, begins)
    formats = [name for name in config.export.formats if name != "circuit_tracer"]
    for name in formats:
        place = _hookpoint_last(found) if name == "sparsify" else found.name
        interop.save(sae, root / name / place, name, about)
    if formats:
        print(f"{found.name} -> {root} ({', '.join(formats)})")


def _write_sets(config: Config, finished: list[FinishedSAE], root: Path) -> None:
    """circuit-tracer's sets: a folder of layers for the SAEs of all hookpoints."""
    from .. import interop
    from ..activations.store import store_of

    store = store_of(config)
    for found in finished:
        sae = found.load()
        rows = interop.thresholds.rows_of(store, found.hookpoint).to(sae.W_dec.dtype)
        contents = interop.thresholds.with_thresholds(sae, rows)
        place = root / "circuit_tracer" / _hookpoint_last(found).parent
        interop.save(contents, place, "circuit_tracer", _about(config, found, True))
        print(f"{found.name} -> {place}")


def _about(config: Config, found: FinishedSAE, begins: bool) -> About:
    from ..models.about import About

    return About(
        found.hookpoint,
        config.model.name if config.model else None,
        config.cache.context_length if config.cache else None,
        begins,
        found.target,
    )


def _check_held(finished: list[FinishedSAE], formats: tuple[str, ...]) -> None:
    """Raises ConfigError before anything is written for an SAE that a format cannot hold."""
    from ..interop import FORMATS

    for found in finished:
        for name in formats:
            try:
                FORMATS[name].check_holds(found.architecture(), found.spec(), found.name)
            except ValueError as e:
                raise ConfigError(f"export.formats={list(formats)}: {e}") from e


def _begins_with_token(config: Config) -> bool:
    """What the store tells; true, as for most models, where it is not at hand."""
    from ..activations.store import ActivationStore

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


if __name__ == "__main__":
    verb_main(run)
