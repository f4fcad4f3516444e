"""dictionary_learning: `ae.pt`, a state_dict, and `config.json` of its trainer.

Its TopK and BatchTopK SAEs have the same tensors; `dict_class` in config.json tells them apart. A
BatchTopK SAE has one threshold for all latents, which its loader takes at inference. Crosscoders
are those of the fork that trains them (crosscoders.py): `ae.pt`, or as its classes save them for
the hub.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.about import About
from ..models.matryoshka import prefix_widths
from . import crosscoders, files
from .contents import (
    Contents,
    centred,
    check_told,
    check_weights,
    not_centred,
    turned,
    whole_number,
)
from .format import Converters, Format, Written, converter
from .hook_names import layer_of

logger = logging.getLogger(__name__)
WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"
_HUB_FILE = "model.safetensors"
_TOPK = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_JUMPRELU = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_RELU = {**_TOPK, "bias": "b_dec"}
_RELU_APRIL = {**_TOPK, "decoder.bias": "b_dec"}
_GATED = {
    "encoder.weight": "W_enc",
    "gate_bias": "b_enc",
    "r_mag": "r_mag",
    "mag_bias": "b_mag",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
}
_MATRYOSHKA = "MatryoshkaBatchTopKSAE"
_CLASSES = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    _MATRYOSHKA: "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    **crosscoders.CLASSES,
}


def _topk_to(sae: Contents) -> Written:
    weights = {theirs: sae.weights[ours] for theirs, ours in _TOPK.items()}
    weights["decoder.weight"] = weights["decoder.weight"].T
    weights["b_dec"] = sae.weights["b_dec"]
    weights["k"] = torch.tensor(sae.keys["k"], dtype=torch.int32)
    # Of its threshold: -1 is none, TopK's own encoding.
    weights["threshold"] = torch.tensor(-1.0)
    trainer = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK"}
    return weights, trainer | {"k": sae.keys["k"]}


def _topk_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # Before 0.1 there was no threshold, and before that k stood in the config alone.
    tensors = files.tensors(path, found, (*_TOPK, "b_dec"), ("k", "threshold"))
    stored, told = tensors.get("k"), trainer.get("k")
    if stored is not None:
        if stored.numel() != 1 or stored.is_floating_point():
            raise ValueError(f"{path}: k holds {list(stored.shape)} numbers, not one whole number")
        if told is not None and told != int(stored):
            raise ValueError(
                f"{path} holds k={int(stored)}, but config.json says k={told!r}; the files are not "
                "of one SAE"
            )
        told = int(stored)
    weights = {ours: tensors[theirs] for theirs, ours in _TOPK.items()}
    weights |= {"W_dec": turned(weights["W_dec"]), "b_dec": tensors["b_dec"]}
    return weights, {"k": whole_number(path, "k", told)}


def _batch_threshold(sae: Contents) -> Tensor | None:
    """The one threshold of all latents; None where each has its own."""
    threshold = sae.weights["threshold"]
    same = bool((threshold == threshold[0]).all())
    return threshold[0].float() if same and bool(threshold[0].isfinite()) else None


def _batch_topk_to(sae: Contents) -> Written:
    """Its class has one threshold: latents with their own make a JumpReLU SAE, the same at use."""
    if (threshold := _batch_threshold(sae)) is None:
        return _jumprelu_to(sae)
    weights, _ = _topk_to(sae)
    trainer = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE"}
    return weights | {"threshold": threshold}, trainer | {"k": sae.keys["k"]}


def _batch_topk_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, keys = _topk_from(path, found, trainer)
    return weights | _thresholds(path, found, weights), keys


def _thresholds(path: Path, found: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our buffers of a file's one threshold."""
    own = found.get("threshold")
    if not isinstance(own, Tensor) or own.numel() != 1 or not own.is_floating_point():
        raise ValueError(f"{path} has no threshold that is one number; it is no SAE at inference")
    own = own.reshape(()).to(weights["W_dec"].dtype)
    if own < 0:
        logger.warning(
            "%s was saved before its threshold was first set: every latent with a positive "
            "pre-activation is active",
            path,
        )
    check_weights(path, weights)
    threshold = own.expand(len(weights["b_enc"])).clone()
    # Training that goes on from it averages from there.
    steps = torch.zeros_like(own)
    return {"threshold": threshold, "mean_threshold": own.clone(), "threshold_steps": steps}


