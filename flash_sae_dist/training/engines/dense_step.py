"""A fused step's forward pass and gradients where most latents are active: five products of 2NDF
flops in blocks of tokens, and the same functions of each pair as `pair_forward`.

Legend: n tokens of a block, N of this replica, D d_in, F d_sae of this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import reference
from ...kernels.dispatch import implementation
from ...kernels.reference import Dense, DenseRows, PairGradients
from ...models.base import SparseCoder
from ...models.dead_latents import DeadLatents
from ...models.sparsity import Batch
from ...models.threshold import ThresholdCoder
from ...parallel.collectives import all_reduce_
from ..sparse_adam import LatentGradients, SparseAdam
from .dead_step import AuxLoss, DeadStep, product
from .density import Density
from .pair_forward import pair_parameters, split_bias, with_skip


class DenseGradients(NamedTuple):
    """What a replica's tokens come to."""

    enc: Tensor  # [F, D] of W_enc
    dec: Tensor  # [F, D] of W_dec
    bias: Tensor  # [F] of b_enc
    own: tuple[Tensor, ...]  # of `pair_parameters`
    residual: Tensor  # [N, D] recon - x, in the compute dtype
    squares: Tensor  # scalar, of the residual
    penalty: Tensor  # scalar
    active: Tensor  # scalar, pairs that are active
    fired: Tensor  # [F] bool, which latents are active on a token
    moved: Tensor  # [F] bool, which have a gradient


