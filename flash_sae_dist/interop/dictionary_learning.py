"""dictionary_learning: `ae.pt`, a state_dict, and `config.json` of its trainer.

Its TopK and BatchTopK SAEs have the same tensors; `dict_class` in config.json tells them apart.
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
    check_told,
    check_weights,
    not_centred,
    turned,
    whole_number,
)
from .format import Format, Written, converter
from .hook_names import layer_of

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"
_TOPK = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_JUMPRELU = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_CLASSES = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
}


def _topk_to(sae: Contents) -> Written:
    weights = {theirs: sae.weights[ours] for theirs, ours in _TOPK.items()}
    weights["decoder.weight"] = weights["decoder.weight"].T
    weights["b_dec"] = sae.weights["b_dec"]
    weights["k"] = torch.tensor(sae.keys["k"], dtype=torch.int32)
    # Of its threshold: -1 is none, TopK's own encoding.
    weights["threshold"] = torch.tensor(-1.0)
    trainer = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", **sae.keys}
    return weights, trainer


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


CONVERTERS = {
    "topk": (_topk_to, _topk_from),
    "jumprelu": (_jumprelu_to, _jumprelu_from),
}


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE so that `dictionary_learning.utils.load_dictionary(folder, device)` gives the
    same reconstruction; SAEBench and SAELens read the same two files.
    """
    weights, trainer = CONVERTERS[sae.architecture][0](sae)
    d_sae, d_in = sae.weights["W_dec"].shape
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


def read(path: Path, k: int | None = None) -> Contents:
    """Reads what `write` or the library wrote: a folder, or one of its .pt files. Raises ValueError
    for an architecture that is not read, or damage.
    """
    del k
    file = path / WEIGHTS_FILE if path.is_dir() else path
    files.check(file.parent)
    trainer = _config(file)
    found = files.read_pt(file)
    theirs = trainer.get("dict_class")
    name = _CLASSES.get(str(theirs))
    weights, keys = converter(file, CONVERTERS, name, theirs)(file, found, trainer)
    told = {"d_sae": trainer.get("dict_size"), "d_in": trainer.get("activation_dim")}
    check_told(file, weights, **told)
    model, hookpoint = trainer.get("lm_name"), trainer.get("submodule_name")
    about = About(
        hookpoint if isinstance(hookpoint, str) else None,
        model if isinstance(model, str) and model != "unknown" else None,
    )
    return Contents(str(name), weights, keys, about)


FORMAT = Format(
    "dictionary_learning",
    "dictionary_learning",
    CONVERTERS,
    read,
    write,
    lambda names: WEIGHTS_FILE in names,
    lambda path: path.suffix == ".pt" and "encoder.weight" in files.pt_names(path, "b_dec"),
)
