"""The dense products over dead latents in plain PyTorch: the part of reference.py that selects
among them and turns their loss into gradients.

Legend: N tokens, D d_in, M listed dead latents, k k_aux.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference_encode import accumulate_dtype, sort_key

# More equal keys than any row has.
TAKE_ALL = 2**31 - 1


class Limits(NamedTuple):
    """Which pre-activations of each token are taken: those whose `sort_key` is above key, and the
    first `take` of those that equal it.
    """

    key: Tensor  # [N] int32 (int64 for float64)
    take: Tensor  # [N] int32


def _first_k(keys: Tensor, k: int) -> Limits:
    """The limits of each row's k largest keys."""
    last = keys.topk(k, dim=1).values[:, -1]
    return Limits(last, (k - (keys > last[:, None]).sum(dim=1)).int())


def select_dead(
    pre: Tensor,  # [N, M] float32/64, without bias
    bias: Tensor,  # [M] float32/64; -inf where a latent is no longer dead
    k: int | None,
    ghost: bool,
    dtype: torch.dtype,
    limits: Limits | None = None,
) -> Tensor:  # [N, M] in dtype
    """Activations of the k largest pre-activations `pre + bias` a token, zero elsewhere: `relu` for
    AuxK, `exp` for ghost gradients, of at most 30: their loss takes the sum of a token at another
    norm, and exp(89) is inf.

    Ties go to the lowest column. k=None takes all; limits, found over all shards, take k's place.
    """
    pre = pre + bias
    acts = pre.clamp(max=30).exp() if ghost else pre.relu()
    if limits is None:
        if k is None or k >= pre.shape[1]:
            return acts.to(dtype)
        limits = _first_k(sort_key(pre), k)
    keys, key = sort_key(pre), limits.key[:, None]
    equal = keys == key
    keep = (keys > key) | (equal & (equal.cumsum(dim=1) <= limits.take[:, None]))
    return torch.where(keep, acts, 0).to(dtype)


def digit_counts(
    pre: Tensor,  # [N, M] float32/64, without bias
    bias: Tensor,  # [M]
    prefix: Tensor,  # [N] int32/64, the bits above this digit's
    shift: int,
) -> Tensor:  # [N, 256] int32
    """How many of a token's sort keys have each value of the 8 bits from `shift` on, among those
    whose higher bits are `prefix`; the sign's bit is turned over, so that digits order as keys.
    """
    keys = sort_key(pre + bias)
    bits = torch.iinfo(keys.dtype).bits
    keys = keys ^ torch.iinfo(keys.dtype).min
    above = torch.zeros_like(keys)
    if shift + 8 < bits:
        above = (keys >> (shift + 8)) & ((1 << (bits - 8 - shift)) - 1)
    counts = torch.zeros((len(pre), 256), dtype=torch.int32, device=pre.device)
    counted = (above == prefix[:, None]).int()
    return counts.scatter_add_(1, ((keys >> shift) & 255).long(), counted)


def pick_digits_(
    counts: Tensor,  # [N, 256] int32
    prefix: Tensor,  # [N] int32/64, a digit is added below its bits
    left: Tensor,  # [N] int32, how many of the keys counted are wanted
) -> None:
    """Each token's largest digit that, with those above it, has the `left` keys wanted; the keys
    above it are taken off `left`.
    """
    reach = counts.flip(1).cumsum(dim=1).flip(1)
    digit = ((reach >= left[:, None]).sum(dim=1) - 1).clamp_min(0)
    at = digit[:, None]
    left.sub_((reach.gather(1, at) - counts.gather(1, at)).squeeze(1))
    prefix.copy_((prefix << 8) | digit.to(prefix.dtype))


def aux_rows(
    residual: Tensor,  # [N, D] recon - x
    recon: Tensor,  # [N, D] float32/64, what the dead latents make of it
    scale: Tensor,  # scalar, 2 * coefficient / normaliser
    ghost: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [N, D] in dtype, [N] float32/64
    """The gradient of the AuxK or ghost loss with respect to recon, and each token's part of the
    loss before it is normalised.

    AuxK (Gao et al. 2024, A.2): `sum (e - recon)^2` with e = -residual held constant. Ghost
    gradients (Anthropic, January 2024): recon is scaled to half the residual's norm, its squared
    error against the residual scaled to the main loss's value; both factors and the residual are
    held constant.
    """
    e = residual.to(recon.dtype)
    if not ghost:
        rows = recon + e
        return (rows * scale).to(dtype), rows.square().sum(dim=1)
    factor = e.norm(dim=1, keepdim=True) / (1e-6 + 2 * recon.norm(dim=1, keepdim=True))
    diff = recon * factor + e
    ratio = e.square() / (diff.square() + 1e-6)
    rows = ratio * factor * diff * scale
    return rows.to(dtype), (diff.square() * ratio).sum(dim=1)


def mask_dead_grad_(
    grad: Tensor,  # [N, M]
    acts: Tensor,  # [N, M]
    ghost: bool,
) -> Tensor:  # [any, M] float32/64
    """The pre-activations' gradient from the activations', in place, and its sums over tokens in
    parts that are to be added.
    """
    grad.copy_(grad * acts if ghost else grad.masked_fill(acts == 0, 0))
    return grad.to(accumulate_dtype(grad.dtype)).sum(dim=0, keepdim=True)
