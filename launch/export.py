"""`export`: every finished SAE in other libraries' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Write every finished SAE under output in the formats of export.formats.

    SAELens loads `<directory>/sae_lens/<job>` with SAE.load_from_disk. sparsify loads the SAEs of
    all hookpoints with SparseCoder.load_many("<directory>/sparsify/<values>", local=True), where
    <values> are a grid's, such as k=16, or `train` for the SAEs of `train`; circuit-tracer loads a
    folder of the same name, whose thresholds are measured on the store. The others are
    `<directory>/<format>/<job>`. Several processes divide the SAEs among them. An SAE that a
    format cannot hold is left out of it, as a warning says.

    flash-sae export configs/quickstart.yaml "export.formats=[sae_lens]"
    """
    from ..exporting import run_export

    with processes(config) as accelerator:
        for found in run_export(config, accelerator):
            print(f"{found.name} -> {found.path} ({found.format})", flush=True)


if __name__ == "__main__":
    verb_main(run)
