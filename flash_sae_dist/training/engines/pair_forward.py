"""A micro-batch's pairs in the fused engine: what each adds to gradients.

Legend: n tokens, N of all micro-batches, D d_in, C pairs (K slots a token of a rectangle), G levels
of nested reconstructions.

What an architecture says of a pair beyond its activation is differentiated by autograd over lists
of C numbers, or has a closed form (`Edges`); products of matrices are the kernels'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.dispatch import implementation
from ...kernels.reference import Decoded, Dense, Nest, PairGradients, PairOrder, level_masks
from ...models.base import Codes, SparseCoder
from ...models.sparsity import Batch
from ...parallel.collectives import all_gather, all_reduce_
from ...parallel.mesh import Mesh
from ..side_stream import SideStream
from .dead_step import product

# The parameters that the optimizer's passes over latents have.
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


class Forward(NamedTuple):
    """A micro-batch's pairs and metrics."""

    codes: Codes  # which the side stream reads
    active: Codes  # those of them that count as active
    made: Decoded  # of which dec_coef and enc_coef are the pairs' gradients
    of_pairs: Tensor | None  # [P] int32, each pair's row of the whole batch's [G, N, D]; of levels
    penalty: Tensor | None  # scalar, made beside the current stream
    grads: tuple[Tensor, ...]  # of `pair_parameters`
    edges: Tensor | None  # [C], of each pair's threshold, which are to be added, in their place


