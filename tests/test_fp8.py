"""Training with an fp8 search and SAEs quantized to fp8, by the reference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flash_sae_dist import TopKSAE, quantize
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.file import parse
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.jumprelu import JumpReLU
from flash_sae_dist.models.multi_topk import MultiTopK
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engine import make_engine
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining

D, F, K, N = 48, 384, 8, 128
TIMER = PhaseTimer(torch.device("cpu"), enabled=False)


def data(seed: int, n: int = N) -> Tensor:
    """Sums of 8 of 384 directions, and a tenth of that as noise."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, F, generator=g).topk(K, dim=1).indices
    acts = torch.zeros(n, F).scatter_(1, chosen, 1 + torch.rand(n, K, generator=g))
    return acts @ directions + 0.1 * torch.randn(n, D, generator=g)


def training(search: str, **options: object) -> SAETraining:
    cfg = ENGINES["auto"](
        num_tokens=200 * N, batch_tokens=N, lr=3e-3, warmup_steps=0, dead_latents="none", **options
    )
    sae = TopKConfig.model_validate({"k": K, "d_sae": F, "search": search})
    return SAETraining(sae, cfg, D, Mesh.single(), torch.device("cpu"))


def fvu(sae: TopKSAE, x: Tensor) -> float:
    with torch.no_grad():
        return float((sae(x).recon - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.fixture(scope="module")
def trained() -> TopKSAE:
    run = training("exact")
    for seed in range(80):
        run.step(data(seed), TIMER)
    sae = run.sae
    assert isinstance(sae, TopKSAE)
    return sae


def test_training_by_fp8_search_ends_where_exact_search_does(trained: TopKSAE) -> None:
    run = training("fp8")
    for seed in range(80):
        run.step(data(seed), TIMER)
    held_out = data(1000, 2048)
    assert isinstance(run.sae, TopKSAE)
    assert fvu(run.sae, held_out) == pytest.approx(fvu(trained, held_out), rel=0.003)


def test_what_is_not_finite_reaches_the_loss() -> None:
    run = training("fp8")
    x = data(0)
    x[3, 5] = torch.nan
    assert not torch.isfinite(torch.as_tensor(run.step(x, TIMER).fvu))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_other_rules_refuse_it(name: str) -> None:
    kind = ARCHITECTURES[name].Config
    values = {"architecture": name, "d_sae": 64, "search": "fp8"}
    values |= {"k": 4} if "k" in kind.model_fields else {}
    if name in ("topk", "multi_topk"):
        assert getattr(parse(kind, values, "sae"), "search") == "fp8"  # noqa: B009
        return
    with pytest.raises(ValueError, match="search"):
        parse(kind, values, "sae")


def test_other_engines_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training("fp8")
    cfg = ENGINES["autograd"](
        engine="autograd", num_tokens=N, batch_tokens=N, lr=1e-3, adam_betas=(0.9, 0.999),
        dead_latents="none",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="fused engine"):
        make_engine(run.sae, run.dead, cfg, torch.float32)
    module = "flash_sae_dist.training.engine.fp8_obstacle"
    monkeypatch.setattr(module, lambda device: "fp8 needs a newer GPU")
    with pytest.raises(ConfigError, match=r"newer GPU; drop sae\.search"):
        make_engine(run.sae, run.dead, run.cfg, torch.float32)


def test_the_search_is_no_part_of_an_sae(tmp_path: Path) -> None:
    sae = TopKSAE(D, F, K, search="fp8")
    sae.save(tmp_path)
    assert "search" not in (tmp_path / "config.json").read_text()
    assert torch.equal(TopKSAE.load(tmp_path).W_enc, sae.W_enc)


def test_a_quantized_sae_reconstructs_as_well(trained: TopKSAE) -> None:
    held_out = data(1000, 2048)
    small = quantize(trained)
    assert fvu(small, held_out) == pytest.approx(fvu(trained, held_out), rel=0.01)
    whole = sum(t.nbytes for t in (trained.W_enc, trained.W_dec))
    assert sum(t.nbytes for t in (small.W_enc, small.W_dec)) == whole / 4
    assert sum(t.nbytes for t in small.state_dict().values()) < 0.3 * whole
    assert not small.training
    assert not list(p for p in small.parameters() if p.requires_grad)


def test_a_quantized_sae_is_used_as_others(trained: TopKSAE, tmp_path: Path) -> None:
    small = quantize(trained)
    x = data(7, 12).view(3, 4, D)
    out, codes = small(x), small.encode(x)
    assert codes.latents.shape == (3, 4, K)
    torch.testing.assert_close(small.decode(codes), out.recon)
    handle = small.register_acts_hook(lambda acts: acts)
    torch.testing.assert_close(small(x).recon, out.recon, rtol=1e-4, atol=1e-5)
    handle.remove()
    rows = small.W_enc.float() * small.W_enc_scale[:, None]
    exact = (x.view(-1, D) - small.b_dec) @ rows.T + small.b_enc
    want = exact.relu().gather(1, codes.latents.view(12, K).long())
    torch.testing.assert_close(codes.values.view(12, K), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not saved"):
        small.save(tmp_path)
    with pytest.raises(ValueError, match="cast to torch"):
        copy.deepcopy(small).to(torch.bfloat16)(x)


def test_what_cannot_be_quantized_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    jump = JumpReLU.from_config(JumpReLU.Config.model_validate({"d_sae": F}), D)
    with pytest.raises(ValueError, match="'jumprelu' cannot be quantized; topk and multi_topk can"):
        quantize(jump)
    with pytest.raises(ValueError, match="'int4' is not 'fp8'"):
        quantize(TopKSAE(D, F, K), "int4")  # type: ignore[arg-type]
    assert quantize(MultiTopK(D, F, K)).k == K
    monkeypatch.setattr("flash_sae_dist.models.quantized.fp8_obstacle", lambda device: "too old")
    with pytest.raises(ValueError, match="too old"):
        quantize(TopKSAE(D, F, K))


@pytest.mark.gpu
def test_inference_takes_a_quarter_of_the_memory_on_the_gpu() -> None:
    sae = TopKSAE(2048, 65_536, 32, device="cuda")
    x = torch.randn(1024, 2048, device="cuda")
    whole = sum(t.nbytes for t in sae.state_dict().values())
    small = quantize(sae)
    want = sae.encode(x)
    del sae
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - sum(t.nbytes for t in small.state_dict().values())
    torch.cuda.reset_peak_memory_stats()
    codes = small(x).codes
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 0.3 * whole + 2 * (63 << 20)
    same = (codes.latents[:, :, None] == want.latents[:, None]).any(1).float().mean()
    assert same > 0.9
