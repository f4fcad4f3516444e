"""The encoder's search by e4m3 products: candidates, exact activations, what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import reference
from flash_sae_dist.kernels.dispatch import fp8_obstacle

triton = pytest.importorskip("triton")
from flash_sae_dist.kernels import encode, encode_filter, encode_fp8, ops  # noqa: E402
from flash_sae_dist.kernels.encode_plan import Plan  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover it")
SMALL = Plan(
    sample=3, rank=6, parts=2, capacity=24, block_rows=32, slots=8, keys=64, whole=9, block_n=32
)


def case(N: int, D: int, F: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of very different lengths, latents, too."""
    g = torch.Generator().manual_seed(N)
    x = torch.randn(N, D, generator=g) * torch.logspace(-3, 3, N)[:, None]
    W = torch.randn(F, D, generator=g) * torch.rand(F, 1, generator=g).exp() / D**0.5
    return x.to(device), W.to(device), 0.1 * torch.randn(F, generator=g).to(device)


def found(latents: Tensor, want: Tensor) -> float:
    """The share of the wanted latents that are there."""
    hits = (latents[:, :, None] == want[:, None, :]).any(1)
    return float(hits.float().mean())


def assert_rounded(rows: Tensor, scale: Tensor, x: Tensor) -> None:
    """To three bits of each mantissa, or the least step beside a row's largest."""
    error = (rows.float() * scale[:, None] - x).abs()
    step = x.abs().amax(1, keepdim=True) / 448 * 2.0**-10
    assert (error <= torch.maximum(x.abs() / 16, step) * 1.0001).all()


def test_quantised_rows_are_within_a_rounding() -> None:
    x, _, _ = case(9, 40, 8)
    x[3] = 0
    rows, scale = reference.quantise_rows(x)
    assert_rounded(rows, scale, x)
    assert rows.float().abs().amax(1)[torch.arange(9) != 3].eq(448).all()


@pytest.mark.parametrize("k", [1, 8, 40])
def test_what_is_found_has_exact_values(k: int) -> None:
    x, W, b = case(64, 96, 2000)
    want, latents = reference.topk_encode(x, W, b, k)
    values, indices = reference.fp8_topk_encode(x, W, b, k)
    assert found(indices, latents) > 0.998
    pre = (x @ W.T + b).relu()
    torch.testing.assert_close(values, pre.gather(1, indices.long()), rtol=1e-5, atol=1e-3)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert (values <= want * (1 + 1e-5) + 1e-5).all()


def test_all_latents_are_candidates_of_few() -> None:
    x, W, b = case(16, 24, 30)
    want, latents = reference.topk_encode(x, W, b, 20)
    values, indices = reference.fp8_topk_encode(x, W, b, 20)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-3)
    assert torch.equal(indices[values > 0], latents[want > 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x, W, b = case(8, 24, 300)
    x[3, 5] = bad
    values, _ = reference.fp8_topk_encode(x, W, b, 4)
    assert not values[3].isfinite().all()
    assert values[torch.arange(8) != 3].isfinite().all()


@interpreted
def test_the_kernel_rounds_as_the_reference() -> None:
    x, _, _ = case(9, 70, 8)
    x[2], x[4, 3], x[5, 1] = 0, torch.nan, -torch.inf
    rows, scale = encode_fp8.quantise_rows(x)
    want, want_scale = reference.quantise_rows(x)
    good = ~want_scale.isnan()
    torch.testing.assert_close(scale, want_scale, equal_nan=True, rtol=1e-6, atol=0)
    assert good.tolist() == [i not in (4, 5) for i in range(9)]
    # Triton's interpreter does not carry a mantissa that is rounded up into the exponent.
    numbers = want.float()
    up = (numbers.abs().frexp().mantissa == 0.5) & (numbers.abs() > (x / scale[:, None]).abs())
    same = (rows.float() == numbers) | up
    assert same[good].float().mean() > 0.99, "but for last bits of a division"


@interpreted
@pytest.mark.parametrize(("F", "quantised"), [(301, False), (320, True)])
def test_the_filter_equals_the_reference(F: int, quantised: bool) -> None:
    """In units of a token's scale, from rows in float32 or in e4m3 alone."""
    x, W, b = case(20, 16, F)
    rows, scales = reference.quantise_rows(W)
    own, scale = (rows, scales) if quantised else (W, None)
    plan = SMALL._replace(whole=F // 32)
    matmul = encode_filter.PlainFilter(rows, b / scales, plan, block_k=16, block_m=16, scale=scales)
    searched = encode_fp8._Quantised(matmul)
    _, latents = encode.filtered_topk(x, own, b, 21, plan, searched, scale)
    values, indices = encode_fp8.rescored(x, own, b, scale, latents, 5)
    want, want_indices = reference.fp8_topk_encode(x, own, b, 5, scale)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-3)
    assert torch.equal(indices[want > 0], want_indices[want > 0])


def test_a_gpu_without_e4m3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8_obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = fp8_obstacle(torch.device("cuda", 0))
    fp8_obstacle.cache_clear()
    assert reason is not None
    assert "8.9 or newer" in reason
    assert "8.0" in reason
    assert fp8_obstacle(torch.device("cpu")) is None
    assert "mps" in (fp8_obstacle(torch.device("mps")) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("N", "D", "F", "k"),
    [(1024, 768, 24_576, 32), (300, 2304, 30_001, 64), (777, 96, 20_000, 1), (64, 768, 4096, 20),
     (400, 776, 20_000, 32), (300, 768, 20_000, 300)],
)  # fmt: skip
def test_search_on_the_gpu(N: int, D: int, F: int, k: int, quantised: bool) -> None:
    x, W, b = case(N, D, F, "cuda")
    x, W = x.bfloat16(), W.bfloat16()
    scale = None
    if quantised:
        W, scale = encode_fp8.quantise_rows(W)
    values, indices = encode_fp8.fp8_topk_encode(x, W, b, k, scale)
    if scale is None:
        want = ops.topk_encode(x, W, b, k)
        assert found(indices, want.latents) >= 0.999
    rows = W.float() if scale is None else W.float() * scale[:, None]
    pre = (x.float() @ rows.T + b).relu().gather(1, indices.long())
    torch.testing.assert_close(values, pre, rtol=2e-3, atol=2e-3)
    assert (values[:, :-1] >= values[:, 1:]).all()


@pytest.mark.gpu
def test_the_portable_filter_finds_as_much_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = case(512, 768, 24_576, "cuda")
    x, W = x.bfloat16(), W.bfloat16()
    monkeypatch.setattr(encode, "_is_hopper", lambda device: False)
    _, indices = encode_fp8.fp8_topk_encode(x, W, b, 32)
    assert found(indices, ops.topk_encode(x, W, b, 32).latents) >= 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden_on_the_gpu(
    bad: float, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = case(300, 768, 20_000, "cuda")
    x, W = x.bfloat16(), W.bfloat16()
    x[3, 5] = bad
    if not hopper:
        monkeypatch.setattr(encode, "_is_hopper", lambda device: False)
    values, _ = encode_fp8.fp8_topk_encode(x, W, b, 32)
    assert not values[3].isfinite().all()
    assert values[torch.arange(300, device="cuda") != 3].isfinite().all()
