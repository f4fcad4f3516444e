"""A verb whose process dies (as by kill -9) or hangs at a named moment, given by DIE_AT."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from flash_sae_dist.launch.entry import verb_main

# Moments, in their order: a function, and whether it is left before or after it ran.
MOMENTS = {
    "start": None,
    "roll call": ("flash_sae_dist.parallel.rendezvous", "_RollCall.answer", "before"),
    "called": ("flash_sae_dist.parallel.rendezvous", "_RollCall.answer", "after"),
    "accelerator": ("accelerate", "Accelerator.__init__", "before"),
    "connected": ("accelerate", "Accelerator.__init__", "after"),
    "mesh": ("flash_sae_dist.grid.runner", "make_mesh", "before"),
    "group": ("flash_sae_dist.parallel.rendezvous", "be_patient", "before"),
    "meshed": ("flash_sae_dist.grid.runner", "make_mesh", "after"),
    "plan": ("flash_sae_dist.grid.runner", "agreed_plan", "before"),
    "planned": ("flash_sae_dist.grid.runner", "agreed_plan", "after"),
    "training": ("flash_sae_dist.grid.runner", "_train", "before"),
    "trainer": ("flash_sae_dist.training.trainer", "Trainer.__init__", "after"),
    "step": ("flash_sae_dist.training.step", "SAETraining.step", "before"),
    "checkpoint": ("flash_sae_dist.training.checkpoint", "save", "before"),
}


def leave() -> None:
    if os.environ.get("DIE_BY") == "hanging":
        time.sleep(600)
    os._exit(77)


def arm(moment: str) -> None:
    place = MOMENTS[moment]
    if place is None:
        leave()
        return
    module, path, when = place
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def dying(*args: Any, **options: Any) -> Any:
        if when == "before":
            leave()
        result = original(*args, **options)
        leave()
        return result

    setattr(owner, name, dying)


if __name__ == "__main__":
    if moment := os.environ.get("DIE_AT"):
        arm(moment)
    verb_main(importlib.import_module("flash_sae_dist.launch.train").run)
