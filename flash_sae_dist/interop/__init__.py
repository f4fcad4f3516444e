"""SAEs in the forms of other libraries: one file a format, `FORMATS` the one registration.

sae = interop.load("trainer_0/ae.pt")            # whichever format it is
interop.save(sae, "out", "sae_lens", About("model.layers.3"))
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.about import About
from ..models.base import SparseCoder
from . import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    hub,
    llamascopium,
    native,
    openai,
    qwen_scope,
    sae_lens,
    sparsify,
    thresholds,
)
from .contents import Contents, build, contents_of
from .format import Format

__all__ = [
    "FORMATS",
    "About",
    "Contents",
    "Format",
    "build",
    "find",
    "hub",
    "load",
    "read",
    "save",
    "thresholds",
]

# In the order in which a path is tried.
FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        native.FORMAT,
        sae_lens.FORMAT,
        sparsify.FORMAT,
        dictionary_learning.FORMAT,
        llamascopium.FORMAT,
        gemma_scope.FORMAT,
        gemma_scope.SECOND_FORMAT,
        circuit_tracer.FORMAT,
        openai.FORMAT,
        qwen_scope.FORMAT,
    )
}


def find(path: str | Path) -> tuple[Format, Path]:
    """The format of a file or folder, and the path to read: a file inside a folder that is one SAE
    stands for it, and so does a job's folder, or one with a single SAE's file. Raises ValueError
    where none is known.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise ValueError(f"{given} does not exist; check the path")
    if given.is_dir():
        alone = sorted(p for p in given.iterdir() if p.suffix in (".pt", ".npz"))
        places = [given, given / "sae", *(alone if len(alone) == 1 else ())]
    else:
        places = [given, given.parent]
    for at in places:
        names = {p.name for p in at.iterdir()} if at.is_dir() else None
        for found in FORMATS.values():
            if found.is_file(at) if names is None else found.is_folder(names):
                return found, at
    raise ValueError(
        f"{given} holds no SAE of a format that is known here ({', '.join(FORMATS)}), or is "
        "damaged; name its file or folder"
    )


def read(path: str | Path, *, k: int | None = None, format: str | None = None) -> Contents:
    """What a file of any format holds. Raises ValueError where that is no whole SAE of an
    architecture that is read; format names it where it is not to be found.
    """
    found, at = find(path)
    if format is not None and found.name != format:
        at, found = Path(path).expanduser(), FORMATS[format]
    return found.read(at, k)


def load(
    path: str | Path,
    *,
    k: int | None = None,  # where the file does not tell it
    device: torch.device | str = "cpu",
) -> SparseCoder:
    """The SAE that a file of any format holds. Raises ValueError as `read`, and for architectures
    that this version does not have.
    """
    contents = read(path, k=k)
    return build(Path(path), contents).to(device)


def save(
    sae: SparseCoder | Contents, path: str | Path, format: str, about: About | None = None
) -> Path:
    """Writes an SAE in a format; returns the path, a file's where the format is one. Raises
    ValueError where it has no place for that SAE.
    """
    contents = sae if isinstance(sae, Contents) else contents_of(sae)
    if about is not None:
        contents = contents._replace(about=about)
    target, kind = Path(path).expanduser(), FORMATS[format]
    kind.check_holds(contents.architecture, contents.keys, "the SAE")
    if kind.file is not None and target.suffix != ".pt":
        target /= kind.file(contents.about)
    kind.write(contents, target)
    return target
