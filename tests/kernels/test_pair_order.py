"""The order of the pairs by latent: the counting sort against the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import pair_order, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(idx: Tensor, latents: int, coef: Tensor | None) -> None:
    idx = idx.to(DEVICE)
    coef = None if coef is None else coef.to(DEVICE)
    got = pair_order._by_counting(idx, latents, coef)
    want = reference.order_pairs(idx, latents, coef)
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.latents.int(), want.latents.int())
    # Beyond every latent's pairs any may stand, if it exists.
    live = int(want.offsets[-1])
    assert torch.equal(got.order[:live].long(), want.order[:live])
    assert ((got.order >= 0) & (got.order < max(1, idx.numel()))).all()


def test_reference_is_stable_and_drops_what_is_not_kept() -> None:
    idx = torch.tensor([[2, 0], [2, 2], [0, 1]], dtype=torch.int32)
    coef = torch.tensor([[1.0, -2.0], [0.0, torch.nan], [0.5, -0.0]])
    order = reference.order_pairs(idx, 4, coef)
    assert order.offsets.tolist() == [0, 2, 2, 4, 4]
    assert order.order[:4].tolist() == [1, 4, 0, 3]
    assert order.latents.tolist() == [0, 0, 2, 2, 4, 4]
    check(idx, 4, coef)


@pytest.mark.parametrize("latents", [1, 7, 300, 1024])
@pytest.mark.parametrize("pairs", [1, 64, 777])
@pytest.mark.parametrize("kind", ["some zeros", "all zeros", "no coefficients"])
def test_equals_the_reference(latents: int, pairs: int, kind: str) -> None:
    gen = torch.Generator().manual_seed(latents + pairs)
    idx = torch.randint(0, latents, (pairs, 1), generator=gen, dtype=torch.int32)
    coef = None
    if kind != "no coefficients":
        coef = (torch.rand(pairs, 1, generator=gen) > 0.5).float() * (kind == "some zeros")
    check(idx, latents, coef)


def test_more_latents_than_16_bits_hold() -> None:
    idx = torch.tensor([[39_999, 3], [32_768, 39_999], [32_767, 0]], dtype=torch.int32)
    check(idx, 40_000, torch.tensor([[1.0, 0.0], [2.0, 3.0], [4.0, 5.0]]))


def test_one_latent_has_most_pairs() -> None:
    gen = torch.Generator().manual_seed(0)
    idx = torch.randint(0, 3000, (150, 3), generator=gen)  # int64
    idx[:, 1] = 2047
    check(idx, 3000, None)


def test_no_pairs_and_many_pairs_are_sorted() -> None:
    order = pair_order.order_pairs(torch.empty(0, 4, dtype=torch.int32, device=DEVICE), 9)
    assert order.offsets.tolist() == [0] * 10
    many = torch.arange(200, dtype=torch.int32, device=DEVICE).view(100, 2) % 5
    assert pair_order.order_pairs(many, 5).order.tolist() == [
        pair for latent in range(5) for pair in range(latent, 200, 5)
    ]


def test_a_latent_that_does_not_exist_is_dropped() -> None:
    """It is a mistake of the caller's, for which nothing else is to be changed."""
    idx = torch.tensor([[0, 9], [-1, 2]], device=DEVICE)
    order = pair_order._by_counting(idx, 3, None)
    assert order.offsets.tolist() == [0, 1, 1, 2]
    assert order.order[:2].tolist() == [0, 3]


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(pair_order, "_by_counting", lambda *args: taken.append("counting"))
    monkeypatch.setattr(reference, "order_pairs", lambda *args: taken.append("sorting"))
    for pairs, latents in ((64, 4), (65, 4), (1 << 20, 1 << 17), (2 << 20, 1 << 18), (9, 1 << 19)):
        pair_order.order_pairs(torch.empty(pairs, dtype=torch.int32, device="meta"), latents)
    assert taken == ["counting", "sorting", "counting", "sorting", "sorting"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 65536, 64), (4096, 24576, 32), (8192, 131072, 64)])
@pytest.mark.parametrize("use", ["uniform", "one latent on every token", "the same latents"])
def test_real_sizes(shape: tuple[int, int, int], use: str) -> None:
    N, F, k = shape
    gen = torch.Generator().manual_seed(N)
    idx = torch.randint(0, F, (N, k), generator=gen, dtype=torch.int32)
    if use == "one latent on every token":
        idx[:, 0] = F // 2
    elif use == "the same latents":
        idx[:] = torch.arange(k, dtype=torch.int32)
    check(idx, F, torch.rand(N, k, generator=gen).round(decimals=1))
