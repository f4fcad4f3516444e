"""Qwen-Scope: one `layerN.sae.pt` a layer, W_enc [F, D], W_dec [D, F]; its encoder reads x itself.

The file tells no k: it stands in the name of the repository, `SAE-Res-Qwen3-8B-Base-W64K-L0_50`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.about import About
from . import files
from .contents import Contents, centred, check_weights, not_centred, turned, whole_number
from .format import Converters, Format, Written
from .hook_names import layer_of

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def _topk_to(sae: Contents) -> Written:
    weights = {name: sae.weights[name] for name in _NAMES}
    weights["b_enc"] = not_centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    weights["W_dec"] = weights["W_dec"].T
    # Its own readers take the four tensors and pass over this.
    return weights, {"k": sae.keys["k"]}


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = files.tensors(path, found, _NAMES)
    weights["W_dec"] = turned(weights["W_dec"])
    check_weights(path, weights)
    weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights, {"k": whole_number(path, "k", config["k"])}


CONVERTERS: Converters = {"topk": (_topk_to, _topk_from), "multi_topk": (_topk_to, None)}


def write(sae: Contents, path: Path) -> None:
    """Writes an SAE in the form of Qwen-Scope's files."""
    weights, config = CONVERTERS[sae.architecture][0](sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_pt(path, weights | config)


def _k(path: Path, stored: object, given: int | None) -> object:
    """k by the file, the caller, or a folder's name above it. Raises ValueError without any."""
    if stored is not None:
        return stored
    if given is not None:
        return given
    for folder in path.resolve().parents:
        if named := re.search(r"L0_(\d+)", folder.name):
            return int(named[1])
    raise ValueError(
        f"{path} does not tell k, and no folder above it is named after one (...-L0_50); give k, "
        "as --k 50"
    )


def read(path: Path, k: int | None = None) -> Contents:
    """Reads what `write` wrote, or Qwen's. Raises ValueError where k is unknown, or for damage."""
    found = files.read_pt(path)
    config = {"k": _k(path, found.pop("k", None), k)}
    weights, keys = _topk_from(path, found, config)
    layer = re.search(r"layer(\d+)", path.name)
    return Contents("topk", weights, keys, About(layer and f"model.layers.{layer[1]}"))


FORMAT = Format(
    "qwen_scope",
    "Qwen-Scope",
    CONVERTERS,
    read,
    write,
    lambda names: False,
    lambda path: path.suffix == ".pt" and "W_enc" in files.pt_names(path, "W_enc"),
    file=lambda about: f"layer{layer_of(about.hookpoint) or 0}.sae.pt",
)
