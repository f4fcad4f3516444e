"""AuxK's and ghost gradients' part of a fused step: dense products over the listed dead latents.

Legend: N tokens of this replica, D d_in, M listed dead latents (padded), k k_aux.

With We, Wd the listed rows of W_enc and W_dec: `pre = xc @ We.T`, the k best of each token,
`recon = acts @ Wd`, the loss's gradient rows, `g = rows @ Wd.T` masked, `dWd = acts.T @ rows`,
`dWe = g.T @ xc`: five products of 2NMD flops, in blocks of tokens so that [N, M] stays bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.dispatch import implementation
from ...kernels.reference import DenseRows, accumulate_dtype
from ...models.base import SparseCoder
from ...models.dead_latents import DeadLatents
from ...models.losses import inverse_variance, residual_sums
from ...parallel.collectives import all_reduce_
from ...parallel.selection import global_limits
from ..side_stream import SideStream

# Of the pre-activations of one block of tokens, float32: 8192 tokens x 43690 latents (a third of
# 131072) in one piece.
MAX_BLOCK_BYTES = 1500 << 20


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` accumulated and returned in float32 (float64 for float64)."""
    dtype = accumulate_dtype(a.dtype)
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class Listed(NamedTuple):
    """The listed latents' parameters."""

    W_enc: Tensor  # [M, D] in the compute dtype
    W_dec: Tensor  # [M, D]
    bias: Tensor  # [M] float32/64; -inf for those that are not dead


class AuxLoss(NamedTuple):
    """This replica's share of a loss without its coefficient: sum(losses) * inverse."""

    losses: list[Tensor]  # [n] each
    inverse: Tensor  # scalar

    def total(self) -> Tensor:
        """The scalar itself."""
        return torch.cat(self.losses).sum() * self.inverse


class DeadStep:
    """The loss of the listed latents on a batch's residual, and their gradients."""

    def __init__(
        self,
        sae: SparseCoder,
        dead: DeadLatents,
        *,
        ghost: bool,
        coef: float,
        k_aux: int,
        by_loss: bool = False,  # AuxK is normalised as the main loss, as ghost gradients are
    ) -> None:
        self.sae, self.dead, self.ghost, self.coef, self.k_aux = sae, dead, ghost, coef, k_aux
        self.by_loss = by_loss or ghost
        self.unit = 1.0  # ghost gradients take pre-activations and residuals in it

    def shape(self) -> tuple[int, bool, float]:
        """What a captured step depends on: where the list lies, whether k_aux are selected, and the
        coefficient.
        """
        return self.dead.generation, self._selects(), self.coef

    def _selects(self) -> bool:
        return self.dead.num_listed > self.k_aux

    def begin(self, weights: tuple[Tensor, Tensor]) -> Listed:
        """The listed latents' parameters, W_enc and W_dec given in the compute dtype; to be taken
        before a step counts what fires.
        """
        rows = self.dead.rows
        bias = self.dead.bias(self.sae.b_enc.detach())
        if self.ghost and self.unit != 1:
            bias = bias / self.unit
        return Listed(weights[0][rows], weights[1][rows], bias)

    def __call__(
        self,
        residual: Tensor,  # [N, D], of this replica
        xc: Tensor,  # [N, D]
        listed: Listed,
        inverse: Tensor,  # scalar, 1 / variance of the whole batch
        side: SideStream,
    ) -> tuple[DenseRows, AuxLoss]:
        """The gradients over all replicas, by an all-reduce of 8 M D bytes, and the loss.

        AuxK is normalised by the batch's own residual, whose variance the side stream takes beside
        the first product; ghost gradients by the variance of the batch. Collective over the
        members.
        """
        mesh = self.sae.mesh
        with side.beside():
            if not self.by_loss:
                tokens = len(residual) * mesh.num_replicas
                inverse = inverse_variance(*residual_sums(residual, mesh), tokens)
            scale = 2 * self.coef * inverse
            scaled = side.mark()
        block = max(1, MAX_BLOCK_BYTES // (4 * max(1, len(listed.bias))))
        sums: list[Tensor] = []
        losses: list[Tensor] = []
        for part, e in zip(torch.split(xc, block), torch.split(residual, block), strict=True):
            acts, recon = self._forward(part, listed)
            side.wait(scaled)
            found, loss = self._backward(part, e, listed, acts, recon, scale)
            del acts, recon
            losses.append(loss)
            if sums:
                torch._foreach_add_(sums, found)
            else:
                sums = found
            del found
        for total in sums:
            all_reduce_(total, mesh.replica_group, mesh.num_replicas)
        return DenseRows(self.dead.slots, *sums), AuxLoss(losses, inverse)

    def _forward(self, xc: Tensor, listed: Listed) -> tuple[Tensor, Tensor]:
        """Activations [n, M] of each token's k_aux best, and what they reconstruct [n, D]."""
        mesh = self.sae.mesh
        pre = product(xc, listed.W_enc.T)
        if self.ghost and self.unit != 1:
            pre /= self.unit
        k = self.k_aux if self._selects() else None
        limits = None
        if k is not None and mesh.num_shards > 1:
            limits = global_limits(pre, listed.bias, k, mesh)
        select = implementation("select_dead", xc)
        acts = select(pre, listed.bias, k, self.ghost, xc.dtype, limits)
        del pre
        recon = product(acts, listed.W_dec)
        all_reduce_(recon, mesh.shard_group, mesh.num_shards)
        return acts, recon

    def _backward(
        self,
        xc: Tensor,
        residual: Tensor,
        listed: Listed,
        acts: Tensor,
        recon: Tensor,
        scale: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of W_enc, W_dec and b_enc, and each token's loss [n], not normalised."""
        unit = self.unit if self.ghost else 1.0
        if unit != 1:
            # exp of a pre-activation depends on its unit, and so do the loss's guards.
            residual, scale = residual.to(recon.dtype) / unit, scale * unit**2
        rows, losses = implementation("aux_rows", xc)(residual, recon, scale, self.ghost, xc.dtype)
        grad = rows @ listed.W_dec.T
        sums = implementation("mask_dead_grad_", xc)(grad, acts, self.ghost).sum(dim=0)
        enc = product(grad.T, xc)
        if unit != 1:
            enc, sums, losses = enc / unit, sums / unit, losses * unit**2
        return [enc, product(acts.T, rows), sums], losses
