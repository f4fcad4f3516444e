"""Crosscoders in the form of the fork of dictionary_learning that trains them (of
science-of-finetuning): the state_dicts of its `CrossCoder` and `BatchTopKCrossCoder`.

Its tensors are [hookpoints, width, ...], all of one width, and its encoder reads rows less
`activation_mean`, times one number; the decoder is undone likewise. Where our rows are divided by a
number for each hookpoint, weights are multiplied out in float64, which gives every weight back to
the bit, and those numbers stand in `activation_std`, which its class keeps and does not use.

It has one threshold for all latents, of activations times their decoder norms. Where ours has that,
too, the file says so. Else activations are multiplied by that threshold over the latent's own, and
decoder rows divided, so that all have the same: its kind NONE, whose norms count for nothing. Such
weights come back but for their last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .contents import (
    Contents,
    centred,
    check_weights,
    not_centred,
    whole_number,
    with_unit_rows,
)
from .format import Written

CLASSES = {"CrossCoder": "relu_crosscoder", "BatchTopKCrossCoder": "batch_topk_crosscoder"}
_NEEDED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_SELECTION = ("k", "threshold")
_NORMALISER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
_KIND = "code_normalization_id"
# Its CodeNormalization by our decoder_norms, with the words of its trainers.
_KINDS = {"sum": (1, "CROSSCODER"), "whole": (2, "SAE")}
_NONE = 4
# Of thresholds over the common one: what stands for latents that always and never fire, so that
# squares of decoder rows stay finite in float32.
_LEAST, _MOST = 1e-15, 1e15


def holds(found: dict[str, Any]) -> bool:
    """Whether a state_dict is a crosscoder's."""
    weight = found.get("encoder.weight")
    return isinstance(weight, Tensor) and weight.ndim == 3


def class_of(found: dict[str, Any]) -> str:
    """Its class, which the tensors tell."""
    return "BatchTopKCrossCoder" if "threshold" in found else "CrossCoder"


def _by_source(tensor: Tensor, num_sources: int) -> Tensor:
    """[..., D] of sources side by side as [..., S, D/S], in float64."""
    return tensor.double().reshape(*tensor.shape[:-1], num_sources, -1)


def norms_of(W_dec: Tensor, num_sources: int, kind: str) -> Tensor:
    """What a latent's activations are multiplied by where they are compared [F], in W_dec's type;
    see `CrosscoderConfig.decoder_norms`.
    """
    if kind == "whole":
        return torch.ones_like(W_dec[:, 0])
    parts = torch.chunk(W_dec, num_sources, dim=1)
    return torch.stack([torch.linalg.vector_norm(p, dim=1) for p in parts], dim=1).sum(dim=1)


