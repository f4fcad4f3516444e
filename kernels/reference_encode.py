"""The encoder in plain PyTorch: the part of reference.py that selects.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  W_enc is [F, D]: a latent is a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows are encoded in blocks of at most this many pre-activations, so that a wide SAE fits a
# laptop's memory.
_MAX_BLOCK_ELEMENTS = 1 << 25


class Slots(NamedTuple):
    """Active latents as a rectangle: K slots a token. An unused slot has the value 0."""

    values: Tensor  # [N, K] float32/64 >= 0
    latents: Tensor  # [N, K] int32

    @property
    def tokens(self) -> None:
        """None: a pair's token is its row."""
        return

    @property
    def offsets(self) -> None:
        """None: each token has K slots."""
        return


class Pairs(NamedTuple):
    """Active latents as a flat list of (token, latent, value) in the order of tokens, each of which
    has any number; latents within a token come in any order, none twice.

    Slots from `num_pairs` on are unused: token 0, latent 0, value 0. Before it a value of 0 is a
    pair that was left out again, as by a selection over shards.
    """

    tokens: Tensor  # [C] int32, ascending
    latents: Tensor  # [C] int32
    values: Tensor  # [C] float32/64 >= 0
    offsets: Tensor  # [N + 1] int32, where each token's pairs begin; the last is their number

    @property
    def num_pairs(self) -> Tensor:
        """Pairs in use, a scalar int32 on the device."""
        return self.offsets[-1]


class Dense(NamedTuple):
    """All latents of each token, those that are not active too: of an architecture that has few of
    them. Not for the kernels, which gather rows: products of matrices take them.
    """

    values: Tensor  # [N, F] float32/64

    @property
    def latents(self) -> Tensor:
        """[N, F] int32, one row in memory."""
        latents = torch.arange(self.values.shape[1], dtype=torch.int32, device=self.values.device)
        return latents.expand_as(self.values)

    @property
    def tokens(self) -> None:
        """None: a pair's token is its row."""
        return

    @property
    def offsets(self) -> None:
        """None: each token has all."""
        return

    def most(self) -> Slots:
        """Each latent's largest value [1, F]: what counting what fires asks for."""
        return Slots(self.values.amax(dim=0, keepdim=True), self.latents[:1])


Codes = Slots | Pairs | Dense


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select_topk(
    values: Tensor,  # [N, M]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] values in descending order, [N, k] int64 columns
    """The k largest of each row, exactly: ties go to the lowest column, NaN sorts above +inf as in
    `torch.topk`.
    """
    # topk breaks ties arbitrarily: where the next value equals the k-th, or both are NaN, sort.
    top, cols = values.topk(min(k + 1, values.shape[1]), dim=1)
    ambiguous = ((top[:, k:] == top[:, k - 1 : k]) | top[:, k:].isnan()).any(dim=1)
    top, cols = top[:, :k], cols[:, :k]
    if bool(ambiguous.any()):
        rows = ambiguous.nonzero().squeeze(1)
        ordered, order = values[rows].sort(dim=1, descending=True, stable=True)
        top[rows], cols[rows] = ordered[:, :k], order[:, :k]
    cols, by_col = cols.sort(dim=1)
    top, by_value = top.gather(1, by_col).sort(dim=1, descending=True, stable=True)
    return top, cols.gather(1, by_value)


def sort_key(values: Tensor) -> Tensor:
    """Integers that order as float32 (int32) or float64 (int64) values, both zeros alike, NaN above
    +inf.
    """
    kind, sign = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(kind)
    # Negative floats count down. In place: the keys are the largest tensors there are.
    bits ^= (bits >> sign) & torch.iinfo(kind).max
    return bits


def sort_keys(
    values: Tensor,  # float32
    latents: Tensor,  # integers from 0 to 2**31 - 1, of a shape that broadcasts
) -> Tensor:  # int64
    """Keys that order as (value, lowest latent first): their k largest are a top-k without ties,
    found without a host sync.
    """
    keys = sort_key(values).to(torch.int64)
    keys <<= 32
    keys += 0x7FFFFFFF - latents
    return keys


def pre_activations(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
) -> Tensor:  # [N, F] float32, or float64 for float64 inputs
    """`x @ W_enc.T + b_enc`, accumulated and returned in `accumulate_dtype(x.dtype)`."""
    dtype = accumulate_dtype(x.dtype)
    if x.is_cuda and x.element_size() == 2 and x.dtype == W_enc.dtype:
        # Without a copy of the weights in float32, which each block of tokens would make.
        return torch.mm(x, W_enc.T, out_dtype=dtype).add_(b_enc)
    return torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype).T)


