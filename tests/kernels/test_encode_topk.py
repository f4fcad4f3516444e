"""The encoder kernels: exact on any data, by the interpreter at small sizes and on the GPU at real
ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import encode_blocked, encode_choice, encode_plan, ops, reference
from flash_sae_dist.kernels.encode_choice import Shape

triton = pytest.importorskip("triton")
from flash_sae_dist.kernels import encode_rows, encode_topk, encode_trial  # noqa: E402

KINDS = ["normal", "heavy", "ascending", "descending", "equal", "group", "few", "negative"]


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


def small_plan(**changes: object) -> encode_plan.Plan:
    sizes = {
        "block_m": 16,
        "block_n": 64,
        "block_k": 16,
        "num_warps": 4,
        "sample_n": 16,
        "keys": 64,
    }
    return encode_plan.Plan(8, 8, 2, 16, 16, **(sizes | changes))  # type: ignore[arg-type]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover it")


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_the_reference_in_the_interpreter(kind: str) -> None:
    x, W, b = make(kind, 20, 24, 301, torch.float32, "cpu")
    values, indices = encode_topk.fused_topk(x, W, b, 5, small_plan())
    want, want_indices = reference.topk_encode(x, W, b, 5)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("changes", [{"parts": 3}, {"keys": 32}, {"block_rows": 32}])
def test_every_variant_in_the_interpreter(changes: dict[str, object]) -> None:
    x, W, b = make("normal", 20, 24, 301, torch.float32, "cpu")
    indices = encode_topk.fused_topk(x, W, b, 5, small_plan()._replace(**changes))[1]
    assert torch.equal(indices, reference.topk_encode(x, W, b, 5)[1])


def selected(
    pre: Tensor, b: Tensor | None, F: int, k: int, sizes: encode_plan.GroupSizes
) -> tuple[Tensor, Tensor]:
    """By the kernel, from the largest of each group as the matmul for few tokens writes them, or,
    with a bias, found by itself."""
    N = pre.shape[0]
    values, indices = torch.empty(N, k), torch.empty(N, k, dtype=torch.int32)
    if b is not None:
        encode_rows.select_rows(pre, b, sizes, values, indices)
        return values, indices
    bits = pre.view(torch.int32).where(~pre.isnan(), torch.tensor(0x7FFFFFFF, dtype=torch.int32))
    maxima = bits.clamp_min(0).view(N, -1, sizes.size).amax(2)
    encode_rows.select_groups(pre, maxima, F, sizes, values, indices)
    return values, indices


@interpreted
@pytest.mark.parametrize("kind", [*KINDS, "nan"])
@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize(("F", "k", "size"), [(301, 5, 32), (40, 40, 1)])
def test_group_selection_in_the_interpreter(
    kind: str, finds: bool, F: int, k: int, size: int
) -> None:
    """Equal activations, in one group and in several, go to the lowest latents."""
    # A program a row.
    x, W, b = make(kind, 5, 24, F, torch.float32, "cpu")
    pre = torch.zeros(5, F if finds else triton.cdiv(F, 256) * 256)
    pre[:, :F] = x @ W.T
    if kind == "nan":
        pre[2, 7], pre[2, F - 1], pre[3, 30] = torch.nan, torch.inf, -torch.inf
    pre[4, :F:3] = 2.5
    sizes = encode_plan.group_sizes(F, k, size)
    assert sizes is not None
    sizes = sizes._replace(step=4)
    whole = pre[:, :F] + b if finds else pre[:, :F]
    want, want_indices = encode_blocked._select(whole.relu(), k)
    # What lies beyond F, and what the matmul made of it, counts for nothing.
    pre[:, F:] = torch.nan
    values, indices = selected(pre, b if finds else None, F, k, sizes)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("N", "F", "first"),
    [(777, 16384, False), (400, 16384, False), (512, 24576, False), (300, 16384, False),
     (190, 65536, True), (128, 65536, True), (270, 32768, True), (256, 32768, True)],
)  # fmt: skip
def test_where_writing_pre_activations_is_first(N: int, F: int, first: bool) -> None:
    """As docs/notes/encoder.md has them measured."""
    assert encode_plan.tiles_are_first(N, F, 132) == first


@pytest.mark.parametrize(
    ("N", "F", "room"),
    [(777, 16384, 16), (784, 16384, 16), (785, 16384, 32), (800, 16384, 32), (801, 16384, 0),
     (768, 16384, 0), (270, 32768, 16), (130, 65536, 0), (272, 8192, 0), (9, 16384, 0)],
)  # fmt: skip
def test_rooms_for_the_last_tokens(N: int, F: int, room: int) -> None:
    """None where they are many, where there are no blocks to go with, where no round is saved."""
    assert encode_plan.tail_rows(N, F, 132) == room


class NoKernel:
    """Launched with anything, does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("F", [40, 300, 512, 2048, 16384, 65536, 1_048_576])