def _exact(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In dtype where that loses nothing, else in float64."""
    small = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {n: s if torch.equal(s.double(), tensors[n]) else tensors[n] for n, s in small.items()}


def _common(sae: Contents, num_sources: int) -> tuple[Tensor, Tensor, int]:
    """The file's threshold, what activations [F] are multiplied by for it, and the kind."""
    weights, scale = sae.weights, sae.weights["source_scale"].double()
    mean, own, W_dec = weights["mean_threshold"], weights["threshold"], weights["W_dec"]
    kind, ones = sae.keys["decoder_norms"], torch.ones_like(own, dtype=torch.float64)
    if torch.equal(own, mean / norms_of(W_dec, num_sources, kind)) and bool(
        (scale == scale[0]).all()
    ):
        return mean.double() * scale[0], ones, _KINDS[kind][0]
    common = mean.double() if mean > 0 else ones[0]
    return common, 1 / (own.double() / common).clamp(_LEAST, _MOST), _NONE


def _tensors(sae: Contents, gain: Tensor) -> Written:
    """All but the selection's, activations multiplied by gain [F], and what trainers tell."""
    weights, sources = sae.weights, sae.keys["sources"]
    count, dtype = len(sources), weights["W_dec"].dtype
    scale, mean = weights["source_scale"].double()[:, None], weights["source_mean"]
    b_enc = not_centred(*(weights[name] for name in ("W_enc", "b_enc", "b_dec")))
    W_enc = _by_source(weights["W_enc"], count) / scale * gain[:, None, None]
    W_dec = _by_source(weights["W_dec"], count) * scale / gain[:, None, None]
    kind = sae.keys["decoder_norms"]
    found = {
        "encoder.weight": W_enc.permute(1, 2, 0),
        "encoder.bias": b_enc * gain,
        "decoder.weight": W_dec.transpose(0, 1),
        "decoder.bias": _by_source(weights["b_dec"], count) * scale,
    }
    shape = found["decoder.bias"].shape
    plain = bool((scale == 1).all()) and not mean.any()
    none = torch.full(shape, torch.nan, dtype=dtype)
    told = {
        "activation_mean": none if plain else mean.reshape(shape),
        "activation_std": none if plain else scale.to(dtype).expand(shape),
        "activation_global_scale": torch.ones((), dtype=dtype),
        "target_rms": torch.ones((), dtype=dtype),
        _KIND: torch.tensor(_KINDS[kind][0]),
    }
    return _exact(found, dtype) | told, {"code_normalization": _KINDS[kind][1]}


def relu_to(sae: Contents) -> Written:
    """For `CrossCoder(width, latents, hookpoints, target_rms=1.0)`."""
    tensors, trainer = _tensors(sae, torch.ones(len(sae.weights["b_enc"]), dtype=torch.float64))
    return tensors, trainer | {"trainer_class": "CrossCoderTrainer", "dict_class": "CrossCoder"}


def batch_topk_to(sae: Contents) -> Written:
    """For `BatchTopKCrossCoder.from_pretrained`."""
    threshold, gain, kind = _common(sae, len(sae.keys["sources"]))
    tensors, trainer = _tensors(sae, gain)
    tensors |= {_KIND: torch.tensor(kind), "threshold": threshold}
    tensors["k"] = torch.tensor(sae.keys["k"], dtype=torch.int32)
    name = "BatchTopKCrossCoder"
    return tensors, trainer | {
        "trainer_class": f"{name}Trainer", "dict_class": name, "k": sae.keys["k"],
    }  # fmt: skip


def _units(
    path: Path, found: dict[str, Tensor], *, by_norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A file's source_scale [S] and source_mean [S, D], of our rows, and what its decoder's rows
    are times ours [S, 1], in float64: one number where they are compared by their norms.
    """
    shape = found["decoder.bias"].shape
    mean, std, by = (found.get(name) for name in _NORMALISER[:3])
    ones = torch.ones(shape[0], dtype=torch.float64)
    if mean is None or std is None or by is None or mean.isnan().any() or std.isnan().any():
        return ones, torch.zeros(shape, dtype=torch.float64), ones[:, None]
    if mean.shape != shape or std.shape != shape or by.numel() != 1 or not by > 0:
        raise ValueError(f"{path}: its normalisation is not of {list(shape)}; export it anew")
    factor, alike = float(by), std[:1, :1] if by_norms else std[:, :1]
    ours = factor == 1 and bool((std == alike).all()) and bool((std > 0).all())
    scale = std[:, 0].double() if ours else ones / factor
    return scale, mean.double(), (scale * factor)[:, None]


def _kind(path: Path, found: dict[str, Any], trainer: dict[str, Any]) -> tuple[str, bool]:
    """Our decoder_norms, and whether the file's activations are compared by their norms."""
    stored = int(found.get(_KIND, _KINDS["sum"][0]))
    names = {number: name for name, (number, _) in _KINDS.items()}
    if stored in names:
        return names[stored], True
    if stored != _NONE:
        raise ValueError(
            f"{path}: {_KIND}={stored} (MIXED or DECOUPLED) is not read here, only 1, 2 and 4 "
            "(CROSSCODER, SAE, NONE)"
        )
    words = {word: name for name, (_, word) in _KINDS.items()}
    return words.get(str(trainer.get("code_normalization")), "whole"), False


def _weights(path: Path, found: dict[str, Tensor], *, by_norms: bool) -> dict[str, Tensor]:
    """Ours but the selection's in float64, decoder rows of whichever norm, and b_enc of an encoder
    that reads rows themselves.
    """
    W_enc, b_enc, W_dec, b_dec = (found[name] for name in _NEEDED)
    count, width, d_sae = W_enc.shape
    shapes = {"encoder.bias": (d_sae,), "decoder.weight": (count, d_sae, width)}
    for name, want in (shapes | {"decoder.bias": (count, width)}).items():
        if tuple(found[name].shape) != want:
            raise ValueError(
                f"{path}: tensors do not fit together: {name} is {list(found[name].shape)}, but "
                f"encoder.weight {list(W_enc.shape)} wants {list(want)}; export it anew"
            )
    scale, mean, by = _units(path, found, by_norms=by_norms)
    ours = {
        "W_enc": (W_enc.double() * by[..., None]).permute(2, 0, 1).flatten(1),
        "b_enc": b_enc.double(),
        "W_dec": (W_dec.double() / by[..., None]).transpose(0, 1).flatten(1),
        "b_dec": (b_dec.double() / by).flatten(),
        "source_scale": scale,
        "source_mean": mean.flatten(),
    }
    check_weights(path, ours)
    return ours


def _finished(given: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows of unit norm, b_enc of an encoder that reads rows less b_dec, in the type that
    was written: what is in float64 is rounded once.
    """
    dtype = found.get("activation_mean", found["decoder.weight"]).dtype
    b_enc = with_unit_rows(given)["b_enc"]
    weights = {n: t.to(dtype).contiguous() for n, t in with_unit_rows(given).items()}
    return weights | {"b_enc": centred(weights["W_enc"], b_enc, weights["b_dec"])}


def relu_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of `CrossCoder`."""
    tensors = files.tensors(path, found, _NEEDED, (*_NORMALISER, _KIND))
    weights = _finished(_weights(path, tensors, by_norms=False), tensors)
    return weights, _keys(weights) | {"decoder_norms": _kind(path, found, trainer)[0]}


def _keys(weights: dict[str, Tensor]) -> dict[str, Any]:
    count = len(weights["source_scale"])
    return {"sources": [len(weights["b_dec"]) // count] * count}


def batch_topk_from(
    path: Path, found: dict[str, Any], trainer: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of `BatchTopKCrossCoder`."""
    needed = (*_NEEDED, *_SELECTION)
    tensors = files.tensors(path, found, needed, (*_NORMALISER, _KIND))
    kind, by_norms = _kind(path, found, trainer)
    given = _weights(path, tensors, by_norms=by_norms)
    weights, threshold = _finished(given, tensors), tensors["threshold"]
    if threshold.numel() != 1 or tensors["k"].numel() != 1:
        raise ValueError(f"{path}: k and threshold are not one number each; it is not read here")
    keys = _keys(weights) | {"decoder_norms": kind}
    keys["k"] = whole_number(path, "k", int(tensors["k"]))
    dtype, common = weights["W_dec"].dtype, threshold.double().reshape(())
    if by_norms:
        by = _units(path, tensors, by_norms=True)[2][0, 0]
        mean = (common / by).to(dtype)
        own = mean / norms_of(weights["W_dec"], len(keys["sources"]), kind)
    else:
        norms = torch.linalg.vector_norm(given["W_dec"], dim=1)
        mean = common.to(dtype)
        own = (common * norms).masked_fill(norms > 0.1 * _MOST, torch.inf).to(dtype)
    steps = torch.zeros_like(mean)
    return weights | {"threshold": own, "mean_threshold": mean, "threshold_steps": steps}, keys
