"""What is usual with an architecture."""

from __future__ import annotations

from typing import Literal, NamedTuple


class TrainDefaults(NamedTuple):
    """What is usual with an architecture for keys of the section train that are left out."""

    lr: float | None = None  # None is 2e-4 / sqrt(d_sae / 2**14)
    lr_steps: int | None = 300_000  # that lr is of: shorter runs bear more; None: nothing is known
    adam_betas: tuple[float, float] = (0.9, 0.999)
    dead_latents: Literal["auxk", "ghost", "resample", "none"] = "auxk"
