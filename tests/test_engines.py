"""The fused engine equals autograd's gradients, torch.optim.Adam and the constraint."""

from __future__ import annotations

import copy
import sys
from typing import Literal

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import dispatch
from flash_sae_dist.launch.bench_training import OurStep
from flash_sae_dist.models.dead_latents import DeadLatents
from flash_sae_dist.models.losses import (
    auxk_loss,
    fvu_loss,
    inverse_variance,
    inverted,
    residual_sums,
    total_variance,
)
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engines.fused import FusedEngine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.optim import project_decoder_grad_, renormalise_decoder_
from flash_sae_dist.training.sparse_adam import SparseAdam

Kind = Literal["auxk", "ghost", "none"]
D, F, K, N, K_AUX, LR = 12, 40, 4, 24, 5, 1e-2


def make_sae(dtype: torch.dtype = torch.float64, device: str = "cpu") -> TopKSAE:
    sae = TopKSAE(D, F, K, dtype=dtype, device=device)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.3, 0.3, D))
    return sae


def make_dead(device: str = "cpu", num_dead: int = 12) -> DeadLatents:
    dead = DeadLatents(F, 1000, Mesh.single(), torch.device(device))
    dead.tokens_since_fired[:num_dead] = 100_000
    dead.list_(dead.mask())
    return dead


def batches(steps: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    gen = torch.Generator().manual_seed(5)
    basis = torch.randn(F, D, generator=gen, dtype=torch.float64)
    codes = [torch.rand(N, F, generator=gen, dtype=torch.float64) ** 8 for _ in range(steps)]
    return [(c @ basis).to(device, dtype) for c in codes]


def aux_loss(sae: TopKSAE, dead: DeadLatents, x: Tensor, recon: Tensor, kind: Kind) -> Tensor:
    """AuxK, and ghost gradients as anchors and SAELens' old code write them, densely."""
    mask = dead.mask()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    best = pre.detach().masked_fill(~mask, -torch.inf).topk(min(K_AUX, int(mask.sum())), dim=1)
    chosen = torch.zeros_like(pre).scatter(1, best.indices, 1.0)
    residual = (x - recon).detach()
    if kind == "auxk":
        inverse = inverse_variance(*residual_sums(residual, sae.mesh), len(x))
        return auxk_loss(residual, (pre.relu() * chosen) @ sae.W_dec, inverse)
    ghost = (pre.exp() * chosen) @ sae.W_dec
    norms = residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * ghost.norm(dim=1, keepdim=True))
    loss = (ghost * norms.detach() - residual).square()
    main = residual.square()
    loss = loss * (main / (loss + 1e-6)).detach()
    return loss.sum() / (x - x.mean(0)).square().sum()


def plain_steps(
    sae: TopKSAE,
    dead: DeadLatents,
    xs: list[Tensor],
    kind: Kind,
    coef: float,
    clip: float | None = None,
) -> list[tuple[float, float]]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10)
    out = []
    for x in xs:
        top = sae.encode(x)
        recon = sae.decode(top)
        aux = torch.zeros((), dtype=x.dtype)
        if kind != "none":
            aux = aux_loss(sae, dead, x, recon, kind)
        fvu = fvu_loss(x, recon, inverted(total_variance(x, sae.mesh)))
        optimizer.zero_grad()
        (fvu + coef * aux).backward()
        project_decoder_grad_(sae)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        optimizer.step()
        renormalise_decoder_(sae)
        dead.update_(*top, N)
        out.append((float(fvu.detach()), float(aux.detach())))
    return out


@pytest.mark.parametrize("kind", ["none", "auxk", "ghost"])
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("k_aux", [5, 40])
def test_equals_autograd_and_torch_adam(
    kind: Kind, clip: float | None, k_aux: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "K_AUX", k_aux)
    plain, coef = make_sae(), 0.3
    fused = copy.deepcopy(plain)
    dead, dead_fused = make_dead(), make_dead()
    xs = batches(30)
    want = plain_steps(plain, dead, xs, kind, coef, clip)
    optimizer = SparseAdam(fused, LR, compute_dtype=torch.float64, grad_clip=clip)
    step = FusedEngine(
        fused, optimizer, dead_fused, dead_latents=kind, aux_coef=coef, k_aux=K_AUX, graph=False
    )
    for x, (fvu, aux) in zip(xs, want, strict=True):
        got = step.step(x)
        assert float(got.fvu) == pytest.approx(fvu, rel=1e-8)
        assert float(got.aux) == pytest.approx(aux, rel=1e-6)
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert torch.equal(dead.tokens_since_fired, dead_fused.tokens_since_fired)
    assert (kind == "none") == (want[0][1] == 0)


