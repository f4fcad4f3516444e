"""Gradient and Adam in one pass over the latents, against torch.optim.Adam with the decoder's
constraint as separate steps, and kernels against the reference.
"""

from __future__ import annotations

import pytest
import torch

from flash_sae_dist.kernels import reference
from flash_sae_dist.kernels.reference import AdamOptions, LatentRows, Pairs

pytest.importorskip("triton")
from flash_sae_dist.kernels import centre as centre_kernels
from flash_sae_dist.kernels import sparse_adam as kernels
from flash_sae_dist.kernels import sparse_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR = 3e-3


def make_rows(F: int, D: int, states: torch.dtype, copies: bool = True) -> LatentRows:
    gen = torch.Generator().manual_seed(F + D)
    W_enc, W_dec = (torch.randn(F, D, generator=gen) for _ in range(2))
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    params = [W_enc.to(DEVICE), torch.randn(F, generator=gen).to(DEVICE), W_dec.to(DEVICE)]
    moments = [
        tuple(torch.zeros_like(p, dtype=states if p.ndim == 2 else torch.float32) for p in params)
        for _ in range(2)
    ]
    compute = (params[0].bfloat16(), params[2].bfloat16()) if copies else None
    return LatentRows(*params, *moments, compute)


def make_pairs(
    N: int, D: int, F: int, K: int, K2: int, seed: int, use: str = "tailed"
) -> tuple[Pairs, reference.PairOrder]:
    gen = torch.Generator().manual_seed(seed)
    P = N * (K + K2)
    idx = (torch.rand(P, generator=gen) ** 3 * F).to(torch.int32)
    if use == "every-token":
        idx[: N * K].view(N, K)[:, 0] = F - 1
    dec, enc = (torch.randn(P, generator=gen) * (idx % 3 > 0) for _ in range(2))
    dec_rows = torch.randn(N * (2 if K2 else 1), D, generator=gen)
    enc_rows = torch.randn(N, D, generator=gen)
    tensors = [t.to(DEVICE) for t in (idx, dec, enc, dec_rows, enc_rows)]
    pairs = Pairs(*tensors, (N, K, K2))
    order = reference.order_pairs(pairs.indices, F, pairs.dec_coef)
    return pairs, order


def scalars_of(step: int) -> torch.Tensor:
    correction = [1 - 0.9**step, 1 - 0.999**step]
    return torch.tensor([LR / correction[0], correction[1] ** 0.5], device=DEVICE)


def clone(rows: LatentRows) -> LatentRows:
    def copy(t: object) -> object:
        return tuple(copy(u) for u in t) if isinstance(t, tuple) else t.clone()

    return LatentRows(*(copy(t) if t is not None else None for t in rows))


def flat(rows: LatentRows) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    for t in rows:
        out += list(t) if isinstance(t, tuple) else [t]
    return [t for t in out if t is not None]


def run(
    step_fn, rows: LatentRows, steps: int, options: AdamOptions, shape, use="tailed"
) -> torch.Tensor:
    N, D, F, K, K2 = shape
    for step in range(1, steps + 1):
        pairs, order = make_pairs(N, D, F, K, K2, step, use)
        count = torch.tensor(float(step), device=DEVICE)
        sums: list[torch.Tensor] = []
        step_fn(rows, pairs, order, scalars_of(step), count, options, sums.append)
    return sums[0].sum(dim=0)


def torch_adam(rows: LatentRows, steps: int, shape) -> list[torch.Tensor]:
    N, D, F, K, K2 = shape
    params = [t.double().clone().requires_grad_() for t in rows[:3]]
    optimizer = torch.optim.Adam(params, lr=LR, eps=6.25e-10)
    for step in range(1, steps + 1):
        pairs, _ = make_pairs(N, D, F, K, K2, step)
        grad_b = reference.scatter_values(pairs.enc_coef, pairs.indices, F)
        enc, dec = reference.pair_gradients(pairs, F)
        W = params[2].detach()
        dec = dec.double() - (dec * W).sum(1, keepdim=True) * W
        for p, g in zip(params, (enc, grad_b, dec), strict=True):
            p.grad = g.double()
        optimizer.step()
        with torch.no_grad():
            params[2] /= params[2].norm(dim=1, keepdim=True)
    return [p.detach() for p in params]


