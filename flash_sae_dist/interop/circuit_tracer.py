"""circuit-tracer: `config.yaml` and one `layer_N.safetensors` a layer, W_enc and W_dec [F, D].

Each layer's latents have thresholds: its loader of local folders passes over a `k`. So TopK SAEs
are written with thresholds that were measured on rows (thresholds.py), which keep each latent's
frequency there. Its encoder reads x itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
)
from .format import Converters, Format, Written, converter
from .hook_names import hook_name, layer_of

CONFIG_FILE = "config.yaml"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = "activation_function.threshold"


def _relu_to(sae: Contents) -> Written:
    weights = named(sae, *_NAMES)
    if not sae.transcodes:
        # All of one type: it is loaded as it lies there.
        folded = not_centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
        weights["b_enc"] = folded.to(weights["W_enc"].dtype)
    return weights, {}


def _thresholds_to(sae: Contents) -> Written:
    if "threshold" not in sae.weights:
        raise ValueError(
            "circuit-tracer wants a threshold of each latent in place of k; name a store to "
            "measure them on, as --rows acts.zarr"
        )
    weights, config = _relu_to(sae)
    return weights | {_THRESHOLD: sae.weights["threshold"].to(weights["W_enc"].dtype)}, config


def _relu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    transcodes = bool(config.get("_transcodes"))
    optional = (*(("W_skip",) if transcodes else ()), _THRESHOLD)
    weights = files.tensors(path, found, _NAMES, optional)
    if _THRESHOLD in weights:
        weights["threshold"] = weights.pop(_THRESHOLD)
    check_weights(path, weights, transcodes=transcodes)
    if transcodes:
        return weights, transcoder_keys(weights)
    weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights, {}


CONVERTERS: Converters = {
    # Written by thresholds, which what comes back has.
    **dict.fromkeys(("topk", "multi_topk", "batch_topk", "matryoshka"), (_thresholds_to, None)),
    "jumprelu": (_thresholds_to, _relu_from),
    "relu": (_relu_to, _relu_from),
}


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE as a layer of a set, beside those that are there. Raises ValueError where the
    set is of other hooks.
    """
    check_output(sae)
    weights, _ = CONVERTERS[sae.architecture][0](sae)
    layer, pattern = layer_of(sae.about.hookpoint), re.compile(r"^blocks\.\d+\.")
    if layer is None:
        raise ValueError(
            f"hookpoint {sae.about.hookpoint!r} has no number of a layer, which names "
            "circuit-tracer's file; give one, as --hookpoint model.layers.3.mlp"
        )
    names = [sae.about.hookpoint, sae.about.output_hookpoint or sae.about.hookpoint]
    hooks = [pattern.sub("", hook_name(str(name))) for name in names]
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "model_name": sae.about.model_name,
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
        "scan": folder.name,
    }
    if (folder / CONFIG_FILE).is_file():
        before = files.read_config(folder / CONFIG_FILE)
        for key in ("feature_input_hook", "feature_output_hook", "model_name"):
            if before.get(key) != config[key]:
                raise ValueError(
                    f"{folder} holds a set of {key}={before.get(key)!r}, not {config[key]!r}; name "
                    "another folder"
                )
    files.begin(folder)
    name = f"layer_{layer}.safetensors"
    files.write_safetensors(folder / name, weights)
    paths = sorted(folder.glob("layer_*.safetensors"), key=lambda p: layer_of(p.name) or 0)
    # Its loader of local files takes them from a list, in the order of the layers.
    config["transcoders"] = [str(path.resolve()) for path in paths]
    files.write_config(folder / CONFIG_FILE, config)
    files.seal(folder, [CONFIG_FILE, *(path.name for path in paths)])


def read(path: Path, k: int | None = None) -> Contents:
    """Reads a layer's file, or the folder of one alone. Raises ValueError for an architecture that
    is not read, or damage.
    """
    del k
    folder, file = (path, path) if path.is_dir() else (path.parent, path)
    files.check(folder)
    if path.is_dir():
        layers = sorted(p.name for p in folder.glob("layer_*.safetensors"))
        if len(layers) != 1:
            raise ValueError(
                f"{folder} holds {len(layers)} layers; name the file of one, as "
                f"{folder / (layers[0] if layers else 'layer_0.safetensors')}"
            )
        file = folder / layers[0]
    config = files.read_config(folder / CONFIG_FILE)
    found: dict[str, Any] = dict(files.read_safetensors(file))
    name = "jumprelu" if _THRESHOLD in found else str(config.get("activation", "relu"))
    hooks = [config.get(f"feature_{side}_hook") for side in ("input", "output")]
    config["_transcodes"] = hooks[0] != hooks[1] or "W_skip" in found
    weights, keys = converter(file, CONVERTERS, name, name)(file, found, config)
    model = config.get("model_name")
    return Contents(name, weights, keys, About(None, model if isinstance(model, str) else None))


FORMAT = Format(
    "circuit_tracer",
    "circuit-tracer",
    CONVERTERS,
    read,
    write,
    lambda names: CONFIG_FILE in names and any(n.startswith("layer_") for n in names),
    lambda path: path.name.startswith("layer_") and (path.parent / CONFIG_FILE).is_file(),
    transcoders=frozenset(CONVERTERS),
)
