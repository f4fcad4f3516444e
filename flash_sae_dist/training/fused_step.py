"""A whole training step of a TopK SAE without autograd: encode, decode with the loss, sparse
gradients, and Adam over the latents' rows.

The loss is that of the plain path: FVU, and AuxK or ghost gradients while latents are dead.
Nothing is read by the host; on one CUDA device the step is captured in a graph.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.dispatch import implementation, on_device
from ..kernels.reference import Pairs, variance_of
from ..models.dead_latents import DeadLatents
from ..models.topk import TopKSAE
from ..parallel import collectives, selection
from .sparse_adam import LatentGradients, SparseAdam
from .timing import PhaseTimer

# Calls of one kind made eagerly before its graph is captured: kernels compile, libraries warm up.
_EAGER_CALLS = 2


class FusedMetrics(NamedTuple):
    """What a step measured, left on the device."""

    fvu: Tensor  # scalar
    aux: Tensor  # scalar, the AuxK or ghost loss without its coefficient
    l0: Tensor  # scalar, mean active latents a token


class _Second(NamedTuple):
    """The second list's part of a batch's pairs: dead latents that are being revived."""

    indices: Tensor  # [N, K2] int32
    dec_coef: Tensor  # [N, K2]
    enc_coef: Tensor  # [N, K2]
    rows: Tensor  # [N, D]
    loss: Tensor  # scalar


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    metrics: Tensor


def auxk_rows(
    residual: Tensor,  # [N, D] recon - x
    aux_recon: Tensor,  # [N, D] without b_dec
    coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], scalar, scalar
    """AuxK's gradient with respect to aux_recon as rows and their scale, and the loss.

    `coef * sum (e - e_hat)^2 / sum (e - mean e)^2` with e = x - recon held constant; zero where
    that is not finite.
    """
    e = residual.to(aux_recon.dtype)
    variance = (e - e.mean(dim=0)).square().sum()
    rows = aux_recon + e
    loss = torch.nan_to_num(rows.square().sum() / variance, 0.0, 0.0, 0.0)
    return rows, torch.nan_to_num(2 * coef / variance, 0.0, 0.0, 0.0), loss


def ghost_rows(
    residual: Tensor,  # [N, D] recon - x
    ghost_recon: Tensor,  # [N, D] sum of exp(pre) * W_dec over the dead candidates
    variance: Tensor,  # scalar
    coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], scalar, scalar
    """The ghost loss's gradient with respect to ghost_recon as rows and their scale, and the loss.

    Anthropic's form (January 2024): the ghost reconstruction is scaled to half the residual's
    norm, its squared error against the residual scaled to the main loss's value; both factors and
    the residual are held constant.
    """
    e = residual.to(ghost_recon.dtype)
    factor = e.norm(dim=1, keepdim=True) / (1e-6 + 2 * ghost_recon.norm(dim=1, keepdim=True))
    diff = ghost_recon * factor + e
    ratio = e.square() / (diff.square() + 1e-6)
    loss = (diff.square() * ratio).sum() / variance
    return ratio * factor * diff, 2 * coef / variance, loss


class FusedStep:
    """One optimizer step a call, the gradients never dense; x is the whole batch [N, d_in].

    Takes one replica (its shards may be many): gradients of several replicas must be averaged,
    which the plain path does. Clipping and accumulation are the plain path's, too.
    """

    def __init__(
        self,
        sae: TopKSAE,
        optimizer: SparseAdam,
        dead: DeadLatents,
        *,
        dead_latents: Literal["auxk", "ghost", "none"] = "auxk",
        aux_coef: float = 1 / 32,
        k_aux: int | None = None,
        graph: bool | None = None,
    ) -> None:
        if sae.mesh.num_replicas > 1:
            raise ValueError(
                f"FusedStep takes one replica, not {sae.mesh.num_replicas}; "
                "set num_replicas: 1 or use the plain step"
            )
        self.sae, self.optimizer, self.dead = sae, optimizer, dead
        self.kind, self.aux_coef = dead_latents, aux_coef
        self.k_aux = min(k_aux or max(1, sae.d_in // 2), sae.d_sae)
        encode = "topk_encode" if dead_latents == "none" else "topk_encode_aux"
        # The reference encoder reads the host; collectives are left out of graphs.
        can_capture = (
            sae.W_dec.is_cuda
            and sae.mesh.num_shards == 1
            and implementation(encode, sae.W_dec) is not getattr(reference, encode)
        )
        if graph and not can_capture:
            raise ValueError(
                "graph=True needs one shard on a CUDA device with Triton's kernels; leave graph out"
            )
        self.graph = can_capture and graph is not False
        self.side = optimizer.side
        self._calls: dict[tuple[object, ...], int] = {}
        self._captured: dict[tuple[object, ...], _Captured] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, timer: PhaseTimer | None = None) -> FusedMetrics:
        """Trains on x [N, d_in]. Collective over the shard group; no host sync.

        The timer's phases are encode, decode and optimizer, or fused_step where a graph is
        replayed, which is one piece to the host.
        """
        timer = timer or PhaseTimer(x.device, enabled=False)
        with on_device(self.sae.W_dec):
            return self._train(x, timer)

    def _train(self, x: Tensor, timer: PhaseTimer) -> FusedMetrics:
        if self.optimizer.sync_group_():
            self._captured.clear()
        use_aux = self.kind != "none" and self.dead.any_dead
        if not self.graph:
            return FusedMetrics(*self._step(x, use_aux, timer))
        key = (x.shape, x.dtype, use_aux)
        if key not in self._captured:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= _EAGER_CALLS:
                return FusedMetrics(*self._step(x, use_aux, timer))
            self._captured[key] = self._capture(x, use_aux)
        captured = self._captured[key]
        captured.x.copy_(x)
        captured.graph.replay()
        timer.mark("fused_step")
        return FusedMetrics(*captured.metrics.clone())

    def _capture(self, x: Tensor, use_aux: bool) -> _Captured:
        static, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
        # The loader's threads pin memory meanwhile, which a global capture would take for its own.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            metrics = self._step(static, use_aux, PhaseTimer(x.device, enabled=False))
        return _Captured(graph, static, metrics)

    def _step(self, x: Tensor, use_aux: bool, timer: PhaseTimer) -> Tensor:  # [3]
        try:
            return self._work(x, use_aux, timer)
        finally:
            # Even where memory ran out midway: what crosses streams is freed after this.
            self.side.meet()

    def _work(self, x: Tensor, use_aux: bool, timer: PhaseTimer) -> Tensor:  # [3]
        sae, mesh = self.sae, self.sae.mesh
        W_enc, W_dec = self.optimizer.compute_weights
        order_pairs = implementation("order_pairs", W_dec)
        xc, *parts = implementation("centre", W_dec)(x, sae.b_dec.detach(), W_dec.dtype)
        with self.side.beside():
            variance = variance_of(parts[0], parts[1], x.shape[0])
            variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
            scale = 2 / variance
            self.optimizer.advance_()
            scaled = self.side.mark()
        values, indices, aux = self._encode(xc, W_enc, use_aux)
        timer.mark("encode")
        with self.side.beside():
            order = None if use_aux else order_pairs(indices, sae.d_sae_local, values)
            ordered = self.side.mark()
            implementation("count_fired_", W_dec)(
                self.dead.tokens_since_fired, values, indices, x.shape[0]
            )
            l0 = (values > 0).sum().to(variance.dtype) / x.shape[0]
        self.side.wait(scaled)
        residual, squares, dec, enc = self._decode(values, indices, W_dec, x, scale)
        second = self._second(aux, W_dec, residual, variance) if aux is not None else None
        pairs = _join(indices, dec, enc, residual, xc, second)
        if order is None:
            order = order_pairs(pairs.indices, sae.d_sae_local, pairs.dec_coef)
        with self.side.beside():
            b_dec = residual.sum(dim=0, dtype=scale.dtype) * scale
            loss = torch.zeros_like(l0) if second is None else second.loss
            metrics = torch.stack([squares.sum() / variance, loss, l0])
        self.side.wait(ordered)
        timer.mark("decode")
        self.optimizer.gradients = LatentGradients(pairs, order, b_dec)
        self.optimizer.step()
        self.side.meet()
        timer.mark("optimizer")
        collectives.all_reduce_(metrics[2:], mesh.shard_group, mesh.num_shards)
        return metrics

    def _encode(
        self, xc: Tensor, W_enc: Tensor, use_aux: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The main list, and the raw one over dead latents; both global over the shards."""
        sae, mesh, first = self.sae, self.sae.mesh, self.sae.first_latent
        k, b_enc = min(sae.k, sae.d_sae_local), sae.b_enc.detach()
        aux = None
        if use_aux:
            encode = implementation("topk_encode_aux", W_enc)
            values, indices, aux_values, aux_indices = encode(
                xc, W_enc, b_enc, k, self.dead.mask(), min(self.k_aux, sae.d_sae_local)
            )
            keep = selection.global_topk_mask(aux_values, aux_indices, self.k_aux, first, mesh)
            if keep is not None:
                aux_values = aux_values.masked_fill(~keep, -torch.inf)
            aux = (aux_values, aux_indices)
        else:
            values, indices = implementation("topk_encode", W_enc)(xc, W_enc, b_enc, k)
        keep = selection.global_topk_mask(values, indices, sae.k, first, mesh)
        return (values if keep is None else values * keep), indices, aux

    def _decode(
        self, values: Tensor, indices: Tensor, W_dec: Tensor, x: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`recon - x` in the compute dtype, its squares in parts, and what each pair adds to its
        latent's rows of W_dec and W_enc."""
        b_dec = self.sae.b_dec.detach()
        if self.sae.mesh.num_shards == 1:
            out: tuple[Tensor, Tensor, Tensor, Tensor] = implementation("decode_coefs", W_dec)(
                values, indices, W_dec, b_dec, x, scale
            )
            return out
        recon = self._combine(values, indices, W_dec) + b_dec
        exact = recon - x.to(recon.dtype)
        residual = exact.to(W_dec.dtype)
        coefs = implementation("pair_coefs", W_dec)(values, indices, W_dec, residual, scale)
        return residual, exact.square().sum().view(1), *coefs

    def _combine(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """The decoder without b_dec, summed over shards, in b_dec's dtype."""
        partial = implementation("sparse_decode", W_dec)(values, indices, W_dec)
        partial = partial.to(self.sae.b_dec.dtype)
        collectives.all_reduce_(partial, self.sae.mesh.shard_group, self.sae.mesh.num_shards)
        return partial  # type: ignore[no-any-return]

    def _second(
        self, aux: tuple[Tensor, Tensor], W_dec: Tensor, residual: Tensor, variance: Tensor
    ) -> _Second:
        """Pairs of the dead latents' loss; gradients flow to the encoder, too."""
        pre, indices = aux
        ghost = self.kind == "ghost"
        acts = pre.exp() if ghost else pre.relu()
        recon = self._combine(acts, indices, W_dec)
        if ghost:
            rows, scale, loss = ghost_rows(residual, recon, variance, self.aux_coef)
        else:
            rows, scale, loss = auxk_rows(residual, recon, self.aux_coef)
        rows = rows.to(W_dec.dtype)
        dec, enc = implementation("pair_coefs", W_dec)(acts, indices, W_dec, rows, scale)
        return _Second(indices, dec, enc * acts if ghost else enc, rows, loss)


def _join(
    indices: Tensor,
    dec: Tensor,
    enc: Tensor,
    residual: Tensor,
    xc: Tensor,
    second: _Second | None,
) -> Pairs:
    """The main list's pairs and the second's as one list."""
    N, K = indices.shape
    if second is None:
        flat = (indices.flatten(), dec.flatten(), enc.flatten())
        return Pairs(*flat, residual, xc, (N, K, 0))
    idx, dec_coef, enc_coef = (
        torch.cat([a.flatten(), b.flatten()])
        for a, b in ((indices, second.indices), (dec, second.dec_coef), (enc, second.enc_coef))
    )
    rows = torch.cat([residual, second.rows])
    return Pairs(idx, dec_coef, enc_coef, rows, xc, (N, K, second.indices.shape[1]))
