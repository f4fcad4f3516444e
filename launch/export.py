"""`export`: every finished SAE in other libraries' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config.base import ConfigError, UserError
from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config

if TYPE_CHECKING:
    from ..evaluation.finished import FinishedSAE


def run(config: Config) -> None:
    """Write every finished SAE under output in the formats of export.formats.

    SAELens loads `<directory>/sae_lens/<job>` with SAE.load_from_disk. sparsify loads the SAEs of
    all hookpoints with SparseCoder.load_many("<directory>/sparsify/<values>", local=True), where
    <values> are a grid's, such as k=16, or `train` for the SAEs of `train`. Several processes
    divide the SAEs among them.

    flash-sae export configs/quickstart.yaml "export.formats=[sae_lens]"
    """
    from ..evaluation.finished import finished_saes
    from ..files import check_writable
    from ..interop import sae_lens, sparsify
    from ..models.topk import TopKSAE
    from ..parallel import agree

    root = Path(config.export.directory or Path(config.output) / "export")
    begins = _begins_with_token(config)
    with processes(config) as accelerator:
        agree.first_checks(lambda: check_writable("export.directory", root))
        rank, world = accelerator.process_index, accelerator.num_processes
        finished = finished_saes(Path(config.output))
        agree.first_checks(lambda: _check_architectures(finished, config.export.formats))
        for found in finished[rank::world]:
            sae = found.load()
            assert isinstance(sae, TopKSAE)
            if "sae_lens" in config.export.formats:
                sae_lens.export(
                    sae,
                    root / "sae_lens" / found.name,
                    hookpoint=found.hookpoint,
                    model_name=config.model.name if config.model else None,
                    context_length=config.cache.context_length if config.cache else None,
                    prepend_bos=begins,
                )
            if "sparsify" in config.export.formats:
                sparsify.export(sae, root / "sparsify" / _hookpoint_last(found))
            print(f"{found.name} -> {root} ({', '.join(config.export.formats)})")
        accelerator.wait_for_everyone()


def _check_architectures(finished: list[FinishedSAE], formats: tuple[str, ...]) -> None:
    """Raises ConfigError before anything is written for an SAE that a format cannot hold."""
    for found in finished:
        if (name := found.architecture()) != "topk":
            raise ConfigError(
                f"export.formats={list(formats)} cannot hold {found.name}, whose architecture is "
                f"{name!r}, only 'topk'; export another output folder"
            )
        if found.target is not None:
            raise ConfigError(
                f"export.formats={list(formats)} cannot hold {found.name}, which is a transcoder; "
                "export another output folder"
            )


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
