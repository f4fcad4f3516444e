"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors` and `config.json`): JumpReLU SAEs whose
encoders read x itself. Names are capitals in the first and small letters in the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.about import About
from . import files
from .contents import (
    Contents,
    centred,
    check_output,
    check_weights,
    named,
    not_centred,
    transcoder_keys,
    turned,
)
from .format import Converters, Format, Written, converter

FIRST, SECOND, CONFIG_FILE = "params.npz", "params.safetensors", "config.json"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SKIP = "affine_skip_connection"  # [d_in, d_out]


def _jumprelu_to(sae: Contents) -> Written:
    weights = named(sae, *_NAMES)
    if not sae.transcodes:
        weights["b_enc"] = not_centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    if "W_skip" in weights:
        weights[_SKIP] = weights.pop("W_skip").T
    weights["W_enc"] = weights["W_enc"].T
    return weights, {}


def _jumprelu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    transcodes = bool(config.get("_transcodes"))
    weights = files.tensors(path, found, _NAMES, (_SKIP,) if transcodes else ())
    weights["W_enc"] = turned(weights["W_enc"])
    if _SKIP in weights:
        weights["W_skip"] = turned(weights.pop(_SKIP))
    check_weights(path, weights, transcodes=transcodes)
    if transcodes:
        return weights, transcoder_keys(weights)
    weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights, {}


# What selects over a batch is written by its thresholds.
CONVERTERS: Converters = {
    "jumprelu": (_jumprelu_to, _jumprelu_from),
    **dict.fromkeys(("batch_topk", "matryoshka"), (_jumprelu_to, None)),
}


def _write_first(sae: Contents, folder: Path) -> None:
    """Writes an SAE in the form of Gemma Scope 1."""
    weights, _ = CONVERTERS[sae.architecture][0](sae)
    files.begin(folder)
    files.write_npz(folder / FIRST, weights)
    files.seal(folder, [FIRST])


def _write_second(sae: Contents, folder: Path) -> None:
    """Writes an SAE or a transcoder in the form of Gemma Scope 2."""
    check_output(sae)
    weights, _ = CONVERTERS[sae.architecture][0](sae)
    config = {
        "architecture": "jump_relu",
        "model_name": sae.about.model_name,
        "hf_hook_point_in": sae.about.hookpoint,
        "hf_hook_point_out": sae.about.output_hookpoint if sae.transcodes else sae.about.hookpoint,
        "width": len(weights["b_enc"]),
        "affine_connection": "W_skip" in sae.weights,
    }
    files.begin(folder)
    files.write_safetensors(folder / SECOND, {n[0].lower() + n[1:]: t for n, t in weights.items()})
    files.write_config(folder / CONFIG_FILE, config)
    files.seal(folder, [CONFIG_FILE, SECOND])


def _read_first(path: Path, k: int | None = None) -> Contents:
    """Reads a params.npz or its folder. Raises ValueError for damage."""
    del k
    file = path / FIRST if path.is_dir() else path
    files.check(file.parent)
    found = {
        ("W" if n.startswith("w_") else n[:1]) + n[1:]: t for n, t in files.read_npz(file).items()
    }
    scale = found.pop("scaling_factor", None)
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        raise ValueError(f"{file}: scaling_factor is not 1, which is not read here")
    weights, keys = _jumprelu_from(file, found, {})
    return Contents("jumprelu", weights, keys)


def _read_second(path: Path, k: int | None = None) -> Contents:
    """Reads a params.safetensors with its config.json, or their folder. Raises ValueError for an
    architecture that is not read, or damage.
    """
    del k
    folder = path if path.is_dir() else path.parent
    files.check(folder)
    found: dict[str, Any] = dict(files.read_safetensors(folder / SECOND))
    config: dict[str, Any] = {}
    if (folder / CONFIG_FILE).is_file():
        config = files.read_config(folder / CONFIG_FILE)
    hooks = [config.get(f"hf_hook_point_{side}") for side in ("in", "out")]
    theirs = str(config.get("architecture", "jump_relu"))
    config["_transcodes"] = _SKIP in found or hooks[0] != hooks[1]
    if config.get("affine_connection") and _SKIP not in found:
        raise ValueError(
            f"{folder / SECOND} has no {_SKIP}, which its config tells of; download it anew"
        )
    ours = {"jump_relu": "jumprelu"}.get(theirs)
    read = converter(folder, CONVERTERS, ours, theirs)
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    weights, keys = read(folder / SECOND, {names.get(n, n): t for n, t in found.items()}, config)
    model, *hooks = (v if isinstance(v, str) else None for v in (config.get("model_name"), *hooks))
    about = About(hooks[0], model)
    if "d_out" in keys:
        about = about._replace(output_hookpoint=hooks[1])
    return Contents(str(ours), weights, keys, about)


FORMAT = Format(
    "gemma_scope",
    "Gemma Scope 1",
    CONVERTERS,
    _read_first,
    _write_first,
    lambda names: FIRST in names,
    lambda path: path.suffix == ".npz",
)
SECOND_FORMAT = Format(
    "gemma_scope_2",
    "Gemma Scope 2",
    CONVERTERS,
    _read_second,
    _write_second,
    lambda names: SECOND in names,
    lambda path: path.name == SECOND,
    transcoders=frozenset(CONVERTERS),
)
