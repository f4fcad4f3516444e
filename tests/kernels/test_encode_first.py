"""The Hopper encoder whose programs make thresholds of their first tiles: its sizes by simulation,
its kernels on the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import encode_first_plan, encode_plan, encode_topk, encode_zeros
from flash_sae_dist.kernels.encode_first_plan import FirstPlan, make_first_plan

from .test_encode_topk import KINDS, NoKernel, assert_exact, make

SHAPES = [
    (1024, 4096, 65536, 64),
    (4096, 768, 24576, 32),
    (8192, 4096, 131072, 64),
    (777, 2304, 16384, 20),
    (16384, 2304, 16384, 20),
    (2048, 5120, 1_048_576, 64),
    (16384, 5120, 1_048_576, 20),
    (4096, 3584, 100_000, 100),
    (1500, 2304, 16384, 100),
    (2048, 2304, 16384, 256),
    (300, 776, 20_000, 32),
    (1792, 2304, 16384, 256),
    (2500, 2304, 16384, 20),
    (1300, 2304, 16384, 256),
]


def spread_of(whole: int) -> int:
    spread = max(1, round(whole * (math.sqrt(5) - 1) / 2))
    while math.gcd(spread, whole) > 1:
        spread += 1
    return spread


def latents_of(tile: int, whole: int) -> Tensor:  # [32, 8]: runs of neighbours
    return torch.arange(32)[:, None] * (whole * 8) + tile * 8 + torch.arange(8)


def lists_of(F: int, plan: FirstPlan) -> Tensor:  # [F / 2]
    """Of each pair of neighbours the list that it goes to."""
    whole = (F - 1) // 256
    turn_of = torch.empty(whole, dtype=torch.long)
    turn_of[torch.arange(whole) * spread_of(whole) % whole] = torch.arange(whole)
    latent = torch.arange(0, F, 2)
    turn = torch.where(latent < whole * 256, turn_of[latent % (whole * 8) // 8], whole)
    # What a block's own programs leave goes to one of the others' lists here, the worst of cases.
    share = torch.where(turn < (plan.regular or whole + 1), turn % plan.parts, plan.parts)
    return share * 4 + latent % 8 // 2


def thresholds(pre: Tensor, plan: FirstPlan) -> Tensor:  # [N]
    """What the filter's programs agree on, where no values are equal."""
    whole = (pre.shape[1] - 1) // 256
    spread = spread_of(whole)
    largest = []
    for turn in range(plan.first * plan.parts):
        tile = pre[:, latents_of(turn * spread % whole, whole)]  # [N, 32, 8]
        cells = tile.view(len(pre), 32 // plan.cells, plan.cells, 4, 2)
        largest.append(cells.amax((1, 4)).flatten(1))
    found = torch.cat(largest, dim=1)
    assert found.shape[1] == plan.keys_per_row
    # The few more that the filter may take.
    order = min(plan.keys_per_row, plan.order + plan.order // 16)
    return found.sort(dim=1, descending=True).values[:, order - 1]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (16384, 5120, 1_048_576, 20)])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ascending", "descending", "neighbours"])
