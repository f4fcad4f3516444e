"""Whether a step of an architecture that selects by threshold is dense or sparse.

At the start about half of all latents may be above their thresholds: lists of pairs are then larger
than the products that they stand for, and gathers far slower. So a step computes all pairs, in
blocks of tokens, until few enough are active, and again where they become many.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...models.base import SparseCoder
from ...models.threshold import ThresholdCoder

logger = logging.getLogger(__name__)
# Pre-activations of a block [n, F]: about ten such tensors of float32 are alive at once.
BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
# Mean L0 as a share of the latents above which steps become dense, and below which sparse again.
# Measured by `flash-sae bench density` (docs/architectures.md): both take as long at 5% on a CPU,
# at 2.7% and 1.2% on an H200 (D = 768 and 4096). A pair is gathered four times, 2 D bytes each; a
# dense one costs four more products of 2 D flops and 50 bytes of [N, F] tensors.
SHARES = {"cpu": (0.1, 0.05), "cuda": (0.02, 0.01)}
# Steps between looks at L0 while steps are sparse; the host waits for the device there.
LOOK_EVERY_STEPS = 100


class Density:
    """The form of the coming steps: a function of the step and of the mean L0 of the step before
    it, both of which a checkpoint holds. Steps are sparse until `choose` is asked.
    """

    def __init__(self, sae: SparseCoder) -> None:
        self.is_dense = False
        self.share = torch.ones_like(sae.b_dec[0], requires_grad=False)
        self._kind, self._d_sae = sae.b_dec.device.type, sae.d_sae
        self._tells = sae.mesh.is_lead
        self.block = max(1, BLOCK_ELEMENTS[self._kind] // sae.d_sae_local)

    @staticmethod
    def of(sae: SparseCoder) -> Density | None:
        """None for architectures whose latents are few from the start."""
        return Density(sae) if isinstance(sae, ThresholdCoder) else None

    def choose(self, step: int) -> None:
        """Decides the form of a step, from 0. A host sync while steps are dense, and every
        LOOK_EVERY_STEPS else.
        """
        if step and not self.is_dense and step % LOOK_EVERY_STEPS:
            return
        share = float(self.share) if step else 1.0
        enter, leave = SHARES[self._kind]
        dense = share > (leave if self.is_dense else enter)
        if dense != self.is_dense and self._tells:
            told = f"{share:.1%} of the latents are active" if step else "L0 is not known yet"
            until = f"densely in blocks, until less than {leave:.1%} are" if dense else "sparsely"
            logger.info("step %d: %s, steps are computed %s", step, told, until)
        self.is_dense = dense

    def saw_(self, l0: Tensor) -> None:
        """Takes in the mean L0 of a step."""
        self.share.copy_(l0 / self._d_sae)
