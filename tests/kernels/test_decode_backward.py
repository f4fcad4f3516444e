"""The decoder's backward pass in one gather against the reference and against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.kernels import ops, reference

pytest.importorskip("triton")
from flash_sae_dist.kernels import decode_backward as kernels
from flash_sae_dist.kernels import sparse_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL = [(512, 768, 24576, 32), (256, 4096, 65536, 64), (64, 2304, 16384, 16), (32, 5120, 8192, 512)]


def inputs(
    n: int, d: int, f: int, k: int, use: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Activations with zeros among them, indices of one of three kinds, weights, a gradient."""
    gen = torch.Generator().manual_seed(n + d + f + k)
    acts = torch.rand(n, k, generator=gen) * (torch.rand(n, k, generator=gen) > 0.3)
    idx = torch.randint(0, f, (n, k), generator=gen, dtype=torch.int32)
    if use == "every-token":
        idx[:, 0] = f - 1
    elif use == "one":
        idx[:] = f - 1
    W, grad = torch.randn(f, d, generator=gen), torch.randn(n, d, generator=gen)
    return tuple(t.to(DEVICE) for t in (acts, idx, W.to(dtype), grad.to(dtype)))


def check(n: int, d: int, f: int, k: int, use: str, dtype: torch.dtype = torch.float32) -> None:
    acts, idx, W, grad = inputs(n, d, f, k, use, dtype)
    want_dots, want_W = reference.decode_backward(acts.double(), idx, W.double(), grad.double())
    magnitude = reference.decode_backward(acts.double(), idx, W.double().abs(), grad.double().abs())
    got = kernels.decode_backward(acts, idx, W, grad)
    for found, want, size in zip(got, (want_dots, want_W), magnitude, strict=True):
        # Sums are float32; then one rounding to the weights' dtype (the interpreter truncates).
        tolerance = 1e-5 * size + torch.finfo(found.dtype).eps * want.abs() + 1e-30
        assert ((found.double() - want).abs() <= tolerance).all()
    again = kernels.decode_backward(acts, idx, W, grad)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])


@pytest.mark.parametrize("use", ["uniform", "every-token", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(
    use: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_grad, "_MIN_HEAVY", 8)
    check(30, 20, 13, 3, use, dtype)
    check(9, 600, 5, 4, use, dtype)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 40),
    f=st.integers(1, 9),
    k=st.integers(1, 4),
    use=st.sampled_from(["uniform", "every-token", "one"]),
)
def test_any_shape(n: int, d: int, f: int, k: int, use: str) -> None:
    check(n, d, f, k, use)


def test_no_tokens_and_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    acts, idx, W, grad = inputs(5, 20, 7, 3, "uniform")
    dots, grad_W = kernels.decode_backward(acts[:0], idx[:0], W, grad[:0])
    assert dots.shape == (0, 3)
    assert not grad_W.any()
    want = kernels.decode_backward(acts, idx, W, grad)
    monkeypatch.setattr(kernels, "_MAX_PARTS_BYTES", 8)
    for got, expected in zip(kernels.decode_backward(acts, idx, W, grad), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["uniform", "every-token"])
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "N{}-D{}-F{}-K{}".format(*s))
def test_real_shapes(shape: tuple[int, int, int, int], use: str) -> None:
    check(*shape, use, torch.bfloat16)


@pytest.mark.gpu
def test_autograd_takes_it_and_equals_dense_autograd() -> None:
    acts, idx, W, grad = inputs(300, 776, 5000, 16, "every-token", torch.float32)
    idx = torch.stack([torch.randperm(5000, device="cuda")[:16] for _ in range(300)]).int()
    leaves = [acts.requires_grad_(), W.requires_grad_()]
    for _ in range(3):  # the order of one call is not taken for the next
        idx = idx.flip(0)
        got = torch.autograd.grad(ops.sparse_decode(leaves[0], idx, leaves[1]), leaves, grad)
        dense = acts.new_zeros(300, 5000).scatter(1, idx.long(), leaves[0])
        want = torch.autograd.grad(dense @ leaves[1], leaves, grad)
        for g, w in zip(got, want, strict=True):
            assert (g - w).norm() <= 1e-3 * w.norm()
