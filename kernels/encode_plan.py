"""Sizes of the encoder: how large a sample, how many lists, how long. A function of shapes alone,
so that every rank makes the same.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

The encoder is a matmul whose epilogue keeps what passes a limit, and a selection from what is kept:

        latents: `whole` tiles of 256, each of 8 neighbours        the last tile: what is left
        from each 32nd part of the latents, in scattered order     of F / 256
       +--------+--------+--------+--------+-- ... --+--------+---+
    128| sample | sample |  part  |  part  |         |  part  |   |
  token|   0    |   1    |   0    |   1    |         |   0    | 1 |
       +--------+--------+--------+--------+-- ... --+--------+---+

1. The first `sample` tiles are multiplied and written, [N, 256 sample] float32.
2. Below the `rank`-th largest of these is the row's limit: k activations of the row pass it,
   whatever the values are (only ranks matter), but in one row of 1e8. What of the sample passes is
   kept as keys. Zeros never pass: most activations of a trained SAE are, and where fewer than rank
   of the sample are positive, all positive ones pass.
3. The other tiles are dealt out to `parts` programs a block of rows. Of a tile's row four threads
   hold 64 columns each and append pairs of neighbours, of which one passes, to lists of their own.
4. A row's k largest are selected from its keys and lists, with zeros where all positive ones are
   fewer. Where these hold fewer than k for another reason (rows of NaN, or of more equal values
   than the sample may keep), or a list was full, the row is computed anew: the result is exact.

Glossary. Run: the 8 neighbours of a tile that are one of 32 parts' of the latents. Pair: two of
them, which one thread holds. Limit: what a pre-activation has to exceed. Sort key: an activation's
bits and its latent as one int64 (`encode_select.key_of`). Position: a tile's turn in scattered
order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

from .shapes import cdiv, next_power_of_2

BLOCK_M, BLOCK_N = 128, 256
# Neighbours in a sample of which the largest is looked at for a limit.
CELL = 4
# Entries of a list behind which there is no look at whether it is full.
ROOM = 4
SCRATCH_BYTES = 62 << 20
# Counts and the like of the batch rule and the threshold rule, a token (encode_flat.Flat).
FLAT_BYTES = 1112
# Of each list that are read at once: the fewest registers. 2 and 8 take up to a third longer.
_SLOTS = 4
_MISS_CHANCE = 1e-8
_OVERFLOW_CHANCE = 1e-7


class Plan(NamedTuple):
    """Sizes of one call."""

    sample: int  # tiles
    rank: int  # which largest of a row's sample is its limit
    parts: int  # programs that share a block of rows
    capacity: int  # entries a list holds
    block_rows: int  # of one launch
    slots: int  # of each list that a row's selection reads at once
    keys: int  # that it holds
    whole: int  # tiles without the last, which is there where 256 does not divide F
    block_n: int = BLOCK_N  # columns of a tile

    @property
    def lists(self) -> int:
        """Lists a row."""
        return 4 * self.parts

    @property
    def slack(self) -> int:
        """Cells of a row's sample that may pass beyond `rank`, so that the search ends sooner."""
        return self.rank // 8

    @property
    def sample_keys(self) -> int:
        """Of a row's sample, at most."""
        return CELL * (self.rank + self.slack)

    @property
    def pitch(self) -> int:
        """int32 words of scratch a row: its sample and the sample's cells, then its lists of
        entries of three words, and the keys that are made of these, beside the sample's."""
        sample = self.sample * (self.block_n + self.block_n // CELL)
        lists = 3 * self.capacity * self.lists
        return cdiv(max(sample, lists, 4 * self.keys) + 2 * self.sample_keys, 16) * 16

    def positions(self, F: int) -> int:
        """Tiles of F latents."""
        return self.whole + (self.whole * self.block_n < F)

    def scratch_bytes(self) -> int:
        """Device memory of a call beyond inputs and outputs."""
        return self.block_rows * (4 * self.pitch + 8 * self.sample_keys + 4 * self.lists + 12)


@lru_cache(maxsize=256)
def spread(whole: int) -> int:
    """A number prime to `whole` whose first multiples lie evenly in it, however many they are: near
    its golden section."""
    found = max(1, round(whole * (math.sqrt(5) - 1) / 2))
    while math.gcd(found, whole) > 1:
        found += 1
    return found


def sort_size(k: int) -> int:
    """Keys that a row's selection sorts: more than k, so that a limit for them is soon found."""
    return max(32, 2 * next_power_of_2(k))


@lru_cache(maxsize=1024)
def rank_of(mean: float) -> int:
    """Smallest r with P(Poisson(mean) >= r) below a row's chance to fall short."""
    r, below = 0, 0.0
    while 1.0 - below > _MISS_CHANCE:
        below += math.exp(r * math.log(mean) - mean - math.lgamma(r + 1))
        r += 1
    return r


def _exceeds(mean: float, most: int) -> float:
    """P(Poisson(mean) > most), but for what is beyond most + 60."""
    log = math.log(mean)
    return sum(math.exp(j * log - mean - math.lgamma(j + 1)) for j in range(most + 1, most + 60))


def _overflow_chance(stride: float, rank: int, lists: int, capacity: int) -> float:
    """Chance that one of a row's lists overflows.

    The number of activations that reach the rank-th largest of every stride-th is stride times a
    Gamma(rank) variable; they spread over the lists evenly.
    """
    chance, steps = 0.0, 40
    width = (rank + 8 * math.sqrt(rank)) / steps
    for i in range(steps):
        g = (i + 0.5) * width
        density = math.exp((rank - 1) * math.log(g) - g - math.lgamma(rank))
        mean = g * stride / lists
        one = 1.0 if mean >= capacity else _exceeds(mean, capacity)
        chance += density * width * min(1.0, lists * one)
    return chance


@lru_cache(maxsize=1024)
def _capacity(stride: float, rank: int, parts: int, rest: int) -> int:
    """Entries that each of a row's lists has to have room for."""
    reach = rank + rank // 8

    def suffices(entries: int) -> bool:
        return _overflow_chance(stride, reach, 4 * parts, entries) <= _OVERFLOW_CHANCE

    entries = bisect_left(range(1 << 12), True, lo=5, key=suffices)
    # Sorted activations that pass are whole runs, a pair of each in each list of their tiles' part;
    # the last tile's are neighbours, which may all pass.
    ordered = cdiv(math.ceil((reach / 8 + 2) * stride), parts) + cdiv(rest, 8) + 2
    return max(entries, ordered) + ROOM


def _parts(blocks: int, tiles: int, programs: int) -> int:
    """Programs a block of rows that take the fewest rounds of tiles."""
    return min(
        range(1, min(tiles, 32) + 1),
        key=lambda p: (cdiv(blocks * p, programs) * cdiv(tiles, p), p),
    )


def _candidate(N: int, F: int, k: int, programs: int, sample: int, chunks: int) -> Plan | None:
    """The plan of so large a sample and so many launches, if it is one."""
    whole, rest = divmod(F, BLOCK_N)
    stride = whole / sample
    rank = rank_of(k / stride)
    reach = rank + rank // 8
    # A sample tells nothing of which most cells pass; lists of a large part of F hold too much.
    if reach * stride * 8 > F or 3 * reach > sample * BLOCK_N // CELL:
        return None
    rows = cdiv(cdiv(N, chunks), BLOCK_M) * BLOCK_M
    blocks, tiles = rows // BLOCK_M, whole - sample + (rest > 0)
    parts = _parts(blocks, tiles, programs)
    capacity = _capacity(stride, rank, parts, rest)
    # Of what passes in most rows eight keys a thread.
    passing = rank * stride * (1 + 1 / math.sqrt(rank))
    keys = next_power_of_2(max(2 * sort_size(k), math.ceil(passing), 256))
    return Plan(sample, rank, parts, capacity, rows, _SLOTS, keys, whole)


def _cost(plan: Plan, N: int, D: int, F: int, programs: int) -> float:
    """Seconds of a call, by rough rates of one H200: another GPU may get a worse plan, never a
    wrong result."""
    blocks, rows = plan.block_rows // BLOCK_M, plan.block_rows
    tile = BLOCK_M * plan.block_n * D * 2 / 5.9e12
    hits = (plan.rank + plan.rank // 8) * plan.whole / plan.sample
    tiles = plan.positions(F) - plan.sample
    # What a round of tiles takes beside its products, and a launch until all are at work.
    tile += 1e-6
    sampling = 4e-6 + cdiv(blocks * plan.sample, programs) * tile + rows * plan.sample * 3e-10
    limits = 4e-6 + rows * plan.sample * 2e-10
    rounds = cdiv(blocks * plan.parts, programs) * cdiv(tiles, plan.parts)
    filtering = 4e-6 + rounds * tile + rows * hits * 1.5e-11
    selecting = 5e-6 + rows * (2e-9 + 1e-11 * hits)
    return cdiv(N, rows) * (sampling + limits + filtering + selecting)


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, F: int, k: int, programs: int = 132) -> Plan | None:
    """The sizes of a call, or None where k is too large a part of F for a sample to pay, or the
    copy engine does not take rows of D."""
    if N == 0 or D % 8 or k > 512 or not 8 <= F // BLOCK_N <= 50_000:
        return None
    best: tuple[float, Plan] | None = None
    for sample in (1, 2, 4, 8, 16, 32, 64):
        if sample * 4 > F // BLOCK_N:
            break
        fitting = 0
        for chunks in range(1, cdiv(N, BLOCK_M) + 1):
            plan = _candidate(N, F, k, programs, sample, chunks)
            if plan is None or fitting == 2:
                break
            if plan.scratch_bytes() <= SCRATCH_BYTES:
                fitting += 1
                cost = _cost(plan, N, D, F, programs)
                if best is None or cost < best[0]:
                    best = (cost, plan)
    return None if best is None else best[1]


@lru_cache(maxsize=256)
def flat_plan(N: int, D: int, F: int, mean: float, room: int, programs: int = 132) -> Plan | None:
    """The sizes of a call that filters all tiles by given limits and keeps up to `room` keys,
    `mean` a token on the mean; None as in `make_plan`. Lists have room for six times as many."""
    if N == 0 or D % 8 or mean * 16 > F or not 8 <= F // BLOCK_N <= 50_000:
        return None
    whole, rest = divmod(F, BLOCK_N)
    # Beside the lists there are keys and, a token, counts (encode_flat.Flat).
    scratch = max(SCRATCH_BYTES // 2, SCRATCH_BYTES - 8 * room - FLAT_BYTES * N)
    for chunks in range(1, cdiv(N, BLOCK_M) + 1):
        rows = cdiv(cdiv(N, chunks), BLOCK_M) * BLOCK_M
        tiles = whole + (rest > 0)
        parts = _parts(rows // BLOCK_M, tiles, programs)
        # A thread has 32 pairs of a tile.
        capacity = min(32 * cdiv(tiles, parts) + ROOM, (scratch // rows - 80) // (48 * parts))
        if 4 * parts * (capacity - ROOM) >= min(6 * mean, F / 2):
            keys = next_power_of_2(max(128, 4 * parts))
            return Plan(0, 0, parts, capacity, rows, 1, keys, whole)
    return None
