"""Training losses; all sums are float32 or wider, over every replica's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.dispatch import implementation
from ..parallel import collectives
from ..parallel.mesh import Mesh


@torch.no_grad()
def total_variance(
    x: Tensor,  # [N, d_in], this replica's tokens
    mesh: Mesh,
) -> Tensor:  # scalar
    """`sum of (x - mean)^2` over tokens and dimensions, the mean taken over all replicas' tokens.

    0 where the tokens do not vary beyond rounding: all alike, or one. Collective over the replicas.
    """
    sums = x.sum(dim=0)
    collectives.all_reduce_(sums, mesh.replica_group, mesh.num_replicas)
    num_tokens = x.shape[0] * mesh.num_replicas
    mean = sums / num_tokens
    variance = (x - mean).square().sum()
    collectives.all_reduce_(variance, mesh.replica_group, mesh.num_replicas)
    rounding = (16 * torch.finfo(variance.dtype).eps) ** 2
    return variance * (variance > rounding * num_tokens * mean.square().sum())


def inverted(variance: Tensor) -> Tensor:
    """`1 / variance`, and 0 for a batch of equal tokens, which has none to explain."""
    tiny = torch.finfo(variance.dtype).tiny
    return torch.where(variance > tiny, 1 / variance.clamp_min(tiny), 0)


def fvu_loss(
    x: Tensor,  # [N, d_in]
    recon: Tensor,  # [N, d_in]
    inverse: Tensor,  # scalar, `inverted` total_variance of the whole batch
) -> Tensor:  # scalar
    """These tokens' share of the fraction of variance unexplained: `sum (x - recon)^2 / variance`.

    The shares of all replicas and micro-batches add up to the FVU of the whole batch, so their
    gradients add up too.
    """
    return (x - recon).square().sum() * inverse


def inverse_variance(
    sums: Tensor,  # [D], over the tokens of all replicas
    squares: Tensor,  # scalar, likewise
    num_tokens: int,
) -> Tensor:  # scalar
    """`1 / sum (e - mean)^2` of residuals e from their sums; 0 where they do not vary beyond
    rounding (one token, say) or are not finite, so that a loss normalised by it, and its gradient,
    are zero there.
    """
    variance = squares - sums.square().sum() / num_tokens
    # The difference of two sums carries their rounding errors.
    varies = variance > squares * (16 * (1 + num_tokens**0.5) * torch.finfo(variance.dtype).eps)
    return torch.where(varies & variance.isfinite(), 1 / variance, 0)


@torch.no_grad()
def residual_sums(residual: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Sums [D] and summed squares of residuals [N, D] over all replicas' tokens, in float32 or
    wider. Collective over the replicas.
    """
    sums, squares = implementation("token_sums", residual)(residual)
    both = torch.cat([sums.sum(dim=0), squares.sum().view(1)])
    collectives.all_reduce_(both, mesh.replica_group, mesh.num_replicas)
    return both[:-1], both[-1]


@torch.no_grad()
def source_sums(residual: Tensor, x: Tensor, sources: Sequence[int]) -> Tensor:  # [2 S + D]
    """What `source_fvus` is made of, of some tokens' residuals and rows [n, D]: both's summed
    squares a source, and the rows' sums.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = [t.to(dtype).square().sum(dim=0) for t in (residual, x)]
    squares = torch.stack([of.sum() for part in columns for of in torch.split(part, list(sources))])
    return torch.cat([squares, x.sum(dim=0, dtype=dtype)])


@torch.no_grad()
def source_fvus(sums: Tensor, sources: Sequence[int], tokens: int, mesh: Mesh) -> Tensor:  # [S]
    """FVU of each source's rows, from the sums of this replica's tokens. Collective over the
    replicas.
    """
    collectives.all_reduce_(sums, mesh.replica_group, mesh.num_replicas)
    error, squares = sums[: 2 * len(sources)].view(2, -1)
    columns = torch.split(sums[2 * len(sources) :].square() / tokens, list(sources))
    variance = squares - torch.stack([of.sum() for of in columns])
    fvus: Tensor = error * inverted(variance)
    return fvus


def auxk_loss(
    residual: Tensor,  # [N, d_in] x - recon, detached
    aux_recon: Tensor,  # [N, d_in] what the dead latents make of it, without b_dec
    inverse: Tensor,  # scalar, inverse_variance of the whole batch's residual
) -> Tensor:  # scalar
    """These tokens' share of AuxK: `sum (residual - aux_recon)^2 / sum (residual - mean)^2`.

    Gao et al. 2024 (arXiv 2406.04093), A.2, in the form of OpenAI's code: normalised by the
    batch's own residual, zero where that has no variance. The caller applies the coefficient, 1/32
    there.
    """
    return (residual - aux_recon).square().sum() * inverse


@torch.no_grad()
def geometric_median(
    x: Tensor,  # [N, d_in]
    iterations: int = 100,
    unit: float = 1.0,
) -> Tensor:  # [d_in]
    """The point of least summed distance to the rows, by Weiszfeld's iteration from their mean;
    distances below 1e-8 unit count as that.
    """
    point = x.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (x - point).norm(dim=1, keepdim=True).clamp_min(1e-8 * unit)
        point = (x * weights).sum(dim=0) / weights.sum()
    return point
