"""Sizes of the fused encoder: how sparse a sample, how many lists, how long.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from .shapes import cdiv, next_power_of_2

SCRATCH_BYTES = 56 << 20
GATHERED_BYTES = 16 << 20
_TILES_BYTES = 63 << 20
# Neighbours whose largest activation encode_tiles.py writes.
GROUP = 32
# Neighbours that a tile of the Hopper filter has of each part of the latents (encode_first.py).
RUN = 8
# Groups that a row may have, whose largest the threads that select hold (encode_pick.py).
MAX_GROUPS = 2048
# Entries of the groups that encode_rows.py reads again, of one row.
_MAX_AGAIN = 16384
MISS_CHANCE = 1e-8
OVERFLOW_CHANCE = 1e-7
# Lists a row in one program: columns 0 and 1, 2 and 3, 4 and 5, 6 and 7 of each 8, the columns that
# one thread holds of a warpgroup instruction's result.
QUADS = 4


class Plan(NamedTuple):
    """Sizes of one call; a function of shapes alone, so that every rank makes the same."""

    stride: int
    rank: int
    parts: int  # programs that share a block of rows
    capacity: int  # activations a list holds
    block_rows: int
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    sample_n: int = 128
    sample_warps: int = 4
    threshold_warps: int = 1
    keys: int = 1024  # activations that a row's selection holds at a time
    select_warps: int = 2

    @property
    def lists(self) -> int:
        """Lists a row."""
        return QUADS * self.parts

    def pitch(self, F: int) -> int:
        """int64 words of scratch a row: samples, then lists, then the selection's keys."""
        samples = cdiv(F // self.stride, 2 * self.sample_n) * self.sample_n
        return max(samples, self.lists * self.capacity, self.keys)


def _poisson_below(mean: float, r: int) -> float:
    """P(Poisson(mean) < r)."""
    return sum(math.exp(j * math.log(mean) - mean - math.lgamma(j + 1)) for j in range(r))


@lru_cache(maxsize=256)
def _rank(mean: float) -> int:
    """Smallest r with P(Poisson(mean) >= r) < MISS_CHANCE."""
    r = max(1, math.ceil(mean))
    while 1.0 - _poisson_below(mean, r) > MISS_CHANCE:
        r += 1
    return r


@lru_cache(maxsize=1024)
def _overflow_chance(stride: int, rank: int, lists: int, capacity: int) -> float:
    """Chance that one of a row's lists overflows.

    The number of activations that reach the rank-th largest of every stride-th is stride times a
    Gamma(rank) variable; they spread over the lists evenly.
    """
    chance, steps = 0.0, 160
    width = (rank + 8 * math.sqrt(rank)) / steps
    for i in range(steps):
        g = (i + 0.5) * width
        density = math.exp((rank - 1) * math.log(g) - g - math.lgamma(rank))
        mean = g * stride / lists
        if mean < capacity:
            # Chernoff's bound of P(Poisson(mean) > capacity).
            one = math.exp(capacity - mean - capacity * math.log(capacity / mean))
        else:
            one = 1.0
        chance += density * width * min(1.0, lists * one)
    return chance


def _rounds(blocks: int, tiles: int, parts: int, programs: int) -> int:
    """Tiles that the busiest program does, where `parts` programs share a block of rows."""
    return cdiv(blocks * parts, programs) * cdiv(tiles, parts)


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, F: int, k: int, programs: int = 132) -> Plan | None:
    """The fused path's sizes, or None where k is too large a part of F for sampling to pay.

    For each stride the fewest chunks of rows that fit the scratch memory; of these the plan with
    the least estimated time. The rates are rough ones of one H100: another GPU may get a worse
    plan, never a wrong result.
    """
    if D % 8 or F < 2048 or k > 512:
        return None
    best: tuple[float, Plan] | None = None
    for stride in (128, 64, 48, 32, 24, 16, 12, 8):
        rank = _rank(k / stride)
        hits = rank * stride
        if hits * 16 > F:
            continue
        for chunks in range(1, cdiv(N, 128) + 1):
            rows = cdiv(cdiv(N, chunks), 128) * 128
            blocks, tiles = rows // 128, cdiv(F, 256)
            parts = min(
                range(1, min(tiles, 32) + 1), key=lambda p: (_rounds(blocks, tiles, p, programs), p)
            )
            # Were all hits neighbours, a list would get the 64 of each of its tiles.
            capacity = 64 * cdiv(cdiv(hits + rank // 8 * stride + 255, 256), parts)
            while _overflow_chance(stride, rank, QUADS * parts, capacity) > OVERFLOW_CHANCE:
                capacity += 16
            keys = max(2 * next_power_of_2(QUADS * parts), math.ceil(1.3 * hits), 2 * k, 256)
            keys = next_power_of_2(keys)
            # Narrower where there would be too few tiles to fill the GPU.
            samples = F // stride
            sample_n = next(
                (n for n in (128, 64) if blocks * cdiv(samples, n) >= 0.75 * programs), 32
            )
            plan = Plan(
                stride, rank, parts, capacity, rows,
                sample_n=sample_n,
                keys=keys,
                select_warps=1 if keys <= 1024 else 4,
                threshold_warps=1 if samples <= 1024 else 4,
            )  # fmt: skip
            scratch = rows * (8 * plan.pitch(F) + 4 * plan.lists + 8)
            if scratch + min(GATHERED_BYTES, samples * 2 * D) > SCRATCH_BYTES:
                continue
            sample_tiles = cdiv(blocks * cdiv(samples, sample_n), programs) * (
                0.5 if sample_n < 128 else 1
            )
            tile = 128 * 256 * D * 2 / 5.5e12
            filtering = _rounds(blocks, tiles, parts, programs) * (tile + 3e-7 + 25e-6 * hits / F)
            each = 15e-6 + 0.6 * sample_tiles * tile + filtering + rows * samples * 8 / 3e12
            cost = cdiv(N, rows) * each
            if best is None or cost < best[0]:
                best = (cost, plan)
            break
    return None if best is None else best[1]


def sort_size(k: int) -> int:
    """Keys that encode_pick.py sorts: k and some more, which take fewer steps to find."""
    size = max(32, next_power_of_2(k))
    return 2 * size if size < k + k // 16 and size <= 64 else size


def groups_room(k: int, warps: int) -> int:
    """Keys that a row's selection from groups holds, by 32: some more than it reads at once, 32 a
    lane."""
    return 8 + 32 * warps + sort_size(k) // 16


def most_keys(k: int) -> int:
    """Keys that are held at a time where a row's selection starts anew."""
    return max(512, next_power_of_2(2 * k))


class GroupSizes(NamedTuple):
    """Sizes of the selection of a row's best groups (encode_rows.py)."""

    size: int  # neighbours a group
    groups_pow2: int
    k_pow2: int
    step: int  # groups whose largest are found at once
    num_warps: int


def group_sizes(F: int, k: int, size: int | None = None) -> GroupSizes | None:
    """Sizes for F latents in groups of `size`, or of the largest size that is fit; None where too
    many groups would be looked at or read again."""
    if size is None:
        fit = [s for s in (256, 128, 64, 32) if F / s > 8192] + [32, 16, 8, 4, 2, 1]
        size = next((s for s in fit if cdiv(F, s) >= min(2 * k, F)), 1)
    groups, k_pow2 = cdiv(F, size), next_power_of_2(k)
    if groups < min(2 * k, F) or groups > 16384 or k_pow2 * size > _MAX_AGAIN:
        return None
    groups_pow2 = next_power_of_2(groups)
    # The fastest of 1, 2, 4 and 8 on an H100 for 512 groups and k = 20, and for 2048 and k = 64.
    warps = max(4, min(16, max(groups_pow2 // 1024, k_pow2 * size // 1024)))
    step = min(groups_pow2, max(1, 1024 * warps // size))
    return GroupSizes(size, groups_pow2, k_pow2, step, warps)


def tiles_fit(N: int, D: int, F: int, k: int) -> bool:
    """Whether encode_tiles.py takes a shape: few enough pre-activations, and groups enough."""
    if N == 0 or D % 8 or group_sizes(F, k, GROUP) is None:
        return False
    each = 4 * cdiv(F, 256) * 256
    return N * (each + each // GROUP + 8 * most_keys(k)) <= _TILES_BYTES


def tail_rows(N: int, F: int, programs: int) -> int:
    """Room for the tokens after the last whole block of 128, which encode_tiles.py multiplies
    beside whole blocks where that takes a round of tiles less; 0 where they are a block as any."""
    whole, rest = divmod(N, 128)
    if whole < 2 or not 0 < rest <= 32:
        return 0
    tiles = cdiv(F, 256)
    if cdiv(whole * tiles, programs) == cdiv((whole + 1) * tiles, programs):
        return 0
    return 16 if rest <= 16 else 32


def tiles_are_first(N: int, F: int, programs: int) -> bool:
    """Whether encode_tiles.py's matmul is likely to be ahead of the others, by an H100's times: of
    two blocks of tokens, which the fused encoder has no more than 64 programs for. (At 270 tokens
    by a fifth; at 400 the fused one was, by an eighth.)"""
    return (N // 128 if tail_rows(N, F, programs) else cdiv(N, 128)) <= 2