def test_reference_equals_torch_adam_over_300_steps() -> None:
    shape = (6, 12, 20, 3, 0)
    rows = make_rows(20, 12, torch.float32)
    want = torch_adam(rows, 300, shape)
    run(reference.sparse_adam_step_, rows, 300, AdamOptions(), shape)
    for got, expected in zip(rows[:3], want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    assert rows.copies is not None
    assert torch.equal(rows.copies[1], rows.W_dec.bfloat16())


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K2", [0, 2])
@pytest.mark.parametrize("use", ["tailed", "every-token"])
def test_kernel_equals_the_reference(
    lazy: bool, states: torch.dtype, K2: int, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_grad, "_MIN_HEAVY", 8)
    shape, options = (21, 20, 9, 2, K2), AdamOptions(lazy=lazy, seed=3)
    want = make_rows(9, 20, states)
    got, again = clone(want), clone(want)
    want_sum = run(reference.sparse_adam_step_, want, 3, options, shape, use)
    for rows in (got, again):
        got_sum = run(kernels.sparse_adam_step_, rows, 3, options, shape, use)
        torch.testing.assert_close(got_sum, want_sum, rtol=1e-4, atol=1e-4)
    for a, b, c in zip(flat(got), flat(want), flat(again), strict=True):
        assert torch.equal(a, c)  # the same bits twice
        # A value on a rounding boundary may go either way in bfloat16.
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(a.float(), b.float(), rtol=tol, atol=2e-5)


def test_lazy_leaves_silent_latents_alone() -> None:
    rows = make_rows(9, 20, torch.float32)
    before = clone(rows)
    pairs, order = make_pairs(4, 20, 9, 2, 0, 1)
    step = torch.tensor(1.0, device=DEVICE)
    options = AdamOptions(lazy=True)
    kernels.sparse_adam_step_(rows, pairs, order, scalars_of(1), step, options, lambda sums: None)
    silent = order.offsets[1:] == order.offsets[:-1]
    assert silent.any()
    for a, b in zip(flat(rows), flat(before), strict=True):
        assert torch.equal(a[silent], b[silent])
        assert a.dtype == torch.bfloat16 or not torch.equal(a[~silent], b[~silent])


def test_without_constraint_or_copies() -> None:
    want = make_rows(5, 11, torch.float32, copies=False)
    got, options = clone(want), AdamOptions(unit_norm=False)
    run(reference.sparse_adam_step_, want, 2, options, (4, 11, 5, 2, 0))
    run(kernels.sparse_adam_step_, got, 2, options, (4, 11, 5, 2, 0))
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(got.W_dec.norm(dim=1), torch.ones(5, device=DEVICE))


def test_stochastic_rounding_is_unbiased() -> None:
    x = torch.full((256, 256), 1.0 + 2.0**-10)  # a quarter of the way to bf16's next value
    bits = reference.random_bits(7, torch.tensor(5.0), 0, 256, 256)
    rounded = reference.round_stochastic(x, bits & 0xFFFF).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs((rounded > 1).float().mean().item() - 0.125) < 0.005
    again = reference.random_bits(7, torch.tensor(6.0), 0, 256, 256)
    assert ((bits & 0xFFFF) == (again & 0xFFFF)).float().mean() < 1e-3
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    out = reference.round_stochastic(special, torch.full((4,), 0xFFFF))
    assert out[0] == torch.inf
    assert out[1] == -torch.inf
    assert out[2].isnan()


@pytest.mark.parametrize("step", [0, 1, 9, 999, 123456])
def test_scalars(step: int) -> None:
    lr = torch.tensor(LR, device=DEVICE)
    betas = torch.tensor([0.9, 0.999], dtype=torch.float64, device=DEVICE)
    for implementation in (kernels, reference):
        count = torch.tensor(float(step), device=DEVICE)
        out = torch.empty(2, device=DEVICE)
        implementation.adam_scalars_(count, lr, betas, out)
        assert count == step + 1
        torch.testing.assert_close(out, scalars_of(step + 1), rtol=3e-7, atol=0)


def test_vector_adam() -> None:
    want = [torch.randn(300, device=DEVICE) for _ in range(3)]
    want[2].abs_()
    grad, got = torch.randn(300, device=DEVICE), [t.clone() for t in want]
    reference.adam_vector_(*want, grad, scalars_of(4), AdamOptions())
    kernels.adam_vector_(*got, grad, scalars_of(4), AdamOptions())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_firing_counters() -> None:
    acts = torch.tensor([[1.0, 0.0], [2.0, 3.0]], device=DEVICE)
    idx = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32, device=DEVICE)
    for implementation in (kernels, reference):
        counter = torch.full((5,), 10, device=DEVICE)
        implementation.count_fired_(counter, acts, idx, 2)
        assert counter.tolist() == [0, 12, 12, 0, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centre(dtype: torch.dtype) -> None:
    x, b = torch.randn(37, 150, device=DEVICE).to(dtype) + 3, torch.randn(150, device=DEVICE) + 3
    want, *_ = reference.centre(x, b, dtype)
    want_variance = (x.float() - x.float().mean(0)).square().sum()
    got, *parts = centre_kernels.centre(x, b, dtype)
    variance = reference.variance_of(*parts, 37)
    # Triton's interpreter truncates where the GPU rounds to bfloat16: up to a whole unit apart.
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(variance, want_variance, rtol=1e-5, atol=0)


def test_wide_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="16384"):
        kernels._decoder_blocks(20000)


@pytest.mark.gpu
def test_kernel_equals_torch_adam_over_300_steps() -> None:
    shape = (64, 768, 512, 8, 0)
    rows = make_rows(512, 768, torch.float32)
    want = torch_adam(rows, 300, shape)
    run(kernels.sparse_adam_step_, rows, 300, AdamOptions(), shape)
    for got, expected in zip(rows[:3], want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 2304, 4096])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_real_widths(D: int, states: torch.dtype) -> None:
    want = make_rows(1024, D, states)
    got, shape = clone(want), (512, D, 1024, 16, 8)
    run(reference.sparse_adam_step_, want, 2, AdamOptions(), shape, "every-token")
    run(kernels.sparse_adam_step_, got, 2, AdamOptions(), shape, "every-token")
    for a, b in zip(flat(got), flat(want), strict=True):
        # A gradient near zero has no sign to rounding, and a value on a bfloat16 boundary goes
        # either way: some elements in a million may differ.
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-4
        wrong = (a.float() - b.float()).abs() > 5e-5 + tol * b.float().abs()
        assert wrong.float().mean() < 2e-5