def _matryoshka_to(sae: Contents) -> Written:
    if (threshold := _batch_threshold(sae)) is None:
        return _jumprelu_to(sae)
    weights = {name: sae.weights[name] for name in _JUMPRELU}
    d_sae = len(weights["b_enc"])
    widths = [w for w in sae.keys.get("prefix_widths") or prefix_widths(d_sae) if w < d_sae]
    borders = [0, *widths, d_sae]
    sizes = [stop - start for start, stop in zip(borders, borders[1:], strict=False)]
    weights |= {
        "W_enc": weights["W_enc"].T,
        "k": torch.tensor(sae.keys["k"], dtype=torch.int32),
        "threshold": threshold,
        "group_sizes": torch.tensor(sizes),
    }
    trainer = {"trainer_class": "MatryoshkaBatchTopKTrainer", "dict_class": _MATRYOSHKA}
    return weights, trainer | {"k": sae.keys["k"], "group_sizes": sizes}


def _matryoshka_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = files.tensors(path, found, (*_JUMPRELU, "k", "group_sizes"))
    sizes, d_sae = tensors["group_sizes"].flatten().tolist(), len(tensors["b_enc"])
    if sum(sizes) != d_sae or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f"{path}: group_sizes={sizes} do not add up to the {d_sae} latents; download it anew"
        )
    weights = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    weights["W_enc"] = turned(weights["W_enc"])
    widths = list(accumulate(sizes))[:-1] or [d_sae]
    keys = {"k": whole_number(path, "k", int(tensors["k"])), "prefix_widths": widths}
    return weights | _thresholds(path, found, weights), keys


def _jumprelu_to(sae: Contents) -> Written:
    weights = {name: sae.weights[name] for name in _JUMPRELU}
    # Its encoder reads x itself.
    weights["b_enc"] = not_centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    weights["W_enc"] = weights["W_enc"].T
    return weights, {"trainer_class": "JumpReluTrainer", "dict_class": "JumpReluAutoEncoder"}


def _jumprelu_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    del trainer
    weights = files.tensors(path, found, _JUMPRELU)
    weights["W_enc"] = turned(weights["W_enc"])
    check_weights(path, weights)
    weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights, {}


def _renamed_to(sae: Contents, names: dict[str, str]) -> dict[str, Tensor]:
    weights = {theirs: sae.weights[ours] for theirs, ours in names.items()}
    return weights | {"decoder.weight": weights["decoder.weight"].T}


def _renamed_from(path: Path, found: dict[str, Any], names: dict[str, str]) -> dict[str, Tensor]:
    tensors = files.tensors(path, found, names)
    weights = {ours: tensors[theirs] for theirs, ours in names.items()}
    weights["W_dec"] = turned(weights["W_dec"])
    check_weights(path, weights)
    return weights


def _relu_to(sae: Contents) -> Written:
    trainer = {"trainer_class": "StandardTrainer", "dict_class": "AutoEncoder"}
    return _renamed_to(sae, _RELU), trainer


def _relu_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if trainer.get("dict_class") != "AutoEncoderNew":
        return _renamed_from(path, found, _RELU), {}
    weights = _renamed_from(path, found, _RELU_APRIL)
    # Its encoder reads x itself.
    weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights, {}


def _gated_to(sae: Contents) -> Written:
    trainer = {"trainer_class": "GatedSAETrainer", "dict_class": "GatedAutoEncoder"}
    return _renamed_to(sae, _GATED), trainer


def _gated_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    del trainer
    return _renamed_from(path, found, _GATED), {}


