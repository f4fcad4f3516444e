"""`evaluate`: numbers and plots of every finished SAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Measure every finished SAE: FVU, cosine, L0, latents that never fired, densities,
    cross-entropy and KL recovered.

    Takes all under output, on the rows that their training held out. Writes evaluation.json,
    report.md and plots, and prints a table. The store must hold rows of the model that the SAEs
    were trained on; its text may be another, and is then read whole. With
    evaluate.loss_sequences=0 the language model is not loaded. Several processes divide the SAEs
    among them.

    flash-sae evaluate configs/quickstart.yaml evaluate.num_tokens=65536

    Any other library's SAE is measured on the same store or model, with SAE=PATH for each (see
    docs/formats.md); a config's file may then be left out.

    flash-sae evaluate SAE=trainer_0/ae.pt SAE=EleutherAI/sae-pythia-70m-32k/layers.3
    store=acts.zarr output=runs/others evaluate.hookpoint=gpt_neox.layers.3
    """
    from rich.console import Console

    from ..evaluation.report import table
    from ..evaluation.runner import run_evaluation

    with processes(config) as accelerator:
        records = run_evaluation(config, accelerator)
        if accelerator.is_main_process:
            Console(width=max(120, Console().width)).print(table(records))


if __name__ == "__main__":
    verb_main(run)
