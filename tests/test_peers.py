"""On the same weights and batch, losses and every gradient equal those of SAELens's training
classes, dictionary_learning's trainers and sparsify's coders, up to the constant that stands before
them: the batch's variance a token, by which FVU is their squared error. Where a library is known to
be wrong the test repeats its mistake first, and gets its value too.

Their values are in tests/data/peers; `bash tests/peers.sh` makes them anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flash_sae_dist.config.train import AutogradTrainConfig
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.engines.autograd import AutogradEngine
from flash_sae_dist.training.step import SAETraining
from tests.peers import case

GIVEN = case.make()
X, Y = GIVEN["x"], GIVEN["y"]
CPU = torch.device("cpu")


def variance_a_token(rows: Tensor = X) -> float:
    """What FVU is multiplied by to be a mean squared error."""
    return float((rows - rows.mean(0)).square().sum() / len(rows))


class Ours(NamedTuple):
    """A forward and backward pass of the autograd engine."""

    training: SAETraining
    fvu: float
    aux: float
    penalty: float
    loss: float
    grads: dict[str, Tensor]


def ours(
    architecture: str,
    *,
    dead: bool = False,
    train: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    **sae: Any,
) -> Ours:
    """Of the case's weights, or others in their place, and of its batch, before the optimizer's
    projection and clipping.
    """
    given = GIVEN | (weights or {})
    config = ARCHITECTURES[architecture].Config(architecture=architecture, d_sae=case.F, **sae)
    transcodes = "target" in (train or {})
    options = {"num_tokens": 10**9, "engine": "autograd", "precision": "float64"} | (train or {})
    cfg = AutogradTrainConfig(**options)
    d_out = case.D if transcodes else None
    training = SAETraining(config, cfg, case.D, Mesh.single(), CPU, d_out=d_out, rms=1.0)
    with torch.no_grad():
        for name, param in training.sae.named_parameters():
            param.copy_(given["b_gate" if (architecture, name) == ("gated", "b_enc") else name])
    if dead:
        training.dead.tokens_since_fired[GIVEN["dead"]] = 10**9
        training.dead.list_(GIVEN["dead"])
    engine = training.engine
    assert isinstance(engine, AutogradEngine)
    target = Y if transcodes else X
    loss, shown, codes, _ = engine._forward(X, target, engine._shared(X, target))
    loss.backward()
    training.sae.observe_([codes])
    grads = {n: p.grad for n, p in training.sae.named_parameters() if p.grad is not None}
    fvu, aux, _, penalty = (float(value) for value in shown)
    return Ours(training, fvu, aux, penalty, float(loss.detach()), grads)


def assert_grads(
    got: dict[str, Tensor], want: dict[str, Tensor], scale: float, rtol: float
) -> None:
    """want holds them as grad.NAME."""
    names = {name.removeprefix("grad.") for name in want if name.startswith("grad.")}
    named = {"b_gate": "b_enc"} if "b_gate" in names else {}
    assert {named.get(name, name) for name in names} == got.keys()
    for name in names:
        expected = want[f"grad.{name}"].to(torch.float64)
        assert expected.abs().max() > 1e-3, "a gradient of nothing tells nothing"
        close = {"rtol": rtol, "atol": rtol * float(expected.abs().max())}
        torch.testing.assert_close(got[named.get(name, name)] * scale, expected, **close)


@pytest.fixture(scope="module")
def lens() -> dict[str, dict[str, Tensor]]:
    return case.read("sae_lens")


@pytest.fixture(scope="module")
def learning() -> dict[str, dict[str, Tensor]]:
    return case.read("dictionary_learning")


@pytest.fixture(scope="module")
def sparsify() -> dict[str, dict[str, Tensor]]:
    return case.read("sparsify")


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning", "sparsify"])
def test_they_were_given_this_case(library: str) -> None:
    kept = case.read(library)["case"]
    assert kept.keys() == GIVEN.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, GIVEN[name])


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_sae_lens_topk_and_batch_topk(name: str, lens: dict[str, dict[str, Tensor]]) -> None:
    got, want, scale = ours(name, k=case.K), lens[name], variance_a_token()
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=1e-12)
    assert_grads(got.grads, want, scale, 1e-10)


def test_sae_lens_matryoshka(lens: dict[str, dict[str, Tensor]]) -> None:
    widths = case.WIDTHS[:-1]
    got = ours("matryoshka", k=case.K, prefix_widths=widths, prefix_losses="sum")
    want, scale = lens["matryoshka"], variance_a_token()
    assert got.fvu * scale == pytest.approx(float(want["mse_loss"]), rel=1e-12)
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=1e-12)
    assert_grads(got.grads, want, scale, 1e-10)


def lens_aux(got: Ours, *, rectified: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """SAELens's AuxK: neither normalised nor, where it is itself, rectified, so that latents with
    negative pre-activations take part; its gradients, which reach no b_dec but the encoder's.
    """
    sae, dead = got.training.sae, GIVEN["dead"]
    params = {name: p.detach().requires_grad_() for name, p in sae.named_parameters()}
    pre = (X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    codes = sae.activate(sae.candidates(X))
    residual = (X - sae.decode(codes)).detach()
    k = min(case.D // 2, int(dead.sum()))
    best = pre.masked_fill(~dead, -torch.inf).topk(k, dim=1)
    acts = torch.zeros_like(pre).scatter(
        1, best.indices, best.values.relu() if rectified else best.values
    )
    scale = min(int(dead.sum()) / (case.D // 2), 1.0)
    loss = scale * (acts @ params["W_dec"] - residual).square().sum(1).mean()
    grads = torch.autograd.grad(loss, list(params.values()))
    return loss.detach(), dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_sae_lens_auxk(name: str, lens: dict[str, dict[str, Tensor]]) -> None:
    """Theirs is not normalised by the residual's variance, and not rectified."""
    want, scale = lens[f"{name}_aux"], variance_a_token()
    plain, both = ours(name, k=case.K), ours(name, k=case.K, dead=True, train={"aux_coef": 1.0})
    value, grads = lens_aux(plain, rectified=False)
    assert float(value) == pytest.approx(float(want["auxiliary_reconstruction_loss"]), rel=1e-12)
    assert_grads({n: g * scale + grads[n] for n, g in plain.grads.items()}, want, 1.0, 1e-10)
    # Ours is theirs rectified and divided by the residual's variance.
    value, grads = lens_aux(plain, rectified=True)
    with torch.no_grad():
        sae = plain.training.sae
        residual = X - sae.decode(sae.candidates(X))
    normaliser = len(X) / (residual - residual.mean(0)).square().sum()
    assert both.aux == pytest.approx(float(value * normaliser), rel=1e-12)
    for n, grad in both.grads.items():
        torch.testing.assert_close(grad, plain.grads[n] + grads[n] * normaliser)


