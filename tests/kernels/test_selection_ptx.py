"""The PTX of the selection kernels against plain sorting, on a machine in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from .ptx_machine import BASE, Array, Memory, Program, parse, run

pytest.importorskip("triton")
# ruff: noqa: E402
from flash_sae_dist.kernels import encode_groups_ptx as groups_ptx
from flash_sae_dist.kernels import encode_lists_ptx as lists_ptx
from flash_sae_dist.kernels.encode_first_plan import OVERSHOOT, TILE_SHIFT
from flash_sae_dist.kernels.encode_plan import groups_room, sort_size

KINDS = ("normal", "equal", "few", "zeros", "negative", "ascending", "descending", "coarse", "inf")


def activations(kind: str, n: int, rng: np.random.Generator) -> Array:
    x = rng.standard_normal(n).astype(np.float32)
    made: dict[str, Callable[[], Array]] = {
        "normal": lambda: x,
        "equal": lambda: np.full(n, 1.5),
        "few": lambda: np.where(rng.random(n) < 0.01, x, -1),
        "zeros": lambda: np.where(rng.random(n) < 0.02, abs(x), 0),
        "negative": lambda: -abs(x),
        "ascending": lambda: np.sort(x),
        "descending": lambda: np.sort(x)[::-1],
        "coarse": lambda: np.round(4 * x) / 4,
        "inf": lambda: np.where(rng.random(n) < 0.05, np.inf, x),
    }
    return np.ascontiguousarray(made[kind](), np.float32) + np.float32(0)


@cache
def program(ptx: Callable[..., str], *sizes: int) -> Program:
    return parse(getattr(ptx, "fn", ptx)(*sizes))


def best_of(values: Array, k: int) -> Array:
    """Places of the k largest, of equal ones the first, in descending order."""
    return np.lexsort((np.arange(len(values)), -values.astype(np.int64)))[:k]


class Space:
    """Global memory with pieces of rows, 64 bytes of noise between them."""

    def __init__(self, rng: np.random.Generator, **sizes: int) -> None:
        self.at: dict[str, int] = {}
        end = BASE
        for name, size in sizes.items():
            self.at[name] = end
            end += -(-size // 64) * 64 + 64
        self.memory = Memory([(self.at[name], size) for name, size in sizes.items()], rng)

    def words(self, name: str, first: int, count: int, kind: Any = np.int32) -> Array:
        start = self.at[name] - BASE + 4 * first
        return self.memory.bytes[start : start + 4 * count].view(kind)


@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind: str, warps: int, group: int) -> None:
    rng = np.random.default_rng(7)
    for k, F in ((64, 2100 + 32 * 64), (100, 8192)):
        columns, size = -(-F // 256) * 256, sort_size(k)
        groups, pitch = -(-F // group), columns // group
        x = activations(kind, columns, rng)
        x[F:] = 0
        bits = np.maximum(x.view(np.int32), 0)
        space = Space(rng, pre=8 * columns, maxima=8 * pitch, values=8 * k, indices=8 * k)
        space.words("pre", columns, columns, np.float32)[:] = x
        space.words("maxima", pitch, pitch)[:] = bits.reshape(-1, group).max(1)
        room = groups_room(k, warps)
        status = run(
            program(groups_ptx.groups_ptx, groups, pitch, room, size, warps, group), warps,
            {"$1": 1, "$2": F, "$3": k, "$4": 4 * columns, "$5": space.at["pre"],
             "$6": space.at["maxima"], "$7": space.at["values"], "$8": space.at["indices"]},
            space.memory, rng,
        )  # fmt: skip
        assert status == 0
        want = best_of(bits[:F], k)
        assert (space.words("indices", k, k) == want).all()
        assert (space.words("values", k, k) == bits[want]).all()


def test_a_largest_of_no_latent_is_said() -> None:
    """127 positive activations, each in another group, and a NaN behind the last latent."""
    rng = np.random.default_rng(0)
    k, F = 128, 32 * 200 + 4
    pitch = -(-F // 256) * 8
    space = Space(rng, pre=4 * 32 * pitch, maxima=4 * pitch, values=4 * k, indices=4 * k)
    x = np.zeros(32 * pitch, np.float32)
    x[: 32 * 127 : 32] = 1 + rng.random(127)
    space.words("pre", 0, 32 * pitch, np.float32)[:] = x
    space.words("maxima", 0, pitch)[:] = x.view(np.int32).reshape(-1, 32).max(1)
    space.words("maxima", 0, pitch)[F // 32] = 0x7FC00000
    sizes = F // 32 + 1, pitch, groups_room(k, 2), sort_size(k), 2
    status = run(
        program(groups_ptx.groups_ptx, *sizes), 2,
        {"$1": 0, "$2": F, "$3": k, "$4": 128 * pitch, "$5": space.at["pre"],
         "$6": space.at["maxima"], "$7": space.at["values"], "$8": space.at["indices"]},
        space.memory, rng,
    )  # fmt: skip
    assert status == -1


class Lists:
    """A row's lists as the Hopper filter writes them, and what is in them."""

    def __init__(
        self, x: Array, programs: int, capacity: int, limit: int, last: int, together: bool,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        F = len(x)
        self.whole, self.lists = (F - 1) // 256, 4 * programs
        tiles = self.whole + 1
        self.records = -(-tiles // programs)
        self.pitch = self.lists * (capacity + OVERSHOOT + self.records + 1)
        self.words = rng.integers(0, 1 << 31, (self.pitch, 2)).astype(np.int32)
        self.count = np.zeros((self.lists, 4), np.int32)
        self.count[:, 2:] = limit, last
        self.held: set[int] = set()  # latents
        self.lacks = False
        bits = np.full(-(-F // 256) * 256 + 256, 0, np.int32)
        bits[:F] = x.view(np.int32)
        for n, tile in enumerate(rng.permutation(tiles)):
            for quad in range(4):
                self._tile(bits, F, int(tile), 4 * (n % programs) + quad, capacity, together)
        self.longest = int(self.count[:, 0].max())

    def _tile(self, bits: Array, F: int, tile: int, of: int, capacity: int, together: bool) -> None:
        limit, last = (int(v) for v in self.count[of, 2:])
        mask, before = 0, int(self.count[of, 0])
        for run_ in range(32):
            rest = tile == self.whole
            f = 256 * self.whole + 8 * run_ if rest else 8 * tile + 8 * self.whole * run_
            f += 2 * (of % 4)
            two = bits[f : f + 2]
            least = limit if f > last else limit - 1 if limit else -(1 << 31)
            if two.max() <= least:
                continue
            if self.count[of, 0] < capacity + OVERSHOOT:
                self.words[self.count[of, 0] * self.lists + of] = two
            mask |= 1 << run_
            self.count[of, 0] += 1
            self.lacks |= f >= F
            larger = f + int(two[1] > two[0] and f + 1 < F)
            self.held |= {larger} if f < F else set()
            other = 2 * f + 1 - larger
            small = max(int(two.min()), 0)
            if other < F and (small > limit or (small == limit and f <= last)):
                self.held |= {other}
        if mask or together:
            if self.count[of, 1] < self.records and before <= capacity:
                at = self.lists * (capacity + OVERSHOOT + self.count[of, 1]) + of
                self.words[at] = np.array([mask, tile << TILE_SHIFT | before], np.uint32).view(
                    np.int32
                )
            self.count[of, 1] += 1


def select(lists: Lists, F: int, k: int, held: int, capacity: int, warps: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    size = max(sort_size(k), 32 * warps)
    space = Space(rng, lists=16 * lists.pitch, count=32 * lists.lists, values=8 * k, indices=8 * k)
    space.words("lists", 2 * lists.pitch, 2 * lists.pitch)[:] = lists.words.ravel()
    space.words("count", 4 * lists.lists, 4 * lists.lists)[:] = lists.count.ravel()
    text = program(lists_ptx.lists_ptx, lists.lists, capacity, lists.records, held, size, warps)
    status = run(
        text, warps,
        {"$1": 1, "$2": F, "$3": k, "$4": 8 * lists.pitch, "$5": lists.whole,
         "$6": space.at["lists"], "$7": space.at["count"], "$8": space.at["values"],
         "$9": space.at["indices"]},
        space.memory, rng,
    )  # fmt: skip
    return status, space.words("values", k, k), space.words("indices", k, k)


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_lists(kind: str, warps: int) -> None:
    rng = np.random.default_rng(3)
    done = 0
    for k, F, programs, more, capacity in (
        (64, 2300, 2, 60, 200), (64, 3001, 11, 0, 60), (100, 4097, 8, 150, 100),
        (256, 5000, 4, 80, 200),
    ):  # fmt: skip
        x = activations(kind, F, rng)
        bits = np.maximum(x.view(np.int32), 0)
        least = best_of(bits, k + more)[-1]
        limit = int(bits[least])
        lists = Lists(x, programs, capacity, limit, int(least), k == 100, rng)
        held = -(-(2 * k + 200) // 64) * 64
        status, values, indices = select(lists, F, k, held, capacity, warps, seed=k)
        pairs = int(lists.count[:, 0].sum())
        lacks = lists.lacks or lists.longest > capacity or max(pairs, len(lists.held)) > held
        assert status == (-1 if lacks or len(lists.held) < k else 0)
        if status == 0:
            want = best_of(bits, k)
            assert (indices == want).all()
            assert (values == bits[want]).all()
            done += 1
    assert done > 0


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tail(kind: str, warps: int) -> None:
    """Rows behind those that have lists, in the same program."""
    rng = np.random.default_rng(11)
    for k, F in ((64, 2100 + 32 * 64), (100, 8192), (200, 5000)):
        columns, size = -(-F // 256) * 256, sort_size(k)
        groups, pitch, held = -(-F // 8), columns // 8, -(-(size + 256 * warps + 50) // 64) * 64
        x = activations(kind, columns, rng)
        bits = np.maximum(x.view(np.int32), 0)
        bits[F:] = 0
        space = Space(rng, pre=8 * columns, maxima=8 * pitch, values=28 * k, indices=28 * k)
        space.words("pre", columns, columns, np.float32)[:] = x
        space.words("maxima", pitch, pitch)[:] = bits.reshape(-1, 8).max(1)
        status = run(
            program(lists_ptx.lists_ptx, 16, 60, 9, held, size, warps, groups, pitch), warps,
            {"$1": 6, "$2": F, "$3": k, "$4": 0, "$5": 20, "$6": 0, "$7": 0,
             "$8": space.at["values"], "$9": space.at["indices"], "$10": 5,
             "$11": space.at["pre"], "$12": space.at["maxima"]},
            space.memory, rng,
        )  # fmt: skip
        assert status == 0
        want = best_of(bits[:F], k)
        assert (space.words("indices", 6 * k, k) == want).all()
        assert (space.words("values", 6 * k, k) == bits[want]).all()


def test_lists_of_different_limits_are_said() -> None:
    """As if programs had not agreed: the k largest might not be complete."""
    rng = np.random.default_rng(1)
    F, k, capacity = 3000, 64, 200
    x = activations("normal", F, rng)
    bits = np.maximum(x.view(np.int32), 0)
    lists = Lists(x, 4, capacity, int(np.sort(bits)[-150]), 1 << 30, False, rng)
    assert select(lists, F, k, 384, capacity, 2, 0)[0] == 0
    # A list that nobody wrote has none.
    lists.count[7] = 0
    assert select(lists, F, k, 384, capacity, 2, 0)[0] == 0
    lists.count[9, 2] += 1
    assert select(lists, F, k, 384, capacity, 2, 0)[0] == -1
