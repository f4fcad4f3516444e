"""Gradient and Adam in one pass over the latents, against torch.optim.Adam with the decoder's
constraint as separate steps, and kernels against the reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import reference
from flash_sae_dist.kernels.reference import (
    AdamOptions,
    DenseRows,
    Gradients,
    HeavySums,
    LatentRows,
    PairGradients,
    PairOrder,
)
from flash_sae_dist.training.schedule_free import ScheduleFreeSign

pytest.importorskip("triton")
from flash_sae_dist.kernels import adam_scalars as small_kernels
from flash_sae_dist.kernels import centre as centre_kernels
from flash_sae_dist.kernels import sparse_adam as kernels
from flash_sae_dist.kernels import sparse_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR = 3e-3


class Case(NamedTuple):
    """Sizes of a batch of gradients, and which latents its tokens use."""

    N: int
    D: int
    F: int
    K: int
    M: int = 0  # listed latents, some with pairs and some without
    use: str = "tailed"


def gradient_squares(
    ops: ModuleType, rows: LatentRows, grads: Gradients, options: AdamOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of all latents' gradients in parts, and the encoder's sums for b_dec."""
    encoder, sums = ops.encoder_squares(rows, grads, options)
    decoder = ops.decoder_squares(rows, grads, options)
    return torch.cat([encoder.flatten(), decoder.flatten()]), sums


def make_rows(F: int, D: int, states: torch.dtype, copies: bool = True) -> LatentRows:
    gen = torch.Generator().manual_seed(F + D)
    W_enc, W_dec = (torch.randn(F, D, generator=gen) for _ in range(2))
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    W_enc, W_dec = W_enc.to(DEVICE), W_dec.to(DEVICE)
    b_enc = torch.randn(F, generator=gen).to(DEVICE)
    m, v = (
        (
            torch.zeros_like(W_enc, dtype=states),
            torch.zeros_like(b_enc),
            torch.zeros_like(W_dec, dtype=states),
        )
        for _ in range(2)
    )
    compute = (W_enc.bfloat16(), W_dec.bfloat16()) if copies else None
    return LatentRows(W_enc, b_enc, W_dec, m, v, compute)


def make_grads(case: Case, seed: int) -> Gradients:
    """Latent 0 is never used and, where any are, listed."""
    N, D, F, K, M, use = case
    gen = torch.Generator().manual_seed(seed)
    idx = (1 + torch.rand(N * K, generator=gen) ** 3 * (F - 1)).clamp_max(F - 1).to(torch.int32)
    if use == "every-token":
        idx.view(N, K)[:, 0] = F - 1
    dec, enc = (torch.randn(N * K, generator=gen) * (idx % 3 > 0) for _ in range(2))
    rows = (torch.randn(N, D, generator=gen) for _ in range(2))
    pairs = PairGradients(*(t.to(DEVICE) for t in (idx, dec, enc, *rows)), K)
    order = reference.order_pairs(pairs.latents, F, pairs.dec_coef)
    if M == 0:
        return Gradients(pairs, order)
    slots = torch.full((F,), -1, dtype=torch.int32)
    slots[torch.linspace(0, F - 1, M).long()] = torch.randperm(M, generator=gen).int()
    sums = (torch.randn(size, generator=gen) for size in ((M, D), (M, D), (M,)))
    return Gradients(pairs, order, DenseRows(*(t.to(DEVICE) for t in (slots, *sums))))


def scalars_of(step: int, scale: float = 1.0) -> Tensor:
    correction = [1 - 0.9**step, 1 - 0.999**step]
    return torch.tensor([LR / correction[0], correction[1] ** 0.5, scale, LR], device=DEVICE)


def clone(rows: LatentRows) -> LatentRows:
    def copy(t: object) -> object:
        return tuple(copy(u) for u in t) if isinstance(t, tuple) else t.clone()

    return LatentRows(*(copy(t) if t is not None else None for t in rows))


def part_of(rows: LatentRows, first: int, last: int) -> LatentRows:
    """Some of the rows, in memory of their own."""

    def cut(t: object) -> object:
        return tuple(cut(u) for u in t) if isinstance(t, tuple) else t[first:last].clone()

    return LatentRows(*(cut(t) if t is not None else None for t in rows))