@pytest.mark.parametrize("k", [1, 64, 257, 512])
def test_library_keeps_to_the_memory_bar(F: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a block of rows allocates, its kernels left out."""
    k, N = min(k, F), 60_000
    if encode_plan.group_sizes(F, k) is None:
        pytest.skip("torch's topk")
    blocks: list[list[int]] = []
    empty = torch.empty

    def counted(*size: int, **kwargs: object) -> Tensor:
        out = empty(*size, **kwargs)
        if blocks:  # not the outputs
            blocks[-1].append(out.nbytes)
        return out

    def products(x: Tensor, W: Tensor) -> Tensor:
        blocks.append([])
        return counted(x.shape[0], W.shape[0], dtype=torch.float32, device="meta")

    monkeypatch.setattr(encode_rows, "_groups_kernel", NoKernel())
    monkeypatch.setattr(encode_blocked, "_products", products)
    tensors = [empty(*size, dtype=torch.bfloat16, device="meta") for size in ((N, 64), (F, 64))]
    monkeypatch.setattr(torch, "empty", counted)
    encode_blocked.topk_encode(*tensors, empty(F, device="meta"), k)
    assert all(len(block) == 4 for block in blocks), "pre-activations, maxima, slots, keys"
    assert max(map(sum, blocks)) <= 64 << 20


@pytest.mark.parametrize("F", [4096, 16384, 30_001, 65536, 524_288])
@pytest.mark.parametrize("k", [1, 64, 256])
def test_tiles_keep_to_the_memory_bar(F: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a call allocates, its kernels left out, for as many tokens as it takes."""
    encode_tiles = pytest.importorskip("flash_sae_dist.kernels.encode_tiles")
    fit = [n for n in range(1, 4097) if encode_plan.tiles_fit(n, 64, F, k)]
    if not fit:
        pytest.skip("too many groups would be kept")
    N, sizes, empty = fit[-1], [], torch.empty

    def counted(*size: int, **kwargs: object) -> Tensor:
        out = empty(*size, **kwargs)
        sizes.append(out.nbytes)
        return out

    tensors = [empty(*size, dtype=torch.bfloat16, device="meta") for size in ((N, 64), (F, 64))]
    monkeypatch.setattr(encode_tiles, "_tiles_kernel", NoKernel())
    monkeypatch.setattr(encode_tiles, "pick_groups_kernel", NoKernel())
    monkeypatch.setattr(encode_rows, "_groups_kernel", NoKernel())
    monkeypatch.setattr(torch, "empty", counted)
    encode_tiles.topk_encode(*tensors, empty(F, device="meta"), k)
    by_warps = N <= 256 or F / encode_plan.GROUP > encode_tiles.MAX_GROUPS
    assert len(sizes) == 5 + by_warps
    assert sum(sizes) - 8 * N * k <= 64 << 20


def test_sizes_of_the_group_selection() -> None:
    assert encode_plan.tiles_fit(777, 2304, 16384, 20)
    assert not encode_plan.tiles_fit(1024, 4096, 65536, 64), "more than 64 MiB"
    assert not encode_plan.tiles_fit(64, 4100, 8192, 64), "rows not from 16-byte boundaries on"
    assert not encode_plan.tiles_fit(64, 4096, 2048, 64), "hardly more groups than are kept"
    assert not encode_plan.tiles_fit(0, 4096, 8192, 64)
    for F in (1, 300, 2049, 16384, 100_000, 1_048_576):
        for k in (1, 20, 64, 256, 512):
            sizes = encode_plan.group_sizes(F, min(k, F))
            if sizes is not None:
                assert sizes.size * sizes.groups_pow2 >= F
                assert sizes.k_pow2 >= min(k, F)
                assert triton.cdiv(F, sizes.size) >= min(k, F)
    assert encode_plan.group_sizes(16384, 20) is not None
    assert encode_plan.group_sizes(1_048_576, 512) is None


@interpreted
@pytest.mark.parametrize(("rank", "capacity"), [(1, 16), (30, 16)])
def test_bad_thresholds_are_mended(rank: int, capacity: int) -> None:
    """Too high a threshold leaves lists short, too low a one overflows them: both are found."""
    x, W, b = make("normal", 6, 24, 301, torch.float32, "cpu")
    plan = small_plan()._replace(rank=rank, capacity=capacity)
    indices = encode_topk.fused_topk(x, W, b, 5, plan)[1]
    assert torch.equal(indices, reference.topk_encode(x, W, b, 5)[1])


@interpreted
def test_nan_and_inf_in_the_interpreter() -> None:
    x, W, b = make("normal", 4, 24, 301, torch.float32, "cpu")
    x[0, 0], b[7] = torch.nan, torch.inf
    values, indices = encode_topk.fused_topk(x, W, b, 5, small_plan())
    want, want_indices = reference.topk_encode(x, W, b, 5)
    assert torch.equal(indices, want_indices)
    assert values[0].isnan().all()
    assert (indices[1:, 0] == 7).all()
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_equals_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_blocked, "_BLOCK_BYTES", 16 * 301 * 7)
    x, W, b = make(kind, 20, 24, 301, torch.float32, "cpu")
    got, want = encode_blocked.topk_encode(x, W, b, 5), reference.topk_encode(x, W, b, 5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        (1024, 4096, 65536, 64),
        (4096, 768, 24576, 32),
        (8192, 4096, 131072, 64),
        (777, 2304, 16384, 20),
        (16384, 2304, 16384, 20),
        (2048, 5120, 1_048_576, 64),
        (4096, 3584, 100_000, 100),
    ],
)
def test_plans_keep_to_the_memory_bar(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a call allocates, its kernels left out."""

    names = ("_gather_kernel", "_sample_kernel", "_threshold_kernel", "_filter_kernel")
    for name in (*names, "select_kernel"):
        monkeypatch.setattr(encode_topk, name, NoKernel())
    sizes: list[int] = []
    empty = torch.empty

    def counted(*size: int, **kwargs: object) -> Tensor:
        out = empty(*size, **kwargs)
        sizes.append(out.nbytes)
        return out

    plan = encode_plan.make_plan(*shape)
    assert plan is not None
    N, D, F, k = shape
    tensors = [empty(*size, dtype=torch.bfloat16, device="meta") for size in ((N, D), (F, D), (F,))]
    monkeypatch.setattr(torch, "empty", counted)
    encode_topk.fused_topk(*tensors, k, plan)
    assert sum(sizes) - 8 * N * k <= 64 << 20
    assert plan.rank > k / plan.stride
    assert encode_plan.make_plan.__wrapped__(*shape) == plan, "every rank makes the same plan"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("design", ["fused", "tiles", "library"])
def test_exact_on_the_gpu(
    kind: str, dtype: torch.dtype, design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = make(kind, 300, 776, 20_000, dtype, "cuda")
    if design != "library" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper GPUs")
    assert design in encode_topk.designs(x, W, b, 32)
    monkeypatch.setattr(encode_choice, "_CHOSEN", {Shape.of(x, W, 32): design})
    out = ops.topk_encode(x, W, b, 32)
    assert_exact(x, W, b, 32, out.values, out.indices)
    again = ops.topk_encode(x, W, b, 32)
    assert torch.equal(out.values, again.values)
    assert torch.equal(out.indices, again.indices)
    if kind == "equal":
        assert torch.equal(out.indices, torch.arange(32, device="cuda").int().expand(300, -1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "D", "F", "k"),
    [(777, 2304, 16384, 20), (130, 3584, 100_000, 100), (64, 5120, 30_001, 256), (1, 768, 4096, 1),
     (257, 770, 5000, 7), (128, 64, 300, 300), (65, 64, 8200, 16), (191, 96, 66_000, 64),
     (272, 2304, 30_001, 64), (400, 776, 20_000, 32), (415, 96, 20_000, 32)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_shapes_on_the_gpu(
    N: int, D: int, F: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = make("normal", N, D, F, dtype, "cuda")
    for design in encode_topk.designs(x, W, b, k):
        monkeypatch.setattr(encode_choice, "_CHOSEN", {Shape.of(x, W, k): design})
        out = ops.topk_encode(x, W, b, k)
        assert_exact(x, W, b, k, out.values, out.indices)


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
    extra = torch.cuda.max_memory_allocated() - before - out.values.nbytes - out.indices.nbytes
    assert extra <= 64 << 20, f"{extra / 2**20:.1f} MiB"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.topk_encode(x, W, b, 32)
    captured.values.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured.values, want.values)
    assert torch.equal(captured.indices, want.indices)
    compiled = torch.compile(lambda *a: ops.topk_encode(*a, 32), fullgraph=True)(x, W, b)
    assert torch.equal(compiled.indices, want.indices)


@pytest.mark.gpu
def test_compiled_graphs_on_the_gpu() -> None:
    """Their warm-up is not captured, but allocates from a pool that is taken back."""
    if torch.cuda.get_device_capability() == (9, 0):
        from flash_sae_dist.kernels import encode_first

        encode_first._zeros._held.clear()
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
        assert torch.equal(got.indices, want.indices)
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
    assert encode_topk._aligned(x).stride() == (24, 1)
    assert torch.equal(encode_topk._aligned(x), x)


@pytest.mark.gpu
def test_the_hopper_kernels_are_used_on_hopper() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for dtype in (torch.bfloat16, torch.float16):
        assert encode_trial.runs("filter", device, dtype) == hopper
        assert encode_trial.runs("tiles", device, dtype) == hopper
