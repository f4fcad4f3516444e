"""Selection among dead latents and the gradients of their loss: kernels against the reference, the
reference against torch.topk and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import reference

pytest.importorskip("triton")
from flash_sae_dist.kernels import dead_products as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(kind: str, n: int, m: int) -> Tensor:
    gen = torch.Generator().manual_seed(n + m)
    x = torch.randn(n, m, generator=gen)
    if kind == "heavy-tailed":
        x = x / torch.rand(n, m, generator=gen).clamp_min(1e-6) ** 3
    elif kind == "ties":
        x = (2 * x).round()
    elif kind == "sorted":
        x = x.sort(dim=1).values
    elif kind == "equal":
        x = torch.full((n, m), 0.5)
    elif kind == "negative":
        x = -x.abs() - 1
    elif kind == "infinite":
        x[:, ::5] = torch.inf
        x[:, 1::5] = -torch.inf
    elif kind == "one-large":
        x = x * 1e-30
        x[:, m // 2] = 1e30
    elif kind == "zeros":
        x = torch.where(x > 1, x, 0.0 * x)  # of either sign
    elif kind == "any-bits":
        bits = torch.randint(-(2**31), 2**31 - 1, (n, m), generator=gen).to(torch.int32)
        x = bits.view(torch.float32).nan_to_num(0.0)
    return x


KINDS = (
    "normal", "heavy-tailed", "ties", "sorted", "equal", "negative", "infinite", "one-large",
    "zeros", "any-bits",
)  # fmt: skip


def expected(pre: Tensor, k: int, ghost: bool) -> Tensor:
    """By a stable sort: ties to the lowest column."""
    order = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    acts = pre.clamp(max=30).exp() if ghost else pre.relu()
    return torch.zeros_like(pre).scatter(1, order, acts.gather(1, order))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize(("n", "m", "k"), [(5, 64, 9), (3, 200, 64), (2, 33, 1), (2, 17, 16)])
def test_selection_is_exact(kind: str, ghost: bool, n: int, m: int, k: int) -> None:
    pre = rows_of(kind, n, m)
    bias = torch.linspace(-1, 1, m) if kind in ("normal", "heavy-tailed") else torch.zeros(m)
    want = expected(pre + bias, k, ghost)
    got = reference.select_dead(pre, bias, k, ghost, torch.float32)
    assert torch.equal(got, want)
    args = (pre.to(DEVICE), bias.to(DEVICE), k, ghost, torch.float32)
    by_kernel = kernels.select_dead(*args).cpu()
    assert torch.equal(by_kernel != 0, want != 0)
    torch.testing.assert_close(by_kernel, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ghost", [False, True])
def test_rows_longer_than_a_block(ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 32)
    for kind in ("normal", "ties", "equal", "sorted"):
        # The last chunk is full at 96, and of one latent at 97.
        for m in (96, 97, 100):
            pre, bias = rows_of(kind, 2, m), torch.zeros(m)
            got = kernels.select_dead(pre.to(DEVICE), bias.to(DEVICE), 37, ghost, torch.float32)
            want = expected(pre, 37, ghost)
            assert torch.equal(got.cpu() != 0, want != 0)


@pytest.mark.parametrize("limits", [False, True])
def test_ties_go_to_the_lowest_column_over_chunks(
    limits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last that is taken stands in the middle, at the end and at the start of a chunk."""
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 16)
    pre = torch.ones(1, 60)
    pre[0, [3, 50]] = 2.0
    key = reference.sort_key(pre[:, :1]).squeeze(1)
    for take in (5, 15, 16, 17, 31, 58):
        want = torch.zeros(60, dtype=torch.bool)
        want[[3, 50]] = True
        want[(pre[0] == 1).nonzero()[:take]] = True
        given = reference.Limits(key, torch.tensor([take], dtype=torch.int32)) if limits else None
        k = None if limits else take + 2
        for ops, device in ((reference, "cpu"), (kernels, DEVICE)):
            there = None if given is None else reference.Limits(*(t.to(device) for t in given))
            args = (pre.to(device), torch.zeros(60, device=device), k, False, torch.float32)
            got = ops.select_dead(*args, there)
            assert torch.equal(got.cpu()[0] != 0, want)


class Counted:
    """A kernel's function and how often it was called."""

    def __init__(self, inner: Callable[..., object]) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ghost", [False, True])
