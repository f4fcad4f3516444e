"""A micro-batch's pairs in the fused engine where activations are more than selected
pre-activations: functions of each pair alone, with a penalty, or nested reconstructions.

Legend: n tokens, D d_in, C pairs (K slots a token of a rectangle), G levels.

What an architecture says of a pair is differentiated by autograd over lists of C numbers; products
of matrices are the kernels'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.dispatch import implementation
from ...kernels.reference import PairGradients
from ...models.base import Codes, SparseCoder
from ...models.sparsity import Batch
from ...parallel.collectives import all_gather, all_reduce_
from ...parallel.mesh import Mesh
from .dead_step import product

# The parameters that the optimizer's passes over latents have.
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


class Forward(NamedTuple):
    """A micro-batch's pairs and metrics."""

    codes: Codes  # which the side stream reads
    dec_coef: Tensor  # [n, K] or [C], as codes.values
    enc_coef: Tensor
    residual: Tensor  # [n, D] recon - x, in the compute dtype
    squares: Tensor  # [any], of the residual
    more: More | None = None


class More(NamedTuple):
    """What nested or pairwise architectures add."""

    active: Codes  # those that count as active
    rows: Tensor  # [G, n, D], what a level's pairs are multiplied by for W_dec's gradient
    levels: Tensor | None  # as codes.values
    penalty: Tensor  # scalar
    grads: tuple[Tensor, ...]  # of `own_parameters`


class General(NamedTuple):
    """What nested or pairwise architectures add to a batch's gradients."""

    tokens: Tensor  # [P] int32, each pair's row of `rows`
    rows: Tensor  # [R, G, N, D]
    grads: tuple[Tensor, ...]  # of `own_parameters`

    @property
    def first_rows(self) -> Tensor:
        """[R * N, D]: what the gradients of all reconstructions come to."""
        return self.rows[:, 0].flatten(0, 1)

    def decoder(self, pairs: PairGradients) -> PairGradients:
        """The pairs with their rows for W_dec's gradient; tokens are of no others."""
        rows = self.rows.flatten(0, 2)
        return pairs._replace(dec_rows=rows, enc_rows=rows, tokens=self.tokens)


def own_parameters(sae: SparseCoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that an architecture has beside the usual four."""
    return {name: p for name, p in sae.named_parameters() if name not in MATRICES}


def is_general(sae: SparseCoder) -> bool:
    """Whether `pair_forward` is needed."""
    return sae.is_pairwise or len(sae.level_weights) > 1


def _parts(sae: SparseCoder, W_dec: Tensor, codes: Codes, levels: Tensor | None) -> Tensor:
    """What the pairs of each level reconstruct alone [G, n, D]."""
    decode = implementation("sparse_decode", W_dec)
    flat = (codes.tokens, codes.offsets)
    if levels is None:
        partial: Tensor = decode(codes.values, codes.latents, W_dec, *flat)[None]
    else:
        every = torch.arange(len(sae.level_weights), device=levels.device)
        of_level = levels == every.view(-1, *(1 for _ in levels.shape))
        values = codes.values * of_level
        partial = torch.stack([decode(own, codes.latents, W_dec, *flat) for own in values])
    if sae.mesh.num_shards > 1:
        partial = partial.to(sae.b_dec.dtype)
        all_reduce_(partial, sae.mesh.shard_group, sae.mesh.num_shards)
    return partial


def _dots(rows: Tensor, W_dec: Tensor, codes: Codes, levels: Tensor | None) -> Tensor:
    """Each pair's gradient by its activation, not scaled: rows of its level times its W_dec row."""
    dots_of = implementation("gathered_dots", W_dec)
    if codes.tokens is not None:
        tokens = codes.tokens if levels is None else codes.tokens + levels * rows.shape[1]
        found: Tensor = dots_of(rows.flatten(0, 1), codes.latents, W_dec, tokens, codes.offsets)
        return found
    dots: Tensor | None = None
    for level, own in enumerate(rows):
        found = dots_of(own, codes.latents, W_dec, codes.tokens, codes.offsets)
        if levels is not None:
            found = found * (levels == level)
        dots = found if dots is None else dots + found
    assert dots is not None
    return dots


def _unused(codes: Codes) -> Tensor:
    """Slots without a pair; of a rectangle those of value 0."""
    if codes.offsets is None:
        return codes.values == 0
    slots = torch.arange(len(codes.latents), device=codes.latents.device)
    return slots >= codes.offsets[-1]


def pair_forward(
    sae: SparseCoder,
    W_dec: Tensor,  # [F, D] in the compute dtype
    x: Tensor,  # [n, D]
    found: Codes,  # candidates
    batch: Batch,
) -> Forward:
    """Residuals and what each pair adds to gradients. Collective over the shards."""
    leaf, own = found.values.detach().requires_grad_(), list(own_parameters(sae).values())
    given = found._replace(values=leaf)
    with torch.enable_grad():
        codes = sae.activate(given)
        penalty = sae.penalty(x.to(sae.b_dec.dtype), given, codes, batch)
    active = codes._replace(values=codes.values.detach())
    levels = sae.levels(active)
    parts = _parts(sae, W_dec, active, levels)
    rows, residual, squares = implementation("nested_rows", W_dec)(
        parts, sae.b_dec.detach(), x, sae.level_weights, sae.main_level, W_dec.dtype
    )
    scale = 2 * batch.inverse
    dots = _dots(rows, W_dec, active, levels) * scale
    if not sae.is_pairwise:
        dots = dots.masked_fill(active.values == 0, 0)
    outputs, grads_of = [codes.values], [dots.to(codes.values.dtype)]
    if penalty.requires_grad:
        outputs, grads_of = [*outputs, penalty], [*grads_of, torch.ones_like(penalty)]
    grads = torch.autograd.grad(outputs, [leaf, *own], grads_of, allow_unused=True)
    enc = torch.zeros_like(leaf) if grads[0] is None else grads[0]
    made = [torch.zeros_like(p) if g is None else g for p, g in zip(own, grads[1:], strict=True)]
    return Forward(
        active,
        active.values.to(scale.dtype) * scale,
        enc.to(scale.dtype).masked_fill(_unused(found), 0),
        residual,
        squares,
        More(sae.main_codes(active), rows, levels, penalty.detach(), tuple(made)),
    )


def join(parts: list[Forward]) -> General | None:
    """That of all micro-batches; None where there is none."""
    more = [part.more for part in parts if part.more is not None]
    if not more:
        return None
    rows = torch.cat([m.rows for m in more], dim=1) if len(more) > 1 else more[0].rows
    tokens, first = [], 0
    for part, own in zip(parts, more, strict=True):
        of, latents = part.codes.tokens, part.codes.latents
        if of is None:
            of = torch.arange(len(latents), device=latents.device)[:, None].expand_as(latents)
        if own.levels is not None:
            of = of + own.levels * rows.shape[1]
        tokens.append((of + first).flatten().int())
        first += own.rows.shape[1]
    grads = tuple(torch.stack(g).sum(dim=0) for g in zip(*(m.grads for m in more), strict=True))
    return General(torch.cat(tokens) if len(tokens) > 1 else tokens[0], rows[None], grads)


def same_length(
    pairs: PairGradients, general: General | None, mesh: Mesh
) -> tuple[PairGradients, General | None]:
    """Lists that are as long on all replicas, unused slots behind. A host sync; collective over the
    replicas.
    """
    if mesh.num_replicas == 1:
        return pairs, general
    length = torch.tensor(len(pairs.latents), device=pairs.latents.device)
    all_reduce_(length, mesh.replica_group, mesh.num_replicas, dist.ReduceOp.MAX)
    more = int(length) - len(pairs.latents)

    def longer(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, more))

    assert pairs.tokens is not None
    pairs = pairs._replace(
        latents=longer(pairs.latents),
        dec_coef=longer(pairs.dec_coef),
        enc_coef=longer(pairs.enc_coef),
        tokens=longer(pairs.tokens),
    )
    if general is not None:
        general = general._replace(tokens=longer(general.tokens))
    return pairs, general


