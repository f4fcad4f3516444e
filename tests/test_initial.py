"""Initial weights: a pure function of (seed, latent, column), normal in direction, drawn once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sae_dist.config.train import FusedTrainConfig
from flash_sae_dist.models import initial
from flash_sae_dist.models.topk import TopKConfig, TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.step import SAETraining

CPU = torch.device("cpu")


def shard(number: int, shards: int) -> Mesh:
    return Mesh(0, 1, 0, 1, number, shards, None, None, None)


def rows(count: int, d_in: int, seed: int = 0, first: int = 0) -> torch.Tensor:
    out = torch.empty(count, d_in)
    initial.unit_rows_(out, seed, first)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [2, 4])
def test_the_same_for_every_number_of_shards(shards: int, dtype: torch.dtype) -> None:
    whole = TopKSAE(24, 1000, 4, dtype=dtype, seed=5)
    parts = [
        TopKSAE(24, 1000, 4, dtype=dtype, mesh=shard(i, shards), seed=5) for i in range(shards)
    ]
    for name in ("W_enc", "W_dec"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert torch.equal(whole.W_enc, whole.W_dec)
    assert whole.W_enc.data_ptr() != whole.W_dec.data_ptr()
    assert not whole.b_enc.any()
    assert not whole.b_dec.any()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 2**31 - 80),
    st.integers(1, 40),
    st.integers(1, 4000),
    st.integers(0, 2**32 - 1),
)
def test_blocks_of_any_size_give_the_same(
    count: int, first: int, d_in: int, block: int, seed: int
) -> None:
    want = rows(count, d_in, seed, first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "_BLOCK", {"cpu": block})
        assert torch.equal(rows(count, d_in, seed, first), want)
    torch.testing.assert_close(want.norm(dim=1), torch.ones(count))
    at = count // 2
    assert torch.equal(rows(1, d_in, seed, first + at)[0], want[at])


def test_the_draw_is_normal() -> None:
    x = initial.normal_rows(3, 0, 4096, 577, CPU)
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert float(x.var()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert float((x**3).mean()) == pytest.approx(0, abs=5 * (15 / n) ** 0.5)
    assert float((x**4).mean()) == pytest.approx(3, abs=5 * (96 / n) ** 0.5)
    # The tails are there, and reach no further than 32 bits do.
    assert 4.5 < float(x.abs().max()) < 6.8
    # Columns and rows, each from one end to the other.
    for dim in (0, 1):
        assert float(x.mean(dim).abs().max()) < 5.5 / x.shape[dim] ** 0.5


def test_rows_are_independent() -> None:
    x = rows(2048, 64)
    assert len(x.unique(dim=0)) == 2048
    cosines = (x @ x.T).fill_diagonal_(0)
    assert float(cosines.abs().max()) < 0.75
    assert float(cosines.square().mean()) == pytest.approx(1 / 64, rel=0.02)
    # Neighbours in a row, which one hash makes, too.
    half = initial.normal_rows(0, 0, 4096, 64, CPU).unflatten(1, (2, 32))
    assert abs(float((half[:, 0] * half[:, 1]).mean())) < 5 / (4096 * 32) ** 0.5
    assert float((half[:, 0] ** 2 * half[:, 1] ** 2).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32 - 1])
def test_seeds_differ(other: int) -> None:
    a, b = rows(64, 32), rows(64, 32, seed=other)
    assert not (a == b).any()
    assert float((a @ b.T).abs().max()) < 0.75


def test_seed_0_is_not_torchs() -> None:
    """Data that a user drew with torch.manual_seed(0) must not be what latents begin with."""
    torch.manual_seed(0)
    mine = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    assert float((rows(64, 32) @ mine.T).abs().max()) < 0.75


def test_nothing_is_drawn_for_weights_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(TopKSAE, "reset_parameters", lambda self, seed=0: drawn.append(seed))
    cfg = FusedTrainConfig(num_tokens=640, batch_tokens=32, warmup_steps=2, seed=9)
    config = TopKConfig(k=3, d_sae=24)
    SAETraining(config, cfg, 8, Mesh.single(), CPU)
    assert drawn == [9], "once"
    SAETraining(config, cfg, 8, Mesh.single(), CPU, drawn=False)
    TopKSAE(8, 24, 3, seed=None)
    assert drawn == [9]


@pytest.mark.gpu
@pytest.mark.parametrize("d_in", [63, 768, 4096])
def test_a_gpu_draws_the_same(d_in: int) -> None:
    want, got = rows(2000, d_in, first=7), torch.empty(2000, d_in, device="cuda")
    initial.unit_rows_(got, 0, 7)
    torch.testing.assert_close(got.cpu(), want, rtol=1.2e-7, atol=0)
    assert float((got.cpu() != want).float().mean()) < 1e-5
