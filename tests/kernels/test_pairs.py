"""Flat lists of (token, latent, value): the batch rule and the threshold rule against definitions
written another way, their gradients, and the decoder over what they give.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sae_dist.kernels import dispatch, eager, ops, reference, reference_encode
from flash_sae_dist.kernels.reference import (
    AdamOptions,
    Gradients,
    LatentRows,
    PairGradients,
    Pairs,
)

pytest.importorskip("triton")
from flash_sae_dist.kernels import dense_grad, pair_order, sparse_adam, sparse_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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
    none, number = ops.threshold_encode(torch.empty(0, 12), pre, pre[:, 0], 0.0, 0)
    assert none.offsets.tolist() == [0]
    assert number == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selection_is_float32_whatever_the_products_are(dtype: torch.dtype) -> None:
    """Values that differ in float32 alone are told apart."""
    x, W, b = torch.randn(9, 16).to(dtype), torch.randn(30, 16).to(dtype), torch.randn(30)
    acts = (x.float() @ W.float().T + b).relu()
    batch = ops.batch_topk_encode(x, W, b, 4)
    above, _ = ops.threshold_encode(x, W, b, float(acts.flatten().topk(37).values[-1]), 270)
    for pairs, count in ((batch, 36), (above, 36)):
        assert pairs.values.dtype == torch.float32
        assert listed(pairs) == brute_batch(acts, count)


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
    above, number = ops.threshold_encode(x, W, torch.zeros(9), 1e9, 45)
    assert int(above.num_pairs) == number == 45


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
        pairs, number = ops.threshold_encode(*of_pre(pre), given_limit, capacity)
        assert listed(pairs) == want
        assert number == len(want)
    pairs, number = ops.threshold_encode(*of_pre(pre), given_limit, len(want) - 1)
    assert listed(pairs) == want[:-1]
    assert number.dtype == torch.int32
    assert number == len(want)


def case(
    counts: list[int], d: int, f: int, unused: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Pairs, Tensor, Tensor]:
    """A list in which tokens have so many pairs, some of value 0; W, and a row for each token."""
    gen = torch.Generator().manual_seed(sum(counts) + d)
    n, total = len(counts), sum(counts)
    tokens = torch.arange(n).repeat_interleave(torch.tensor(counts))
    latents = torch.cat([torch.randperm(f, generator=gen)[:c] for c in counts])
    values = torch.rand(total, generator=gen) * (torch.rand(total, generator=gen) > 0.2)
    padded = [torch.nn.functional.pad(t, (0, unused)) for t in (tokens, latents, values)]
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    W, rows = (torch.randn(size, d, generator=gen).to(DEVICE, dtype) for size in (f, n))
    return (
        Pairs(*(t.int().to(DEVICE) for t in padded[:2]), padded[2].to(DEVICE),
              offsets.int().to(DEVICE)),
        W, rows,
    )  # fmt: skip


CASES = {
    "empty-tokens": ([0, 3, 0, 0, 9, 1, 0], 33, 11, 5),
    "one-has-all": ([0, 20, 0], 40, 20, 0),
    "none-at-all": ([0, 0], 16, 4, 7),
    "full": ([2, 2, 2], 8, 5, 0),
    "heavy": ([1] * 130, 20, 1, 40),  # blocks of 64 pairs that belong to one latent
}
REAL = {
    "gpt2": ([32] * 200 + [0, 4000] + [7] * 300, 768, 24576, 5000),
    "wide": ([64] * 64 + [0] * 32 + [3000], 4096, 65536, 100),
}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest value, NaN never."""
    eps = torch.finfo(dtype).eps
    assert got.shape == want.shape
    largest = want.double().abs().max() if want.numel() else 0
    assert ((got.double() - want.double()).abs() <= 16 * eps * largest + 1e-30).all()