def flat(rows: LatentRows) -> list[Tensor]:
    out: list[Tensor] = []
    for t in rows:
        out += list(t) if isinstance(t, tuple) else [t]
    return [t for t in out if t is not None]


def step_(
    ops: ModuleType,
    rows: LatentRows,
    grads: Gradients,
    step: int,
    options: AdamOptions,
    scale: float = 1.0,
    first_latent: int = 0,
) -> Tensor:
    """Both passes of a step; what the first returns, added up."""
    count = torch.tensor(float(step), device=DEVICE)
    args = (rows, grads, scalars_of(step, scale), count, options, first_latent)
    sums: Tensor = ops.adam_encoder_(*args)
    ops.adam_decoder_(*args)
    return sums.sum(dim=0)


def run(
    ops: ModuleType,
    rows: LatentRows,
    steps: int,
    options: AdamOptions,
    case: Case,
    scale: float = 1.0,
) -> Tensor:
    sums = torch.zeros(0)
    for step in range(1, steps + 1):
        sums = step_(ops, rows, make_grads(case, step), step, options, scale)
    return sums


def dense_of(grads: Gradients, F: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc, b_enc and W_dec in float64, from one pair and listed latent at a time."""
    pairs, D = grads.pairs, grads.pairs.dec_rows.shape[1]
    enc, dec = (torch.zeros(F, D, dtype=torch.float64, device=DEVICE) for _ in range(2))
    bias = torch.zeros(F, dtype=torch.float64, device=DEVICE)
    token = torch.arange(len(pairs.latents), device=DEVICE) // pairs.k
    at = pairs.latents.long()
    enc.index_add_(0, at, pairs.enc_coef.double()[:, None] * pairs.enc_rows.double()[token])
    dec.index_add_(0, at, pairs.dec_coef.double()[:, None] * pairs.dec_rows.double()[token])
    bias.index_add_(0, at, pairs.enc_coef.double())
    if grads.dense is not None:
        for latent, slot in enumerate(grads.dense.slots.tolist()):
            if slot >= 0:
                enc[latent] += grads.dense.enc[slot]
                dec[latent] += grads.dense.dec[slot]
                bias[latent] += grads.dense.bias[slot]
    return enc, bias, dec


def torch_adam(
    rows: LatentRows, steps: int, case: Case, scale: float = 1.0, decay: float = 0.0
) -> list[Tensor]:
    params = [t.double().clone().requires_grad_() for t in rows[:3]]
    groups = [{"params": params[::2], "weight_decay": decay}, {"params": params[1:2]}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=6.25e-10, weight_decay=0)
    for step in range(1, steps + 1):
        enc, bias, dec = dense_of(make_grads(case, step), case.F)
        W = params[2].detach()
        dec -= (dec * W).sum(1, keepdim=True) * W
        for p, g in zip(params, (enc, bias, dec), strict=True):
            p.grad = g * scale
        optimizer.step()
        with torch.no_grad():
            params[2] /= params[2].norm(dim=1, keepdim=True)
    return [p.detach() for p in params]


def test_some_listed_latents_have_pairs_and_some_have_none() -> None:
    grads = make_grads(Case(21, 20, 9, 2, 4), 1)
    assert grads.dense is not None
    listed = grads.dense.slots >= 0
    used = grads.order.offsets[1:] > grads.order.offsets[:-1]
    for among in (used & listed, used & ~listed, ~used & listed, ~used & ~listed):
        assert among.any()


@pytest.mark.parametrize(
    ("M", "scale", "decay"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (5, 0.3, 0.0), (5, 0.3, 2.0)]
)
def test_reference_equals_torch_adam_over_300_steps(M: int, scale: float, decay: float) -> None:
    case = Case(6, 12, 20, 3, M)
    rows = make_rows(20, 12, torch.float32)
    want = torch_adam(rows, 300, case, scale, decay)
    run(reference, rows, 300, AdamOptions(scaled=scale != 1, decay=decay), case, scale)
    for got, expected in zip(rows[:3], want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    assert rows.copies is not None
    assert torch.equal(rows.copies[0], rows.W_enc.bfloat16())
    assert torch.equal(rows.copies[1], rows.W_dec.bfloat16())


def descended(ops: ModuleType, case: Case, steps: int, scale: float) -> list[Tensor]:
    """Weights and z after steps of sign descent, decoder rows scaled before each, or by each."""
    rows = make_rows(case.F, case.D, torch.float32)
    z = tuple(t.clone() for t in rows[:3])
    rows = rows._replace(exp_avg=z, exp_avg_sq=z)
    by_step = scale != 1
    options = AdamOptions((0.95, 0.999), scaled=by_step, sign=True, renorm=by_step)
    for step in range(1, steps + 1):
        if not by_step:
            rows.W_dec.div_(rows.W_dec.norm(dim=1, keepdim=True))
        scalars = scalars_of(step, scale)
        scalars[1] = 1 / step
        args = (rows, make_grads(case, step), scalars, torch.tensor(float(step), device=DEVICE))
        ops.adam_encoder_(*args, options)
        ops.adam_decoder_(*args, options)
    assert rows.copies is not None
    for copy, own in zip(rows.copies, (rows.W_enc, rows.W_dec), strict=True):
        torch.testing.assert_close(copy.float(), own, rtol=2.0**-7, atol=2.0**-20)
    return [*rows[:3], *z]


SIZES = [Case(21, 20, 9, 2), Case(21, 20, 9, 2, 4, "every-token")]
SIZES += [pytest.param(Case(512, 768, 1024, 16, 30, "every-token"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_sign_descent_is_the_optimizers(ops: ModuleType, case: Case, scale: float) -> None:
    """Beside schedule-free sign descent on dense gradients in float64."""
    rows = make_rows(case.F, case.D, torch.float32)
    params = [t.double().clone().requires_grad_() for t in rows[:3]]
    optimizer, W = ScheduleFreeSign(params, LR), params[2].detach()
    for step in range(1, 6):
        W.div_(W.norm(dim=1, keepdim=True))
        enc, bias, dec = dense_of(make_grads(case, step), case.F)
        dec -= (dec * W).sum(1, keepdim=True) * W
        for param, grad in zip(params, (enc, bias, dec), strict=True):
            param.grad = grad
        optimizer.step()
        if scale != 1:
            W.div_(W.norm(dim=1, keepdim=True))
    want = [*(p.detach() for p in params), *(optimizer.state[p]["z"] for p in params)]
    for got, expected in zip(descended(ops, case, 5, scale), want, strict=True):
        # A gradient near zero has no sign to rounding.
        wrong = (got.double() - expected).abs() > 1e-5
        assert wrong.double().mean() < (2e-5 if case.D > 20 else 1e-9)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "scale"), [(0, 1.0), (4, 1.0), (4, 0.25)])
@pytest.mark.parametrize("use", ["tailed", "every-token"])
def test_kernel_equals_the_reference(
    lazy: bool,
    states: torch.dtype,
    M: int,
    scale: float,
    use: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_grad, "_MIN_HEAVY", 8)
    decay = 40.0 * (M > 0 and not lazy)  # a tenth or so a step
    case = Case(21, 20, 9, 2, M, use)
    options = AdamOptions(lazy=lazy, seed=3, scaled=scale != 1, decay=decay)
    want = make_rows(9, 20, states)
    got, again = clone(want), clone(want)
    want_sum = run(reference, want, 2, options, case, scale)
    for rows in (got, again):
        got_sum = run(kernels, rows, 2, options, case, scale)
        torch.testing.assert_close(got_sum, want_sum, rtol=1e-4, atol=1e-4)
    for a, b, c in zip(flat(got), flat(want), flat(again), strict=True):
        assert torch.equal(a, c)  # the same bits twice
        # A value on a rounding boundary may go either way in bfloat16.
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(a.float(), b.float(), rtol=tol, atol=2e-5)


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("M", [0, 4])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_part_of_the_biases_gradients_beside_pre_activations(
    ops: ModuleType, M: int, lazy: bool
) -> None:
    """Of b_enc alone: neither of W_enc nor of what b_dec gets."""
    grads, options = make_grads(Case(21, 20, 9, 2, M), 1), AdamOptions(lazy=lazy, scaled=True)
    _, bias, _ = dense_of(grads, 9)
    apart = (1 + torch.rand(9, device=DEVICE)) * (bias != 0)
    both = grads._replace(bias=apart)
    plain, got = (make_rows(9, 20, torch.float32) for _ in range(2))
    squares, sums = (gradient_squares(ops, got, given, options)[0].sum() for given in (grads, both))
    more = (bias + apart).square().sum() - bias.square().sum()
    assert float(sums - squares) == pytest.approx(float(more), rel=1e-4)
    b_dec = step_(ops, plain, grads, 1, options, 0.5)
    assert torch.equal(step_(ops, got, both, 1, options, 0.5), b_dec)
    torch.testing.assert_close(got.exp_avg[1].double(), 0.1 * 0.5 * (bias + apart).double())
    assert not torch.equal(got.b_enc, plain.b_enc)
    for a, b in zip(flat(got), flat(plain), strict=True):
        assert a.ndim == 1 or torch.equal(a, b)


def test_sums_made_ahead_are_used() -> None:
    """The same bits whether a step adds the heavy blocks itself or is handed their sums."""
    case = Case(130, 20, 9, 2, 3, "every-token")
    grads, options = make_grads(case, 1), AdamOptions()
    sums = kernels.heavy_sums(grads.order, grads.pairs, 9)
    assert isinstance(sums, HeavySums)
    assert len(sums.dec) > 0
    one, two = (make_rows(9, 20, torch.float32) for _ in range(2))
    step_(kernels, one, grads, 1, options)
    step_(kernels, two, grads._replace(sums=sums), 1, options)
    for a, b in zip(flat(one), flat(two), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("M", [0, 4])
def test_lazy_leaves_silent_latents_alone(M: int) -> None:
    rows = make_rows(9, 20, torch.float32)
    before = clone(rows)
    grads = make_grads(Case(4, 20, 9, 2, M), 1)
    step_(kernels, rows, grads, 1, AdamOptions(lazy=True))
    silent = grads.order.offsets[1:] == grads.order.offsets[:-1]
    if grads.dense is not None:
        silent &= grads.dense.slots < 0
    assert silent.any()
    for a, b in zip(flat(rows), flat(before), strict=True):
        assert torch.equal(a[silent], b[silent])
        assert a.dtype == torch.bfloat16 or not torch.equal(a[~silent], b[~silent])


@pytest.mark.parametrize("M", [0, 2])
def test_without_constraint_or_copies(M: int) -> None:
    want = make_rows(5, 11, torch.float32, copies=False)
    got, options = clone(want), AdamOptions(unit_norm=False)
    run(reference, want, 2, options, Case(4, 11, 5, 2, M))
    run(kernels, got, 2, options, Case(4, 11, 5, 2, M))
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(got.W_dec.norm(dim=1), torch.ones(5, device=DEVICE))


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("lazy", [False, True])
def test_no_pairs_and_no_listed_latents(ops: ModuleType, lazy: bool) -> None:
    """A list that became empty; a batch whose activations are all 0."""
    F, D, N, K = 6, 20, 3, 2
    zeros = torch.zeros(N * K, device=DEVICE)
    rows_of = torch.randn(N, D, device=DEVICE)
    pairs = PairGradients(zeros.int(), zeros, zeros, rows_of, rows_of, K)
    order = reference.order_pairs(pairs.latents, F, pairs.dec_coef)
    none = torch.zeros(0, D, device=DEVICE)
    slots = torch.full((F,), -1, dtype=torch.int32, device=DEVICE)
    grads = Gradients(pairs, order, DenseRows(slots, none, none, none[:, 0]))
    rows = make_rows(F, D, torch.float32)
    before = clone(rows)
    squares, sums = gradient_squares(ops, rows, grads, AdamOptions(lazy=lazy))
    assert squares.sum() == 0
    assert (sums.sum(dim=0) == 0).all()
    assert (step_(ops, rows, grads, 1, AdamOptions(lazy=lazy)) == 0).all()
    for a, b in zip(flat(rows), flat(before), strict=True):
        torch.testing.assert_close(a, b)


def assert_squares(ops: ModuleType, case: Case, options: AdamOptions) -> None:
    """Against dense gradients; nothing is changed, and the sums are those of the step."""
    rows, grads = make_rows(case.F, case.D, torch.float32), make_grads(case, 7)
    before = clone(rows)
    squares, sums = gradient_squares(ops, rows, grads, options)
    again = gradient_squares(ops, rows, grads, options)
    assert torch.equal(squares, again[0])
    assert torch.equal(sums, again[1])
    for a, b in zip(flat(rows), flat(before), strict=True):
        assert torch.equal(a, b)
    enc, bias, dec = dense_of(grads, case.F)
    W = rows.W_dec.double()
    if options.unit_norm:
        dec -= (dec * W).sum(1, keepdim=True) * W
    want = sum(float(t.square().sum()) for t in (enc, bias, dec))
    assert float(squares.double().sum()) == pytest.approx(want, rel=1e-5)
    want_sums = bias @ rows.W_enc.double()
    torch.testing.assert_close(sums.double().sum(dim=0), want_sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        step_(ops, rows, grads, 1, options), sums.sum(dim=0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("M", [0, 4])
@pytest.mark.parametrize("use", ["tailed", "every-token"])
@pytest.mark.parametrize(
    "options", [AdamOptions(), AdamOptions(lazy=True), AdamOptions(unit_norm=False)]
)
def test_gradient_squares(
    ops: ModuleType, M: int, use: str, options: AdamOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_grad, "_MIN_HEAVY", 8)
    assert_squares(ops, Case(21, 20, 9, 2, M, use), options)


def test_gradient_squares_of_several_blocks_of_columns() -> None:
    """A bias's square is counted once."""
    assert_squares(kernels, Case(9, 300, 7, 2, 3), AdamOptions())


def half_of(grads: Gradients, first: int, last: int) -> Gradients:
    """The gradients of some latents, as the shard that holds them forms them."""
    pairs, F = grads.pairs, last - first
    own = (pairs.latents >= first) & (pairs.latents < last)
    pairs = pairs._replace(
        latents=(pairs.latents - first).where(own, 0),
        dec_coef=pairs.dec_coef * own,
        enc_coef=pairs.enc_coef * own,
    )
    order: PairOrder = reference.order_pairs(pairs.latents, F, pairs.dec_coef)
    dense = grads.dense
    if dense is not None:
        dense = dense._replace(slots=dense.slots[first:last].contiguous())
    return Gradients(pairs, order, dense)


def whole_numbers(grads: Gradients) -> Gradients:
    """Gradients of pairs whose sums are exact, in whatever order they are added."""
    pairs, F = grads.pairs, len(grads.order.offsets) - 1
    pairs = PairGradients(*(t.round() for t in pairs[:5]), pairs.k)
    pairs = pairs._replace(enc_coef=pairs.enc_coef * (pairs.dec_coef != 0))
    order = reference.order_pairs(pairs.latents, F, pairs.dec_coef)
    return grads._replace(pairs=pairs, order=order)


def assert_rounds_alike_by_halves(ops: ModuleType, case: Case) -> None:
    """bfloat16 moments, bit for bit, whatever the number of shards."""
    F, options = case.F, AdamOptions(seed=11)
    whole = make_rows(F, case.D, torch.bfloat16)
    middle = F // 2
    halves = [part_of(whole, 0, middle), part_of(whole, middle, F)]
    for step in range(1, 4):
        grads = whole_numbers(make_grads(case, step))
        step_(ops, whole, grads, step, options)
        for rows, first, last in zip(halves, (0, middle), (middle, F), strict=True):
            step_(ops, rows, half_of(grads, first, last), step, options, first_latent=first)
    for a, *b in zip(flat(whole), *map(flat, halves), strict=True):
        assert torch.equal(a, torch.cat(b))
    # Rounded by the local row they differ.
    other = part_of(make_rows(F, case.D, torch.bfloat16), middle, F)
    step_(ops, other, half_of(make_grads(case, 1), middle, F), 1, options)
    right = part_of(make_rows(F, case.D, torch.bfloat16), middle, F)
    step_(ops, right, half_of(make_grads(case, 1), middle, F), 1, options, first_latent=middle)
    assert not torch.equal(other.exp_avg[0], right.exp_avg[0])
    assert not torch.equal(other.exp_avg_sq[2], right.exp_avg_sq[2])


@pytest.mark.parametrize("ops", [reference, kernels])
def test_halves_round_as_the_whole(ops: ModuleType) -> None:
    assert_rounds_alike_by_halves(ops, Case(16, 20, 9, 2, 4))


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
    for implementation in (small_kernels, reference):
        count = torch.tensor(float(step), device=DEVICE)
        out = torch.empty(4, device=DEVICE)
        implementation.adam_scalars_(count, lr, betas, out)
        assert count == step + 1
        torch.testing.assert_close(out, scalars_of(step + 1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_vector_adam(scale: float) -> None:
    want = [torch.randn(300, device=DEVICE) for _ in range(3)]
    want[2].abs_()
    grad, got = torch.randn(300, device=DEVICE), [t.clone() for t in want]
    reference.adam_vector_(*want, grad, scalars_of(4, scale), AdamOptions())
    small_kernels.adam_vector_(*got, grad, scalars_of(4, scale), AdamOptions())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_firing_counters() -> None:
    acts = torch.tensor([[1.0, 0.0], [2.0, 3.0]], device=DEVICE)
    idx = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32, device=DEVICE)
    for implementation in (small_kernels, reference):
        counter = torch.full((5,), 10, device=DEVICE)
        implementation.count_fired_(counter, acts, idx, 2)
        assert counter.tolist() == [0, 12, 12, 0, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centre(dtype: torch.dtype) -> None:
    x, b = torch.randn(37, 150, device=DEVICE).to(dtype) + 3, torch.randn(150, device=DEVICE) + 3
    want, *_ = reference.centre(x, b, dtype)
    want_variance = (x.float() - x.float().mean(0)).square().sum()
    got, *parts = centre_kernels.centre(x, b, dtype)
    sums, squares = parts[0].sum(dim=0), parts[1].sum()
    variance = squares - sums.square().sum() / 37
    # Triton's interpreter truncates where the GPU rounds to bfloat16: up to a whole unit apart.
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(variance, want_variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("M", [0, 4])
def test_encoder_and_decoder_of_other_widths(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transcoder's, blocks of a frequent latent's pairs too."""
    monkeypatch.setattr(sparse_grad, "_MIN_HEAVY", 8)
    F, into, out = 9, 40, 20
    a, b = make_rows(F, into, torch.float32), make_rows(F, out, torch.float32)
    assert a.copies is not None
    assert b.copies is not None
    moments = [(*one[:2], other[2]) for one, other in zip(a[3:5], b[3:5], strict=True)]
    want = LatentRows(a.W_enc, a.b_enc, b.W_dec, *moments, (a.copies[0], b.copies[1]))
    got, options = clone(want), AdamOptions(unit_norm=False)
    for step in (1, 2):
        wide, narrow = (make_grads(Case(40, D, F, 2, M, "every-token"), step) for D in (into, out))
        pairs = wide.pairs._replace(dec_rows=narrow.pairs.dec_rows)
        dense = None
        if wide.dense is not None and narrow.dense is not None:
            dense = wide.dense._replace(dec=narrow.dense.dec)
        grads = Gradients(pairs, wide.order, dense)
        both = ((reference, want), (kernels, got))
        sums = [step_(ops, rows, grads, step, options) for ops, rows in both]
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(flat(got), flat(want), strict=True):
        tol = 2.0**-7 if theirs.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tol, atol=2e-5)


@pytest.mark.parametrize(
    ("M", "scale", "lazy", "decay"),
    [(0, 1.0, False, 40.0), (4, 0.25, True, 0.0)],
)
@pytest.mark.parametrize("unit_norm", [True, False])
def test_wide_rows_are_done_in_blocks(
    M: int,
    scale: float,
    lazy: bool,
    decay: float,
    unit_norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that do not fill the row, and bfloat16 moments, which are rounded by their place; with
    AdamW's decay a tenth or so a step.
    """
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 16)
    monkeypatch.setattr(kernels, "_WIDE_BLOCK", 16)
    case = Case(21, 40, 9, 2, M, "every-token")
    options = AdamOptions(lazy=lazy, seed=3, scaled=scale != 1, unit_norm=unit_norm, decay=decay)
    want = make_rows(9, 40, torch.bfloat16)
    got = clone(want)
    run(reference, want, 2, options, case, scale)
    run(kernels, got, 2, options, case, scale)
    for a, b in zip(flat(got), flat(want), strict=True):
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(a.float(), b.float(), rtol=tol, atol=2e-5)
    assert_squares(kernels, case, options)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [20480, 36000])
def test_wide_rows(D: int) -> None:
    case, options = Case(64, D, 128, 8, 30, "every-token"), AdamOptions()
    want = make_rows(128, D, torch.float32)
    got = clone(want)
    run(reference, want, 2, options, case)
    run(kernels, got, 2, options, case)
    for a, b in zip(flat(got), flat(want), strict=True):
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-4
        wrong = (a.float() - b.float()).abs() > 5e-5 + tol * b.float().abs()
        assert wrong.float().mean() < 2e-5
    assert_squares(kernels, case, options)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 100])
def test_kernel_equals_torch_adam_over_300_steps(M: int) -> None:
    case = Case(64, 768, 512, 8, M)
    rows = make_rows(512, 768, torch.float32)
    want = torch_adam(rows, 300, case)
    run(kernels, rows, 300, AdamOptions(), case)
    for got, expected in zip(rows[:3], want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 2304, 4096])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "scale"), [(0, 1.0), (300, 0.25)])
