"""The encoder kernels: exact on any data, by the interpreter at small sizes and on the GPU at real
ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import encode_plan, ops, reference
from flash_sae_dist.kernels.encode_plan import Plan

triton = pytest.importorskip("triton")
from flash_sae_dist.kernels import encode, encode_filter, encode_rows, encode_select  # noqa: E402

KINDS = [
    "normal", "heavy", "ascending", "descending", "equal", "group", "few", "trained", "negative",
    "twins",
]  # fmt: skip


def make(kind: str, N: int, D: int, F: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, W_enc, b_enc whose activations are distributed as `kind` says."""
    g = torch.Generator().manual_seed(len(kind))
    x = torch.randn(N, D, generator=g)
    W = torch.randn(F, D, generator=g) / D**0.5
    b = 0.1 * torch.randn(F, generator=g)
    if kind == "heavy":
        W *= torch.randn(F, 1, generator=g).abs().clamp_min(1e-3) ** -1.0
    elif kind in ("ascending", "descending"):
        b = torch.linspace(0, 1000, F)
        W *= 0.01
        if kind == "descending":
            b = b.flip(0)
    elif kind == "equal":
        W, b = torch.zeros(F, D), torch.ones(F)
    elif kind == "group":
        b[F // 2 : F // 2 + 64] += 50
    elif kind == "twins":
        # Where one of a pair of neighbours passes, both do.
        W, b = (t[torch.arange(F) // 2] for t in (W, b))
    elif kind == "trained":
        # As in an SAE on a language model: of most rows some hundred are positive, of some fewer
        # than k, of some thousands.
        x *= torch.exp(0.25 * torch.randn(N, 1, generator=g))
        b -= 2.6
    elif kind == "few":
        b -= 4.5
    elif kind == "negative":
        W, b = W * 0.01, torch.full((F,), -1.0)
    return x.to(device, dtype), W.to(device, dtype), b.to(device)


def assert_exact(x: Tensor, W: Tensor, b: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """Against float64: nothing wrong selected, nothing missed; sorted, and distinct."""
    raw = x.double() @ W.double().T + b.double()
    pre = raw.relu()
    kth = pre.topk(k, dim=1).values[:, -1:]
    slack = 1e-5 * (x.double().abs() @ W.double().abs().T + b.double().abs()).amax(1, keepdim=True)
    got = pre.gather(1, indices.long())
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int32
    assert (got >= kth - slack).all(), "a selected latent is below the k-th largest"
    assert ((got - values.double()).abs() <= slack).all(), "a value is not its latent's activation"
    chosen = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, indices.long(), True)
    assert (chosen.sum(1) == k).all(), "a latent is selected twice"
    assert not ((pre > kth + slack) & ~chosen).any(), "a larger latent was missed"
    assert (values[:, :-1] >= values[:, 1:]).all()
    tied = values[:, :-1] == values[:, 1:]
    assert (indices[:, :-1] < indices[:, 1:])[tied].all(), "equal values go to the lowest index"
    # What ReLU makes zeros are the ties that rounding does not decide.
    last_zero = torch.where(values == 0, indices, -1).amax(1, keepdim=True)
    before = torch.arange(raw.shape[1], device=raw.device) < last_zero
    assert not ((raw < -slack) & ~chosen & before).any(), "a zero of a lower latent was passed over"


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover it")
# Tiles of 32 columns, of which a sample of two; two programs a block of rows.
SMALL = Plan(
    sample=3, rank=6, parts=2, capacity=24, block_rows=32, slots=8, keys=64, whole=9, block_n=32
)


def by_filter(x: Tensor, W: Tensor, b: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """The portable filter, of 16 rows a block."""
    plan = plan._replace(whole=W.shape[0] // plan.block_n)
    matmul = encode_filter.PlainFilter(W, b, plan, block_k=16, block_m=16)
    return encode.filtered_topk(x, W, b, k, plan, matmul)


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each row that is computed anew; for the interpreter."""
    rows: list[int] = []
    stream = encode_select.stream_row

    class Counted:
        def __call__(self, *args: object, **kwargs: object) -> object:
            rows.append(1)
            return stream(*args, **kwargs)

    monkeypatch.setattr(encode_select, "stream_row", Counted())
    return rows


@interpreted
@pytest.mark.parametrize("F", [301, 320])
@pytest.mark.parametrize("kind", KINDS)
def test_the_filter_equals_the_reference(kind: str, F: int, redone: list[int]) -> None:
    """None of it by computing rows anew but where all activations are equal, with or without a
    ragged last tile."""
    x, W, b = make(kind, 20, 24, F, torch.float32, "cpu")
    values, indices = by_filter(x, W, b, 5, SMALL)
    want, want_indices = reference.topk_encode(x, W, b, 5)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)
    assert len(redone) == (20 if kind == "equal" else 0)


class Marks:
    """In mend_kernel's place: which rows it would compute anew."""

    def __init__(self) -> None:
        self.short = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._count

    def _count(self, x: Tensor, *args: Tensor, **_: int) -> None:
        self.short += int(args[3][: len(x)].sum())


@interpreted
def test_no_row_of_a_trained_sae_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take longer than the rest of a step. With the sizes of a call on a GPU."""
    marks = Marks()
    monkeypatch.setattr(encode, "mend_kernel", marks)
    x, W, b = make("trained", 8, 24, 16_384, torch.float32, "cpu")
    positive = (x @ W.T + b > 0).sum(1)
    assert (positive < 32).any()
    assert (positive > 200).any()
    plan = encode_plan.make_plan(4096, 576, 16_384, 32, 132)
    assert plan is not None
    matmul = encode_filter.PlainFilter(W, b, plan, block_k=32, block_m=16)
    _, indices = encode.filtered_topk(x, W, b, 32, plan._replace(block_rows=128), matmul)
    assert torch.equal(indices, reference.topk_encode(x, W, b, 32)[1])
    assert not marks.short


@pytest.mark.gpu
@pytest.mark.parametrize("k", [32, 128])
def test_no_row_of_a_trained_sae_is_computed_anew_on_the_gpu(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks()
    monkeypatch.setattr(encode, "mend_kernel", marks)
    x, W, b = make("trained", 4096, 768, 24_576, torch.bfloat16, "cuda")
    assert_exact(x, W, b, k, *encode.topk_encode(x, W, b, k))
    assert not marks.short


@interpreted
@pytest.mark.parametrize(
    ("changes", "anew"),
    [({"parts": 3}, False), ({"sample": 4, "parts": 1}, False), ({"block_rows": 16}, False),
     ({"slots": 2, "rank": 9}, False), ({"rank": 1}, True),
     ({"rank": 20, "capacity": 4}, True)],
)  # fmt: skip
def test_other_plans_and_bad_ones(changes: dict[str, int], anew: bool, redone: list[int]) -> None:
    """Too high a limit leaves lists short, too low a one overflows them: both are mended."""
    x, W, b = make("normal", 6 if anew else 20, 24, 301, torch.float32, "cpu")
    plan = SMALL._replace(**changes)
    indices = by_filter(x, W, b, 5, plan)[1]
    assert torch.equal(indices, reference.topk_encode(x, W, b, 5)[1])
    assert bool(redone) == anew


@interpreted
def test_what_does_not_pass_the_limit_does_not_count(redone: list[int]) -> None:
    """A cell that is kept, or a pair, has neighbours below the limit beside which larger ones were
    left out: a row that has enough entries with them alone is short."""
    x, W, b = make("normal", 48, 24, 301, torch.float32, "cpu")
    indices = by_filter(x, W, b, 5, SMALL._replace(rank=2))[1]
    assert torch.equal(indices, reference.topk_encode(x, W, b, 5)[1])
    assert redone


@interpreted
@pytest.mark.parametrize("seed", range(4))
def test_of_equal_activations_the_lowest_latents_are_taken(seed: int) -> None:
    """Without weights activations are the bias alone: few different values, many of them equal to
    the limit, some beside a larger neighbour."""
    g = torch.Generator().manual_seed(seed)
    F, k = (317, 7) if seed % 2 else (288, 12)
    b = torch.randint(-2, 2 + 2 * seed, (F,), generator=g).float()
    x, W = torch.randn(5, 16, generator=g), torch.zeros(F, 16)
    values, indices = by_filter(x, W, b, k, SMALL._replace(rank=9))
    want, want_indices = reference.topk_encode(x, W, b, k)
    assert torch.equal(indices, want_indices)
    assert torch.equal(values, want)


@interpreted
@pytest.mark.parametrize("size", [0.0, 1.0, 1e-40], ids=["any", "equal", "denormal"])
def test_rows_of_about_k_positive_activations(size: float) -> None:
    """Fewer, as many and more, in the first latents, the last, or anywhere."""
    g = torch.Generator().manual_seed(0)
    F, k, numbers = 317, 5, [0, 1, 4, 5, 6, 11, 60, 317]
    W = torch.full((F, 3 * len(numbers)), -1.0)
    for row, number in enumerate(3 * numbers):
        values = torch.rand(number, generator=g)
        if size:
            values = size * torch.randint(1, 3, (number,), generator=g)
        anywhere = torch.randperm(F, generator=g)[:number]
        places = [torch.arange(number), torch.arange(F - number, F), anywhere]
        W[places[row // len(numbers)], row] = values
    x, b = torch.eye(W.shape[1]), torch.zeros(F)
    got, want = by_filter(x, W, b, k, SMALL), reference.topk_encode(x, W, b, k)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_nan_and_inf() -> None:
    x, W, b = make("normal", 4, 24, 301, torch.float32, "cpu")
    x[0, 0], b[7] = torch.nan, torch.inf
    values, indices = by_filter(x, W, b, 5, SMALL)
    want, want_indices = reference.topk_encode(x, W, b, 5)
    assert torch.equal(indices, want_indices)
    assert values[0].isnan().all()
    assert (indices[1:, 0] == 7).all()
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@interpreted
@pytest.mark.parametrize("kind", [*KINDS, "nan"])
@pytest.mark.parametrize(("F", "k"), [(301, 5), (40, 40)])
def test_selection_from_whole_rows(kind: str, F: int, k: int) -> None:
    """Equal activations, in one group and in several, go to the lowest latents."""
    # A program a row.
    x, W, b = make(kind, 5, 24, F, torch.float32, "cpu")
    pre = x @ W.T
    if kind == "nan":
        pre[2, 7], pre[2, F - 1], pre[3, 30] = torch.nan, torch.inf, -torch.inf
    pre[4, ::3] = 2.5
    sizes = encode_rows.group_sizes(F, k)
    assert sizes is not None
    values, indices = torch.empty(5, k), torch.empty(5, k, dtype=torch.int32)
    encode_rows.select_rows(pre, b, sizes._replace(step=4), values, indices)
    want, want_indices = encode_rows._select((pre + b).relu(), k)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_rows, "_BLOCK_BYTES", 16 * 301 * 7)
    x, W, b = make(kind, 20, 24, 301, torch.float32, "cpu")
    got, want = encode_rows.topk_encode(x, W, b, 5), reference.topk_encode(x, W, b, 5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


class NoKernel:
    """Launched with anything, does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("F", [40, 300, 512, 2048, 16384, 65536, 1_048_576])
@pytest.mark.parametrize("k", [1, 64, 257, 512])
def test_rows_keep_to_the_memory_bar(F: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a block of rows allocates, its kernels left out."""
    k, N = min(k, F), 60_000
    if encode_rows.group_sizes(F, k) is None:
        pytest.skip("torch's topk")
    blocks: list[list[int]] = []
    empty = torch.empty

    def counted(*size: int, **kwargs: object) -> Tensor:
        out = empty(*size, **kwargs)
        if blocks:  # not the outputs
            blocks[-1].append(out.nbytes)
        return out

    def products(x: Tensor, W: Tensor, scale: Tensor | None) -> Tensor:
        assert scale is None
        blocks.append([])
        return counted(x.shape[0], W.shape[0], dtype=torch.float32, device="meta")

    monkeypatch.setattr(encode_rows, "_groups_kernel", NoKernel())
    monkeypatch.setattr(encode_rows, "_products", products)
    tensors = [empty(*size, dtype=torch.bfloat16, device="meta") for size in ((N, 64), (F, 64))]
    monkeypatch.setattr(torch, "empty", counted)
    encode_rows.topk_encode(*tensors, empty(F, device="meta"), k)
    assert all(len(block) == 4 for block in blocks), "pre-activations, maxima, slots, keys"
    assert max(map(sum, blocks)) <= 64 << 20


def test_sizes_of_the_group_selection() -> None:
    for F in (1, 300, 2049, 16384, 100_000, 1_048_576):
        for k in (1, 20, 64, 256, 512):
            sizes = encode_rows.group_sizes(F, min(k, F))
            if sizes is not None:
                assert sizes.size * sizes.groups_pow2 >= F
                assert sizes.k_pow2 >= min(k, F)
                assert triton.cdiv(F, sizes.size) >= min(k, F)
    assert encode_rows.group_sizes(16384, 20) is not None
    assert encode_rows.group_sizes(1_048_576, 512) is None


SHAPES = [
    (1024, 4096, 65536, 64), (4096, 768, 24576, 32), (8192, 4096, 131072, 64),
    (4096, 4096, 32768, 50), (2048, 3584, 16384, 60), (4096, 2304, 16384, 100),
    (777, 2304, 16384, 20), (16384, 2304, 16384, 256), (2048, 5120, 1_048_576, 64),
    (4096, 3584, 100_000, 100), (8192, 2304, 1_048_576, 64), (300, 64, 4104, 512),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_plans_keep_to_the_memory_bar(shape: tuple[int, int, int, int]) -> None:
    """All that a call allocates beside its results, and that what is read and kept fits."""
    N, _, F, k = shape
    plan = encode_plan.make_plan(*shape)
    if plan is None:
        assert k == 512, "no sample of so few latents tells of so large a part of them"
        return
    scratch = torch.empty(plan.block_rows, plan.pitch, dtype=torch.int32, device="meta")
    kept = torch.empty(plan.block_rows, plan.sample_keys, dtype=torch.int64, device="meta")
    small = 4 * plan.block_rows * (plan.lists + 3)
    assert scratch.nbytes + kept.nbytes + small == plan.scratch_bytes() <= 64 << 20
    assert plan.rank > k * plan.sample / plan.whole
    sizes = encode.select_sizes(plan, k)
    assert plan.keys >= 2 * sizes["SORT"], "what is cut back leaves room for as many"
    assert plan.keys >= plan.sample_keys
    assert encode_plan.make_plan.__wrapped__(*shape) == plan, "the same on all ranks"


@pytest.mark.parametrize(("whole", "sample", "parts"), [(96, 8, 4), (9, 2, 3), (257, 16, 16)])
def test_every_latent_is_in_one_tile_of_one_program(whole: int, sample: int, parts: int) -> None:
    """As the kernels number them."""
    F, spread = whole * 256 + 37, encode_plan.spread(whole)
    seen = torch.zeros(F, dtype=torch.int32)
    turns = [range(sample), *(range(sample + p, whole + 1, parts) for p in range(parts))]
    cols = torch.arange(256)
    for position in itertools.chain(*turns):
        if position < whole:
            latents = cols // 8 * (whole * 8) + position * spread % whole * 8 + cols % 8
        else:
            latents = whole * 256 + cols
        seen[latents[latents < F]] += 1
    assert (seen == 1).all()
    assert whole * spread < 2**31


@pytest.mark.parametrize("mean", [0.1, 1.3, 6.0, 40.0])
def test_a_limit_is_seldom_too_high(mean: float) -> None:
    """Of a Poisson variable, which bounds how many of the k largest a sample holds."""
    rank = encode_plan.rank_of(mean)

    def at_least(r: float) -> float:
        return float(torch.special.gammainc(*torch.tensor([r, mean], dtype=torch.float64)))

    assert at_least(rank) <= 1.1e-8
    assert at_least(rank - 2.0) > 1e-8


def on_gpu(
    design: str, x: Tensor, W: Tensor, b: Tensor, k: int, **changes: int
) -> tuple[Tensor, Tensor]:
    """A call by one design, with changes of its plan; skips where the GPU has no such."""
    if design == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper GPUs")
    if design == "rows":
        return encode_rows.topk_encode(x, W, b, k)
    plan = encode_plan.make_plan(*x.shape, W.shape[0], k)
    if plan is None:
        pytest.skip("no plan for the shape")
    return encode.run(design, plan._replace(**changes), x, W, b, k)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("design", ["hopper", "plain", "rows"])
def test_exact_on_the_gpu(kind: str, dtype: torch.dtype, design: str) -> None:
    x, W, b = make(kind, 300, 776, 20_000, dtype, "cuda")
    values, indices = on_gpu(design, x, W, b, 32)
    assert_exact(x, W, b, 32, values, indices)
    again = on_gpu(design, x, W, b, 32)
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])
    if kind == "equal":
        assert torch.equal(indices, torch.arange(32, device="cuda").int().expand(300, -1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{"sample": 1, "rank": 9}, {"sample": 16, "rank": 40}, {"parts": 1, "capacity": 200},
     {"parts": 32}, {"block_rows": 128}, {"rank": 1}, {"capacity": 6}, {"slots": 2}, {"keys": 128}],
)  # fmt: skip
@pytest.mark.parametrize("design", ["hopper", "plain"])
def test_other_plans_are_exact_on_the_gpu(design: str, changes: dict[str, int]) -> None:
    x, W, b = make("heavy", 300, 776, 20_000, torch.bfloat16, "cuda")
    assert_exact(x, W, b, 32, *on_gpu(design, x, W, b, 32, **changes))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "D", "F", "k"),
    [(777, 2304, 16384, 20), (300, 3584, 100_000, 100), (264, 5120, 30_001, 256),
     (1, 768, 4096, 1), (257, 770, 5000, 7), (128, 64, 300, 300), (300, 64, 8200, 16),
     (391, 96, 66_000, 64), (272, 2304, 30_001, 64), (400, 776, 20_000, 32), (415, 96, 20_000, 32),
     (700, 64, 16384, 256), (2000, 64, 33_000, 8), (257, 64, 1_000_003, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_shapes_on_the_gpu(N: int, D: int, F: int, k: int, dtype: torch.dtype) -> None:
    x, W, b = make("normal", N, D, F, dtype, "cuda")
    out = ops.topk_encode(x, W, b, k)
    # float64 of the whole matrix takes memory.
    some = torch.randperm(N, device="cuda")[:64]
    assert_exact(x[some], W, b, k, out.values[some], out.latents[some])


@pytest.mark.gpu
@pytest.mark.parametrize("period", [312, 504, 512, 624, 768, 2528])
@pytest.mark.parametrize("design", ["hopper", "plain"])
def test_latents_that_repeat_are_exact_on_the_gpu(design: str, period: int) -> None:
    """Equal latents, apart by what may be a tile's runs' distance (632 and 1,264 here)."""
    x, W, b = make("normal", 300, 776, 20_224, torch.bfloat16, "cuda")
    W, b = (t[torch.arange(20_224, device="cuda") % period].contiguous() for t in (W, b))
    assert_exact(x, W, b, 32, *on_gpu(design, x, W, b, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("design", ["hopper", "plain"])
@pytest.mark.parametrize("D", [64, 200, 776])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_borne_on_the_gpu(design: str, D: int, bad: float) -> None:
    """In tiles of one stage, of the ring's, and of more."""
    x, W, b = make("normal", 300, D, 20_000, torch.bfloat16, "cuda")
    x[3, 5], b[7] = bad, torch.inf
    want, want_indices = encode_rows.topk_encode(x, W, b, 32)
    got, indices = on_gpu(design, x, W, b, 32)
    good = torch.arange(300, device="cuda") != 3
    torch.testing.assert_close(got[good], want[good], rtol=1e-3, atol=1e-3)
    assert (indices == want_indices)[good].float().mean() > 0.98
    torch.testing.assert_close(got[~good], want[~good], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("design", ["hopper", "plain", "rows"])
@pytest.mark.parametrize("seed", range(6))
def test_equal_activations_on_the_gpu(design: str, seed: int) -> None:
    """Without weights activations are the bias alone: few different values."""
    g = torch.Generator().manual_seed(seed)
    F, k = ((20_000, 32), (16_384, 100), (30_001, 5))[seed % 3]
    b = torch.randint(-2, 2 + 40 * seed, (F,), generator=g).float().cuda()
    x = torch.randn(300, 64, generator=g).bfloat16().cuda()
    W = torch.zeros(F, 64, dtype=torch.bfloat16, device="cuda")
    want, want_indices = reference.topk_encode(x[:1].float(), W.float(), b, k)
    values, indices = on_gpu(design, x, W, b, k)
    assert torch.equal(values, want.expand(300, -1))
    assert torch.equal(indices, want_indices.expand(300, -1))


@pytest.mark.gpu
def test_gradients_on_the_gpu() -> None:
    x, W, b = make("normal", 200, 768, 8192, torch.bfloat16, "cuda")
    leaves = [t.float().requires_grad_() for t in (x, W, b)]
    weight = torch.randn(200, 16, device="cuda")
    grads = torch.autograd.grad((ops.topk_encode(*leaves, 16).values * weight).sum(), leaves)
    dense = (leaves[0].double() @ leaves[1].double().T + leaves[2].double()).relu()
    want = torch.autograd.grad((dense.topk(16, dim=1).values * weight).sum(), leaves)
    for g, w in zip(grads, want, strict=True):
        assert (g - w).norm() <= 1e-3 * w.norm()


@pytest.mark.gpu
def test_memory_graph_and_compile_on_the_gpu() -> None:
    x, W, b = make("normal", 4096, 768, 24_576, torch.bfloat16, "cuda")
    want = ops.topk_encode(x, W, b, 32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = ops.topk_encode(x, W, b, 32)
    extra = torch.cuda.max_memory_allocated() - before - out.values.nbytes - out.latents.nbytes
    assert extra <= 64 << 20, f"{extra / 2**20:.1f} MiB"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.topk_encode(x, W, b, 32)
    captured.values.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured.values, want.values)
    assert torch.equal(captured.latents, want.latents)
    compiled = torch.compile(lambda *a: ops.topk_encode(*a, 32), fullgraph=True)(x, W, b)
    assert torch.equal(compiled.latents, want.latents)


@pytest.mark.gpu
def test_compiled_graphs_on_the_gpu() -> None:
    """Their warm-up is not captured, but allocates from a pool that is taken back."""
    x, W, b = make("normal", 1500, 776, 20_000, torch.bfloat16, "cuda")
    encode = torch.compile(
        lambda *a: ops.topk_encode(*a, 32), fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(5):
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        torch.compiler.cudagraph_mark_step_begin()
        got = encode(x, W, b)
        want = ops.topk_encode(x, W, b, 32)
        assert torch.equal(got.values, want.values)
        assert torch.equal(got.latents, want.latents)
        torch.zeros(1 << 20, device="cuda").fill_(seed)


def test_sort_keys_order_as_values_then_lowest_latents() -> None:
    special = [torch.nan, torch.inf, 2.0, 2.0, 1e-40, 0.0, -0.0, -1e-40, -3.0, -torch.inf]
    values = torch.tensor(special).expand(4, -1).contiguous()
    keys = reference.sort_keys(values, torch.arange(10))
    assert torch.equal(keys.argsort(dim=1, descending=True)[0], torch.arange(10))
    assert (keys[:, 5] - keys[:, 6] == 1).all(), "one zero"
    negative_nan = (-values[:, :1].abs()).mul(-1)
    assert torch.equal(reference.sort_keys(negative_nan, torch.tensor([0])), keys[:, :1])


def test_one_row_with_an_odd_stride() -> None:
    x = torch.randn(24, 1).t()
    assert x.is_contiguous()
    assert x.stride() == (1, 1)
    assert encode.aligned(x).stride() == (24, 1)
    assert torch.equal(encode.aligned(x), x)


@pytest.mark.gpu
def test_the_design_is_the_gpus() -> None:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for dtype in (torch.bfloat16, torch.float16):
        x, W, _ = make("normal", 300, 64, 4104, dtype, "cuda")
        assert encode.choose(x, W, 8)[0] == ("hopper" if hopper else "plain")
        assert encode.choose(x[:64], W, 8)[0] == "rows"
        assert encode.choose(x.float(), W.float(), 8)[0] == "rows"


def test_rocm_is_not_taken_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capability is (9, 0), too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = []
    for hip in (None, "6.4"):
        monkeypatch.setattr(torch.version, "hip", hip)
        encode._is_hopper.cache_clear()
        found.append(encode._is_hopper(torch.device("cuda", 0)))
    encode._is_hopper.cache_clear()
    assert found == [True, False]