CONVERTERS: Converters = {
    "topk": (_topk_to, _topk_from),
    "multi_topk": (_topk_to, None),
    "batch_topk": (_batch_topk_to, _batch_topk_from),
    "matryoshka": (_matryoshka_to, _matryoshka_from),
    "jumprelu": (_jumprelu_to, _jumprelu_from),
    "relu": (_relu_to, _relu_from),
    "gated": (_gated_to, _gated_from),
    "relu_crosscoder": (crosscoders.relu_to, crosscoders.relu_from),
    "batch_topk_crosscoder": (crosscoders.batch_topk_to, crosscoders.batch_topk_from),
}


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE so that `dictionary_learning.utils.load_dictionary(folder, device)` gives the
    same reconstruction; SAEBench and SAELens read the same two files.
    """
    weights, trainer = CONVERTERS[sae.architecture][0](sae)
    d_sae, d_in = sae.weights["W_dec"].shape
    # Of a crosscoder's hookpoints, which are side by side, one.
    d_in //= len(sae.keys.get("sources", (d_in,)))
    trainer |= {
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": layer_of(sae.about.hookpoint) or 0,
        "lm_name": sae.about.model_name or "unknown",
        "submodule_name": sae.about.hookpoint,
    }
    buffer = {"d_submodule": d_in, "io": "out", "ctx_len": sae.about.context_length or 128}
    files.begin(folder)
    files.write_pt(folder / WEIGHTS_FILE, weights)
    files.write_config(folder / CONFIG_FILE, {"trainer": trainer, "buffer": buffer})
    files.seal(folder, [CONFIG_FILE, WEIGHTS_FILE])


def _config(file: Path) -> dict[str, Any]:
    """What config.json beside the weights, or above their checkpoints, says of the trainer."""
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            trainer = files.read_config(folder / CONFIG_FILE).get("trainer")
            if not isinstance(trainer, dict):
                raise files.no_whole(folder, f"{CONFIG_FILE} has no trainer")
            return trainer
    raise ValueError(
        f"{file} has no {CONFIG_FILE} beside it, which tells TopK from BatchTopK; download it, too"
    )


def _hub_config(folder: Path) -> dict[str, Any]:
    """What config.json beside a crosscoder of the hub says, as a trainer would."""
    config = files.read_config(folder / CONFIG_FILE)
    if not {"activation_dim", "dict_size"} <= config.keys():
        raise files.no_whole(folder, f"{CONFIG_FILE} is of no dictionary, but of something else")
    files.check_keys(
        folder / CONFIG_FILE, config, {"encoder_layers": None, "num_decoder_layers": None}
    )
    return config


def _found(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The file of a path, its tensors, and what is told of its trainer."""
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.suffix == ".safetensors" or (path.is_dir() and not file.is_file()):
        file = path / _HUB_FILE if path.is_dir() else path
        return file, dict(files.read_safetensors(file)), _hub_config(file.parent)
    # Crosscoders' tensors tell all; the config of others must.
    alone = crosscoders.holds(found := files.read_pt(file)) and not any(
        (at / CONFIG_FILE).is_file() for at in (file.parent, file.parent.parent)
    )
    return file, found, {} if alone else _config(file)


def read(path: Path, k: int | None = None) -> Contents:
    """Reads what `write` or the library wrote: a folder, or one of its files. Raises ValueError
    for an architecture that is not read, or damage.
    """
    del k
    files.check(path if path.is_dir() else path.parent)
    file, found, trainer = _found(path)
    theirs = trainer.get("dict_class")
    if crosscoders.holds(found):
        theirs = crosscoders.class_of(found)
    name = _CLASSES.get(str(theirs))
    weights, keys = converter(file, CONVERTERS, name, theirs)(file, found, trainer)
    d_sae, d_in = trainer.get("dict_size"), trainer.get("activation_dim")
    if isinstance(d_in, int):
        d_in *= len(keys.get("sources", (d_in,)))
    check_told(file, weights, d_sae=d_sae, d_in=d_in)
    model, hookpoint = trainer.get("lm_name"), trainer.get("submodule_name")
    about = About(
        hookpoint if isinstance(hookpoint, str) else None,
        model if isinstance(model, str) and model != "unknown" else None,
    )
    return Contents(str(name), weights, keys, about)


def _is_file(path: Path) -> bool:
    # Qwen-Scope's have W_enc, too, and no threshold; OpenAI's encoder.weight, and a pre_bias.
    names = files.pt_names(path, "encoder.weight") or files.pt_names(path, "threshold")
    return path.suffix == ".pt" and bool(names) and "pre_bias" not in names


FORMAT = Format(
    "dictionary_learning",
    "dictionary_learning",
    CONVERTERS,
    read,
    write,
    lambda names: WEIGHTS_FILE in names or {_HUB_FILE, CONFIG_FILE} <= names,
    _is_file,
)
