"""Triton kernels of the sparse decoder: gather and weighted sum, gathered dot products, and both
with the loss's residual between them.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.  One program a token and a block of columns
(decode) or of pairs (dots); several latents' rows are in flight at once as a [BLOCK_K, BLOCK_D]
tile.  No atomics: the order of every sum is fixed.  Pairs are a rectangle [N, K], or a flat list
[C], whose tokens' numbers of pairs are known to the device alone: there dots take blocks of pairs
whatever their tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Decoded, Levels, Nest
from .shapes import cdiv, next_power_of_2


@triton.jit
def _span(offsets_ptr, token, K):
    """Where a token's pairs begin, and their number; offsets are None for a rectangle."""
    if offsets_ptr is None:
        first = token * K
        count = K
    else:
        first = tl.load(offsets_ptr + token).to(tl.int64)
        count = (tl.load(offsets_ptr + token + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def _latent_rows(
    acts_ptr, idx_ptr, w_ptr, first, start, cols, D, K, BLOCK_K: tl.constexpr,
    EVERY: tl.constexpr = False,
):  # fmt: skip
    """Activations [BLOCK_K] of a token, whose K pairs begin at `first`, from slot `start` on, and
    their latents' rows in some columns, float32."""
    slot = start + tl.arange(0, BLOCK_K)
    act = tl.load(acts_ptr + first + slot, mask=slot < K, other=0.0).to(tl.float32)
    latent = tl.load(idx_ptr + first + slot, mask=slot < K, other=0).to(tl.int64)
    # A zero activation loads nothing: on a shard most pairs belong to other shards.
    wanted = slot < K if EVERY else act != 0
    mask = wanted[:, None] & (cols < D)[None, :]
    w = tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=mask, other=0.0)
    return act, w.to(tl.float32)


@triton.jit
def _decode_kernel(
    acts_ptr,  # [N, K]
    idx_ptr,  # [N, K]
    w_ptr,  # [F, D]
    out_ptr,  # [N, D]
    offsets_ptr,  # [N + 1] of a flat list, or None
    D,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token's reconstruction in a block of columns."""
    token = tl.program_id(0).to(tl.int64)
    first, k = _span(offsets_ptr, token, K)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_K):
        act, w = _latent_rows(acts_ptr, idx_ptr, w_ptr, first, start, cols, D, k, BLOCK_K)
        acc += act[:, None] * w
    row = tl.sum(acc, axis=0)
    tl.store(out_ptr + token * D + cols, row.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _decode_dots_kernel(
    acts_ptr,  # [N, K]
    idx_ptr,  # [N, K]
    w_ptr,  # [F, D]
    main_ptr,  # [N, D]
    rows_ptr,  # [G, N, D]; that of a single level is main's
    offsets_ptr,  # [N + 1] of a flat list, or None
    ends_ptr,  # [N, G] of several levels, or None
    b_ptr,  # [D]
    x_ptr,  # [N, D]
    sq_ptr,  # [N, blocks] sums of squares
    dots_ptr,  # [N, blocks, K] float32, as many of each token as it has pairs
    N,
    D,
    K,
    WEIGHTS: tl.constexpr,
    MAIN: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token's residuals in a block of columns, level after level, whose pairs stand in their
    order; then its part of the dot products with the same rows, which the caches still hold."""
    G: tl.constexpr = len(WEIGHTS)
    token = tl.program_id(0).to(tl.int64)
    first, k = _span(offsets_ptr, token, K)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    errors = ()
    end = 0
    for level in tl.static_range(G):
        begin = end
        end = k if ends_ptr is None else tl.load(ends_ptr + token * G + level)
        acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_K):
            act, w = _latent_rows(acts_ptr, idx_ptr, w_ptr, first, start, cols, D, end, BLOCK_K)
            acc += act[:, None] * w
        error = tl.sum(acc, axis=0)
        if level == 0:
            x = tl.load(x_ptr + token * D + cols, mask=inside, other=0.0).to(tl.float32)
            error += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32) - x
            error = tl.where(inside, error, 0.0)
        else:
            error += errors[level - 1]
        if level == MAIN:
            at = token * tl.num_programs(1) + tl.program_id(1)
            tl.store(sq_ptr + at, tl.sum(error * error, axis=0))
            rounded = error.to(main_ptr.dtype.element_ty)
            tl.store(main_ptr + token * D + cols, rounded, mask=inside)
        errors = errors + (error,)  # type: ignore[assignment]
    at = token * tl.num_programs(1) + tl.program_id(1)
    to = at * K if offsets_ptr is None else first * tl.num_programs(1) + tl.program_id(1) * k
    above = tl.zeros([BLOCK_D], tl.float32)
    for back in tl.static_range(G):
        above += errors[G - 1 - back] * WEIGHTS[G - 1 - back]
        rounded = above.to(main_ptr.dtype.element_ty)
        begin = 0
        if ends_ptr is not None:
            level = G - 1 - back
            tl.store(rows_ptr + (level * N + token) * D + cols, rounded, mask=inside)
            end = tl.load(ends_ptr + token * G + level)
            begin = tl.load(ends_ptr + token * G + level - 1, mask=level > 0, other=0)
        grad = rounded.to(tl.float32)
        for start in range(begin, end, BLOCK_K):
            slot = start + tl.arange(0, BLOCK_K)
            _, w = _latent_rows(
                acts_ptr, idx_ptr, w_ptr, first, start, cols, D, end, BLOCK_K, EVERY
            )
            tl.store(dots_ptr + to + slot, tl.sum(grad[None, :] * w, axis=1), mask=slot < end)


@triton.jit
def _by_level_kernel(
    levels_ptr, acts_ptr, idx_ptr,  # [P]
    offsets_ptr,  # [N + 1] of a flat list, or None
    acts_out_ptr, idx_out_ptr, rows_ptr,  # [P]
    ends_ptr,  # [N, G]
    first_row,
    stride,
    P,
    K,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's pairs, those of the least level first. A slot that no token has gets a zero."""
    token = tl.program_id(0).to(tl.int64)
    first, k = _span(offsets_ptr, token, K)
    done = tl.zeros([], tl.int32)
    for level in tl.static_range(G):
        for start in range(0, k, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            own = tl.load(levels_ptr + first + slot, mask=slot < k, other=G) == level
            to = first + done + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(acts_out_ptr + to, tl.load(acts_ptr + first + slot, mask=own), mask=own)
            tl.store(idx_out_ptr + to, tl.load(idx_ptr + first + slot, mask=own), mask=own)
            row = tl.zeros([BLOCK], tl.int32) + (level * stride + first_row + token).to(tl.int32)
            tl.store(rows_ptr + to, row, mask=own)
            done += tl.sum(own.to(tl.int32), 0)
        tl.store(ends_ptr + token * G + level, done)
    if offsets_ptr is not None:
        # Programs share what is behind the last token's.
        there = tl.load(offsets_ptr + tl.num_programs(0))
        for start in range(there + token * BLOCK, P, tl.num_programs(0) * BLOCK):
            to = start + tl.arange(0, BLOCK)
            tl.store(acts_out_ptr + to, tl.zeros([BLOCK], tl.float32), mask=to < P)
            tl.store(idx_out_ptr + to, tl.zeros([BLOCK], tl.int32), mask=to < P)
            tl.store(rows_ptr + to, tl.zeros([BLOCK], tl.int32), mask=to < P)


@triton.jit
def _coefs_kernel(
    acts_ptr,  # [P]
    dots_ptr,  # of _decode_dots_kernel
    scale_ptr,  # scalar float32
    dec_ptr,  # [P] float32
    enc_ptr,  # [P] float32
    tokens_ptr,  # [P] of a flat list, or None
    offsets_ptr,  # [N + 1] of a flat list, or None
    N,
    P,
    K,
    blocks,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = pair < P
    if tokens_ptr is None:
        at = (pair // K).to(tl.int64) * blocks * K + pair % K
        step = K
    else:
        used = pair < tl.load(offsets_ptr + N)
        token = tl.load(tokens_ptr + pair, mask=used, other=0)
        first = tl.load(offsets_ptr + token, mask=used, other=0)
        step = tl.load(offsets_ptr + token + 1, mask=used, other=0) - first
        at = first.to(tl.int64) * blocks + pair - first
    dots = tl.zeros([BLOCK], tl.float32)
    for _ in range(blocks):
        dots += tl.load(dots_ptr + at, mask=used, other=0.0)
        at += step
    act = tl.load(acts_ptr + pair, mask=pair < P, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    tl.store(dec_ptr + pair, act * scale, mask=pair < P)
    enc = dots * scale
    if not EVERY:
        enc = tl.where(act != 0, enc, 0.0)
    tl.store(enc_ptr + pair, enc, mask=pair < P)


@triton.jit
def _dots_kernel(
    grad_ptr,  # [N, D]
    idx_ptr,  # [N, K]
    w_ptr,  # [F, D]
    out_ptr,  # [N, K] float32
    acts_ptr,  # [N, K], COEFS only
    dec_ptr,  # [N, K] float32, COEFS only
    scale_ptr,  # scalar float32, COEFS only
    tokens_ptr,  # [P] of a flat list, or None
    offsets_ptr,  # [N + 1] of a flat list, or None
    N,
    D,
    K,  # pairs a token; of a flat list all slots
    COEFS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = slot < K
    if tokens_ptr is None:
        token = tl.program_id(0).to(tl.int64)
        pair = token * K + slot
        used = inside
    else:
        pair = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = pair < K
        used = pair < tl.load(offsets_ptr + N)
        token = tl.load(tokens_ptr + pair, mask=used, other=0).to(tl.int64)[:, None]
    latent = tl.load(idx_ptr + pair, mask=used, other=0).to(tl.int64)
    if COEFS:
        act = tl.load(acts_ptr + pair, mask=used, other=0.0).to(tl.float32)
        wanted = used & (act != 0)
    else:
        wanted = used
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D))[None, :]
        g = tl.load(grad_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        mask = wanted[:, None] & (cols < D)
        w = tl.load(w_ptr + latent[:, None] * D + cols, mask=mask, other=0.0)
        acc += g * w.to(tl.float32)
    dots = tl.sum(acc, axis=1)
    if COEFS:
        scale = tl.load(scale_ptr)
        dots = dots * scale
        tl.store(dec_ptr + pair, act * scale, mask=inside)
    tl.store(out_ptr + pair, dots, mask=inside)


@triton.jit
def _nested_kernel(
    parts_ptr,  # [G, N, D]
    b_ptr,  # [D]
    x_ptr,  # [N, D]
    rows_ptr,  # [G, N, D]
    main_ptr,  # [N, D]
    squares_ptr,  # [N] float32
    N,
    D,
    WEIGHTS: tl.constexpr,
    MAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    G: tl.constexpr = len(WEIGHTS)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    at = row * D + cols
    base = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    base -= tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for back in tl.static_range(G):
        e = base
        # Those below are in the cache.
        for level in tl.static_range(G - back):
            part = parts_ptr + (level * N + row) * D + cols
            e += tl.load(part, mask=inside, other=0.0).to(tl.float32)
        above += e * WEIGHTS[G - 1 - back]
        to = rows_ptr + ((G - 1 - back) * N + row) * D + cols
        tl.store(to, above.to(rows_ptr.dtype.element_ty), mask=inside)
        if G - 1 - back == MAIN:
            tl.store(main_ptr + at, e.to(main_ptr.dtype.element_ty), mask=inside)
            tl.store(squares_ptr + row, tl.sum(e * e, 0))


def _decode_blocks(D: int) -> dict[str, int]:
    # One warp a program, so that no sum crosses warps: 1.8x over four at D=768, K=32. Columns by
    # 128: 144 us against 165 by 256 at D=4096, K=64 on an H100.
    return {"BLOCK_K": 8, "BLOCK_D": min(128, max(16, next_power_of_2(D))), "num_warps": 1}


def _dots_blocks(D: int, K: int) -> dict[str, int]:
    # 163 us against 190 with 8 latents by 256 columns at D=4096, K=64; 47 against 56 at D=768.
    block_d = min(128, max(16, next_power_of_2(D)))
    return {"BLOCK_K": min(16, next_power_of_2(K)), "BLOCK_D": block_d, "num_warps": 1}


def _dots_grid(
    N: int, D: int, K: int, tokens: Tensor | None
) -> tuple[tuple[int, int], dict[str, int]]:
    blocks = _dots_blocks(D, K)
    programs = cdiv(K, blocks["BLOCK_K"])
    # A grid's first axis alone may have more than 65535.
    return ((N, programs) if tokens is None else (programs, 1)), blocks


def _decode_coefs_blocks(D: int, K: int) -> dict[str, int]:
    # 16 latents at once 203 us, 8 263 us at D=4096, K=64; at D=768, K=32 66 and 61.
    return {**_decode_blocks(D), "BLOCK_K": 16 if K > 32 else 8}


def _sizes(top_idx: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    """N, and K; of a flat list all slots."""
    return (len(top_idx) if offsets is None else len(offsets) - 1), top_idx.shape[-1]


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K] int32 or int64
    W_dec: Tensor,  # [F, D]
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> Tensor:  # [N, D] in W_dec's dtype
    """`reference.sparse_decode`; a row of W_dec whose activation is 0 is never read."""
    del tokens
    (N, K), D = _sizes(top_idx, offsets), W_dec.shape[1]
    # Rows of e4m3 are weights; what they make is not rounded to it.
    narrow = W_dec.element_size() == 1
    out = W_dec.new_empty((N, D), dtype=torch.float32 if narrow else W_dec.dtype)
    if N:
        top_acts, top_idx, W_dec = top_acts.contiguous(), top_idx.contiguous(), W_dec.contiguous()
        blocks = _decode_blocks(D)
        grid = (N, cdiv(D, blocks["BLOCK_D"]))
        _decode_kernel[grid](top_acts, top_idx, W_dec, out, offsets, D, K, **blocks)
    return out


def gathered_dots(
    grad: Tensor,  # [N, D]
    top_idx: Tensor,  # [N, K]
    W: Tensor,  # [F, D]
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> Tensor:  # [N, K] float32
    """`reference.gathered_dots`."""
    (N, K), D = _sizes(top_idx, offsets), W.shape[1]
    out = W.new_empty(top_idx.shape, dtype=torch.float32)
    if out.numel():
        grid, blocks = _dots_grid(N, D, K, tokens)
        grad, top_idx, W = grad.contiguous(), top_idx.contiguous(), W.contiguous()
        args = (grad, top_idx, W, out, out, out, out, tokens, offsets, N, D, K)
        _dots_kernel[grid](*args, COEFS=False, **blocks)
    return out


def pair_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    residual: Tensor,  # [N, D]
    scale: Tensor,  # scalar float32
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # [N, K] float32 x 2
    """`reference.pair_coefs` in one pass."""
    (N, K), D = _sizes(top_idx, offsets), W_dec.shape[1]
    enc = W_dec.new_empty(top_idx.shape, dtype=torch.float32)
    dec = torch.empty_like(enc)
    if enc.numel():
        grid, blocks = _dots_grid(N, D, K, tokens)
        args = (residual, top_idx.contiguous(), W_dec, enc, top_acts.contiguous(), dec, scale)
        _dots_kernel[grid](*args, tokens, offsets, N, D, K, COEFS=True, **blocks)
    return dec, enc


def by_level(
    levels: Tensor,  # [N, K] int32, or [C] of a flat list
    top_acts: Tensor,  # as levels
    top_idx: Tensor,  # likewise, int32
    offsets: Tensor | None,  # [N + 1] of a flat list
    number: int,  # of levels
    first: int,
    tokens: int,
) -> tuple[Tensor, Tensor, Levels]:  # as top_acts and top_idx
    """`reference.by_level` in one launch."""
    N, K = _sizes(top_idx, offsets)
    acts, idx = torch.empty_like(top_acts), torch.empty_like(top_idx)
    rows = levels.new_empty(levels.numel())
    ends = levels.new_empty((N, number))
    if N:
        args = (levels.contiguous(), top_acts.contiguous(), top_idx.contiguous(), offsets)
        _by_level_kernel[(N,)](
            *args, acts, idx, rows, ends, first, tokens, rows.numel(), K, G=number,
            BLOCK=128, num_warps=1,
        )  # fmt: skip
    return acts, idx, Levels(rows, ends, tokens)


def decode_coefs(
    top_acts: Tensor,  # [N, K]
    top_idx: Tensor,  # [N, K]
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    scale: Tensor,  # scalar float32
    tokens: Tensor | None = None,  # [C], of a flat list
    offsets: Tensor | None = None,  # [N + 1]
    nest: Nest = Nest(),  # noqa: B008
) -> Decoded:
    """`reference.decode_coefs` with the rows of W_dec read once from memory: the dot products find
    them in the caches.
    """
    (N, K), D, P = _sizes(top_idx, offsets), W_dec.shape[1], top_idx.numel()
    G = len(nest.weights)
    block = _decode_coefs_blocks(D, cdiv(P, max(N, 1)))
    blocks = cdiv(D, block["BLOCK_D"])
    out = W_dec.new_empty((N, D))
    rows = out[None] if G == 1 else W_dec.new_empty((G, N, D))
    sq = W_dec.new_empty((N, blocks), dtype=torch.float32)
    dots = sq.new_empty(P * blocks)
    dec, enc = sq.new_empty((2, *top_idx.shape)).unbind()
    if N:
        top_acts, top_idx = top_acts.contiguous(), top_idx.contiguous()
        ends = None if nest.levels is None else nest.levels.ends
        args = (top_acts, top_idx, W_dec, out, rows, offsets, ends, b_dec, x.contiguous(), sq, dots)
        _decode_dots_kernel[(N, blocks)](
            *args, N, D, K, nest.weights, nest.main, nest.every, **block
        )
    if P:
        pairs = (top_acts, dots, scale, dec, enc, tokens, offsets, N, P, K, blocks)
        _coefs_kernel[(cdiv(P, 512),)](*pairs, EVERY=nest.every, BLOCK=512)
    return Decoded(out, sq, dec, enc, rows)


def nested_rows(
    parts: Tensor,  # [G, N, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    weights: tuple[float, ...],
    main: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [G, N, D] and [N, D] in dtype, [N] float32
    """`reference.nested_rows` in one pass."""
    G, N, D = parts.shape
    rows = parts.new_empty((G, N, D), dtype=dtype)
    residual = parts.new_empty((N, D), dtype=dtype)
    squares = parts.new_empty(N, dtype=torch.float32)
    if N:
        block = next_power_of_2(D)
        args = (parts.contiguous(), b_dec, x.contiguous(), rows, residual, squares, N, D)
        warps = max(1, min(8, block // 256))
        _nested_kernel[(N,)](*args, tuple(weights), main, block, num_warps=warps)
    return rows, residual, squares