def test_sae_lens_keeps_a_threshold(lens: dict[str, dict[str, Tensor]]) -> None:
    """Its average begins at 0 with the first step; ours at the first batch's least activation."""
    got = ours("batch_topk", k=case.K, threshold_decay=0.99)
    least = float(got.training.sae.mean_threshold)
    assert 0.01 * least == pytest.approx(float(lens["batch_topk"]["threshold"]), rel=1e-12)


def along(norms: Tensor) -> Tensor:
    """What SAELens's decoder norms add to W_dec's gradient: along each row, which the unit norm of
    rows here removes."""
    return norms[:, None] * GIVEN["W_dec"]


def test_sae_lens_standard(lens: dict[str, dict[str, Tensor]]) -> None:
    got = ours("relu", l1_coefficient=case.SPARSITY, sparsity_warmup=0.0)
    want, scale = lens["standard"], variance_a_token()
    assert got.fvu * scale == pytest.approx(float(want["mse_loss"]), rel=1e-12)
    assert got.penalty * scale == pytest.approx(float(want["l1_loss"]), rel=1e-12)
    with torch.no_grad():
        acts = ((X - GIVEN["b_dec"]) @ GIVEN["W_enc"].T + GIVEN["b_enc"]).relu()
    got.grads["W_dec"] += along(case.SPARSITY * acts.mean(0)) / scale
    assert_grads(got.grads, want, scale, 1e-10)


def gate() -> Tensor:
    with torch.no_grad():
        return ((X - GIVEN["b_dec"]) @ GIVEN["W_enc"].T + GIVEN["b_gate"]).relu()


def test_sae_lens_gated(lens: dict[str, dict[str, Tensor]]) -> None:
    """Theirs trains the decoder by the gate's reconstruction, too."""
    got = ours("gated", l1_coefficient=case.SPARSITY, sparsity_warmup=0.0)
    want, scale = lens["gated"], variance_a_token()
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=1e-12)
    wrong = 2 * (gate() @ GIVEN["W_dec"] + GIVEN["b_dec"] - X) / len(X)
    got.grads["W_dec"] += (gate().T @ wrong + along(case.SPARSITY * gate().mean(0))) / scale
    got.grads["b_dec"] += wrong.sum(0) / scale
    assert_grads(got.grads, want, scale, 1e-10)