def own_parameters(sae: SparseCoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that an architecture has beside the usual four."""
    return {name: p for name, p in sae.named_parameters() if name not in MATRICES}


def pair_parameters(sae: SparseCoder) -> list[torch.nn.Parameter]:
    """What activations of given pre-activations, and their penalty, depend on: `own_parameters`,
    and b_enc where it is among these.
    """
    own = list(own_parameters(sae).values())
    return [*own, sae.b_enc] if sae.bias_apart else own


def split_bias(
    sae: SparseCoder, grads: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of `own_parameters`, and b_enc's, of those of `pair_parameters`."""
    return (grads[:-1], grads[-1]) if sae.bias_apart else (grads, None)


def is_general(sae: SparseCoder) -> bool:
    """Whether pairs are more than selected pre-activations."""
    return sae.is_pairwise or len(sae.level_weights) > 1


def _decoded(
    sae: SparseCoder, W_dec: Tensor, codes: Codes, x: Tensor, scale: Tensor, nest: Nest
) -> Decoded:
    """`decode_coefs` of all shards' pairs. Collective over the shards."""
    flat, b_dec = (codes.tokens, codes.offsets), sae.b_dec.detach()
    pairs = (codes.values, codes.latents, W_dec)
    if sae.mesh.num_shards == 1:
        found: Decoded = implementation("decode_coefs", W_dec)(*pairs, b_dec, x, scale, *flat, nest)
        return found
    decode, dots_of = (implementation(n, W_dec) for n in ("sparse_decode", "gathered_dots"))
    of_level = level_masks(codes.latents, nest)
    parts = [decode(codes.values * own, codes.latents, W_dec, *flat) for own in of_level]
    partial = torch.stack(parts).to(b_dec.dtype)
    all_reduce_(partial, sae.mesh.shard_group, sae.mesh.num_shards)
    rows, residual, squares = implementation("nested_rows", W_dec)(
        partial, b_dec, x, nest.weights, nest.main, W_dec.dtype
    )
    if nest.levels is None and not nest.every:
        dec, enc = implementation("pair_coefs", W_dec)(*pairs, residual, scale, *flat)
        return Decoded(residual, squares, dec, enc, rows)
    dots = [own * dots_of(row, *pairs[1:], *flat) for row, own in zip(rows, of_level, strict=True)]
    enc = torch.stack(dots).sum(dim=0) * scale
    if not nest.every:
        enc = enc.masked_fill(codes.values == 0, 0)
    return Decoded(residual, squares, codes.values.to(enc.dtype) * scale, enc, rows)


def used_slots(sae: SparseCoder, codes: Codes) -> Tensor:
    """As codes.values, 0 for pairs without a gradient: slots that are unused, or values of 0."""
    if codes.offsets is None or not sae.is_pairwise:
        return codes.values
    slots = torch.arange(len(codes.latents), device=codes.latents.device)
    return (slots < codes.offsets[-1]).to(codes.values.dtype)


def by_level(sae: SparseCoder, found: list[Codes], tokens: int) -> list[tuple[Codes, Nest]]:
    """The codes of micro-batches of so many tokens in all, each token's pairs in the order of
    levels. Collective over the shards.
    """
    weights, done = tuple(sae.level_weights), 0
    made: list[tuple[Codes, Nest]] = []
    for codes in found:
        nest = Nest(weights, sae.main_level, sae.is_pairwise)
        if len(weights) > 1:
            levels = sae.levels(codes)
            assert levels is not None
            values, latents, of = implementation("by_level", sae.W_dec)(
                levels, codes.values, codes.latents, codes.offsets, len(weights), done, tokens
            )
            assert not isinstance(codes, Dense)
            codes, nest = codes._replace(values=values, latents=latents), nest._replace(levels=of)
            done += len(of.ends)
        made.append((codes, nest))
    return made


def pair_forward(
    sae: SparseCoder,
    W_dec: Tensor,  # [F, D] in the compute dtype
    x: Tensor,  # [n, D]
    found: Codes,  # candidates
    nest: Nest,
    batch: Batch,
    scale: Tensor,  # scalar, 2 * batch.inverse
    side: SideStream,
) -> Forward:
    """Residuals and what each pair adds to gradients. Collective over the shards."""
    codes, edges = found, sae.edges(batch)
    penalty = edge = of_pairs = None
    if edges is not None:
        args = (found.values, found.latents, edges.threshold.detach(), found.offsets)
        codes = found._replace(values=implementation("jump_acts", W_dec)(*args))
        with side.beside():
            penalty = sae.penalty(x.to(sae.b_dec.dtype), found, codes, batch)
    elif sae.is_pairwise:
        found = found._replace(values=found.values.detach().requires_grad_())
        with torch.enable_grad():
            codes = sae.activate(found)
            penalty = sae.penalty(x.to(sae.b_dec.dtype), found, codes, batch)
    active = whole = codes._replace(values=codes.values.detach())
    made = _decoded(sae, W_dec, whole, x, scale, nest)
    grads: tuple[Tensor, ...] = ()
    if edges is not None:
        enc, edge = implementation("jump_grads", W_dec)(*args, made.enc_coef, *edges[1:])
        made = made._replace(enc_coef=enc)
    elif penalty is not None:
        enc, grads = _by_autograd(sae, found, codes, penalty, made.enc_coef)
        made, penalty = made._replace(enc_coef=enc), penalty.detach()
    if nest.levels is not None:
        of_pairs = nest.levels.rows
        if nest.main < len(nest.weights) - 1:
            beyond = of_pairs.view_as(active.latents) >= (nest.main + 1) * nest.levels.tokens
            active = active._replace(values=active.values.masked_fill(beyond, 0))
    return Forward(whole, active, made, of_pairs, penalty, grads, edge)


def _by_autograd(
    sae: SparseCoder, found: Codes, codes: Codes, penalty: Tensor, dots: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients by candidates' values and by `pair_parameters`, of those by activations."""
    own = pair_parameters(sae)
    outputs, grads_of = [codes.values], [dots.to(codes.values.dtype)]
    if penalty.requires_grad:
        outputs, grads_of = [*outputs, penalty], [*grads_of, torch.ones_like(penalty)]
    grads = torch.autograd.grad(
        outputs, [found.values, *own], grads_of, allow_unused=True, materialize_grads=True
    )
    unused = used_slots(sae, found).detach() == 0
    return grads[0].to(dots.dtype).masked_fill(unused, 0), grads[1:]


def own_gradients(
    sae: SparseCoder, parts: list[Forward], order: PairOrder | None
) -> tuple[Tensor, ...]:
    """Gradients of `pair_parameters` over all replicas, collective over them; order is that of the
    parts' pairs where there is one.
    """
    grads = [torch.stack(g).sum(dim=0) for g in zip(*(p.grads for p in parts), strict=True)]
    own = own_parameters(sae)
    if not grads:
        grads = [torch.zeros_like(p) for p in pair_parameters(sae)]
    if parts[0].edges is not None:
        edges = joined([part.edges for part in parts])
        latents = joined([part.codes.latents for part in parts])
        sums = implementation("scatter_rows", edges)(
            edges[None], latents[None], edges.new_ones(1, 1), sae.d_sae_local, edges.dtype, order
        )
        grads[list(own).index("threshold")] = sums.squeeze(1)
    for grad in grads:
        all_reduce_(grad, sae.mesh.replica_group, sae.mesh.num_replicas)
    return tuple(grads)


def same_length(pairs: PairGradients, mesh: Mesh) -> PairGradients:
    """Lists that are as long on all replicas, unused slots behind. A host sync; collective over the
    replicas.
    """
    if mesh.num_replicas == 1:
        return pairs
    length = torch.tensor(len(pairs.latents), device=pairs.latents.device)
    all_reduce_(length, mesh.replica_group, mesh.num_replicas, dist.ReduceOp.MAX)
    more = int(length) - len(pairs.latents)
    latents, dec, enc, tokens = (
        torch.nn.functional.pad(t, (0, more))
        for t in (pairs.latents, pairs.dec_coef, pairs.enc_coef, pairs.tokens)
        if t is not None
    )
    return pairs._replace(latents=latents, dec_coef=dec, enc_coef=enc, tokens=tokens)


def gather_pairs(local: PairGradients, xc_all: Tensor, mesh: Mesh) -> PairGradients:
    """The pairs of all replicas, tokens in the order of the whole batch: a rank contributes
    N * (12 K + 4 D) bytes where rows are bfloat16, or 16 C + 4 N D of a flat list, whose
    unused slots travel too. Collective over the replicas.
    """
    if mesh.num_replicas == 1:
        return local
    group, size = mesh.replica_group, mesh.num_replicas
    # float64 pairs travel with their indices as int64.
    bits = torch.int64 if local.dec_coef.dtype == torch.float64 else torch.int32
    coefs = (local.dec_coef.view(bits), local.enc_coef.view(bits))
    tokens = local.tokens
    xc = local.enc_rows
    flat = [] if tokens is None else [tokens + mesh.replica * len(xc)]
    if local.rows is not None:
        flat.append(local.rows + mesh.replica * len(local.dec_rows))
    packed = torch.stack([*(t.to(bits) for t in (local.latents, *flat)), *coefs])
    gathered = all_gather(packed, group, size).transpose(0, 1).flatten(1).contiguous()
    latents, *flat = (row.to(torch.int32) for row in gathered[:-2])
    dec, enc = (row.view(local.dec_coef.dtype) for row in gathered[-2:])
    dec_rows = all_gather(local.dec_rows, group, size).flatten(0, 1)
    rows = None if local.rows is None else flat.pop()
    of = flat[0] if flat else None
    return PairGradients(latents, dec, enc, dec_rows, xc_all, local.k, of, rows)


def has_gradient(pairs: PairGradients) -> Tensor:
    """As their coefficients, 0 for the pairs that add nothing."""
    used = (pairs.dec_coef != 0) | (pairs.enc_coef != 0)
    return used.to(pairs.dec_coef.dtype)


def joined(parts: Sequence[Tensor | None], dim: int = 0) -> Tensor:
    """One tensor of those of micro-batches."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, dim) if len(given) > 1 else given[0]


def join_pairs(parts: list[Forward], xc: Tensor) -> PairGradients:
    """The pairs of all micro-batches, tokens in the order of the batch; xc is what was encoded."""
    tokens, first = [], 0
    for part in parts:
        if part.codes.tokens is not None:
            tokens.append(part.codes.tokens + first if first else part.codes.tokens)
        first += len(part.made.residual)
    latents = joined([part.codes.latents for part in parts])
    return PairGradients(
        latents.flatten(),
        joined([part.made.dec_coef for part in parts]).flatten(),
        joined([part.made.enc_coef for part in parts]).flatten(),
        joined([part.made.rows for part in parts], dim=1).flatten(0, 1),
        xc,
        latents.shape[-1],
        joined(tokens) if tokens else None,
        None if parts[0].of_pairs is None else joined([part.of_pairs for part in parts]),
    )


def with_skip(
    sae: SparseCoder, own: tuple[Tensor, ...], rows: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `own_parameters`, that of a transcoder's W_skip among them: of its inputs x
    [N, d_in] and the gradients of what it gives, rows [N, d_out] times scale.
    """
    if sae.W_skip is None:
        return own
    grad = product(rows.T, x).mul_(scale)
    return tuple(
        grad if n == "W_skip" else g for n, g in zip(own_parameters(sae), own, strict=True)
    )