def check_kernels(pairs: Pairs, W: Tensor, rows: Tensor) -> None:
    """Decoder, dots, coefficients, gradients and both passes of Adam."""
    n, dtype = int(pairs.num_pairs), W.dtype
    values, latents, flat = pairs.values, pairs.latents, (pairs.tokens, pairs.offsets)
    wide = [t.double() for t in (values, W, rows)]
    recon = reference.sparse_decode(wide[0], latents, wide[1], *flat)
    close(sparse_decode.sparse_decode(values, latents, W, *flat), recon, dtype)
    dots = sparse_decode.gathered_dots(rows, latents, W, *flat)
    close(dots, reference.gathered_dots(wide[2], latents, wide[1], *flat), torch.float32)
    assert not dots[n:].any()
    scale, b_dec = torch.tensor(0.7, device=DEVICE), torch.randn(W.shape[1], device=DEVICE)
    x = torch.randn(rows.shape, device=DEVICE)
    got = sparse_decode.decode_coefs(values, latents, W, b_dec, x, scale, *flat)
    want = reference.decode_coefs(values, latents, W, b_dec, x, scale, *flat)
    close(got[0], want[0], dtype)
    close(got[1].sum(), want[1].sum(), torch.float32)
    again = sparse_decode.pair_coefs(values, latents, W, got[0], scale, *flat)
    for coefs in (got[2:4], again):
        expected = reference.pair_coefs(values, latents, W, got[0], scale, *flat)
        for one, other in zip(coefs, expected, strict=True):
            close(one, other, torch.float32)
            assert not one[n:].any()
    grad = dense_grad.scatter_rows(values, latents, rows, len(W), tokens=pairs.tokens)
    close(grad, reference.scatter_rows(wide[0], latents, wide[2], len(W), tokens=pairs.tokens),
          torch.float32)  # fmt: skip
    check_adam(pairs, got[2], got[3], W, got[0], rows)


