"""Flat lists of (token, latent, value): the batch rule and the threshold rule against definitions
written another way, their gradients, and the decoder over what they give.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sae_dist.kernels import ops, reference_encode
from flash_sae_dist.kernels.reference import Pairs

Listed = list[tuple[int, int, float]]


def listed(pairs: Pairs) -> Listed:
    """The pairs in use, in order; what is unused is checked."""
    n, tokens, latents = int(pairs.num_pairs), pairs.tokens, pairs.latents
    assert not tokens[n:].any()
    assert not latents[n:].any()
    assert not pairs.values[n:].any()
    assert tokens.dtype == latents.dtype == pairs.offsets.dtype == torch.int32
    counts = torch.bincount(tokens[:n], minlength=len(pairs.offsets) - 1)
    assert pairs.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert (tokens[:n].diff() >= 0).all()
    found = zip(tokens[:n].tolist(), latents[:n].tolist(), pairs.values[:n].tolist(), strict=True)
    return sorted(found, key=lambda pair: pair[:2])


def brute_batch(acts: Tensor, count: int) -> Listed:
    """By Python's sort: NaN first, then value descending, then (token, latent)."""
    every = [(t, f, v) for t, row in enumerate(acts.tolist()) for f, v in enumerate(row) if v != 0]
    every.sort(key=lambda p: (p[2] == p[2], -p[2] if p[2] == p[2] else 0, p[0], p[1]))
    return sorted(every[:count], key=lambda pair: pair[:2])


def of_pre(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, W_enc and b_enc that give these pre-activations exactly."""
    return torch.eye(len(pre), dtype=pre.dtype), pre.T.contiguous(), pre.new_zeros(pre.shape[1])


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 7),
    f=st.integers(1, 20),
    levels=st.integers(1, 6),
    shift=st.integers(-4, 1),
    block=st.integers(1, 60),
    data=st.data(),
)
def test_the_batch_rule_is_a_sort_of_all(
    n: int, f: int, levels: int, shift: int, block: int, data: st.DataObject
) -> None:
    """Ties, few positives, blocks of tokens that end anywhere."""
    k, seed = data.draw(st.integers(1, f)), data.draw(st.integers(0, 1000))
    gen = torch.Generator().manual_seed(seed)
    pre = (torch.randint(0, levels, (n, f), generator=gen) + shift).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_encode, "_MAX_BLOCK_ELEMENTS", block)
        pairs = ops.batch_topk_encode(*of_pre(pre), k)
    assert len(pairs.values) == n * k
    assert listed(pairs) == brute_batch(pre.relu(), n * k)


def test_one_token_may_hold_all_and_others_none() -> None:
    pre = torch.full((4, 12), -1.0)
    pre[2] = torch.arange(12.0) + 1
    pairs = ops.batch_topk_encode(*of_pre(pre), 3)
    assert pairs.offsets.tolist() == [0, 0, 0, 12, 12]
    assert pairs.latents.sort().values.tolist() == list(range(12))
    nothing = ops.batch_topk_encode(*of_pre(pre.neg().clamp_max(0)), 3)
    assert listed(nothing) == []
    assert int(nothing.num_pairs) == 0
    assert ops.batch_topk_encode(torch.empty(0, 12), pre, pre[:, 0], 3).offsets.tolist() == [0]


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_nan_comes_first(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_encode, "_MAX_BLOCK_ELEMENTS", block)
    x, W = torch.randn(5, 3), torch.randn(9, 3)
    W[4] = torch.nan
    batch = ops.batch_topk_encode(x, W, torch.zeros(9), 2)
    assert set(batch.latents[batch.values.isnan()].tolist()) == {4}
    assert int(batch.values.isnan().sum()) == 5
    assert int(batch.num_pairs) == 10
    few = ops.batch_topk_encode(x, W.fill_(torch.nan), torch.zeros(9), 1)
    assert [p[:2] for p in listed(few)] == [(0, f) for f in range(5)]
    above, overflowed = ops.threshold_encode(x, W, torch.zeros(9), 1e9, 45)
    assert int(above.num_pairs) == 45
    assert not overflowed


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 1.0, "each"])
def test_the_threshold_rule_takes_all_strictly_above(
    limit: float | str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_encode, "_MAX_BLOCK_ELEMENTS", block)
    pre = torch.randint(-3, 4, (6, 8)).double()
    each = torch.arange(8.0).double() - 4 if limit == "each" else torch.tensor(float(limit))
    acts = pre.relu() * (pre.relu() > each)
    want = [(t, f, acts[t, f].item()) for t, f in acts.nonzero().tolist()]
    given_limit = each if limit == "each" else float(limit)
    for capacity in (len(want) + 3, len(want)):
        pairs, overflowed = ops.threshold_encode(*of_pre(pre), given_limit, capacity)
        assert listed(pairs) == want
        assert not overflowed
    pairs, overflowed = ops.threshold_encode(*of_pre(pre), given_limit, len(want) - 1)
    assert listed(pairs) == want[:-1]
    assert overflowed.dtype == torch.bool
    assert overflowed
