"""Sizes of the fused encoder for Hopper (encode_first.py): how large a sample, how many programs,
how long lists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from .encode_plan import (
    MAX_GROUPS,
    MISS_CHANCE,
    OVERFLOW_CHANCE,
    QUADS,
    RUN,
    most_keys,
    sort_size,
)
from .shapes import cdiv

# Static shared memory of a selection, beside which what it uses otherwise is within 48 KiB.
_PICK_BYTES = 38 << 10
# With 63 MiB N=4096 D=2304 F=16384 k=100 would be one chunk of tokens, 3% slower than two.
_FIRST_BYTES = 251 << 18
# Where a record of the Hopper filter has its tile's number, above how many pairs come before.
TILE_SHIFT = 12
# Pairs that it may write past a list that is full, before it looks.
OVERSHOOT = 5
# Entries of a tail's row that a lane reads at once.
TAIL_EACH = 8


class FirstPlan(NamedTuple):
    """Sizes of one call on Hopper GPUs, whose filter takes its programs' first tiles as the sample;
    a function of shapes alone, so that every rank makes the same."""

    first: int  # tiles that a program takes as its sample
    cells: int  # parts of the 64 of a tile's columns that a thread has of a row
    order: int  # which largest of the cells' largest activations is the threshold
    parts: int  # programs that a block of rows has of its own
    capacity: int  # pairs of neighbours a list holds
    block_rows: int
    held: int  # activations that a row's selection holds
    size: int  # of which are sorted
    keys: int  # that it holds at a time where it starts anew
    # Programs beside those, which do the tiles that these leave of `block_rows`, and how many of a
    # block's tiles they do not leave. No others: all.
    others: int = 0
    regular: int = 0
    # Whether the four threads that share a row write their records of a tile together.
    together: bool = False
    warps: int = 1  # that select a row's k largest, together
    # Room for the tokens after the last whole block, which are multiplied beside whole blocks and
    # selected from their pre-activations; 0 where they are a block as any.
    tail: int = 0

    def others_of_block(self, F: int) -> int:
        """Others that may do tiles of one block of rows."""
        return _others_of_block(self.block_rows // 128, cdiv(F, 256) - self.regular, self.others)

    def shares(self, F: int) -> int:
        """Programs that may do tiles of a block of rows."""
        return self.parts + self.others_of_block(F)

    def lists(self, F: int) -> int:
        """Lists a row."""
        return QUADS * self.shares(F)

    def records(self, F: int) -> int:
        """Tiles of which a list may have records."""
        tiles = cdiv(F, 256)
        most = cdiv(tiles, self.parts)
        if self.others:
            left = tiles - self.regular
            each = cdiv(self.block_rows // 128 * left, self.others)
            # Fewer blocks, as the last rows of a call may be, have no others.
            most = max(most, min(left, each))
        return most if self.together else min(most, self.capacity + 1)

    def pitch(self, F: int) -> int:
        """int64 words of scratch a row: lists of pairs and of records, the selection's keys."""
        each = self.capacity + OVERSHOOT + self.records(F) + 1
        return max(self.lists(F) * each, self.keys)

    @property
    def keys_per_row(self) -> int:
        """Cells of a row's sample."""
        return self.first * self.parts * QUADS * self.cells

    def scratch_bytes(self, F: int) -> int:
        """Device memory of a call beyond inputs and outputs; keys, and the lengths of others'
        lists, stay for the next one (`encode_zeros.Zeros`)."""
        each = 8 * self.pitch(F) + 16 * self.lists(F) + 8 * self.keys_per_row + 16
        tail = 4 * self.tail_pitch(F) * (RUN + 1) // RUN
        return (self.block_rows + self.tail) * each + self.tail * tail

    @property
    def registers(self) -> int:
        """A thread's of a selection. Of two warps a row as few as let 14 rows be on a
        multiprocessor, or, where a call has fewer, 12, or 10 where a tail's are selected, too."""
        if self.warps == 1:
            return 128
        if self.block_rows > 1280:
            return 64
        return 96 if self.tail else 80

    def tail_pitch(self, F: int) -> int:
        """Pre-activations a row of the tail."""
        return cdiv(F, 256) * 256

    def rounds(self, F: int) -> int:
        """Tiles that the busiest program does of a block of rows."""
        tiles = self.regular or cdiv(F, 256)
        return cdiv(tiles, self.parts) + self.first - 1