def test_dictionary_learning_gated(learning: dict[str, dict[str, Tensor]]) -> None:
    got = ours("gated", l1_coefficient=case.SPARSITY, sparsity_warmup=0.0)
    want, scale = learning["gated"], variance_a_token()
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=1e-12)
    assert_grads(got.grads, want, scale, 1e-10)


@pytest.mark.parametrize("mode", ["l0", "quadratic", "tanh"])
def test_sae_lens_jumprelu(mode: str, lens: dict[str, dict[str, Tensor]]) -> None:
    scale = variance_a_token()
    options: dict[str, Any] = {
        "sparsity": mode,
        "bandwidth": case.BANDWIDTH,
        "sparsity_warmup": 0.0,
    }
    # L0 stands beside FVU, as in DeepMind's paper, tanh beside the squared error, as Anthropic's.
    options["sparsity_coefficient"] = case.SPARSITY / (1 if mode == "tanh" else scale)
    if mode == "quadratic":
        options["target_l0"] = case.TARGET_L0
    if mode == "tanh":
        options |= {"tanh_scale": case.TANH_SCALE, "pre_act_coefficient": case.PRE_ACT}
    got = ours("jumprelu", dead=mode == "tanh", **options)
    want = lens[{"l0": "jumprelu_step"}.get(mode, f"jumprelu_{mode}")]
    penalty = float(want["l0_loss"]) + float(want.get("pre_act_loss", 0))
    assert got.fvu * scale == pytest.approx(float(want["mse_loss"]), rel=1e-12)
    assert got.penalty * scale == pytest.approx(penalty, rel=1e-12)
    if mode == "tanh":
        with torch.no_grad():
            pre = (X - GIVEN["b_dec"]) @ GIVEN["W_enc"].T + GIVEN["b_enc"]
            acts = case.TANH_SCALE * pre * (pre > GIVEN["threshold"])
            short = (GIVEN["threshold"] - pre).relu() * GIVEN["dead"] * case.PRE_ACT
        norms = case.SPARSITY * acts * (1 - acts.tanh().square()) + short
        got.grads["W_dec"] += along(norms.mean(0)) / scale
    assert_grads(got.grads, want, scale, 1e-10)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
@pytest.mark.parametrize("dead", [False, True])
def test_dictionary_learning_topk_and_batch_topk(
    name: str, dead: bool, learning: dict[str, dict[str, Tensor]]
) -> None:
    """The same AuxK, whose 1/32 stands beside the squared error, not beside FVU."""
    scale, want = variance_a_token(), learning[name + "_aux" * dead]
    got = ours(name, k=case.K, dead=dead, train={"aux_coef": 1 / 32 / scale})
    # The library computes AuxK in float32.
    rtol = 1e-6 if dead else 1e-10
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=rtol)
    assert got.aux == pytest.approx(float(want["auxk_loss"]), rel=rtol)
    assert_grads(got.grads, want, scale, rtol)
    if name == "batch_topk":
        least = float(got.training.sae.mean_threshold)
        assert least == pytest.approx(float(want["threshold"]), rel=1e-6)


@pytest.mark.parametrize("dead", [False, True])
def test_dictionary_learning_matryoshka(dead: bool, learning: dict[str, dict[str, Tensor]]) -> None:
    """Theirs divides by the number of widths twice, AuxK not at all."""
    widths, count = case.WIDTHS[:-1], len(case.WIDTHS)
    scale, want = variance_a_token() / count, learning["matryoshka" + "_aux" * dead]
    got = ours("matryoshka", k=case.K, prefix_widths=widths, dead=dead,
               train={"aux_coef": 1 / 32 / scale})  # fmt: skip
    rtol = 1e-6 if dead else 1e-10
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=rtol)
    assert_grads(got.grads, want, scale, rtol)


