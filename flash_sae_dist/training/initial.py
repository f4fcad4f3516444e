"""train.init_from: training begins from the weights of an SAE in a file of any format."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .. import interop
from ..config.base import ConfigError
from ..config.sae import SAEConfig
from ..files import checksum
from ..identity import digest
from ..models.base import SparseCoder

logger = logging.getLogger(__name__)


def read_initial(path: str, config: SAEConfig, d_in: int) -> interop.Contents:
    """What train.init_from names. Raises ConfigError where it is no SAE of the section sae's kind
    and width: k may be another.
    """
    key = f"train.init_from={path!r}"
    try:
        contents = interop.read(interop.hub.local_copy_of(path), k=getattr(config, "k", None))
        d_sae, width = interop.contents.check_weights(
            Path(path), contents.weights, transcodes=contents.transcodes
        )
    except ValueError as e:
        raise ConfigError(f"train.init_from: {e}") from e
    if contents.transcodes:
        raise ConfigError(f"{key} is a transcoder, from which no training begins; name an SAE")
    norm = contents.keys.get("input_norm", "none")
    for name, told, is_ in (
        ("sae.architecture", config.architecture, contents.architecture),
        ("sae.d_sae", config.width(d_in), d_sae),
        ("sae.input_norm", config.input_norm, norm),
    ):
        if told != is_:
            raise ConfigError(f"{key} is of {name}={is_!r}, not {told!r}; set {name}={is_}")
    if width != d_in:
        raise ConfigError(f"{key} is of width {width}, but the hookpoint of {d_in}; name another")
    return contents


def digest_of(path: str) -> str:
    """A checksum of files, by which a job knows them. Raises ConfigError where there are none."""
    try:
        place = interop.find(interop.hub.local_copy_of(path))[1]
    except ValueError as e:
        raise ConfigError(f"train.init_from: {e}") from e
    files = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    return digest([checksum(file) for file in files])


@torch.no_grad()
def begin_from_(sae: SparseCoder, path: str) -> None:
    """Copies the weights into an SAE, of a shard its rows. Rows of the decoder become of unit norm,
    as training keeps them, and the encoder's rows longer in their place.
    """
    weights = read_initial(path, sae.config, sae.d_in).weights
    if not interop.contents.unit_rows(weights["W_dec"]) and sae.mesh.is_lead:
        logger.warning(
            "train.init_from=%r has decoder rows of other norms than 1: they are taken into the "
            "encoder, which ranks latents by them",
            path,
        )
    weights = interop.contents.with_unit_rows(weights, "threshold", "b_mag")
    first, count = sae.first_latent, sae.d_sae_local
    for name, own in sae.state_dict().items():
        if name in weights:
            given = weights[name]
            own.copy_(given[first : first + count] if sae.roles[name] == "rows" else given)