def test_dead_latents_get_encoder_gradients() -> None:
    sae, dead = make_sae(), make_dead()
    before = sae.W_enc.detach().clone()
    optimizer = SparseAdam(sae, LR, lazy=True, compute_dtype=torch.float64)
    top = sae.encode(batches(1)[0])
    step = FusedEngine(sae, optimizer, dead, k_aux=K_AUX, graph=False)
    step.step(batches(1)[0])
    silent = torch.ones(F, dtype=torch.bool)
    silent[top.latents[top.values > 0].long()] = False
    moved = (sae.W_enc != before).any(dim=1)
    assert (moved & silent)[:12].any()


def test_schedule_resume_and_ema() -> None:
    def run(steps: int, resume_at: int | None) -> tuple[TopKSAE, SparseAdam]:
        sae, dead, xs = make_sae(torch.float32), make_dead(num_dead=0), batches(12, torch.float32)
        optimizer = SparseAdam(
            sae, LR, ema_decay=0.9, moment_dtype=torch.bfloat16, compute_dtype=torch.float32
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
        for i, x in enumerate(xs[:steps]):
            if i == resume_at:
                saved = copy.deepcopy((sae.state_dict(), optimizer.state_dict()))
                sae = make_sae(torch.float32)
                optimizer = SparseAdam(
                    sae, LR, ema_decay=0.9, moment_dtype=torch.bfloat16, compute_dtype=torch.float32
                )
                old, schedule = schedule.state_dict(), None
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
                sae.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                schedule.load_state_dict(old)
            FusedEngine(sae, optimizer, dead, graph=False).step(x)
            schedule.step()
        return sae, optimizer

    sae, optimizer = run(12, None)
    resumed, other = run(12, 6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 13)
    for a, b in zip(sae.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["ema"], other.state[b]["ema"])
        assert not torch.equal(optimizer.state[a]["ema"], a)


def test_a_timer_splits_the_step() -> None:
    sae = make_sae()
    step = FusedEngine(sae, SparseAdam(sae, LR), make_dead())
    timer = PhaseTimer(torch.device("cpu"), enabled=True)
    step.step(batches(1)[0], timer)
    spent = timer.milliseconds()
    assert list(spent) == ["encode", "decode", "dead", "optimizer"]
    assert all(ms > 0 for ms in spent.values())


def test_a_schedule_that_moves_betas() -> None:
    """OneCycleLR cycles the first beta, too: as torch.optim.Adam takes it."""
    xs, (fused, plain) = batches(6), (make_sae(), make_sae())
    optimizer = SparseAdam(fused, LR, compute_dtype=torch.float64)
    other = torch.optim.Adam(plain.parameters(), lr=LR, eps=6.25e-10)
    step = FusedEngine(fused, optimizer, make_dead(num_dead=0), dead_latents="none")
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=LR, total_steps=7) for o in (optimizer, other)
    ]
    for x in xs:
        step.step(x)
        other.zero_grad()
        fvu_loss(x, plain(x).recon, inverted(total_variance(x, plain.mesh))).backward()
        project_decoder_grad_(plain)
        other.step()
        renormalise_decoder_(plain)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    for got, want in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_misuse_is_named() -> None:
    sae = make_sae()
    optimizer = SparseAdam(sae, LR, compute_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="FusedEngine"):
        optimizer.step()
    with pytest.raises(ValueError, match="one param group"):
        optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="moment_dtype"):
        SparseAdam(sae, LR, moment_dtype=torch.float16)
    wide = TopKSAE(D, F + 1, K, dtype=torch.float64)
    saved = SparseAdam(wide, LR, compute_dtype=torch.float64).state_dict()
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["none", "auxk"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU test below covers it")
def test_kernels_in_the_interpreter(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, on=kernels: on)
        monkeypatch.delitem(dispatch.KERNEL_FILES, "topk_encode", raising=False)
        sae, dead = make_sae(torch.float32), make_dead()
        optimizer = SparseAdam(sae, LR, compute_dtype=torch.float32)
        step = FusedEngine(sae, optimizer, dead, dead_latents=kind, k_aux=K_AUX)
        metrics = [torch.stack(step.step(x)) for x in batches(3, torch.float32)]
        results.append([torch.stack(metrics), dead.tokens_since_fired, *sae.parameters()])
    for got, want in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "auxk", "ghost"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_reference(kind: Kind, compute: torch.dtype) -> None:
    xs = batches(8, torch.float32)
    results = []
    for device, graph in (("cpu", False), ("cuda", False), ("cuda", True), ("cuda", True)):
        sae = make_sae(torch.float32, "cpu").to(device)
        optimizer = SparseAdam(sae, LR, compute_dtype=compute)
        dead = make_dead(device)
        step = FusedEngine(sae, optimizer, dead, dead_latents=kind, k_aux=K_AUX, graph=graph)
        metrics = [torch.stack(step.step(x.to(device))).cpu() for x in xs]
        weights = [p.detach().cpu() for p in sae.parameters()]
        results.append([torch.stack(metrics), dead.tokens_since_fired.cpu(), *weights])
    for eager, graphed, again in zip(*results[1:], strict=True):
        assert torch.equal(eager, graphed)  # the same bits captured and not, twice
        assert torch.equal(graphed, again)
    # Selections may differ between near-equal candidates, more so from bfloat16 weights.
    tol = 2e-3 if compute == torch.float32 else 5e-2
    torch.testing.assert_close(results[1][0], results[0][0], rtol=tol, atol=tol)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "sign"), [("none", False), ("auxk", False), ("ghost", False), ("auxk", True)]
)
def test_a_graph_equals_launches_with_the_fused_encoder(kind: Kind, sign: bool) -> None:
    """The whole step at a real width: fused encoder, second list, side stream, graph."""
    gen = torch.Generator().manual_seed(3)
    basis = torch.randn(8192, 768, generator=gen)
    codes = (torch.rand(512, 8192, generator=gen) > 0.998).float()
    x = (codes @ basis).cuda()
    saes, losses = [], []
    for graph in (True, False):
        sae = TopKSAE(768, 8192, 16, device="cuda")
        dead = DeadLatents(8192, 10**9, Mesh.single(), torch.device("cuda"))
        dead.tokens_since_fired[:800] = 2 * 10**9
        dead.list_(dead.mask())
        optimizer = SparseAdam(sae, 1e-3, sign=sign)
        step = FusedEngine(sae, optimizer, dead, dead_latents=kind, graph=graph)
        metrics = [step.step(x.roll(i, 0)) for i in range(8)]
        assert bool(step._captured) == graph
        saes.append(sae)
        losses.append(torch.stack([m.fvu for m in metrics]))
    assert losses[0].isfinite().all()
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(losses[0], losses[1])
    for name, param in saes[0].named_parameters():
        assert torch.equal(param, dict(saes[1].named_parameters())[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka", "jumprelu", "relu", "gated"])
def test_architectures_in_a_graph_equal_launches(architecture: str) -> None:
    """To the bit; also where a list by threshold outgrows its room, or needs far less."""
    runs, penalties = [], []
    for graph in (True, False):
        step = OurStep((1024, 256, 8192, 16), architecture=architecture, graph=graph)
        gen = torch.Generator().manual_seed(1)
        metrics = []
        for i in range(12):
            x = torch.randn(1024, 256, generator=gen) * {7: 1.3, 9: 0.7, 11: 1.3}.get(i, 1.0)
            timer = PhaseTimer(step.training.device, enabled=False)
            metrics.append(torch.stack(step.training.step(x.cuda(), timer)))
        assert step.training.engine.graph == graph
        assert bool(step.training.engine._captured) == graph
        told = torch.stack(metrics)
        penalties.append(told[:, 3])
        runs.append([told[:, :3], *step.training.sae.parameters()])
    assert runs[0][0].isfinite().all()
    assert all(torch.equal(*both) for both in zip(*runs, strict=True))
    # Alone launches make their lists just as long as they have to be: a sum rounds otherwise.
    torch.testing.assert_close(*penalties, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_residual_without_variance_revives_nothing(dtype: torch.dtype, tokens: int) -> None:
    """One token, or equal ones: AuxK and its gradient are zero, not NaN."""
    sae, dead = make_sae(dtype), make_dead()
    before = sae.W_enc.detach()[:12].clone()
    engine = FusedEngine(sae, SparseAdam(sae, LR, compute_dtype=dtype), dead, k_aux=K_AUX)
    x = batches(1, dtype)[0][:1].expand(tokens, -1).contiguous()
    metrics = engine.step(x)
    assert metrics.aux == 0
    silent = torch.ones(12, dtype=torch.bool)
    silent[[i for i in sae.encode(x).latents.flatten().tolist() if i < 12]] = False
    assert torch.equal(sae.W_enc[:12][silent], before[silent])
    assert all(p.isfinite().all() for p in sae.parameters())
    for kind in (torch.float32, torch.float64):
        e = torch.randn(500, D, dtype=kind) + 3
        sums, squares = e.sum(0), e.square().sum()
        want = 1 / (e - e.mean(0)).square().sum()
        torch.testing.assert_close(inverse_variance(sums, squares, 500), want, rtol=1e-4, atol=0)