def test_thresholds_leave_k_and_few_more(shape: tuple[int, int, int, int], kind: str) -> None:
    """No row lacks one of its k largest, though but one in 1e8 may; nor has one many more than the
    plan has room for."""
    F, k = shape[2:]
    plan = make_first_plan(*shape)
    assert plan is not None
    g = torch.Generator().manual_seed(0)
    rows = 200 if F <= 65536 else 20
    pre = torch.randn(rows, F, generator=g)
    if kind == "heavy":
        pre = pre.abs() ** -2
    elif kind == "ascending":
        pre = pre.sort(dim=1).values
    elif kind == "descending":
        pre = pre.sort(dim=1, descending=True).values
    elif kind == "neighbours":
        start = int(torch.randint(F - k, (), generator=g))
        pre[:, start : start + k] += 100
    passes = pre >= thresholds(pre, plan)[:, None]
    hits = passes.sum(1)
    assert int(hits.min()) >= k
    assert int(hits.max()) <= plan.held
    pairs = torch.nn.functional.pad(passes, (0, F % 2)).view(rows, -1, 2).any(2)
    lengths = torch.zeros(rows, plan.lists(F), dtype=torch.int32)
    lengths.index_add_(1, lists_of(F, plan), pairs.int())
    assert int(lengths.max()) <= plan.capacity
    if kind in ("normal", "heavy"):
        cells = 4 * plan.cells * ((F - 1) // 256)
        expected = cells * sum(
            g * chance
            for g, chance in encode_first_plan._reached(
                min(plan.keys_per_row, plan.order + plan.order // 16), plan.keys_per_row
            )
        )
        assert hits.float().mean() == pytest.approx(expected, rel=0.15)


def test_units_are_done_once() -> None:
    """Each tile of each block by one program, and each list by one: as encode_first_kernel._work_of
    and _unit_of say, in numbers here."""
    seen = 0
    for N, F, k in (
        (1792, 16384, 256), (2500, 16384, 20), (4096, 100_000, 100), (1100, 65536, 32),
        (7078, 8192, 300), (16384, 24576, 32),
    ):  # fmt: skip
        plan = make_first_plan(N, 2304, F, k)
        assert plan is not None
        blocks, tiles = plan.block_rows // 128, -(-F // 256)
        left = tiles - plan.regular
        done: dict[tuple[int, int], int] = {}
        lists: dict[tuple[int, int], set[int]] = {}
        rounds = []
        for program in range(blocks * plan.parts):
            turns = range(program // blocks, plan.regular or tiles, plan.parts)
            rounds += [len(turns)]
            for turn in turns:
                done[program % blocks, turn] = done.get((program % blocks, turn), 0) + 1
        for other in range(plan.others):
            units = range(
                other * blocks * left // plan.others, (other + 1) * blocks * left // plan.others
            )
            rounds += [len(units)]
            seen += len(units)
            for unit in units:
                block = unit // left
                before = ((block * left + 1) * plan.others - 1) // (blocks * left)
                share = plan.parts + other - before
                assert plan.parts <= share < plan.shares(F)
                lists.setdefault((block, share), set()).add(other)
                at = block, plan.regular + unit % left
                done[at] = done.get(at, 0) + 1
        assert done == {(block, turn): 1 for block in range(blocks) for turn in range(tiles)}
        assert all(len(owners) == 1 for owners in lists.values())
        assert max(rounds) <= plan.records(F) or not plan.together
        # The last rows of a call may be fewer blocks, which have no others.
        assert min(-(-tiles // plan.parts), plan.capacity + 1) <= plan.records(F)
        assert max(rounds) <= -(-tiles // plan.parts)
    assert seen > 0, "some plan has others"


def test_a_tile_has_each_latent_once() -> None:
    for F in (2048, 2049, 4104, 16384, 30_001):
        whole = (F - 1) // 256
        spread = spread_of(whole)
        tiles = [latents_of(turn * spread % whole, whole).flatten() for turn in range(whole)]
        last = torch.arange(whole * 256, F)
        assert 1 <= len(last) <= 256
        assert torch.equal(torch.cat([*tiles, last]).sort().values, torch.arange(F))


def test_the_threshold_is_safe() -> None:
    """The chance to lack some of the k, by the sum itself where `_order` stops."""
    for k, num_cells, sample in ((20, 252, 64), (64, 1020, 64), (256, 504, 64), (100, 252, 44)):
        order = encode_first_plan._order(k, num_cells, sample)
        assert order is not None
        one = 1 - math.exp(-k / num_cells)
        chance = [
            sum(
                math.comb(sample, j) * one**j * (1 - one) ** (sample - j)
                for j in range(first, sample + 1)
            )
            for first in (order - 1, order)
        ]
        assert chance[1] <= encode_first_plan.MISS_CHANCE < chance[0]
    assert encode_first_plan._order(1000, 252, 16) is None


def test_no_plan_where_sampling_does_not_pay() -> None:
    assert make_first_plan(1024, 768, 1024, 32) is None, "too few latents"
    assert make_first_plan(1024, 770, 65536, 32) is None, "rows not from 16-byte boundaries on"
    assert make_first_plan(1024, 768, 2304, 512) is None, "k is a fifth of F"
    assert make_first_plan(0, 768, 65536, 32) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_plans_keep_to_the_memory_bar(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a call allocates, its kernels left out; all programs fit the GPU at once."""
    encode_first = pytest.importorskip("flash_sae_dist.kernels.encode_first")
    for name in ("filter_kernel", "pick_kernel"):
        monkeypatch.setattr(encode_first, name, NoKernel())
    for name in ("descriptor", "rows_descriptor"):
        monkeypatch.setattr(encode_first, name, lambda *a: None)
    sizes: list[int] = []
    empty = torch.empty

    def counted(*size: int, **kwargs: object) -> Tensor:
        out = empty(*size, **kwargs)
        sizes.append(out.nbytes)
        return out

    class Zeros:
        def take(self, words: int, device: torch.device) -> tuple[Tensor, bool]:
            return torch.empty(words, dtype=torch.int32, device=device), True

        def give(self, zeros: Tensor, may_stay: bool) -> None:
            pass

    plan = make_first_plan(*shape)
    assert plan is not None
    N, D, F, k = shape
    tensors = [empty(*size, dtype=torch.bfloat16, device="meta") for size in ((N, D), (F, D), (F,))]
    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(encode_first, "_zeros", Zeros())
    encode_first.topk_encode(*tensors, k, plan)
    assert sum(sizes) - 8 * N * k <= 64 << 20
    assert plan.block_rows // 128 * plan.parts + plan.others <= 132
    encode_first_plan._first_plan.cache_clear()
    assert make_first_plan(*shape) == plan, "every rank makes the same plan"


def test_scratch_lies_within_one_upper_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter adds to the lower half of an address alone."""
    encode_first = pytest.importorskip("flash_sae_dist.kernels.encode_first")
    made: list[Tensor] = []

    class Placed(Tensor):
        def data_ptr(self) -> int:
            made.append(self)
            return (1 << 32) - 64 if len(made) == 1 else 1 << 32

    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).as_subclass(Placed)
    )
    got = encode_first._scratch(4, 16, torch.device("cpu"))
    assert len(made) == 2
    assert got is made[1]


def test_zeros_are_each_streams_own(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"stream": 1, "capturing": False}
    stream = lambda device: SimpleNamespace(device_index=0, cuda_stream=state["stream"])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    pool = (0, 0)
    monkeypatch.setattr(
        torch.cuda,
        "memory_snapshot",
        lambda: [{"address": 0, "total_size": 1 << 62, "segment_pool_id": pool}],
    )
    zeros, cpu = encode_zeros.Zeros(), torch.device("cpu")
    first, stays = zeros.take(8, cpu)
    assert not first.any()
    assert stays
    assert zeros.take(8, cpu)[0] is not first, "a call that has not ended has them"
    zeros.give(first, stays)
    state["stream"] = 2
    assert zeros.take(8, cpu)[0] is not first
    state["stream"], state["capturing"] = 1, True
    of_graph, stays = zeros.take(8, cpu)
    assert of_graph is not first
    assert not stays
    zeros.give(of_graph, stays)
    state["capturing"] = False
    with ThreadPoolExecutor(1) as other:
        assert other.submit(zeros.take, 8, cpu).result()[0] is not first
    assert zeros.take(4, cpu)[0] is first
    zeros.give(first, True)
    larger, stays = zeros.take(9, cpu)
    assert larger.numel() == 9
    pool = (0, 3)
    of_pool, stays = zeros.take(8, cpu)
    assert not stays, "torch.compile's graphs take back what is of their pool"
    zeros.give(of_pool, stays)
    assert not zeros._held


def test_two_warps_select_where_few_rows_are_a_multiprocessors() -> None:
    def warps(N: int, k: int) -> int:
        plan = make_first_plan(N, 2304, 16384, k)
        assert plan is not None
        return plan.warps

    assert [warps(N, 256) for N in (900, 1500, 2048, 16384)] == [2, 2, 1, 2]
    assert warps(900, 20) == 1, "32 keys are one warp's to sort"


def test_a_tail_is_no_block_where_that_is_a_round_of_tiles_less() -> None:
    def tail(N: int, F: int = 16384, k: int = 256) -> int:
        plan = make_first_plan(N, 2304, F, k)
        assert plan is not None
        assert not plan.tail or N - plan.tail <= plan.block_rows < N
        return plan.tail

    assert [tail(N) for N in (777, 768, 1300, 900)] == [16, 0, 32, 0]
    assert tail(777, k=20) == 16
    assert tail(810) == 0, "too many tokens"
    assert tail(777, F=50_000) == 0, "more groups than threads hold"


def hopper_only() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper GPUs")


def plan_of(N: int, D: int, F: int, k: int, **changes: int) -> FirstPlan:
    plan = make_first_plan(N, D, F, k)
    assert plan is not None
    return plan._replace(**changes)


def encoder(plan: FirstPlan, k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    from flash_sae_dist.kernels import encode_first

    return lambda x, W, b: encode_first.topk_encode(x, W, b, k, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"first": 2, "parts": 8},
        {"first": 4, "parts": 4, "cells": 2, "order": 28},
        {"cells": 4, "parts": 20},
        {"parts": 1, "cells": 4, "order": 14},
        {"block_rows": 128},
        {"held": 128, "order": 100, "capacity": 60},
        {"size": 32, "warps": 1},
        {"size": 256},
        {"warps": 1},
        {"size": 128, "warps": 4},
        {"together": True},
        {"parts": 20, "others": 7, "regular": 60},
        {"parts": 20, "others": 1, "regular": 76},
        {"first": 2, "parts": 10, "others": 50, "regular": 60, "together": True},
        {"block_rows": 128, "parts": 16, "others": 4, "regular": 64},
        {"block_rows": 256, "parts": 16, "others": 3, "regular": 70},
    ],
)
def test_every_variant_is_exact_on_the_gpu(kind: str, changes: dict[str, int]) -> None:
    hopper_only()
    x, W, b = make(kind, 300, 776, 20_000, torch.bfloat16, "cuda")
    values, indices = encoder(plan_of(300, 776, 20_000, 32, **changes), 32)(x, W, b)
    assert_exact(x, W, b, 32, values, indices)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("blocks", "rest", "k", "changes"),
    [
        (2, 9, 32, {"tail": 16, "warps": 1}),
        (2, 9, 32, {"tail": 16, "warps": 2, "size": 64}),
        (3, 1, 100, {"tail": 16, "size": 128}),
        (5, 32, 100, {"tail": 32, "size": 256}),
        (2, 20, 32, {"tail": 32, "first": 2, "parts": 8}),
        (5, 20, 32, {"tail": 32, "first": 2, "parts": 8}),
        (3, 17, 32, {"tail": 32, "parts": 20, "others": 7, "regular": 60}),
    ],
)
def test_a_tail_is_exact_on_the_gpu(
    kind: str, blocks: int, rest: int, k: int, changes: dict[str, int]
) -> None:
    """Tokens after the last whole block, beside which they are multiplied."""
    hopper_only()
    F = 16_003
    x, W, b = make(kind, 128 * blocks + rest, 776, F, torch.bfloat16, "cuda")
    plan = plan_of(128 * blocks, 776, F, k, **changes)
    values, indices = encoder(plan._replace(held=max(plan.held, 832)), k)(x, W, b)
    assert_exact(x, W, b, k, values, indices)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "D", "F", "k"),
    [(1, 64, 2048, 1), (130, 72, 4104, 16), (129, 776, 16384, 512), (700, 64, 16384, 256),
     (1000, 96, 66_000, 100), (2000, 64, 33_000, 8), (257, 64, 1_000_003, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_shapes_are_exact_on_the_gpu(
    N: int, D: int, F: int, k: int, dtype: torch.dtype
) -> None:
    hopper_only()
    x, W, b = make("normal", N, D, F, dtype, "cuda")
    values, indices = encoder(plan_of(N, D, F, k), k)(x, W, b)
    # float64 of the whole matrix takes memory.
    some = torch.randperm(N, device="cuda")[:64]
    assert_exact(x[some], W, b, k, values[some], indices[some])


@pytest.mark.gpu
@pytest.mark.parametrize("period", [312, 504, 512, 624, 768, 2528])
def test_latents_that_repeat_are_exact_on_the_gpu(period: int) -> None:
    """Equal latents, apart by what may be a tile's runs' distance (624 here)."""
    hopper_only()
    x, W, b = make("normal", 300, 776, 20_224, torch.bfloat16, "cuda")
    W, b = (t[torch.arange(20_224, device="cuda") % period].contiguous() for t in (W, b))
    values, indices = encoder(plan_of(300, 776, 20_224, 32), 32)(x, W, b)
    assert_exact(x, W, b, 32, values, indices)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"order": 1}, "normal"), ({"order": 108, "capacity": 4}, "normal"), ({}, "nan"),
     ({"block_rows": 256, "parts": 16, "others": 3, "regular": 70, "order": 5}, "normal"),
     ({}, "inf"), ({"held": 128, "order": 105, "capacity": 60}, "normal"), ({}, "all nan"),
     ({}, "minus inf")],
)  # fmt: skip
def test_bad_thresholds_are_mended_and_nan_borne_on_the_gpu(
    changes: dict[str, int], kind: str
) -> None:
    hopper_only()
    x, W, b = make("normal", 300, 776, 20_000, torch.bfloat16, "cuda")
    if kind == "nan":
        x[3, 5] = torch.nan
    elif kind == "all nan":
        x[3] = torch.nan
    elif kind == "inf":
        b[7] = torch.inf
    elif kind == "minus inf":
        b[:] = -torch.inf
    plain = plain_plan(300, 776, 20_000, 32)
    want, want_indices = encode_topk.fused_topk(x, W, b, 32, plain)
    got, indices = encoder(plan_of(300, 776, 20_000, 32, **changes), 32)(x, W, b)
    # A row that was done anew adds in another order.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
    # In a row of NaN any latents will do.
    rows = torch.arange(300, device="cuda") != (3 if "nan" in kind else -1)
    assert (indices == want_indices)[rows].float().mean() > 0.98


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 200, 776])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tail_bears_what_is_not_finite_on_the_gpu(bad: float, D: int) -> None:
    """In tiles of one stage, of the ring's, and of more."""
    hopper_only()
    N, F = 3 * 128 + 9, 16_000
    x, W, b = make("normal", N, D, F, torch.bfloat16, "cuda")
    x[N - 2, 5] = bad
    want, want_indices = encode_topk.fused_topk(x, W, b, 32, plain_plan(N, D, F, 32))
    plan = plan_of(384, D, F, 32, tail=16)
    got, indices = encoder(plan._replace(held=max(plan.held, 832)), 32)(x, W, b)
    good = torch.arange(N, device="cuda") != N - 2
    torch.testing.assert_close(got[good], want[good], rtol=1e-3, atol=1e-3)
    assert (indices == want_indices)[good].float().mean() > 0.98
    torch.testing.assert_close(got[~good], want[~good], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_of_equal_activations_the_lowest_latents_are_taken_on_the_gpu(seed: int) -> None:
    """Without weights, activations are the bias alone: few different values, so that ties go
    through the thresholds, some of them beside a neighbour that is larger, and through the tiles'
    groups, of which more than are sorted may hold one of the k largest."""
    hopper_only()
    from flash_sae_dist.kernels import encode_tiles

    N, D, F, k = 300, 776, 20_000, (32, 100, 256)[seed % 3]
    equal = float(seed // 4)
    g = torch.Generator().manual_seed(seed)
    b = torch.full((F,), -1.0)
    ties = torch.rand(F, generator=g) < (0.001, 0.01, 0.1, 0.9)[seed % 4]
    b[ties] = equal
    for step in (2, 5):
        larger = torch.randint(F // 2, (k // step,), generator=g) * 2
        b[larger] = 100.0 + torch.arange(k // step) // 3
        b[larger + 1] = equal
    x, W = torch.randn(N, D, generator=g), torch.zeros(F, D)
    x, W = (t.to("cuda", torch.bfloat16) for t in (x, W))
    want, want_indices = b.relu().sort(descending=True, stable=True)
    encode = encoder(plan_of(N, D, F, k), k)
    for values, indices in (
        encode(x, W, b.cuda()),
        encoder(plan_of(N, D, F, k, first=2, parts=8), k)(x, W, b.cuda()),
        encode_tiles.topk_encode(x, W, b.cuda(), k),
        encode_topk.fused_topk(x, W, b.cuda(), k, plain_plan(N, D, F, k)),
    ):
        assert torch.equal(values.cpu(), want[:k].expand(N, k))
        assert torch.equal(indices.cpu().long(), want_indices[:k].expand(N, k))


def plain_plan(N: int, D: int, F: int, k: int) -> encode_plan.Plan:
    plan = encode_plan.make_plan(N, D, F, k)
    assert plan is not None
    return plan


@pytest.mark.gpu
def test_tiles_bear_nan_beside_latents_that_are_none_on_the_gpu() -> None:
    """The last group's columns past F are 0 times what is not finite."""
    hopper_only()
    from flash_sae_dist.kernels import encode_tiles

    N, F, k = 300, 20_005, 32
    x, W, b = make("normal", N, 776, F, torch.bfloat16, "cuda")
    x[3, 5], x[4] = torch.inf, torch.nan
    values, indices = encode_tiles.topk_encode(x, W, b, k)
    rest = torch.arange(N, device="cuda") > 4
    assert_exact(x[rest], W, b, k, values[rest], indices[rest])
    assert ((indices >= 0) & (indices < F)).all()
    assert (indices[3:5].sort(dim=1).values.diff(dim=1) > 0).all(), "a latent is selected twice"
    assert values[4].isnan().all()


@pytest.mark.gpu
def test_a_graph_of_several_chunks_replays_on_the_gpu() -> None:
    """Keys of one chunk, or replay, must not be taken for the next one's."""
    hopper_only()
    x, W, b = make("normal", 700, 776, 20_000, torch.bfloat16, "cuda")
    encode = encoder(plan_of(700, 776, 20_000, 32, block_rows=128), 32)
    encode(x, W, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = encode(x, W, b)
    for seed in range(5):
        new = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        x.copy_(new.cuda() * (1 + seed))
        graph.replay()
        for one, other in zip(got, encode(x, W, b), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_calls_leave_zeros_behind_on_the_gpu() -> None:
    """Of all plans, whose keys, codes and lengths lie in other places of the same memory."""
    hopper_only()
    from flash_sae_dist.kernels import encode_first

    for kind in ("normal", "equal", "group"):
        for N, changes in (
            (300, {}), (130, {"first": 2, "parts": 8}), (257, {"block_rows": 128}),
            (384, {"parts": 20, "others": 7, "regular": 60}), (1, {"cells": 4, "parts": 20}),
        ):  # fmt: skip
            x, W, b = make(kind, N, 776, 20_000, torch.bfloat16, "cuda")
            plan = plan_of(300, 776, 20_000, 32, **changes)
            values, indices = encoder(plan, 32)(x, W, b)
            assert_exact(x, W, b, 32, values, indices)
            for zeros in encode_first._zeros._held.values():
                assert not zeros.any(), (kind, N, changes)


@pytest.mark.gpu
def test_two_streams_at_once_on_the_gpu() -> None:
    """Programs wait for one another: launches that cannot both be on the GPU must not begin to."""
    hopper_only()
    calls, wants = [], []
    for seed in range(2):
        x, W, b = make(KINDS[seed], 1500, 776, 20_000, torch.bfloat16, "cuda")
        encode = encoder(plan_of(1500, 776, 20_000, 32), 32)
        calls.append(lambda e=encode, x=x, W=W, b=b: e(x, W, b))
        wants.append(calls[-1]())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(50):
        gots = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                gots.append(call())
        torch.cuda.synchronize()
        for got, want in zip(gots, wants, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