@lru_cache(maxsize=1024)
def _others_of_block(blocks: int, left: int, others: int) -> int:
    """How many of `others`, which share the `left` tiles of each block in turn, have some of one
    block, at most."""
    if not others:
        return 0

    def other_of(unit: int) -> int:
        return ((unit + 1) * others - 1) // (blocks * left)

    return max(other_of((b + 1) * left - 1) - other_of(b * left) + 1 for b in range(blocks))


def _rounds_with_others(blocks: int, tiles: int, parts: int, others: int) -> int:
    """Tiles that the busiest program does where `others` do what the blocks' own programs leave."""
    rounds = cdiv(blocks * tiles, blocks * parts + others)
    while cdiv(blocks * max(tiles - parts * rounds, 0), others) > rounds:
        rounds += 1
    return rounds


Density = tuple[tuple[float, float], ...]  # values, and the chance of each


@lru_cache(maxsize=1024)
def _reached(order: int, cells: int) -> Density:
    """How many of a cell's activations reach the order-th largest of `cells` cells' largest, on
    average over all cells: a cell's largest is reached by as many of another's as an exponential
    variable says."""
    steps, found = 300, []
    mean = sum(1 / (cells - i) for i in range(order))
    width = (mean + 9 * math.sqrt(sum(1 / (cells - i) ** 2 for i in range(order)))) / steps
    ways = math.log(order) + math.lgamma(cells + 1) - math.lgamma(order + 1)
    ways -= math.lgamma(cells - order + 1)
    for i in range(steps):
        g = (i + 0.5) * width
        log = ways + (order - 1) * math.log(-math.expm1(-g)) - (cells - order + 1) * g
        found.append((g, math.exp(log) * width))
    return tuple(found)


def _warps(size: int, rows: int, programs: int) -> int:
    """Warps that select a row's k largest: one works where the other waits. Rows of one warp each
    are 16 a multiprocessor, of two warps 14; a few more would be a second turn. By an H100's
    times."""
    each = rows / programs
    if size < 64 or 14 < each <= 16 or (size == 64 and each > 14):
        return 1
    return 2


def _mean(density: Density) -> float:
    return sum(g * chance for g, chance in density)


@lru_cache(maxsize=1024)
def _order(k: int, num_cells: float, sample: int) -> int | None:
    """Which largest of a sample's cells' largest leaves less than k in fewer than MISS_CHANCE
    rows, where the k largest are spread over `num_cells` cells."""
    one = -math.expm1(-k / num_cells)
    missed = 0.0
    for order in range(sample, 0, -1):
        log = math.lgamma(sample + 1) - math.lgamma(order + 1) - math.lgamma(sample - order + 1)
        missed += math.exp(log + order * math.log(one) + (sample - order) * math.log1p(-one))
        if missed > MISS_CHANCE:
            return order + 1 if order < sample else None
    return 1


def _longest(density: Density, num_cells: int, lists: int, chance: float) -> int:
    """Length that the longest of a row's lists exceeds with less than a chance."""
    means = [(g * num_cells / lists, weight) for g, weight in density]

    def exceeds(length: int) -> bool:
        total = 0.0
        for mean, weight in means:
            # Chernoff's bound of P(Poisson(mean) > length).
            one = 1.0
            if mean < length:
                one = math.exp(length - mean - length * math.log(length / mean))
            total += weight * min(1.0, lists * one)
        return total >= chance

    high = 16
    while exceeds(high):
        high *= 2
    low = 8
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if exceeds(middle) else (low, middle)
    return high


def make_first_plan(N: int, D: int, F: int, k: int, programs: int = 132) -> FirstPlan | None:
    """As `make_plan`, for the filter that makes its own thresholds."""
    plan = _first_plan(cdiv(N, 128), D, F, k, programs)
    whole, rest = divmod(N, 128)
    # Two blocks multiply a tail, a half of the latents each.
    if plan is None or whole < 2 or not 0 < rest <= 32:
        return plan
    fewer = _first_plan(whole, D, F, k, programs)
    if (
        fewer is None or fewer.block_rows != whole * 128
        or fewer.rounds(F) >= cdiv(N, plan.block_rows) * plan.rounds(F)
        or not 2 * k <= cdiv(F, RUN) <= MAX_GROUPS
    ):  # fmt: skip
        return plan
    fewer = fewer._replace(tail=16 if rest <= 16 else 32)
    # A row's groups are listed in shared memory, too, and read in turns.
    fits = 8 * (fewer.held + fewer.size) <= _PICK_BYTES and fewer.scratch_bytes(F) <= _FIRST_BYTES
    fits &= fewer.size + 32 * TAIL_EACH * fewer.warps <= fewer.held
    return fewer if fits else plan


