"""Imported by the server of forks alone: what the verbs and workers import, then no garbage
collection of it, which would copy its memory in every fork.
"""

from __future__ import annotations

import gc
import importlib

for module in (
    "accelerate.commands.launch",
    "flash_sae_dist.activations.harvest",
    "flash_sae_dist.grid.runner",
    "flash_sae_dist.kernels.encode",
    "tests.dist.ranks",
    "tests.tiny_model",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(module)
gc.freeze()