def check_adam(
    pairs: Pairs, dec: Tensor, enc: Tensor, W: Tensor, dec_rows: Tensor, enc_rows: Tensor
) -> None:
    """Squares of the gradients, and a step that shows them in the moments."""
    gradients = PairGradients(pairs.latents, dec, enc, dec_rows, enc_rows, 0, pairs.tokens)
    grads = Gradients(gradients, pair_order.order_pairs(pairs.latents, len(W), dec))
    scalars, step = (
        torch.tensor([1e-3, 1.0, 1.0, 1e-3], device=DEVICE),
        torch.ones((), device=DEVICE),
    )
    results = []
    for implementation in (sparse_adam, reference):
        unit = torch.nn.functional.normalize(W.float(), dim=1)
        masters = (unit, torch.zeros_like(unit[:, 0]), unit.clone())
        moments = [tuple(torch.zeros_like(t) for t in masters) for _ in "mv"]
        latent_rows = LatentRows(*masters, *moments, None)
        args = (latent_rows, grads, AdamOptions())
        squares, weighted = implementation.encoder_squares(*args)
        found = [squares.sum(), weighted.sum(0), implementation.decoder_squares(*args).sum()]
        step_args = (latent_rows, grads, scalars, step, AdamOptions())
        implementation.adam_encoder_(*step_args)
        implementation.adam_decoder_(*step_args)
        results.append([*found, *moments[0], *moments[1]])
    for got, want in zip(*results, strict=True):
        close(got, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_flat_lists_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernels(*case(*CASES[name], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_kernels_of_flat_lists_at_real_shapes(name: str) -> None:
    check_kernels(*case(*REAL[name], torch.bfloat16))


def test_a_rectangle_is_a_flat_list_to_the_bit() -> None:
    """The kernels add in the same order."""
    pairs, W, rows = case([17] * 6, 70, 23)
    shape, flat = (6, 17), (pairs.tokens, pairs.offsets)
    scale, b_dec = torch.tensor(0.7, device=DEVICE), torch.randn(70, device=DEVICE)
    found = []
    for as_list in (True, False):
        values, latents = (t if as_list else t.view(shape) for t in (pairs.values, pairs.latents))
        kind = flat if as_list else ()
        got = [
            sparse_decode.sparse_decode(values, latents, W, *kind),
            sparse_decode.gathered_dots(rows, latents, W, *kind),
            *sparse_decode.decode_coefs(values, latents, W, b_dec, rows, scale, *kind),
            *sparse_decode.pair_coefs(values, latents, W, rows, scale, *kind),
            dense_grad.scatter_rows(values, latents, rows, 23, tokens=kind[0] if kind else None),
        ]
        found.append([t.flatten() for t in got])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def parameters() -> tuple[Tensor, ...]:
    shapes = [(7, 5), (11, 5), (11,), (5,)]
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


RULES = {
    "batch": lambda x, W, b, d: ops.batch_topk_encode(x, W, b, 3, b_dec=d),
    "threshold": lambda x, W, b, d: ops.threshold_encode(x, W, b, 0.2, 90, b_dec=d)[0],
}


@pytest.mark.parametrize("rule", RULES)
def test_gradients_and_compiling(rule: str) -> None:
    def loss(x: Tensor, W: Tensor, b: Tensor, d: Tensor) -> Tensor:
        pairs = RULES[rule](x, W, b, d)
        recon = ops.sparse_decode(pairs.values, pairs.latents, W, pairs.tokens, pairs.offsets)
        return (recon * torch.arange(5)).sin().sum()

    args = parameters()
    assert torch.autograd.gradcheck(loss, args)
    x, W, b, d = args
    pairs = RULES[rule](*args)
    assert int(pairs.num_pairs) > 0
    mask = torch.zeros(7, 11, dtype=torch.bool)
    used = slice(int(pairs.num_pairs))
    mask[pairs.tokens[used].long(), pairs.latents[used].long()] = True
    dense = (((x - d) @ W.T + b).relu() * mask) @ W
    want = torch.autograd.grad((dense * torch.arange(5)).sin().sum(), args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (loss(*args), compiled(*args)):
        for got, expected in zip(torch.autograd.grad(value, args), want, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_kernels_under_autograd(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interpreter: the order that both gradients share leaves unused slots out."""
    for module in (ops, dispatch, eager):
        monkeypatch.setattr(module, "use_kernels", lambda like: like.dtype == torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = []

    def beside(*args: Any) -> tuple[Any, None]:
        made.append(eager._order_of(*args))
        return made[-1], None

    monkeypatch.setattr(eager, "_order_beside", beside)
    args = tuple(t.detach().float().to(DEVICE).requires_grad_() for t in parameters())

    def loss(*given: Tensor) -> Tensor:
        pairs = RULES[rule](*given)
        flat = (pairs.tokens, pairs.offsets)
        return ops.sparse_decode(pairs.values, pairs.latents, given[1], *flat).square().sum()

    for compiler in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if compiler:
                patch.setattr(eager, "applies", lambda *tensors: False)
            got = torch.autograd.grad(loss(*args), args)
        assert len(made) == 1
        assert int(made[0].offsets[-1]) == int(RULES[rule](*args).num_pairs)
        wide = tuple(t.detach().double().cpu().requires_grad_() for t in args)
        want = torch.autograd.grad(loss(*wide), wide)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.cpu(), other.float(), rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    x, W, b, d = (t.detach().float() for t in parameters())
    pairs = ops.batch_topk_encode(x, W, b, 3)
    flat = (pairs.tokens, pairs.offsets)
    torch.library.opcheck(ops._batch_topk_encode, (x, W, b, d, 3))
    torch.library.opcheck(ops._threshold_encode, (x, W, b, d, torch.tensor(0.1), 40))
    torch.library.opcheck(ops._sparse_decode, (pairs.values, pairs.latents, W, *flat))
    torch.library.opcheck(ops._gathered_dots, (x, pairs.latents, W, *flat))


@pytest.mark.parametrize(
    ("threshold", "capacity", "words"),
    [(torch.zeros(10), 5, r"\[11\].*\[10\]"), (torch.zeros(1, 11), 5, r"\[1, 11\]"),
     (0.0, 0, "capacity=0")],
)  # fmt: skip
def test_bad_input_is_named(threshold: Tensor | float, capacity: int, words: str) -> None:
    x, W, b, _ = parameters()
    with pytest.raises(ValueError, match=words):
        ops.threshold_encode(x, W, b, threshold, capacity)
    with pytest.raises(ValueError, match="both"):
        ops.sparse_decode(b, torch.zeros(11).int(), W, torch.zeros(11).int())
    with pytest.raises(ValueError, match="k=12"):
        ops.batch_topk_encode(x, W, b, 12)