@lru_cache(maxsize=256)
def _first_plan(num_blocks: int, D: int, F: int, k: int, programs: int) -> FirstPlan | None:
    """`make_first_plan` of so many blocks of 128 tokens, the last of which may be less."""
    tiles, whole = cdiv(F, 256), (F - 1) // 256
    rest = F - 256 * whole
    if num_blocks == 0 or D % 8 or F < 2048 or whole > 40_000 or k > 512:
        return None
    best: tuple[float, FirstPlan] | None = None
    fits = before = 0
    for chunks in range(1, num_blocks + 1):
        blocks = cdiv(num_blocks, chunks)
        rows = blocks * 128
        if blocks > programs or blocks == before:
            continue
        before = blocks
        parts = min(
            range(1, min(whole, 32, programs // blocks) + 1), key=lambda p: (cdiv(tiles, p), p)
        )
        rounds, others, regular = cdiv(tiles, parts), 0, 0
        own = programs // blocks
        if own <= 30 and programs % blocks and own <= whole:
            fewer = _rounds_with_others(blocks, tiles, own, programs % blocks)
            # Fewer by two in a hundred, for their tiles are read once more.
            if fewer <= 0.98 * rounds:
                rounds, parts, regular = fewer, own, own * fewer
                others = min(programs % blocks, blocks * (tiles - regular))
        shares = parts + _others_of_block(blocks, tiles - regular, others)
        # The lists' least length, before any is reckoned.
        if rows * QUADS * shares * 8 * (rest // (2 * QUADS) + 8) > _FIRST_BYTES:
            continue
        fit = False
        for first, cells in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)):
            # What a thread reads for each row of its own.
            if not 4 <= first * parts * cells <= 72 or parts * first > (regular or whole):
                continue
            sample = first * parts * QUADS * cells
            order = _order(k, whole * QUADS * cells, sample)
            if order is None:
                continue
            # Sorted activations are 8 neighbours each of tiles that follow one another, which are a
            # run's cells: of the k largest not so many are of the sample that one of them is the
            # threshold.
            runs = min(k / (8 * whole), cells)
            order = max(order, math.ceil(sample / cells * runs) + 2 * QUADS + 1)
            # Nor does the filter stop at the least of the keys (it takes up to a 16th more).
            if order + order // 16 > 0.97 * sample:
                continue
            # The filter takes up to a 16th more (encode_first_ptx.agree_ptx).
            lists, density = QUADS * parts, _reached(min(sample, order + order // 32), sample)
            num_cells = whole * QUADS * cells
            hits = _mean(density) * num_cells
            # Sorted activations, or equal ones, that reach the threshold.
            ordered = 8 * whole * (order * cells / sample + 1 / (first * parts))
            if max(hits, ordered) * 6 > F:
                continue
            capacity = max(
                _longest(density, num_cells, lists, OVERFLOW_CHANCE),
                # The last tile's are neighbours: of sorted ones all may be in its lists.
                math.ceil(1.1 * ordered / 2 / lists) + 4 + cdiv(rest, 2 * QUADS),
            )
            size = sort_size(k)
            most = _longest(density, num_cells, 1, MISS_CHANCE)
            most = max(most, math.ceil(1.1 * ordered) + rest)
            held = cdiv(max(most, size), 64) * 64
            if held * 8 > _PICK_BYTES or capacity >> TILE_SHIFT:
                continue
            keys = most_keys(k)
            # A store costs by the sectors that it touches: where most threads have some of a tile,
            # empty records beside the others' cost less.
            warps = _warps(size, rows, programs)
            together = hits > 2.2 * QUADS * tiles and rounds <= capacity
            plan = FirstPlan(
                first, cells, order, parts, capacity, rows, held, size, keys, others, regular,
                together, warps,
            )  # fmt: skip
            if plan.scratch_bytes(F) > _FIRST_BYTES:
                continue
            fit = True
            tile = 128 * 256 * D * 2 / 5.5e12
            filtering = (rounds + first - 1) * (tile + 3e-7) + rows * hits * 1.5e-11
            agreeing = 3.5e-6 + 8e-6 / parts + 6e-7 * first * cells
            selecting = rows * (1.8e-9 + 2.8e-11 * k + 5e-12 * hits)
            cost = cdiv(num_blocks, blocks) * (10e-6 + agreeing + filtering + selecting)
            if best is None or cost < best[0]:
                best = (cost, plan)
        fits += fit
        if fits > 2:
            break
    return None if best is None else best[1]
