"""`train`: one SAE from the activation store, or from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import processes, verb_main

if TYPE_CHECKING:
    from ..training.job import Config


def run(config: Config) -> None:
    """Train one SAE on a hookpoint of the store; its latents are sharded over the processes.

    Run again after an interruption, it goes on from the newest checkpoint. Reads the sections sae
    and train; with train.source=stream it needs no store: the model runs meanwhile, as model, text
    and cache say.

    sae.architecture is topk, batch_topk, matryoshka, jumprelu, gated, relu, multi_topk,
    topk_crosscoder, batch_topk_crosscoder or relu_crosscoder; `flash-sae keys sae` lists the keys
    of each. A crosscoder's train.hookpoint joins several by +.

    flash-sae train configs/gpt2-small.yaml train.hookpoint=transformer.h.8

    flash-sae train configs/gpt2-small.yaml sae.architecture=batch_topk

    flash-sae train configs/gpt2-small.yaml output=runs/gpt2-stream train.source=stream

    accelerate launch -m flash_sae_dist.launch.train configs/gpt2-small.yaml train.num_shards=8
    """
    from ..grid.runner import run_jobs

    with processes(config, trackers=True) as accelerator:
        run_jobs(config, accelerator, grid=False)


if __name__ == "__main__":
    verb_main(run)
