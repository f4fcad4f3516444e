"""`features`: what the latents of finished SAEs mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Show what each latent of every finished SAE stands for: examples with their text, densities,
    the output tokens it raises, its nearest latents.

    Reads the store once for each SAE of features.saes under output, and writes
    <SAE>/features/index.html, a page that opens from the disk, and features.jsonl.gz, a latent a
    line, for programs. The model of the section model gives the tokens' text and its unembedding;
    without it they are left out. Several processes divide the SAEs among them.

    flash-sae features configs/quickstart.yaml "features.saes=[model.layers.8/k=32]"
    """
    from ..features.runner import run_features

    with processes(config) as accelerator:
        for folder in run_features(config, accelerator):
            print(folder / "index.html", flush=True)


if __name__ == "__main__":
    verb_main(run)
