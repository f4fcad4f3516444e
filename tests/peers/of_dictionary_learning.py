"""Losses and gradients of dictionary_learning's trainers, as they are before its optimizers clip
and project them: `python -m tests.peers.of_dictionary_learning`.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.peers import case

# By parameter of the library our name; a * stands before those that it keeps turned.
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "*W_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "W_enc": "*W_enc",
}
_SILENT_TOKENS = 10_000_000  # the library's dead_feature_threshold
_STEP = 10**6  # beyond every warm-up


def _trainers() -> Any:
    """The module of the trainers. Its package imports a buffer of activations, and with it nnsight,
    which nothing here needs.
    """
    try:
        importlib.import_module("nnsight")
    except ImportError:
        sys.modules["nnsight"] = stub = types.ModuleType("nnsight")
        stub.LanguageModel = mock.MagicMock  # type: ignore[attr-defined]
    return importlib.import_module


def run(module: str, kind: str, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """One forward and backward pass of a trainer's loss."""
    dead = options.pop("dead", False)
    trainers = _trainers()(f"dictionary_learning.trainers.{module}")
    trainer = getattr(trainers, kind)(
        steps=2 * _STEP, activation_dim=case.D, dict_size=case.F, layer=0, lm_name="none",
        device="cpu", **options,
    )  # fmt: skip
    trainer.ae.double()
    own = dict(trainer.ae.named_parameters())
    turned = {name: _NAMES.get(name, name).startswith("*") for name in own}
    names = {name: _NAMES.get(name, name).lstrip("*") for name in own}
    with torch.no_grad():
        for name, param in own.items():
            value = given[names[name]]
            param.copy_(value.T if turned[name] else value)
    if dead:
        trainer.num_tokens_since_fired[given["dead"]] = 2 * _SILENT_TOKENS
    log = trainer.loss(given["x"], step=_STEP, logging=True)
    loss = trainer.loss(given["x"], step=_STEP)
    loss.backward()
    found = {
        "loss": loss,
        **{n: torch.tensor(v, dtype=torch.float64) for n, v in log.losses.items()},
    }
    if hasattr(trainer.ae, "threshold") and "threshold" not in own:
        found["threshold"] = torch.as_tensor(trainer.ae.threshold)
    for name, param in own.items():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        found[f"grad.{names[name]}"] = grad.T if turned[name] else grad
    return found


def cases() -> dict[str, dict[str, Tensor]]:
    """TopK, BatchTopK and Matryoshka with and without AuxK, JumpReLU and Gated."""
    given = case.make()
    ends = (0, *case.WIDTHS)
    sizes = [(after - before) / case.F for before, after in zip(ends, ends[1:], strict=False)]
    found = {
        "jumprelu": run(
            "jumprelu", "JumpReluTrainer", given, bandwidth=case.BANDWIDTH,
            target_l0=case.TARGET_L0, sparsity_penalty=case.SPARSITY,
        ),
        "gated": run("gdm", "GatedSAETrainer", given, l1_penalty=case.SPARSITY),
    }  # fmt: skip
    for name, module, kind, more in (
        ("topk", "top_k", "TopKTrainer", {}),
        ("batch_topk", "batch_top_k", "BatchTopKTrainer", {}),
        ("matryoshka", "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer",
         {"group_fractions": sizes}),
    ):  # fmt: skip
        for dead in (False, True):
            found[name + "_aux" * dead] = run(module, kind, given, k=case.K, dead=dead, **more)
    return found


if __name__ == "__main__":
    case.keep("dictionary_learning", cases(), version("dictionary-learning"))