def test_dictionary_learning_jumprelu(learning: dict[str, dict[str, Tensor]]) -> None:
    """Theirs does not centre its input, which other biases make up for, and takes L0's gradient at
    activations: of the window's pairs only those above their thresholds have one.
    """
    scale, want = variance_a_token(), learning["jumprelu"]
    got = ours(
        "jumprelu", sparsity="target", target_l0=case.TARGET_L0, bandwidth=case.BANDWIDTH,
        sparsity_coefficient=case.SPARSITY / scale, sparsity_warmup=0.0,
        weights={"b_enc": GIVEN["b_enc"] + GIVEN["W_enc"] @ GIVEN["b_dec"]},
    )  # fmt: skip
    assert got.fvu * scale == pytest.approx(float(want["l2_loss"]), rel=1e-12)
    # The library counts in float32.
    assert got.loss * scale == pytest.approx(float(want["loss"]), rel=1e-7)
    pre, threshold = X @ GIVEN["W_enc"].T + GIVEN["b_enc"], GIVEN["threshold"]
    l0 = (pre > threshold).sum() / len(X)
    below = ((pre <= threshold) & (pre > threshold - case.BANDWIDTH / 2)).sum(0)
    # An activation of 0 is in the window of thresholds below half of it.
    zeros = ((pre <= threshold) & (threshold < case.BANDWIDTH / 2)).sum(0)
    each = -2 * (l0 / case.TARGET_L0 - 1) / case.TARGET_L0 / case.BANDWIDTH / len(X)
    got.grads["threshold"] += case.SPARSITY * each * (zeros - below) / scale
    # Through the bias that makes up for centring.
    b_enc = got.grads["b_enc"]
    got.grads["W_enc"] += b_enc[:, None] * GIVEN["b_dec"]
    got.grads["b_dec"] += GIVEN["W_enc"].T @ b_enc
    assert_grads(got.grads, want, scale, 1e-6)


def test_sparsify_topk(sparsify: dict[str, dict[str, Tensor]]) -> None:
    got, want = ours("topk", k=case.K), sparsify["topk"]
    assert got.fvu == pytest.approx(float(want["fvu"]), rel=1e-12)
    assert_grads(got.grads, want, 1.0, 1e-10)


def dense_topk(k: int, params: dict[str, Tensor]) -> Tensor:
    pre = ((X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]).relu()
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values)


def test_sparsify_auxk(sparsify: dict[str, dict[str, Tensor]]) -> None:
    """Theirs, normalised by the batch's variance, gives the encoder no gradient."""
    want, plain = sparsify["topk_aux"], ours("topk", k=case.K)
    params = {
        name: GIVEN[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "b_dec", "W_dec")
    }
    pre = ((X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]).relu()
    residual = (X - dense_topk(case.K, params) @ params["W_dec"] - params["b_dec"]).detach()
    best = pre.masked_fill(~GIVEN["dead"], -torch.inf).topk(case.D // 2, dim=1)
    acts = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    total = variance_a_token() * len(X)
    for broken in (True, False):
        used = acts.detach() if broken else acts
        loss = (used @ params["W_dec"] - residual).square().sum() / total
        grads = torch.autograd.grad(
            loss, list(params.values()), allow_unused=True, retain_graph=True
        )
        found = dict(zip(params, grads, strict=True))
        assert float(loss.detach()) == pytest.approx(float(want["auxk"]), rel=1e-12)
        if broken:
            grads_of = {
                n: g + (0 if found[n] is None else found[n] / 32) for n, g in plain.grads.items()
            }
            assert_grads(grads_of, want, 1.0, 1e-10)
    # Ours is what it should be, divided by the residual's variance.
    both = ours("topk", k=case.K, dead=True)
    ratio = float(total / (residual - residual.mean(0)).square().sum())
    assert both.aux == pytest.approx(float(want["auxk"]) * ratio, rel=1e-12)
    for n, grad in both.grads.items():
        torch.testing.assert_close(grad, plain.grads[n] + found[n] * ratio / 32)


def test_sparsify_multi_topk(sparsify: dict[str, dict[str, Tensor]]) -> None:
    """Theirs gives the encoder no gradient of the second loss."""
    want, plain, got = sparsify["multi_topk"], ours("topk", k=case.K), ours("multi_topk", k=case.K)
    params = {
        name: GIVEN[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "b_dec", "W_dec")
    }
    acts = dense_topk(4 * case.K, params)
    assert got.fvu == pytest.approx(float(want["fvu"]), rel=1e-12)
    assert got.loss == pytest.approx(float(want["fvu"] + want["multi_topk"] / 8), rel=1e-12)
    for broken in (True, False):
        recon = (acts.detach() if broken else acts) @ params["W_dec"] + params["b_dec"]
        loss = (recon - X).square().sum() / variance_a_token() / len(X) / 8
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        found = {n: 0 if g is None else g for n, g in zip(params, grads, strict=True)}
        summed = {n: g + found[n] for n, g in plain.grads.items()}
        if broken:
            assert_grads(summed, want, 1.0, 1e-10)
        else:
            for n, grad in got.grads.items():
                torch.testing.assert_close(grad, summed[n])


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcoder(skip: bool, sparsify: dict[str, dict[str, Tensor]]) -> None:
    want = sparsify["skip_transcoder" if skip else "transcoder"]
    got = ours("topk", k=case.K, skip=skip, train={"target": "mlp"})
    assert got.loss == pytest.approx(float(want["fvu"]), rel=1e-12)
    assert_grads(got.grads, want, 1.0, 1e-10)
