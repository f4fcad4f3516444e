"""OpenAI's sparse_autoencoder: one `.pt` file, a state_dict with its activation's name.

Its class standardises each token where the activation is TopK, so that is `sae.input_norm`
layer_norm here; its first SAEs, of ReLU, take tokens as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .contents import Contents, turned, whole_number
from .format import Converters, Format, Written, converter
from .hook_names import layer_of

_NAMES = {
    "encoder.weight": "W_enc",
    "latent_bias": "b_enc",
    "decoder.weight": "W_dec",
    "pre_bias": "b_dec",
}
# Statistics of its training, a number a latent.
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_ACTIVATION = ("activation", "activation_state_dict")


def _to(sae: Contents) -> dict[str, Tensor]:
    weights = {theirs: sae.weights[ours] for theirs, ours in _NAMES.items()}
    weights["decoder.weight"] = weights["decoder.weight"].T
    zeros = torch.zeros(len(sae.weights["b_enc"]))
    return weights | dict.fromkeys(_STATISTICS, zeros) | {_STATISTICS[0]: zeros.long()}


def _from(path: Path, found: dict[str, Any]) -> dict[str, Tensor]:
    tensors = files.tensors(path, found, _NAMES, _STATISTICS)
    weights = {ours: tensors[theirs] for theirs, ours in _NAMES.items()}
    return weights | {"W_dec": turned(weights["W_dec"])}


def _topk_to(sae: Contents) -> Written:
    if sae.keys.get("input_norm") != "layer_norm":
        raise ValueError(
            "OpenAI's class standardises each token where the activation is TopK, which this SAE "
            "does not (sae.input_norm='none'); name another format"
        )
    k = {"k": sae.keys["k"], "postact_fn": "ReLU"}
    return _to(sae), {"activation": "TopK", "activation_state_dict": k}


def _relu_to(sae: Contents) -> Written:
    if sae.keys.get("input_norm", "none") != "none":
        raise ValueError(
            "only of TopK does OpenAI's class standardise tokens, which this SAE of ReLU does "
            f"(sae.input_norm={sae.keys['input_norm']!r}); name another format"
        )
    return _to(sae), {"activation": "ReLU", "activation_state_dict": {}}


def _relu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    del config
    return _from(path, found), {}


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = _from(path, found)
    state = config.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    # Stored as a class's name, which is ReLU in all that were published.
    if (after := str(state.get("postact_fn", "ReLU"))) != "ReLU":
        raise ValueError(f"{path}: postact_fn={after!r}, but only 'ReLU' is read here")
    k = whole_number(path, "k", state.get("k"))
    return weights, {"k": k, "input_norm": "layer_norm"}


CONVERTERS: Converters = {
    "topk": (_topk_to, _topk_from),
    "multi_topk": (_topk_to, None),
    "relu": (_relu_to, _relu_from),
}


def write(sae: Contents, path: Path) -> None:
    """Writes an SAE so that OpenAI's `Autoencoder.from_state_dict(torch.load(path))` gives the same
    reconstruction. Raises ValueError for one of TopK that does not standardise its tokens.
    """
    weights, config = CONVERTERS[sae.architecture][0](sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_pt(path, weights | config)


def read(path: Path, k: int | None = None) -> Contents:
    """Reads what `write` or OpenAI wrote. Raises ValueError for an architecture that is not read,
    or damage.
    """
    del k
    found = files.read_pt(path)
    config = {name: found.pop(name) for name in _ACTIVATION if name in found}
    # Its `state_dict()` tells k and its function once more, under the submodule's name.
    found = {name: value for name, value in found.items() if not name.startswith("activation.")}
    # Without the key its class takes ReLU.
    theirs = str(config.get("activation", "ReLU"))
    name = {"TopK": "topk", "ReLU": "relu"}.get(theirs)
    weights, keys = converter(path, CONVERTERS, name, theirs)(path, found, config)
    return Contents(str(name), weights, keys)


FORMAT = Format(
    "openai",
    "OpenAI's sparse_autoencoder",
    CONVERTERS,
    read,
    write,
    lambda names: False,
    lambda path: path.suffix == ".pt" and "pre_bias" in files.pt_names(path, "pre_bias"),
    file=lambda about: f"{layer_of(about.hookpoint) or 0}.pt",
    layer_norm=True,
)
