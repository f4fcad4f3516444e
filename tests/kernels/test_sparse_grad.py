"""Sums over each latent's pairs against the reference, with long and empty segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.kernels import ops, reference

pytest.importorskip("triton")
from flash_sae_dist.kernels import dense_grad
from flash_sae_dist.kernels import sparse_grad as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs(n: int, d: int, f: int, k: int, use: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Indices of one of four kinds of use, coefficients with zeros among them, rows."""
    gen = torch.Generator().manual_seed(n + d + f + k)
    if use == "uniform":
        idx = torch.randint(0, f, (n, k), generator=gen)
    elif use == "tailed":
        idx = (torch.rand(n, k, generator=gen) ** 6 * f).long()
    else:  # latent f - 1 fires on every token
        idx = torch.randint(0, f, (n, k), generator=gen)
        idx[:, 0] = f - 1
        if use == "one":
            idx[:] = f - 1
    coef = torch.randn(n, k, generator=gen) * (torch.rand(n, k, generator=gen) > 0.2)
    rows = torch.randn(n, d, generator=gen).to(dtype)
    return coef.to(DEVICE), idx.to(torch.int32).to(DEVICE), rows.to(DEVICE)


def check(n: int, d: int, f: int, k: int, use: str, dtype: torch.dtype = torch.float32) -> None:
    coef, idx, rows = pairs(n, d, f, k, use, dtype)
    want = reference.scatter_rows(coef.double(), idx, rows.double(), f)
    magnitude = reference.scatter_rows(coef.double().abs(), idx, rows.double().abs(), f)
    got = dense_grad.scatter_rows(coef, idx, rows, f)
    assert ((got - want).abs() <= 1e-5 * magnitude + 1e-30).all()
    assert torch.equal(got, dense_grad.scatter_rows(coef, idx, rows, f))
    # The encoder bias's gradient.
    sums = dense_grad.scatter_rows(coef, idx, coef.new_ones(n, 1), f).squeeze(1)
    want_sums = torch.zeros(f, dtype=torch.float64, device=DEVICE)
    want_sums.index_add_(0, idx.flatten(), coef.double().flatten())
    assert ((sums - want_sums).abs() <= 1e-5 * coef.abs().sum().clamp_min(1)).all()


@pytest.mark.parametrize("use", ["uniform", "tailed", "every-token", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_equal_the_reference(
    use: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_MIN_HEAVY", 8)
    check(30, 20, 13, 3, use, dtype)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 20),
    f=st.integers(1, 9),
    k=st.integers(1, 4),
    use=st.sampled_from(["uniform", "tailed", "every-token", "one"]),
)
def test_any_shape(n: int, d: int, f: int, k: int, use: str) -> None:
    before = kernels._MIN_HEAVY
    kernels._MIN_HEAVY = 8
    try:
        check(n, d, f, k, use)
    finally:
        kernels._MIN_HEAVY = before


def test_no_tokens_give_zeros() -> None:
    idx = torch.empty(0, 3, dtype=torch.int32)
    assert not dense_grad.scatter_rows(torch.empty(0, 3), idx, torch.empty(0, 5), 4).any()


@pytest.mark.parametrize(("num_pairs", "D"), [(65536, 4096), (131072, 768), (524288, 4096)])
def test_scratch_is_bounded(num_pairs: int, D: int) -> None:
    heavy = kernels.heavy_block(num_pairs, D, 2)
    assert num_pairs // heavy * D * 4 * 2 <= 32 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["uniform", "tailed", "every-token", "one"])
@pytest.mark.parametrize("shape", [(512, 768, 24576, 32), (256, 2304, 65536, 64)])
def test_real_shapes(shape: tuple[int, int, int, int], use: str) -> None:
    check(*shape, use, torch.bfloat16)


@pytest.mark.gpu
def test_the_decoders_gradients_equal_dense_autograd() -> None:
    acts, _, grad = pairs(300, 776, 5000, 16, "uniform", torch.float32)
    W = torch.randn(5000, 776, device="cuda").requires_grad_()
    leaves = [acts.requires_grad_(), W]
    idx = torch.stack([torch.randperm(5000, device="cuda")[:16] for _ in range(300)]).int()
    idx[:, 0] = 4999  # twice where it is there already, which sums bear
    for _ in range(3):  # the order of one call is not taken for the next
        idx = idx.flip(0)
        got = torch.autograd.grad(ops.sparse_decode(acts, idx, W), leaves, grad)
        dense = acts.new_zeros(300, 5000).scatter_add(1, idx.long(), acts)
        want = torch.autograd.grad(dense @ W, leaves, grad)
        for g, w in zip(got, want, strict=True):
            assert (g - w).norm() <= 1e-3 * w.norm()
