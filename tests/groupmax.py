"""An architecture in one file and one line, as a user would add it: `python -m tests.groupmax VERB
CONFIG ...` runs a verb that knows it.
"""

from __future__ import annotations

import importlib
import sys
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.base import Codes, Slots, SparseCoder
from flash_sae_dist.parallel.collectives import feed_shards


class GroupMaxConfig(SAEConfig):
    """Each group of neighbouring latents has one that is active."""

    architecture: Literal["groupmax"]
    group: int
    """Latents a group."""


class GroupMax(SparseCoder):
    """The largest pre-activation of each group, rectified and squared."""

    Config: ClassVar[type[SAEConfig]] = GroupMaxConfig
    is_pairwise = True

    def encode_rows(self, x: Tensor) -> Codes:
        return self.activate(self.candidates(x))

    def candidates(self, x: Tensor) -> Codes:
        self.check_input(x)
        xc = feed_shards(x, self.mesh) - feed_shards(self.b_dec, self.mesh)
        return self.select(xc, self.W_enc, self.b_enc)

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Codes:
        assert isinstance(self.config, GroupMaxConfig)
        pre = (xc @ W_enc.T + b_enc).unflatten(1, (-1, self.config.group))
        best, place = pre.max(dim=2)
        first = torch.arange(best.shape[1], device=place.device) * self.config.group
        return Slots(best.relu(), (place + first).int())

    def activate(self, found: Codes) -> Codes:
        return found._replace(values=found.values.square())


if __name__ == "__main__":
    ARCHITECTURES["groupmax"] = GroupMax
    verb, *sys.argv[1:] = sys.argv[1:]
    module = importlib.import_module(f"flash_sae_dist.launch.{verb}")
    from flash_sae_dist.launch.entry import verb_main

    verb_main(module.run)
