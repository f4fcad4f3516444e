"""The sparse decoder's kernels against the reference: on the CPU by Triton's interpreter at small
shapes, on a GPU at real ones.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.kernels import reference

pytest.importorskip("triton")
from flash_sae_dist.kernels import sparse_decode as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL = [(512, 768, 24576, 32), (256, 4096, 65536, 64), (64, 2304, 16384, 16), (32, 5120, 8192, 512)]


def pairs(
    n: int, d: int, f: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Activations with zeros among them, indices with repeats, weights, a gradient."""
    gen = torch.Generator().manual_seed(seed)
    acts = torch.rand(n, k, generator=gen) * (torch.rand(n, k, generator=gen) > 0.3)
    idx = torch.randint(0, f, (n, k), generator=gen, dtype=torch.int32)
    W = torch.randn(f, d, generator=gen).to(dtype)
    grad = torch.randn(n, d, generator=gen).to(dtype)
    return tuple(t.to(DEVICE) for t in (acts, idx, W, grad))


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the output dtype of the largest value, NaN never."""
    eps = torch.finfo(dtype).eps
    assert got.dtype == want.dtype
    assert (got.double() - want.double()).abs().max() <= 8 * eps * want.double().abs().max() + 1e-30


SHAPES = [(3, 5, 7, 1), (4, 33, 11, 9), (2, 600, 16, 3), (5, 64, 4, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-F{}-K{}".format(*s))
def test_decode_and_dots_equal_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    acts, idx, W, grad = pairs(*shape, dtype)
    want = reference.sparse_decode(acts, idx, W)
    want_dots = reference.gathered_dots(grad, idx, W)
    close(kernels.sparse_decode(acts, idx, W), want, dtype)
    close(kernels.sparse_decode(acts, idx.long(), W), want, dtype)
    close(kernels.gathered_dots(grad, idx, W), want_dots, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "main"), [(3, 40, 2), (5, 129, 0), (0, 8, 1)])
def test_nested_rows_equal_the_reference(n: int, d: int, main: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(d)
    parts = torch.randn(3, n, d, generator=gen).to(DEVICE, dtype)
    b_dec, x = (torch.randn(size, generator=gen).to(DEVICE) for size in ((d,), (n, d)))
    args = (parts, b_dec, x, (0.5, 1.0, 0.25), main, dtype)
    got, want = kernels.nested_rows(*args), reference.nested_rows(*args)
    if n:
        for ours, theirs in zip(got[:2], want[:2], strict=True):
            close(ours, theirs, dtype)
        close(got[2].sum(), want[2].sum(), torch.float32)
    assert got[0].shape == want[0].shape


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "N{}-D{}-F{}-K{}".format(*s))
def test_real_shapes(shape: tuple[int, int, int, int]) -> None:
    acts, idx, W, grad = pairs(*shape, torch.bfloat16)
    close(
        kernels.sparse_decode(acts, idx, W), reference.sparse_decode(acts, idx, W), torch.bfloat16
    )
    dots = kernels.gathered_dots(grad, idx, W)
    close(dots, reference.gathered_dots(grad, idx, W), torch.float32)
    assert torch.equal(dots, kernels.gathered_dots(grad, idx, W))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 4),
    d=st.integers(1, 40),
    f=st.integers(1, 9),
    k=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_any_shape(n: int, d: int, f: int, k: int, seed: int) -> None:
    acts, idx, W, grad = pairs(n, d, f, k, torch.float32, seed)
    out = kernels.sparse_decode(acts, idx, W)
    assert out.shape == (n, d)
    assert kernels.gathered_dots(grad, idx, W).shape == (n, k)
    if n:
        close(out, reference.sparse_decode(acts, idx, W), torch.float32)


def check_decode_coefs(n: int, d: int, f: int, k: int, dtype: torch.dtype) -> None:
    acts, idx, W, x = pairs(n, d, f, k, dtype)
    b_dec, scale = torch.randn(d, device=DEVICE), torch.tensor(0.37, device=DEVICE)
    want, want_sum, *_ = reference.decode_coefs(acts, idx, W, b_dec, x, scale)
    got, got_sum, *coefs, _ = kernels.decode_coefs(acts, idx, W, b_dec, x, scale)
    close(got, want, dtype)
    close(got_sum.sum(), want_sum.sum(), torch.float32)
    # The coefficients of the kernel's own residual, which may be a rounding away.
    for together in (coefs, kernels.pair_coefs(acts, idx, W, got, scale)):
        for coef, expected in zip(
            together, reference.pair_coefs(acts, idx, W, got, scale), strict=True
        ):
            close(coef, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-F{}-K{}".format(*s))
def test_residual_and_coefs_equal_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check_decode_coefs(*shape, dtype)


def check_levels(
    n: int, d: int, f: int, k: int, dtype: torch.dtype, *, flat: bool, main: int, every: bool
) -> None:
    """A rectangle with levels, or the same pairs as a flat list with some tokens without any."""
    acts, idx, W, x = pairs(n, d, f, k, dtype)
    levels = torch.randint(0, 3, idx.shape, dtype=torch.int32).to(DEVICE)
    tokens = offsets = None
    if flat:
        sizes = torch.arange(n, device=DEVICE) % 3 * k // 2
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
        tokens = torch.arange(n, device=DEVICE).repeat_interleave(sizes).int()
        tokens = torch.nn.functional.pad(tokens, (0, n * k - len(tokens)))
        acts, idx, levels = acts.flatten(), idx.flatten(), levels.flatten()
        unused = torch.arange(n * k, device=DEVICE) >= offsets[-1]
        acts, idx = acts.masked_fill(unused, 0), idx.masked_fill(unused, 0)
    want = reference.by_level(levels, acts, idx, offsets, 3, 2, n + 5)
    got = kernels.by_level(levels, acts, idx, offsets, 3, 2, n + 5)
    for ours, theirs in zip((*got[:2], *got[2][:2]), (*want[:2], *want[2][:2]), strict=True):
        assert torch.equal(ours, theirs)
    b_dec, scale = torch.randn(d, device=DEVICE), torch.tensor(0.37, device=DEVICE)
    nest = reference.Nest((0.5, 1.0, 0.25), main, every, got[2])
    args = (*got[:2], W, b_dec, x, scale, tokens, offsets, nest)
    ours, theirs = kernels.decode_coefs(*args), reference.decode_coefs(*args)
    close(ours.residual, theirs.residual, dtype)
    close(ours.rows, theirs.rows, dtype)
    close(ours.squares.sum(), theirs.squares.sum(), torch.float32)
    close(ours.dec_coef, theirs.dec_coef, torch.float32)
    dots = [
        own * reference.gathered_dots(row, got[1], W, tokens, offsets) * scale
        for row, own in zip(ours.rows, reference.level_masks(got[1], nest), strict=True)
    ]
    whole = sum(dots[1:], dots[0])
    close(ours.enc_coef, whole if every else whole * (got[0] != 0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("main", "every"), [(2, False), (0, True)])
def test_nested_reconstructions_equal_the_reference(
    dtype: torch.dtype, flat: bool, main: int, every: bool
) -> None:
    for shape in SHAPES:
        check_levels(*shape, dtype, flat=flat, main=main, every=every)


@pytest.mark.gpu
@pytest.mark.parametrize("flat", [False, True])
def test_nested_reconstructions_at_a_real_shape(flat: bool) -> None:
    check_levels(512, 768, 24576, 32, torch.bfloat16, flat=flat, main=2, every=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "N{}-D{}-F{}-K{}".format(*s))
def test_residual_and_coefs_at_real_shapes(shape: tuple[int, int, int, int]) -> None:
    check_decode_coefs(*shape, torch.bfloat16)


def test_a_zero_activation_reads_no_row() -> None:
    acts = torch.tensor([[2.0, 0.0]], device=DEVICE)
    idx = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE)
    W = torch.tensor([[torch.nan] * 3, [1.0] * 3], device=DEVICE)
    assert kernels.sparse_decode(acts, idx, W).tolist() == [[2.0, 2.0, 2.0]]