def test_real_widths(D: int, states: torch.dtype, M: int, scale: float) -> None:
    want = make_rows(1024, D, states)
    got, again = clone(want), clone(want)
    case, options = Case(512, D, 1024, 16, M, "every-token"), AdamOptions(scaled=scale != 1)
    run(reference, want, 2, options, case, scale)
    run(kernels, got, 2, options, case, scale)
    run(kernels, again, 2, options, case, scale)
    for a, b, c in zip(flat(got), flat(want), flat(again), strict=True):
        assert torch.equal(a, c)
        # A gradient near zero has no sign to rounding, and a value on a bfloat16 boundary goes
        # either way: some elements in a million may differ.
        tol = 2.0**-7 if b.dtype == torch.bfloat16 else 2e-4
        wrong = (a.float() - b.float()).abs() > 5e-5 + tol * b.float().abs()
        assert wrong.float().mean() < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 2304, 4096])
@pytest.mark.parametrize("lazy", [False, True])
def test_gradient_squares_at_real_widths(D: int, lazy: bool) -> None:
    assert_squares(kernels, Case(512, D, 1024, 16, 300, "every-token"), AdamOptions(lazy=lazy))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 2304, 4096])
def test_halves_round_as_the_whole_at_real_widths(D: int) -> None:
    assert_rounds_alike_by_halves(kernels, Case(256, D, 1024, 8, 300, "every-token"))


@pytest.mark.parametrize("ops", [reference, small_kernels])
@pytest.mark.parametrize("norm", [0.5, 40.0])
def test_clipping_factor_is_torchs(ops: ModuleType, norm: float) -> None:
    grads = [torch.randn(n, device=DEVICE) for n in (300, 70)]
    scale = norm / torch.cat(grads).norm()
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        g *= scale
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    scalars = scalars_of(3)
    squares = grads[1].square().sum() * torch.tensor([0.25, 0.75], device=DEVICE)
    over_encoder = torch.randn_like(grads[0])
    grad = ops.clip_(grads[0] + over_encoder, over_encoder, squares, 1.0, scalars)
    torch.testing.assert_close(grad * scalars[2], params[0].grad, rtol=1e-4, atol=1e-6)
    assert (scalars[2] == 1) == (norm < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_sums(dtype: torch.dtype) -> None:
    x = (torch.randn(37, 150, device=DEVICE) + 1).to(dtype)
    for ops in (reference, centre_kernels):
        sums, squares = ops.token_sums(x)
        torch.testing.assert_close(sums.sum(0), x.float().sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(squares.sum(), x.float().square().sum(), rtol=1e-5, atol=0)
