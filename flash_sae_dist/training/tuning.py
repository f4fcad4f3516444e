"""Times the encoder's designs for a training, and lets all ranks of one SAE take the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import encode_choice
from ..kernels.dispatch import on_device, use_kernels
from ..parallel.agree import from_lead
from ..parallel.mesh import Mesh

Choice = tuple[encode_choice.Shape, str]


def agree(found: Choice | None, mesh: Mesh) -> Choice | None:
    """All members use what the lead found, if anything; returns it. Collective over the members."""
    found = from_lead(found, mesh)
    if found is not None:
        encode_choice.use(*found)
    return found


@torch.no_grad()
def tune_encoder(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, mesh: Mesh
) -> Choice | None:
    """The lead looks the fastest design up, or times each and keeps the answer in the user's cache
    folder; all members use it.

    x [N, d_in] is a batch (not centred), W_enc [d_sae_local, d_in], both cast to the compute
    dtype. Collective over the members; waits for the device. None where no kernels serve.
    """
    if not use_kernels(W_enc.new_empty(0, dtype=dtype)):
        return None
    found = None
    try:
        if mesh.is_lead:
            from ..kernels.encode_topk import tune

            with on_device(W_enc):
                found = tune(x.to(dtype), W_enc.to(dtype), b_enc, k)
    except torch.OutOfMemoryError:
        # The usual design is used.
        torch.cuda.empty_cache()
    finally:
        # Even where the lead fails: the others wait for its answer.
        found = agree(found, mesh)
    return found
