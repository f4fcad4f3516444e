"""What a file of any format holds, under this library's names, and the SAE that it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.file import parse
from ..models import ARCHITECTURES
from ..models.about import About
from ..models.base import SparseCoder


class Contents(NamedTuple):
    """An SAE in plain data."""

    architecture: str  # as in ARCHITECTURES, or what it would be there
    weights: dict[str, Tensor]  # W_enc and W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in], ...
    # Of the config's section sae, but its widths; a transcoder's d_out, a crosscoder's sources.
    keys: dict[str, Any]
    about: About = About()

    @property
    def transcodes(self) -> bool:
        """Whether it is a transcoder."""
        return "d_out" in self.keys


def contents_of(sae: SparseCoder, about: About | None = None) -> Contents:
    """A whole SAE as plain data, its tensors by reference."""
    spec = sae.spec()
    keys = {k: v for k, v in spec.items() if k not in ("architecture", "d_in", "d_sae")}
    weights = {name: p.detach() for name, p in sae.state_dict().items()}
    return Contents(spec["architecture"], weights, keys, about or sae.about)


def transcoder_keys(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The keys of a transcoder of those weights."""
    return {"d_out": len(weights["b_dec"]), "skip": "W_skip" in weights}


def check_output(sae: Contents) -> None:
    """Raises ValueError for a transcoder of which it is not known what it gives."""
    if sae.transcodes and sae.about.output_hookpoint is None:
        raise ValueError(
            "the transcoder's output is not known, which this format tells it from an SAE by; give "
            "a module, as --output-hookpoint model.layers.3.mlp"
        )


def named(sae: Contents, *names: str) -> dict[str, Tensor]:
    """Tensors by name, and a skip connection where there is one."""
    skip = [n for n in ("W_skip",) if n in sae.weights]
    return {name: sae.weights[name] for name in (*names, *skip)}


def build(path: Path, contents: Contents) -> SparseCoder:
    """The SAE of what a file holds. Raises ValueError where this version has no such architecture,
    or the tensors do not make one.
    """
    name, weights = contents.architecture, contents.weights
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds an SAE of architecture {name!r}, which this version does not have; it "
            f"has: {', '.join(sorted(ARCHITECTURES))}"
        )
    d_sae, d_in = check_weights(path, weights, transcodes=contents.transcodes)
    kind = ARCHITECTURES[name]
    keys = {"architecture": name, "d_sae": d_sae, **contents.keys}
    place = {name: keys.pop(name) for name in ("d_out", "sources") if name in keys}
    config = parse(kind.Config, keys, str(path))
    dtype = weights["W_dec"].dtype
    sae = kind.from_config(config, d_in, **place, dtype=dtype, seed=None)
    try:
        sae.load_state_dict({n: t.to(dtype) for n, t in weights.items()})
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: tensors do not fit together: {reason}") from e
    sae.about = contents.about
    return sae.eval()


def check_weights(
    path: Path, weights: dict[str, Tensor], *, transcodes: bool = False
) -> tuple[int, int]:
    """(d_sae, d_in) of weights under our names. Raises ValueError where they are no numbers, not
    finite, or of other shapes than W_dec's, and of a transcoder than W_enc's.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating "
                "point numbers; download or export it anew"
            )
        # -inf and inf are thresholds of latents that always or never fire.
        if tensor.isnan().any() or (name != "threshold" and not tensor.isfinite().all()):
            raise ValueError(
                f"{path}: {name} holds what is no finite number; download or export it anew"
            )
    shape = tuple(weights["W_dec"].shape)
    if len(shape) != 2 or not math.prod(shape):
        raise ValueError(f"{path}: W_dec is {list(shape)}, not [d_sae, d_in]; export it anew")
    d_sae, d_out = shape
    d_in = weights["W_enc"].shape[-1] if transcodes else d_out
    own = dict.fromkeys(("b_enc", "threshold", "r_mag", "b_mag"), (d_sae,))
    wanted = {"W_enc": (d_sae, d_in), "b_dec": (d_out,), "W_skip": (d_out, d_in), **own}
    for name, want in wanted.items():
        found = tuple(weights[name].shape) if name in weights else want
        if found != want:
            raise ValueError(
                f"{path}: tensors do not fit together: {name} is {list(found)}, but W_dec "
                f"[{d_sae}, {d_out}] (d_sae, d_in) wants {list(want)}; export it anew"
            )
    return d_sae, d_in


def check_told(
    path: Path, weights: dict[str, Tensor], *, transcodes: bool = False, **told: object
) -> None:
    """Raises ValueError where W_dec (of a transcoder W_enc) is not of the d_sae and d_in that a
    config tells; None is not told.
    """
    d_sae, d_in = check_weights(path, weights, transcodes=transcodes)
    for (name, said), found in zip(sorted(told.items(), reverse=True), (d_sae, d_in), strict=True):
        if said is not None and said != found:
            matrix = "W_enc" if transcodes else "W_dec"
            raise ValueError(
                f"{path}: {matrix} is [{d_sae}, {d_in}], but its config says {name}={said!r}; the "
                "files are not of one SAE, export it anew"
            )


def whole_number(path: Path, key: str, value: object) -> int:
    """A key's value that is a whole number > 0. Raises ValueError where it is none, or missing."""
    if type(value) is not int or value < 1:
        what = f"{key}={value!r} is no whole number > 0" if value is not None else f"no {key}"
        raise ValueError(f"{path} has {what}; it is no SAE of that architecture")
    return value


def turned(tensor: Tensor) -> Tensor:
    """A matrix's transpose, contiguous; anything else as it is, for `check_weights` to refuse."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def centred(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """b_enc of an encoder that reads x - b_dec, from one that reads x, in b_enc's own dtype or
    W_enc's."""
    return (b_enc.double() + W_enc.double() @ b_dec.double()).to(W_enc.dtype)


def not_centred(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """b_enc of an encoder that reads x, from one that reads x - b_dec: in float64, from which
    `centred` gives b_enc back to the bit.
    """
    return b_enc.double() - W_enc.double() @ b_dec.double()


def with_unit_rows(weights: dict[str, Tensor], *also: str) -> dict[str, Tensor]:
    """Pre-activations that are multiplied by the decoder rows' norms, which then divide the
    activations, are those of an encoder that has the norms in its rows, and in what else is of
    their units. Rows of norm 1 stay as they are.
    """
    if unit_rows(weights["W_dec"]):
        return weights
    norms = torch.linalg.vector_norm(weights["W_dec"].double(), dim=1)
    by = {"W_enc": norms[:, None], "W_dec": 1 / norms.clamp_min(1e-300)[:, None]}
    by |= dict.fromkeys(("b_enc", *also), norms)
    return {n: (t * by[n]).to(t.dtype) if n in by else t for n, t in weights.items()}


def unit_rows(W_dec: Tensor) -> bool:
    """Whether all rows are of norm 1 but for float32's rounding."""
    norms = torch.linalg.vector_norm(W_dec.double(), dim=1)
    return bool(((norms - 1).abs() < 1e-6).all())