class DenseStep:
    """All pairs of a batch, their gradients as those of as many listed latents."""

    def __init__(
        self, sae: ThresholdCoder, dead: DeadLatents, block: int, dead_step: DeadStep
    ) -> None:
        """block is how many tokens are computed at once."""
        self.sae, self.dead, self.block, self.dead_step = sae, dead, block, dead_step

    @classmethod
    def of(
        cls, sae: SparseCoder, dead: DeadLatents, density: Density | None, dead_step: DeadStep
    ) -> DenseStep | None:
        """That of an SAE whose density is watched; None of others."""
        if density is None or not isinstance(sae, ThresholdCoder):
            return None
        return cls(sae, dead, density.block, dead_step)

    def __call__(
        self, x: Tensor, xc: Tensor, shared: Batch, revives: bool, optimizer: SparseAdam
    ) -> tuple[DenseGradients, LatentGradients, AuxLoss | None]:
        """Of target rows x [N, D] and what is encoded of the tokens, in the compute dtype. Counts
        what fires. Collective over the members.
        """
        sae, mesh, weights = self.sae, self.sae.mesh, optimizer.compute_weights
        listed = self.dead_step.begin(weights) if revives else None
        if sae.needs_l0:
            l0 = self._count(xc, weights[0]).to(shared.inverse.dtype)
            all_reduce_(l0, mesh.member_group, mesh.members)
            shared = shared._replace(l0=l0 / shared.tokens)
        found = self._sum(x, xc, weights, shared)
        own, bias = split_bias(sae, found.own)
        own = with_skip(sae, own, found.residual, xc, 2 * shared.inverse)
        for total in (found.enc, found.dec, found.bias, *own, *(() if bias is None else (bias,))):
            all_reduce_(total, mesh.replica_group, mesh.num_replicas)
        none, aux = self._no_pairs(found.residual, xc, found.bias.dtype), None
        if listed is not None:
            dead, aux = self.dead_step(found.residual, xc, listed, shared.inverse, optimizer.side)
            optimizer.side.meet()
            for total, part in zip((found.enc, found.dec, found.bias), dead[1:], strict=True):
                total.index_add_(0, self.dead.rows, part.to(total.dtype))
        b_dec = found.residual.sum(dim=0, dtype=found.dec.dtype) * (2 * shared.inverse)
        all_reduce_(b_dec, mesh.replica_group, mesh.num_replicas)
        latents = torch.arange(sae.d_sae_local, dtype=torch.int32, device=x.device)
        if optimizer.lazy:
            latents = self._moved(found, latents)
        rows = DenseRows(latents, found.enc, found.dec, found.bias)
        fired = torch.arange(sae.d_sae_local, device=x.device)
        self.dead.update_(found.fired[None], fired[None], shared.tokens)
        order = implementation("order_pairs", sae.W_dec)(
            none.latents, sae.d_sae_local, none.dec_coef
        )
        return found, LatentGradients(none, order, b_dec, rows, own, bias), aux

    def _moved(self, found: DenseGradients, latents: Tensor) -> Tensor:
        """Each latent's row of the dense gradients, -1 for those that lazy Adam leaves alone."""
        mesh, moved = self.sae.mesh, found.moved.to(torch.int32)
        all_reduce_(moved, mesh.replica_group, mesh.num_replicas, dist.ReduceOp.MAX)
        return torch.where((moved > 0) | self.dead.listed(), latents, -1)

    @staticmethod
    def _no_pairs(residual: Tensor, xc: Tensor, dtype: torch.dtype) -> PairGradients:
        """A list of one pair, which adds nothing."""
        zero = torch.zeros(1, dtype=torch.int32, device=xc.device)
        coef = torch.zeros(1, dtype=dtype, device=xc.device)
        return PairGradients(zero, coef, coef, residual, xc, 1, zero)

    def _found(self, xc: Tensor, W_enc: Tensor) -> tuple[Dense, Tensor]:
        """All pairs of centred tokens, and which of them are candidates."""
        pre = reference.pre_activations(xc, W_enc, self.sae.b_enc.detach())
        return self.sae.dense_found(pre), self.sae.exceeds(pre)

    def _count(self, xc: Tensor, W_enc: Tensor) -> Tensor:  # scalar
        """Pairs that are active, which takes a pass of its own."""
        counts = [
            (self.sae.activate(self._found(part, W_enc)[0]).values > 0).sum()
            for part in torch.split(xc, self.block)
        ]
        return torch.stack(counts).sum()

    def _sum(
        self, x: Tensor, xc: Tensor, weights: tuple[Tensor, Tensor], shared: Batch
    ) -> DenseGradients:
        """What all blocks come to. Collective over the shards."""
        blocks = zip(torch.split(x, self.block), torch.split(xc, self.block), strict=True)
        total, residuals = None, []
        for part, centred in blocks:
            found = self._block(part, centred, weights, shared)
            residuals.append(found.residual)
            total = found if total is None else _added(total, found)
        assert total is not None
        return total._replace(residual=torch.cat(residuals))

    def _block(
        self, x: Tensor, xc: Tensor, weights: tuple[Tensor, Tensor], shared: Batch
    ) -> DenseGradients:
        sae, b_dec, (W_enc, W_dec) = self.sae, self.sae.b_dec.detach(), weights
        given, kept = self._found(xc, W_enc)
        leaf, own = given.values.requires_grad_(), pair_parameters(sae)
        with torch.enable_grad():
            codes = sae.activate(given)
            penalty = sae.penalty(x.to(b_dec.dtype), given, codes, shared)
        values = codes.values.detach()
        acts = values.to(W_dec.dtype)
        exact = product(acts, W_dec)
        all_reduce_(exact, sae.mesh.shard_group, sae.mesh.num_shards)
        exact += b_dec - x.to(b_dec.dtype)
        rows, scale = exact.to(W_dec.dtype), 2 * shared.inverse
        dots = product(rows, W_dec.T).mul_(scale)
        outputs, grads_of = [codes.values], [dots.to(values.dtype)]
        if penalty.requires_grad:
            outputs, grads_of = [*outputs, penalty], [*grads_of, torch.ones_like(penalty)]
        grads = torch.autograd.grad(outputs, [leaf, *own], grads_of, allow_unused=True)
        assert grads[0] is not None
        enc = grads[0] * kept
        given_own = zip(own, grads[1:], strict=True)
        made = (torch.zeros_like(p) if g is None else g for p, g in given_own)
        return DenseGradients(
            product(enc.to(xc.dtype).T, xc),
            product(acts.T, rows).mul_(scale),
            enc.sum(dim=0),
            tuple(made),
            rows,
            exact.square().sum(),
            penalty.detach(),
            (values > 0).sum(),
            (values > 0).any(dim=0),
            ((enc != 0) | (values != 0)).any(dim=0),
        )


def _added(total: DenseGradients, more: DenseGradients) -> DenseGradients:
    """Two blocks' sums, those of tensors in place; residuals are the first's."""
    for one, other in ((total.enc, more.enc), (total.dec, more.dec), (total.bias, more.bias)):
        one.add_(other)
    return total._replace(
        own=tuple(a + b for a, b in zip(total.own, more.own, strict=True)),
        squares=total.squares + more.squares,
        penalty=total.penalty + more.penalty,
        active=total.active + more.active,
        fired=total.fired | more.fired,
        moved=total.moved | more.moved,
    )
