"""llamascopium: `config.json` and `sae_weights.safetensors`; its encoder reads x itself. What reads
one hook point and gives another is a transcoder, of one width, without a skip connection.

Where it normalises by the data set's mean norm, weights are turned into those for rows as they are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.about import About
from . import files
from .contents import (
    Contents,
    centred,
    check_output,
    check_told,
    check_weights,
    not_centred,
    transcoder_keys,
    turned,
    whole_number,
    with_unit_rows,
)
from .format import Converters, Format, Written, converter

WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "config.json"
_NAMES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."


def _to(sae: Contents) -> dict[str, Tensor]:
    weights = {theirs: sae.weights[ours] for theirs, ours in _NAMES.items()}
    if not sae.transcodes:
        weights["b_E"] = not_centred(*(sae.weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return {**weights, "W_E": weights["W_E"].T}


def _topk_to(sae: Contents) -> Written:
    return _to(sae), {"act_fn": "topk", "top_k": sae.keys["k"]}


def _jumprelu_to(sae: Contents) -> Written:
    # It stores the logarithm; float64 keeps what comes back the same to float32's last bit.
    threshold = sae.weights["threshold"].double().clamp_min(0).log()
    return {**_to(sae), _LOG_THRESHOLD: threshold}, {"act_fn": "jumprelu"}


def _relu_to(sae: Contents) -> Written:
    return _to(sae), {"act_fn": "relu"}


def _relu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _from(path, files.tensors(path / WEIGHTS_FILE, found, _NAMES), config), {}


def _from(path: Path, found: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    """Our weights of tensors in their names, log_threshold among them."""
    weights = {_NAMES.get(name, name): tensor for name, tensor in found.items()}
    weights["W_enc"] = turned(weights["W_enc"])
    if (log := weights.pop(_LOG_THRESHOLD, None)) is not None:
        weights["threshold"] = log.double().exp().to(weights["W_dec"].dtype)
    check_weights(path, weights)
    if config.get("sparsity_include_decoder_norm", True):
        # Its thresholds are those of pre-activations times the norms.
        weights = with_unit_rows(weights)
    if config["norm_activation"] != "inference":
        weights = _for_plain_rows(path, weights, config)
    if not _transcodes(config):
        weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights


def _transcodes(config: dict[str, Any]) -> bool:
    return bool(config.get("hook_point_in") != config.get("hook_point_out"))


def _for_plain_rows(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Weights for rows that are not scaled to the norm sqrt(d_in) in the mean."""
    scales = []
    for hook in (config.get("hook_point_in"), config.get("hook_point_out")):
        norm = config["_norms"].get(f"{_NORM}{hook}")
        number = float(norm) if norm is not None and norm.numel() == 1 else None
        if number is None or not 0 < number < math.inf:
            raise ValueError(
                f"{path}: norm_activation='dataset-wise', but {_NORM}{hook} is {number}; save it "
                "with fold_activation_scale=True"
            )
        scales.append(number / math.sqrt(len(weights["b_dec"])))
    of_input, of_output = scales
    by = dict.fromkeys(("b_enc", "threshold"), of_input)
    by |= {"b_dec": of_output, "W_dec": of_output / of_input}
    return {n: t * by.get(n, 1.0) for n, t in weights.items()}


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = files.tensors(path / WEIGHTS_FILE, found, _NAMES)
    k = whole_number(path / CONFIG_FILE, "top_k", config.get("top_k", 50))
    return _from(path, tensors, config), {"k": k}


def _jumprelu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = files.tensors(path / WEIGHTS_FILE, found, (*_NAMES, _LOG_THRESHOLD))
    return _from(path, tensors, config), {}


CONVERTERS: Converters = {
    "topk": (_topk_to, _topk_from),
    "multi_topk": (_topk_to, None),
    # What selects over a batch, by its thresholds.
    "batch_topk": (_jumprelu_to, None),
    "matryoshka": (_jumprelu_to, None),
    "jumprelu": (_jumprelu_to, _jumprelu_from),
    "relu": (_relu_to, _relu_from),
}


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE so that llamascopium's `SparseDictionary.from_pretrained(folder)` gives the
    same reconstruction of rows as they are.
    """
    check_output(sae)
    if "W_skip" in sae.weights:
        raise ValueError(
            "llamascopium has no word for a transcoder's skip connection; name another format"
        )
    weights, own = CONVERTERS[sae.architecture][0](sae)
    (d_sae, d_in), d_out = sae.weights["W_enc"].shape, len(sae.weights["b_dec"])
    if d_in != d_out:
        raise ValueError(
            f"the transcoder is from width {d_in} to {d_out}, but llamascopium's are of one "
            "width; name another format"
        )
    hookpoint = sae.about.hookpoint or "unknown"
    config = {
        "sae_type": "sae",
        "d_model": d_in,
        # It takes int(d_model * expansion_factor): half a latent more is cut off.
        "expansion_factor": d_sae // d_in if d_sae % d_in == 0 else (d_sae + 0.5) / d_in,
        "hook_point_in": hookpoint,
        "hook_point_out": sae.about.output_hookpoint if sae.transcodes else hookpoint,
        "use_decoder_bias": True,
        **own,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "use_glu_encoder": False,
    }
    files.begin(folder)
    files.write_safetensors(folder / WEIGHTS_FILE, weights)
    files.write_config(folder / CONFIG_FILE, config)
    files.seal(folder, [CONFIG_FILE, WEIGHTS_FILE])


def read(folder: Path, k: int | None = None) -> Contents:
    """Reads what `write` wrote, or llamascopium. Raises ValueError for an architecture that is not
    read, or damage.
    """
    del k
    files.check(folder)
    file = folder / CONFIG_FILE
    config = files.read_config(file)
    theirs = str(config.get("act_fn", "relu"))
    if (kind := config.get("sae_type", "sae")) != "sae":
        theirs = str(kind)
    allowed = {
        "use_glu_encoder": False,
        "use_decoder_bias": True,
        "norm_activation": ("dataset-wise", "inference"),
    }
    read_as = converter(folder, CONVERTERS, theirs, theirs)
    files.check_keys(file, config, allowed)
    found: dict[str, Any] = dict(files.read_safetensors(folder / WEIGHTS_FILE))
    norms = {n: found.pop(n) for n in list(found) if n.startswith(_NORM)}
    own = {"norm_activation": "dataset-wise", **config, "_norms": norms}
    weights, keys = read_as(folder, found, own)
    d_in, factor = config.get("d_model"), config.get("expansion_factor")
    told = None
    if isinstance(d_in, int) and isinstance(factor, int | float):
        told = int(d_in * factor)
    check_told(folder, weights, d_sae=told, d_in=d_in)
    hooks = [config.get(f"hook_point_{side}") for side in ("in", "out")]
    about = About(hooks[0] if isinstance(hooks[0], str) else None)
    if _transcodes(config):
        keys |= transcoder_keys(weights)
        about = about._replace(output_hookpoint=str(hooks[1]))
    return Contents(theirs, weights, keys, about)


FORMAT = Format(
    "llamascopium",
    "llamascopium",
    CONVERTERS,
    read,
    write,
    lambda names: {CONFIG_FILE, WEIGHTS_FILE} <= names and "cfg.json" not in names,
    transcoders=frozenset(CONVERTERS),
)
