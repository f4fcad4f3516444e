"""Training on flat lists of (token, latent): BatchTopK and a threshold a latent on both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sae_dist.config.sae import SAEConfig
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.evaluation.metrics import measure
from flash_sae_dist.kernels import dispatch
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.dead_latents import DeadLatents
from flash_sae_dist.models.losses import fvu_loss, inverted, total_variance
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engines.autograd import AutogradEngine
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.sparse_adam import SparseAdam
from flash_sae_dist.training.step import SAETraining
from tests.batchtopk import Batch, BatchConfig, Jump, JumpConfig

D, F, K, N = 12, 64, 5, 32
CONFIGS: dict[str, SAEConfig] = {
    "batch": BatchConfig(d_sae=F, k=K),
    "jump": JumpConfig(d_sae=F, limit=0.3, capacity=32),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "batch", Batch)
    monkeypatch.setitem(ARCHITECTURES, "jump", Jump)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Tokens of different sizes, so that their counts differ; one is zero."""
    gen = torch.Generator().manual_seed(7)
    basis = torch.randn(24, D, generator=gen, dtype=torch.float64)
    out = []
    for _ in range(steps):
        codes = torch.rand(N, 24, generator=gen, dtype=torch.float64) ** 6
        codes *= torch.rand(N, 1, generator=gen, dtype=torch.float64) * 3
        codes[4] = 0
        out.append((codes @ basis).to(dtype))
    return out


def train(engine: str, rule: str, steps: int, **options: Any) -> tuple[SAETraining, list[Any]]:
    cfg = ENGINES[engine](
        num_tokens=10**4, batch_tokens=N, lr=1e-2, warmup_steps=0, engine=engine,
        precision="float64", dead_after_tokens=N * 10, **options,
    )  # fmt: skip
    training = SAETraining(CONFIGS[rule], cfg, D, Mesh.single(), torch.device("cpu"))
    assert isinstance(training.engine, FusedEngine if engine == "fused" else AutogradEngine)
    with torch.no_grad():
        training.sae.b_enc[::4] = -2.0  # soon dead
    timer = PhaseTimer(training.device, enabled=False)
    return training, [tuple(map(float, training.step(x, timer))) for x in batches(steps)]


@pytest.mark.parametrize("rule", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05, "micro_batches": 3}])
def test_the_fused_engine_trains_as_autograd_does(rule: str, options: dict[str, Any]) -> None:
    (fused, curve), (autograd, want) = (
        train(engine, rule, 110, **options) for engine in ("fused", "autograd")
    )
    assert curve[-1][0] < 0.7 * curve[0][0]
    assert curve[-1][1] > 0, "dead latents must have had work"
    for got, expected in zip(curve, want, strict=True):
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-12)
    for a, b in zip(fused.sae.parameters(), autograd.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert torch.equal(fused.dead.tokens_since_fired, autograd.dead.tokens_since_fired)


@pytest.mark.parametrize("rule", CONFIGS)
def test_a_step_is_that_of_dense_arithmetic(rule: str) -> None:
    training, _ = train("fused", rule, 0)
    sae, x = training.sae, batches(1)[0]
    acts = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    if rule == "batch":
        mask = acts >= acts.flatten().topk(N * K).values[-1]
    else:
        mask = acts > 0.3 * (1 + torch.arange(F) % 3)
    counts = mask.sum(1)
    assert counts.min() == 0
    assert counts.max() > 2 * K
    recon = (acts * mask) @ sae.W_dec + sae.b_dec
    out = sae(x)
    torch.testing.assert_close(out.recon, recon)
    found = measure(sae, [x])
    assert found.l0 == pytest.approx(float(counts.double().mean()))
    fvu = fvu_loss(x, recon, inverted(total_variance(x, sae.mesh)))
    want = torch.autograd.grad(fvu, list(sae.parameters()))
    got = torch.autograd.grad(
        fvu_loss(x, out.recon, inverted(total_variance(x, sae.mesh))), list(sae.parameters())
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    metrics = training.engine.step(x, PhaseTimer(training.device, enabled=False))
    assert float(metrics.fvu) == pytest.approx(float(fvu.detach()), rel=1e-9)
    assert float(metrics.l0) == pytest.approx(float(counts.double().mean()))
    fired = training.dead.tokens_since_fired == 0
    assert torch.equal(fired, mask.any(0))


def engine_on(
    device: str, dtype: torch.dtype, rule: str, graph: bool | None
) -> tuple[Any, DeadLatents, FusedEngine]:
    sae = (Batch if rule == "batch" else Jump)(CONFIGS[rule], D).to(device)
    dead = DeadLatents(F, 1000, Mesh.single(), torch.device(device))
    dead.tokens_since_fired[:12] = 100_000
    dead.list_(dead.mask())
    optimizer = SparseAdam(sae, 1e-2, compute_dtype=dtype, grad_clip=0.5)
    return sae, dead, FusedEngine(sae, optimizer, dead, k_aux=5, graph=graph)


@pytest.mark.parametrize("rule", CONFIGS)
def test_kernels_in_the_interpreter(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, on=kernels: on)
        # The encoders', which have tests of their own.
        for name in ("topk_encode", "batch_topk_encode", "threshold_encode"):
            monkeypatch.delitem(dispatch.KERNEL_FILES, name, raising=False)
        sae, dead, engine = engine_on("cpu", torch.float32, rule, None)
        metrics = [torch.stack(engine.step(x[:12])) for x in batches(1, torch.float32)]
        results.append([torch.stack(metrics), dead.tokens_since_fired, *sae.parameters()])
    for got, want in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", CONFIGS)
def test_kernels_on_a_gpu_equal_the_reference(rule: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        sae, dead, engine = engine_on(device, torch.float32, rule, False)
        metrics = [torch.stack(engine.step(x.to(device))).cpu() for x in batches(4, torch.float32)]
        weights = [p.detach().cpu() for p in sae.parameters()]
        results.append([torch.stack(metrics), dead.tokens_since_fired.cpu(), *weights])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3)


def test_batchtopk_of_one_token_is_topk() -> None:
    batch, top = Batch(CONFIGS["batch"], D, seed=3), TopKSAE(D, F, K, seed=3)
    x = batches(1, torch.float32)[0][:1]
    torch.testing.assert_close(batch(x).recon, top(x).recon)
