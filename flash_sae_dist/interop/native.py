"""This library's own form: `config.json` and `sae.safetensors`, as `SparseCoder.save` writes."""

from __future__ import annotations

from pathlib import Path

from ..models import ARCHITECTURES, load_sae
from ..models.crosscoder import Crosscoder
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from .contents import Contents, build, contents_of
from .format import Format


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE that `load_sae(folder)` reads."""
    build(folder, sae).save(folder)


def read(path: Path, k: int | None = None) -> Contents:
    """Reads what `save` wrote. Raises ValueError."""
    del k
    return contents_of(load_sae(path))


FORMAT = Format(
    "flash_sae_dist",
    "flash_sae_dist",
    # Every architecture that there is; `read` and `write` convert nothing.
    {
        name: (lambda sae: (sae.weights, sae.keys), lambda path, w, k: (w, k))
        for name in ARCHITECTURES
    },
    read,
    write,
    lambda names: {CONFIG_FILE, WEIGHTS_FILE} <= names,
    layer_norm=True,
    one_width=False,
    # A crosscoder gives the rows that it reads.
    transcoders=frozenset(
        n for n, kind in ARCHITECTURES.items() if not issubclass(kind, Crosscoder)
    ),
)
