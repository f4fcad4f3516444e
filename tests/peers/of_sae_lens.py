"""Losses and gradients of SAELens's training classes: `python -m tests.peers.of_sae_lens`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tests.peers import case

_TURNED = ("W_enc",)


def _class(kind: str) -> Any:
    import sae_lens

    return getattr(sae_lens, f"{kind}TrainingSAE"), getattr(sae_lens, f"{kind}TrainingSAEConfig")


def run(
    kind: str, given: dict[str, Tensor], *, dead: bool, coefficient: str | None, **config: Any
) -> dict[str, Tensor]:
    """One forward and backward pass of a training class."""
    from sae_lens.saes.sae import TrainStepInput

    model, model_config = _class(kind)
    sae = model(model_config(d_in=case.D, d_sae=case.F, dtype="float64", device="cpu", **config))
    own = dict(sae.named_parameters())
    if "threshold" in own:
        # SAELens keeps it in float32; float64 is what the others are.
        sae.threshold.data = sae.threshold.data.double()
    with torch.no_grad():
        for name, param in own.items():
            param.data = (given[name].T if name in _TURNED else given[name]).clone().contiguous()
    step = TrainStepInput(
        sae_in=given["x"],
        coefficients={} if coefficient is None else {coefficient: case.SPARSITY},
        dead_neuron_mask=given["dead"] if dead else None,
        n_training_steps=0,
        is_logging_step=False,
    )
    out = sae.training_forward_pass(step)
    out.loss.backward()
    found = {"loss": out.loss, **{n: torch.as_tensor(v) for n, v in out.losses.items()}}
    if hasattr(sae, "topk_threshold"):
        found["threshold"] = sae.topk_threshold
    for name, param in own.items():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        found[f"grad.{name}"] = grad.T if name in _TURNED else grad
    return found


def cases() -> dict[str, dict[str, Tensor]]:
    """Every class that trains what is trained here."""
    given = case.make()
    jump = {"jumprelu_bandwidth": case.BANDWIDTH}
    found = {
        "standard": run("Standard", given, dead=False, coefficient="l1"),
        "gated": run("Gated", given, dead=False, coefficient="l1"),
        "jumprelu_step": run("JumpReLU", given, dead=False, coefficient="l0", **jump),
        "jumprelu_tanh": run(
            "JumpReLU", given, dead=True, coefficient="l0", jumprelu_sparsity_loss_mode="tanh",
            jumprelu_tanh_scale=case.TANH_SCALE, pre_act_loss_coefficient=case.PRE_ACT,
            jumprelu_ste_to_input=True, **jump,
        ),
        "jumprelu_quadratic": run(
            "JumpReLU", given, dead=False, coefficient="l0", target_l0=case.TARGET_L0,
            jumprelu_sparsity_loss_mode="quadratic", **jump,
        ),
    }  # fmt: skip
    matryoshka = {"matryoshka_widths": list(case.WIDTHS)}
    for name, kind, more in (
        ("topk", "TopK", {}),
        ("batch_topk", "BatchTopK", {}),
        ("matryoshka", "MatryoshkaBatchTopK", matryoshka),
    ):
        for dead in (False, True):
            found[name + "_aux" * dead] = run(
                kind, given, dead=dead, coefficient=None, k=case.K, **more
            )
    return found


if __name__ == "__main__":
    case.keep("sae_lens", cases(), version("sae-lens"))