def _blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pre-activations of a block of tokens, and its first token."""
    size, at = max(1, _MAX_BLOCK_ELEMENTS // W_enc.shape[0]), 0
    for rows in torch.split(x, size):
        yield at, pre_activations(rows, W_enc, b_enc)
        at += len(rows)


def topk_encode(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32/64, descending; [N, k] int32
    """The k largest of `relu(x @ W_enc.T + b_enc)` a row; equal values, zeros too, go to the
    lowest index.
    """
    values, indices = [], []
    for _, pre in _blocks(x, W_enc, b_enc):
        v, i = select_topk(pre.relu_(), k)
        values.append(v)
        indices.append(i.to(torch.int32))
    return torch.cat(values), torch.cat(indices)


_Found = tuple[Tensor, Tensor, Tensor]  # tokens and latents int64, values; in that order


def _find(pre: Tensor, limit: Tensor, first_token: int) -> _Found:
    """The pairs of a block whose pre-activation is above its limit, or NaN."""
    rows, latents = (~(pre <= limit)).nonzero(as_tuple=True)
    return rows + first_token, latents, pre[rows, latents]


def _largest(found: _Found, count: int) -> _Found:
    """The `count` pairs of largest value, the first of equal ones, in their order."""
    keys = sort_key(found[2])
    least = keys.topk(count, sorted=False).values.min()
    equal, wanted = keys == least, count - (keys > least).sum()
    keep = (keys > least) | (equal & (equal.cumsum(0) <= wanted))
    return found[0][keep], found[1][keep], found[2][keep]


def _least(values: Tensor) -> Tensor:  # scalar
    """The least value; NaN is above all."""
    return torch.where(values.isnan(), torch.inf, values).min()


def _joined(found: _Found, more: _Found) -> _Found:
    tokens, latents, values = (torch.cat(both) for both in zip(found, more, strict=True))
    return tokens, latents, values


def _no_pairs(x: Tensor) -> _Found:
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    return none, none, torch.empty(0, dtype=accumulate_dtype(x.dtype), device=x.device)


def _padded(found: _Found, num_tokens: int, capacity: int) -> Pairs:
    """A list of `capacity` slots of at most so many pairs."""
    tokens, latents, values = (t.new_zeros(capacity) for t in found)
    for whole, part in zip((tokens, latents, values), found, strict=True):
        whole[: len(part)] = part
    bounds = torch.arange(num_tokens + 1, device=tokens.device)
    offsets = torch.searchsorted(found[0], bounds, out_int32=True)
    return Pairs(tokens.int(), latents.int(), values, offsets)


def batch_topk_encode(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    k: int,
) -> Pairs:  # of N * k slots
    """The N * k largest of `relu(x @ W_enc.T + b_enc)` over all tokens together, equal values by
    the lowest (token, latent); a token may have none or all. Zeros are no pairs: where fewer are
    positive the list is shorter.

    In blocks of tokens: what is kept between them is at most N * k pairs.
    """
    found, total = _no_pairs(x), len(x) * k
    limit = found[2].new_zeros(())
    for first, pre in _blocks(x, W_enc, b_enc):
        if pre.numel() > total:
            # A block's own limit first: 1.1 s for 2.4 at N=1024 D=576 F=16384 k=32 on one core, of
            # which the product is 0.4.
            own = _least(pre.flatten().topk(total, sorted=False).values)
            limit = torch.maximum(limit, torch.nextafter(own, own.new_tensor(-torch.inf)))
        found = _joined(found, _find(pre, limit, first))
        if len(found[0]) > total:
            found = _largest(found, total)
            # Later tokens lose against equal values.
            limit = _least(found[2])
    return _padded(found, len(x), total)


def threshold_encode(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    threshold: Tensor,  # [F], or a scalar for all
    capacity: int,
) -> tuple[Pairs, Tensor]:  # of `capacity` slots; scalar int32, how many pairs there are
    """All pairs whose `x @ W_enc.T + b_enc` is above their latent's threshold, as JumpReLU's
    Heaviside (Rajamanoharan et al. 2024, arXiv 2407.14435), SAELens and dictionary_learning have
    it: strictly.

    Where they are more than the capacity the number says so and the list has some of them: here the
    first.
    """
    limit, number = threshold.to(accumulate_dtype(x.dtype)), 0
    found = _no_pairs(x)
    for first, pre in _blocks(x, W_enc, b_enc):
        more = _find(pre, limit, first)
        number += len(more[0])
        tokens, latents, values = _joined(found, more)
        found = tokens[:capacity], latents[:capacity], values[:capacity]
    there = torch.tensor(min(number, 2**31 - 1), dtype=torch.int32, device=x.device)
    return _padded(found, len(x), capacity), there