def test_the_search_ends(kind: str, ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth pass leaves at most a quarter of the keys: within 64; on usual data soon."""
    count = Counted(kernels._count_four)
    monkeypatch.setattr(kernels, "_count_four", count)
    for row in rows_of(kind, 2, 256):
        count.calls = 0
        kernels.select_dead(row[None].contiguous(), torch.zeros(256), 40, ghost, torch.float32)
        assert count.calls <= (9 if kind in ("normal", "sorted") else 64)
    if kind == "normal":
        assert count.calls >= 1


def assert_same_nan(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("ghost", [False, True])
def test_nan_is_selected_first(sign: float, ghost: bool) -> None:
    """It reaches the loss instead of hiding, whatever its sign; more than k of them are ties."""
    pre = rows_of("normal", 4, 40)
    nan = torch.full((1,), torch.nan).copysign(torch.tensor(sign))
    pre[0, 7:9], pre[1], pre[2, 30:] = nan, nan, nan
    pre[3, 5] = torch.inf
    bias = torch.zeros(40)
    bias[5] = -torch.inf  # inf - inf
    want = reference.select_dead(pre, bias, 9, ghost, torch.float32)
    assert want[0, 7:9].isnan().all()
    assert want[1].isnan().sum() == 9
    assert want[1, :9].isnan().sum() >= 8
    assert want[3, 5].isnan()
    args = (pre.to(DEVICE), bias.to(DEVICE), 9, ghost, torch.float32)
    assert_same_nan(kernels.select_dead(*args), want)
    parts = [p.contiguous().to(DEVICE) for p in pre.split([25, 15], dim=1)]
    biases = [p.contiguous().to(DEVICE) for p in bias.split([25, 15])]
    if not ghost:
        assert_same_nan(torch.cat(limits_over(parts, biases, 9, kernels), dim=1), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ghost", [False, True])
def test_activations_in_the_compute_dtype(dtype: torch.dtype, ghost: bool) -> None:
    """Selected before they are rounded."""
    pre, bias = rows_of("normal", 3, 64), torch.zeros(64)
    want = expected(pre, 9, ghost)
    for select, device in ((reference.select_dead, "cpu"), (kernels.select_dead, DEVICE)):
        got = select(pre.to(device), bias.to(device), 9, ghost, dtype).cpu()
        assert got.dtype == dtype
        assert torch.equal(got != 0, want != 0)
        # Triton's interpreter truncates to bfloat16: up to a whole unit apart.
        torch.testing.assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize(("n", "m"), [(0, 40), (3, 0), (0, 0), (3, 1)])
def test_no_tokens_or_no_latents(ops: ModuleType, n: int, m: int) -> None:
    pre, bias = torch.rand(n, m, device=DEVICE) + 0.1, torch.zeros(m, device=DEVICE)
    for k in (None, 50):
        got = ops.select_dead(pre, bias, k, False, torch.float32)
        torch.testing.assert_close(got, pre)
    prefix = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    left = torch.full((n,), 5, dtype=torch.int32, device=DEVICE)
    counts = ops.digit_counts(pre, bias, prefix, 24)
    assert counts.shape == (n, 256)
    assert (counts.sum(dim=1) == m).all()
    ops.pick_digits_(counts, prefix, left)
    # Fewer than are wanted: all are taken.
    assert (prefix == 0).all()
    assert (left >= 5 - m).all()
    grad = torch.ones_like(pre)
    sums = ops.mask_dead_grad_(grad, pre, False).sum(dim=0)
    assert torch.equal(sums, torch.full((m,), float(n), device=DEVICE))
    rows, loss = ops.aux_rows(pre, pre, torch.tensor(1.0, device=DEVICE), False, torch.float32)
    assert rows.shape == (n, m)
    assert loss.shape == (n,)


@pytest.mark.parametrize("ops", [reference, kernels])
def test_shards_with_fewer_latents_than_are_wanted(ops: ModuleType) -> None:
    """All are taken, on shards without any too."""
    pre = rows_of("normal", 4, 20)
    parts = [p.contiguous().to(DEVICE) for p in pre.split([13, 0, 7], dim=1)]
    bias = [torch.zeros(p.shape[1], device=DEVICE) for p in parts]
    for k in (20, 30):
        got = torch.cat(limits_over(parts, bias, k, ops), dim=1).cpu()
        torch.testing.assert_close(got, pre.relu())


def test_latents_that_fire_again_are_left_out() -> None:
    pre, bias = rows_of("normal", 4, 40) + 3, torch.zeros(40)
    bias[::2] = -torch.inf
    for select, device in ((reference.select_dead, "cpu"), (kernels.select_dead, DEVICE)):
        for ghost in (False, True):
            got = select(pre.to(device), bias.to(device), 30, ghost, torch.float32)
            assert (got[:, ::2] == 0).all()
            assert (got[:, 1::2] != 0).all()


def limits_over(parts: list[Tensor], bias: list[Tensor], k: int, ops: object) -> list[Tensor]:
    """Selection over parts as shards make it: counts added up, no keys gathered."""
    dtype = torch.int64 if parts[0].dtype == torch.float64 else torch.int32
    bits = torch.iinfo(dtype).bits
    device = parts[0].device
    prefix = torch.zeros(len(parts[0]), dtype=dtype, device=device)
    left = torch.full((len(parts[0]),), k, dtype=torch.int32, device=device)
    for shift in range(bits - 8, -1, -8):
        counts = [ops.digit_counts(p, b, prefix, shift) for p, b in zip(parts, bias, strict=True)]
        ops.pick_digits_(sum(counts[1:], counts[0].clone()), prefix, left)
    key = prefix ^ torch.iinfo(dtype).min
    chosen, last = [], (prefix & 255).long()[:, None]
    for part, b, count in zip(parts, bias, counts, strict=True):
        equal = count.gather(1, last).squeeze(1)
        take = torch.minimum(left.clamp_min(0), equal)
        left = left - equal
        limits = reference.Limits(key, take)
        chosen.append(ops.select_dead(part, b, None, False, part.dtype, limits))
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_agree_by_counts(kind: str, dtype: torch.dtype) -> None:
    pre = rows_of(kind, 4, 90).to(dtype)
    want = expected(pre, 23, ghost=False)
    for ops, device in ((reference, "cpu"), (kernels, DEVICE)):
        if ops is kernels and dtype == torch.float64:
            continue
        parts = [p.contiguous().to(device) for p in pre.split([30, 40, 20], dim=1)]
        bias = [torch.zeros(p.shape[1], dtype=dtype, device=device) for p in parts]
        got = torch.cat(limits_over(parts, bias, 23, ops), dim=1).cpu()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("d", [12, 40])
def test_rows_and_masks(ghost: bool, d: int) -> None:
    residual, recon = torch.randn(7, d), torch.randn(7, d)
    scale = torch.tensor(0.3)
    want = reference.aux_rows(residual, recon, scale, ghost, torch.float32)
    args = (residual.to(DEVICE), recon.to(DEVICE), scale.to(DEVICE), ghost, torch.float32)
    for got, expect in zip(kernels.aux_rows(*args), want, strict=True):
        torch.testing.assert_close(got.cpu(), expect, rtol=1e-5, atol=1e-6)
    grad, acts = torch.randn(70, d), torch.randn(70, d).relu()
    masked = grad.clone().to(DEVICE)
    sums = kernels.mask_dead_grad_(masked, acts.to(DEVICE), ghost).sum(dim=0).cpu()
    sums_want = reference.mask_dead_grad_(grad, acts, ghost).sum(dim=0)
    torch.testing.assert_close(masked.cpu(), grad)
    torch.testing.assert_close(sums, sums_want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("ghost", [False, True])
def test_gradients_are_those_of_autograd(ops: ModuleType, ghost: bool) -> None:
    """From the loss to the pre-activations, whose factors are held constant."""
    n, m, d = 6, 24, 10
    residual, W, pre = torch.randn(n, d), torch.randn(m, d), rows_of("normal", n, m)
    pre.requires_grad_()
    acts = expected(pre, 7, ghost)
    recon = acts @ W
    if ghost:
        factor = residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * recon.norm(dim=1, keepdim=True))
        diff = recon * factor.detach() + residual
        each = (diff.square() * (residual.square() / (diff.square() + 1e-6)).detach()).sum(dim=1)
    else:
        each = (recon + residual).square().sum(dim=1)
    (each.sum() * 0.15).backward()
    there = [t.detach().to(DEVICE) for t in (residual, recon, torch.tensor(0.3))]
    rows, loss = ops.aux_rows(*there, ghost, torch.float32)
    torch.testing.assert_close(loss.cpu(), each.detach(), rtol=1e-5, atol=1e-5)
    grad = rows @ W.to(DEVICE).T
    sums = ops.mask_dead_grad_(grad, acts.detach().to(DEVICE), ghost).sum(dim=0)
    assert pre.grad is not None
    torch.testing.assert_close(grad.cpu(), pre.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.cpu(), pre.grad.sum(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m", "k"), [(300, 2496, 384), (64, 13120, 2048), (16, 43712, 2048)])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_at_real_sizes(n: int, m: int, k: int, kind: str) -> None:
    pre, bias = rows_of(kind, n, m).cuda(), torch.zeros(m, device="cuda")
    got = kernels.select_dead(pre, bias, k, False, torch.float32)
    want = expected(pre, k, ghost=False)
    assert torch.equal(got, want)
    parts = [p.contiguous() for p in pre.split(m // 2, dim=1)]
    by_counts = torch.cat(limits_over(parts, [bias[: m // 2]] * 2, k, kernels), dim=1)
    assert torch.equal(by_counts, want)
