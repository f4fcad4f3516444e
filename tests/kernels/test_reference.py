"""The reference operations against definitions written another way; their gradients; their errors;
torch.compile.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.kernels import ops, reference


def brute_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row with Python's sort: value descending, then column ascending."""
    rows = [sorted(range(len(r)), key=lambda c, r=r: (-r[c], c))[:k] for r in values.tolist()]
    cols = torch.tensor(rows)
    return values.gather(1, cols), cols


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 24),
    levels=st.integers(1, 5),
    data=st.data(),
)
def test_select_topk_breaks_ties_to_the_lowest_column(
    n: int, m: int, levels: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, m))
    seed = data.draw(st.integers(0, 1000))
    values = torch.randint(0, levels, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    top, cols = reference.select_topk(values, k)
    want, want_cols = brute_topk(values, k)
    assert torch.equal(top, want)
    assert torch.equal(cols, want_cols)


def test_select_topk_puts_nan_first_and_keeps_infinities() -> None:
    values = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, 2.0]])
    top, cols = reference.select_topk(values, 3)
    assert cols.tolist() == [[1, 2, 4]]
    assert top[0, 0].isnan()
    assert top[0, 1:].tolist() == [torch.inf, 2.0]


def test_rows_with_few_positives_end_in_the_lowest_zeros() -> None:
    x = torch.tensor([[1.0, 0.0]])
    W = torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    top = ops.topk_encode(x, W, torch.zeros(4), 3)
    assert top.values.tolist() == [[3.0, 0.0, 0.0]]
    assert top.latents.tolist() == [[2, 0, 1]]


def test_encode_decode_equal_dense_arithmetic() -> None:
    x, W, b, b_dec = torch.randn(9, 5), torch.randn(12, 5), torch.randn(12), torch.randn(5)
    top = ops.topk_encode(x, W, b, 4, b_dec=b_dec)
    acts = ((x - b_dec) @ W.T + b).relu()
    dense = torch.zeros_like(acts).scatter(1, acts.topk(4).indices, acts.topk(4).values)
    torch.testing.assert_close(ops.sparse_decode(*top, W), dense @ W)


def _parameters() -> tuple[torch.Tensor, ...]:
    shapes = [(7, 5), (11, 5), (11,), (5,)]
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


def test_gradcheck_encode() -> None:
    assert torch.autograd.gradcheck(
        lambda x, W, b, d: ops.topk_encode(x, W, b, 3, b_dec=d).values, _parameters()
    )


def test_gradcheck_decode_with_repeated_indices() -> None:
    idx = torch.randint(0, 4, (7, 3))
    acts = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    W = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: ops.sparse_decode(a, idx, w), (acts, W))


def test_compiles_without_graph_breaks() -> None:
    def loss(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return ops.sparse_decode(*ops.topk_encode(x, W, b, 3, b_dec=d), W).square().sum()

    args = _parameters()
    want = torch.autograd.grad(loss(*args), args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(torch.autograd.grad(compiled(*args), args), want, strict=True):
        torch.testing.assert_close(got, expected)


OPS = ["topk_encode", "sparse_decode", "scatter_rows", "gathered_dots", "order_pairs"]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(name: str, transposed: bool) -> None:
    x, W, b = torch.randn(6, 5), torch.randn(8, 5), torch.randn(8)
    if transposed:
        W = W.t().contiguous().t()
    idx, acts = torch.randint(0, 8, (6, 3), dtype=torch.int32), torch.rand(6, 3)
    calls = {
        "topk_encode": (ops._topk_encode, (x, W, b, None, 3)),
        "sparse_decode": (ops._sparse_decode, (acts, idx, W)),
        "scatter_rows": (ops._scatter_rows, (acts, idx, x, 8, torch.float32, [], None)),
        "gathered_dots": (ops._gathered_dots, (x, idx, W)),
        "order_pairs": (ops._order_pairs, (idx, 8, None)),
    }
    torch.library.opcheck(*calls[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(4, 6)}, ["[4, 6]", "[12, 5]"]),
        ({"x": torch.randn(2, 4, 5)}, ["[2, 4, 5]", "flatten"]),
        ({"b_enc": torch.randn(11)}, ["b_enc", "[11]"]),
        ({"k": 0}, ["k=0", "1..12"]),
        ({"k": 13}, ["k=13", "1..12"]),
        ({"x": torch.ones(4, 5, dtype=torch.int64)}, ["x", "int64"]),
        ({"b_dec": torch.randn(4)}, ["b_dec", "[4]"]),
    ],
)
def test_bad_input_is_named(change: dict[str, object], words: list[str]) -> None:
    args: dict[str, object] = {
        "x": torch.randn(4, 5),
        "W_enc": torch.randn(12, 5),
        "b_enc": torch.randn(12),
        "k": 3,
    }
    with pytest.raises(ValueError, match=".") as e:
        ops.topk_encode(**(args | change))  # type: ignore[arg-type]
    for word in words:
        assert word in str(e.value)


def test_strided_and_expanded_inputs_give_the_same() -> None:
    x, W, b = torch.randn(5, 8).T, torch.randn(5, 12).T, torch.randn(1).expand(12)
    top = ops.topk_encode(x, W, b, 4)
    want = ops.topk_encode(x.contiguous(), W.contiguous(), b.contiguous(), 4)
    assert torch.equal(top.latents, want.latents)
    assert torch.equal(top.values, want.values)
    decoded = ops.sparse_decode(top.values.T.contiguous().T, top.latents, W)
    torch.testing.assert_close(decoded, ops.sparse_decode(*want, W.contiguous()))


@pytest.mark.parametrize(
    ("acts", "idx", "W", "word"),
    [
        (torch.rand(4, 3), torch.zeros(4, 2, dtype=torch.int32), torch.rand(6, 5), r"\[4, 2\]"),
        (torch.rand(4, 3), torch.zeros(4, 3), torch.rand(6, 5), "float32"),
        (torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.int64), torch.rand(6), r"\[6\]"),
    ],
)
def test_bad_decode_input_is_named(
    acts: torch.Tensor, idx: torch.Tensor, W: torch.Tensor, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        ops.sparse_decode(acts, idx, W)


def test_another_device_is_named() -> None:
    with pytest.raises(ValueError, match="meta but W_enc on cpu"):
        ops.topk_encode(torch.empty(4, 5, device="meta"), torch.randn(12, 5), torch.randn(12), 3)


def test_meta_tensors_give_shapes() -> None:
    x, W = torch.empty(3, 8, device="meta"), torch.empty(20, 8, device="meta")
    top = ops.topk_encode(x, W, torch.empty(20, device="meta"), 4)
    assert top.latents.shape == (3, 4)
    assert ops.sparse_decode(top.values, top.latents, W).shape == (3, 8)


def test_ties_beside_nan_go_to_the_lowest_columns() -> None:
    values = torch.randn(50, 300)
    for row in values:
        places = torch.randperm(300)
        row[places[:4]], row[places[4:11]] = torch.nan, torch.inf
    cols = reference.select_topk(values, 7)[1]
    want = torch.cat(
        [
            values.isnan().nonzero()[:, 1].view(50, 4),
            values.isposinf().nonzero()[:, 1].view(50, 7)[:, :3],
        ],
        dim=1,
    )
    assert torch.equal(cols.sort().values, want.sort().values)
