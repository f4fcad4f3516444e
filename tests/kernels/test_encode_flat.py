"""The kernels of the batch rule and the threshold rule: the same pairs as the reference's on any
data, by the interpreter at small sizes and on the GPU at real ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sae_dist.kernels import encode_plan, reference
from flash_sae_dist.kernels.encode_plan import Plan
from flash_sae_dist.kernels.reference import Pairs

pytest.importorskip("triton")
from flash_sae_dist.kernels import encode, encode_filter, encode_flat
from tests.kernels.test_encode import SHAPES, interpreted, make
from tests.kernels.test_pairs import listed

F = 140
# Tiles of 32 columns, the last of them ragged; two programs a block of rows.
SMALL = Plan(0, 0, 2, capacity=24, block_rows=32, slots=1, keys=64, whole=F // 32, block_n=32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter has the time for."""
    if torch.cuda.is_available():
        return

    def matmul(design: str, W: Tensor, b: Tensor, plan: Plan) -> encode.Matmul:
        return encode_filter.PlainFilter(W, b, plan, block_k=16, block_m=16)

    monkeypatch.setattr(encode, "matmul_of", matmul)
    monkeypatch.setattr(encode_flat, "_SPANS", 2)


def dense_of(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (x @ W.T + b).relu()


def by_batch(x: Tensor, W: Tensor, b: Tensor, k: int, plan: Plan | None, room: int = 4000) -> Pairs:
    return encode_flat.by_batch(x, W, b, "plain" if plan else "rows", plan, k, room)


def assert_same(got: Pairs, want: Pairs) -> None:
    """The same pairs, with values that were summed in another order."""
    ours, theirs = listed(got), listed(want)
    assert [pair[:2] for pair in ours] == [pair[:2] for pair in theirs]
    values = [torch.tensor([pair[2] for pair in found]) for found in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5, equal_nan=True)


@interpreted
@pytest.mark.parametrize("kind", ["normal", "heavy", "equal", "few", "negative", "twins"])
@pytest.mark.parametrize("plan", [SMALL, None], ids=["filter", "rows"])
def test_the_batch_rule_equals_the_reference(kind: str, plan: Plan | None) -> None:
    x, W, b = make(kind, 20, 16, F, torch.float32, "cpu")
    assert_same(by_batch(x, W, b, 4, plan), reference.batch_topk_encode(x, W, b, 4))


@interpreted
def test_zeros_of_dense_rows_are_not_counted() -> None:
    """N * F of them would be more than 32 bits hold."""
    x, W, b = make("few", 20, 16, F, torch.float32, "cpu")
    call = encode_flat.Flat(x, W, b, b.new_zeros(()), 4000, 4000, "rows", None)
    call.steps(encode_flat.COUNT, encode_flat.EMIT)
    above, equal, _ = call.above.view(3, 20)
    assert int(above.sum()) == int((dense_of(x, W, b) > 0).sum())
    assert not equal.any()


@interpreted
@pytest.mark.parametrize(
    ("changes", "room"), [({"block_rows": 16}, 4000), ({"capacity": 5}, 4000), ({}, 100)],
    ids=["two-blocks", "short-lists", "few-keys"],
)  # fmt: skip
def test_rows_without_room_are_computed_densely(changes: dict[str, int], room: int) -> None:
    x, W, b = make("normal", 20, 16, F, torch.float32, "cpu")
    got = by_batch(x, W, b, 4, SMALL._replace(**changes), room)
    assert_same(got, reference.batch_topk_encode(x, W, b, 4))


@interpreted
@pytest.mark.parametrize("plan", [SMALL, None], ids=["filter", "rows"])
def test_too_high_a_limit_is_found_out(plan: Plan | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = encode_flat.sample_of(20, F, 4)._replace(rank=1)
    monkeypatch.setattr(encode_flat, "sample_of", lambda *sizes: sample)
    x, W, b = make("normal", 20, 16, F, torch.float32, "cpu")
    assert_same(by_batch(x, W, b, 4, plan), reference.batch_topk_encode(x, W, b, 4))


@interpreted
def test_one_token_may_have_most_of_them_and_nan_comes_first() -> None:
    x, W, b = make("normal", 20, 16, F, torch.float32, "cpu")
    x[3] *= 50
    b[7] = torch.inf
    assert_same(by_batch(x, W, b, 4, SMALL), reference.batch_topk_encode(x, W, b, 4))
    x[11, 0] = torch.nan
    got, want = (listed(p) for p in (by_batch(x, W, b, 4, SMALL),
                                     reference.batch_topk_encode(x, W, b, 4)))  # fmt: skip
    # Which of its latents is a matter of how NaN is compared: all 80 are of that token.
    assert {pair[0] for pair in got} == {pair[0] for pair in want} == {11}
    assert len(got) == len(want) == 80


@interpreted
@settings(max_examples=6, deadline=None)
@given(levels=st.integers(1, 5), shift=st.integers(-4, 1), k=st.integers(1, 9), seed=st.integers(0))
def test_ties_go_to_the_lowest_token_and_latent(levels: int, shift: int, k: int, seed: int) -> None:
    """Pre-activations of few values: of equal ones some latents of one token at most are left."""
    gen = torch.Generator().manual_seed(seed % 2**31)
    pre = (torch.randint(0, levels, (8, 72), generator=gen) + shift).float()
    x, W, b = torch.eye(8), pre.T.contiguous(), torch.zeros(72)
    want = listed(reference.batch_topk_encode(x, W, b, k))
    assert listed(by_batch(x, W, b, k, SMALL._replace(whole=2))) == want
    assert listed(by_batch(x, W, b, k, None)) == want


@interpreted
@pytest.mark.parametrize("plan", [SMALL, SMALL._replace(capacity=5), None])
def test_the_threshold_rule_takes_all_strictly_above(
    plan: Plan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_flat, "_BLOCK_BYTES", 4 * F * 7)  # rows in three blocks
    x, W, b = make("normal", 20, 16, F, torch.float32, "cpu")
    theta = torch.rand(F) * 2 - 0.2
    want = reference.threshold_encode(x, W, b, theta, 2800)[0]
    number = int(want.num_pairs)
    for capacity in (number + 3, number, number - 1):
        design = "plain" if plan else "rows"
        got, there = encode_flat.by_threshold(x, W, b - theta, design, plan, theta, capacity)
        assert there == number
        assert there.dtype == torch.int32
        # The first where they are more.
        used = min(number, capacity)
        assert int(got.num_pairs) == used
        assert torch.equal(got.tokens[:used], want.tokens[:used])
        if capacity >= number:
            assert_same(got, want)


def test_no_tokens() -> None:
    x, W, b = torch.empty(0, 16), torch.randn(F, 16), torch.zeros(F)
    assert by_batch(x, W, b, 4, None).offsets.tolist() == [0]
    pairs, number = encode_flat.threshold_encode(x, W, b, torch.tensor(0.1), 0)
    assert pairs.offsets.tolist() == [0]
    assert number == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_keep_to_the_memory_bar(shape: tuple[int, int, int, int]) -> None:
    """All that a call allocates but keys, which grow with the batch, and that rows may have far
    more than the mean."""
    N, D, F, k = shape
    room = 6 * N * k + 4096
    plan = encode_plan.flat_plan(N, D, F, 2.5 * k, room)
    if plan is None:
        assert 40 * k > F
        return
    rows = min(N, plan.block_rows)
    counts = 4 * N * (2 * encode_flat._SPANS + 8) + (1 << 16)
    lists = 4 * rows * (plan.pitch + plan.lists)
    # Where there are so many keys that they leave no room, lists have half of it.
    assert lists <= 32 << 20 or lists + counts + 8 * room <= 64 << 20
    assert plan.lists * (plan.capacity - encode_plan.ROOM) >= min(15 * k, F / 2)
    sample = encode_flat.sample_of(N, F, k)
    assert 4 * N * sample.size <= 64 << 20
    assert (sample.size - 1) * sample.step < F


def dense(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (torch.mm(x, W.T, out_dtype=torch.float32) + b).relu()


def assert_exact(got: Pairs, acts: Tensor, least: Tensor, slack: float) -> None:
    """No pair below what was asked for, none above it missed, each with its activation."""
    n = int(got.num_pairs)
    tokens, latents, values = got.tokens[:n].long(), got.latents[:n].long(), got.values[:n]
    counts = torch.bincount(tokens, minlength=len(acts)).cumsum(0)
    assert torch.equal(got.offsets[1:].long(), counts)
    assert not got.values[n:].any()
    assert not got.latents[n:].any()
    assert ((acts[tokens, latents] - values).abs() <= slack).all()
    assert (values >= least - slack).all()
    chosen = torch.zeros_like(acts, dtype=torch.bool)
    chosen[tokens, latents] = True
    assert int(chosen.sum()) == n, "a pair is there twice"
    assert not ((acts > least + slack) & ~chosen).any()


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["normal", "few", "first-tokens", "everywhere", "equal"])
@pytest.mark.parametrize("design", ["hopper", "plain", "rows"])
def test_exact_on_the_gpu(data: str, design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if design == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper GPUs")
    monkeypatch.setattr(encode, "kind_of", lambda x: design)
    x, W, b = make("normal", 900, 776, 20_000, torch.bfloat16, "cuda")
    if data == "first-tokens":
        x[::50] *= 6
    elif data == "everywhere":
        b[::500] += 4
    elif data == "few":
        b -= 5
    elif data == "equal":
        W.zero_()
        b.fill_(1)
    acts, k = dense(x, W, b), 32
    got = encode_flat.batch_topk_encode(x, W, b, k)
    number = min(900 * k, int((acts > 0).sum()))
    assert int(got.num_pairs) == number
    least = acts.flatten().topk(number).values[-1]
    assert_exact(got, acts, least, 1e-3)
    again = encode_flat.batch_topk_encode(x, W, b, k)
    assert all(torch.equal(*both) for both in zip(got, again, strict=True))
    if data == "equal":
        assert (got.tokens * 20_000 + got.latents).sort().values.tolist() == list(range(900 * k))
        return
    pairs, there = encode_flat.threshold_encode(x, W, b, least, 2 * 900 * k)
    assert there == pairs.num_pairs
    assert_exact(pairs, acts, least, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["batch", "threshold"])
def test_both_rules_in_a_cuda_graph(rule: str) -> None:
    x, W, b = make("normal", 900, 776, 20_000, torch.bfloat16, "cuda")
    calls: dict[str, Callable[[], Pairs]] = {
        "batch": lambda: encode_flat.batch_topk_encode(x, W, b, 32),
        # Room for all pairs of each scale: which of more there are is not told.
        "threshold": lambda: encode_flat.threshold_encode(x, W, b, b.abs() + 6, 900_000)[0],
    }
    calls[rule]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = calls[rule]()
    for scale in (1.0, 0.1, 3.0):
        x.copy_(scale * torch.randn(900, 776))
        graph.replay()
        assert all(torch.equal(*both) for both in zip(got, calls[rule](), strict=True))
