"""Training losses of a TopK SAE; all sums are float32 or wider, over every replica's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import collectives
from ..parallel.mesh import Mesh


@torch.no_grad()
def total_variance(
    x: Tensor,  # [N, d_in], this replica's tokens
    mesh: Mesh,
) -> Tensor:  # scalar
    """`sum of (x - mean)^2` over tokens and dimensions, the mean taken over all replicas' tokens.

    Collective over the replicas.
    """
    sums = x.sum(dim=0)
    collectives.all_reduce_(sums, mesh.replica_group, mesh.num_replicas)
    mean = sums / (x.shape[0] * mesh.num_replicas)
    variance = (x - mean).square().sum()
    collectives.all_reduce_(variance, mesh.replica_group, mesh.num_replicas)
    return variance


def fvu_loss(
    x: Tensor,  # [N, d_in]
    recon: Tensor,  # [N, d_in]
    variance: Tensor,  # scalar, total_variance of the whole batch
) -> Tensor:  # scalar
    """These tokens' share of the fraction of variance unexplained: `sum (x - recon)^2 / variance`.

    The shares of all replicas and micro-batches add up to the FVU of the whole batch, so their
    gradients add up too.
    """
    return (x - recon).square().sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def auxk_loss(
    residual: Tensor,  # [N, d_in] x - recon, detached
    aux_recon: Tensor,  # [N, d_in] what the dead latents make of it, without b_dec
    mesh: Mesh,
) -> Tensor:  # scalar
    """This replica's share of AuxK: `sum (residual - aux_recon)^2 / sum (residual - mean)^2`.

    Gao et al. 2024 (arXiv 2406.04093), A.2, in the form of OpenAI's code: normalised by the
    residual's own variance, zero where that is not finite. The caller applies the coefficient,
    1/32 there.
    """
    variance = total_variance(residual, mesh)
    return torch.nan_to_num((residual - aux_recon).square().sum() / variance, 0.0, 0.0, 0.0)


@torch.no_grad()
def geometric_median(
    x: Tensor,  # [N, d_in]
    iterations: int = 100,
) -> Tensor:  # [d_in]
    """The point of least summed distance to the rows, by Weiszfeld's iteration from their mean."""
    point = x.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (x - point).norm(dim=1, keepdim=True).clamp_min(1e-8)
        point = (x * weights).sum(dim=0) / weights.sum()
    return point
