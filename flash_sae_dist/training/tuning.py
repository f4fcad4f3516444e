"""Times the encoder's designs for a training, and lets all ranks of one SAE take the same."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..kernels import encode_choice
from ..kernels.dispatch import on_device, use_kernels
from ..parallel import comm
from ..parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def agree(found: tuple[encode_choice.Shape, str] | None, mesh: Mesh) -> None:
    """All members use what the lead found, if anything. Collective over the members."""
    found = comm.from_lead(found, mesh)
    if found is not None:
        encode_choice.use(*found)


@torch.no_grad()
def tune_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mesh: Mesh) -> None:
    """The lead looks the fastest design up, or times each and keeps the answer in the user's cache
    folder; all members use it.

    x [N, d_in] is a batch as the encoder will get it, W_enc [d_sae_local, d_in] in the compute
    dtype. Collective over the members; waits for the device. Nothing where there are no kernels.
    """
    if not use_kernels(W_enc):
        return
    found = None
    if mesh.is_lead:
        from ..kernels.encode_topk import tune

        try:
            with on_device(W_enc):
                found = tune(x.to(W_enc.dtype), W_enc, b_enc, k)
        except torch.OutOfMemoryError:
            logger.warning("no memory to time the encoder's designs: the usual one is used")
    agree(found, mesh)