def gather(general: General, mesh: Mesh) -> General:
    """That of all replicas. Collective over them."""
    if mesh.num_replicas == 1:
        return general
    group, size = mesh.replica_group, mesh.num_replicas
    each = general.rows.shape[1] * general.rows.shape[2]
    tokens = all_gather(general.tokens + mesh.replica * each, group, size).flatten()
    rows = all_gather(general.rows[0], group, size)
    for grad in general.grads:
        all_reduce_(grad, group, size)
    return General(tokens, rows, general.grads)


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
    flat = [] if tokens is None else [tokens + mesh.replica * len(local.dec_rows)]
    packed = torch.stack([*(t.to(bits) for t in (local.latents, *flat)), *coefs])
    gathered = all_gather(packed, group, size).transpose(0, 1).flatten(1).contiguous()
    latents, *flat = (row.to(torch.int32) for row in gathered[:-2])
    dec, enc = (row.view(local.dec_coef.dtype) for row in gathered[-2:])
    residual = all_gather(local.dec_rows, group, size).flatten(0, 1)
    return PairGradients(latents, dec, enc, residual, xc_all, local.k, *flat)


def has_gradient(pairs: PairGradients) -> Tensor:
    """As their coefficients, 0 for the pairs that add nothing."""
    used = (pairs.dec_coef != 0) | (pairs.enc_coef != 0)
    return used.to(pairs.dec_coef.dtype)


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor of those of micro-batches."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def join_pairs(parts: list[Forward], xc: Tensor) -> PairGradients:
    """The pairs of all micro-batches, tokens in the order of the batch; xc is what was encoded."""
    tokens, first = [], 0
    for part in parts:
        if part.codes.tokens is not None:
            tokens.append(part.codes.tokens + first if first else part.codes.tokens)
        first += len(part.residual)
    latents = joined([part.codes.latents for part in parts])
    return PairGradients(
        latents.flatten(),
        joined([part.dec_coef for part in parts]).flatten(),
        joined([part.enc_coef for part in parts]).flatten(),
        joined([part.residual for part in parts]),
        xc,
        latents.shape[-1],
        joined(tokens) if tokens else None,
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
    names = list(own_parameters(sae))
    found = own or (grad,) * len(names)
    return tuple(grad if n == "W_skip" else g for n, g in zip(names, found, strict=True))
