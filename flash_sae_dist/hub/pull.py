"""SAEs of a repository of the Hugging Face hub in a local folder."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import NamedTuple

from .. import __version__, interop
from ..config.base import ConfigError, UserError
from ..files import check_writable
from ..models import load_sae
from .reach import check_name, reaching

# Of a repository nothing else is taken: no pickles, no code.
_TAKEN = ("*.safetensors", "*.json", "*.yaml", "README.md")
# The hub's client keeps what it knows of earlier downloads there.
_CLIENTS_OWN = ".cache"


class PulledSAE(NamedTuple):
    """An SAE that was downloaded."""

    path: Path  # its folder
    format: str  # a name of interop.FORMATS


def pull(
    repo: str,  # owner/name
    folder: str | Path,
    *,
    subfolder: str = "",  # of the repository; all of it where it is empty
    revision: str | None = None,
) -> list[PulledSAE]:
    """Downloads a repository's safetensors, their configs and the model card; returns the SAEs, by
    path. Those that `push` wrote are compared with their checksums.

    Raises ConfigError where the folder holds other things, UserError where the hub cannot be
    reached, has no such repository, or the repository no SAE.
    """
    check_name(repo)
    root, inside = Path(folder).expanduser(), subfolder.strip("/")
    if root.exists() and (not root.is_dir() or _holds_other_things(root)):
        raise ConfigError(f"{root} holds other things already; name a new folder")
    check_writable("FOLDER", root)
    # Not at the top: it takes long to import.
    from huggingface_hub import snapshot_download

    # Names of a grid's SAEs may have brackets, which patterns take for a choice.
    prefix = f"{glob.escape(inside)}/" if inside else ""
    with reaching(repo, "pull"):
        snapshot_download(
            repo,
            revision=revision,
            local_dir=root,
            allow_patterns=[*(prefix + pattern for pattern in _TAKEN), "README.md"],
            library_name="flash_sae_dist",
            library_version=__version__,
        )
    return _checked(repo, root / inside)


def _holds_other_things(root: Path) -> bool:
    names = {path.name for path in root.iterdir()}
    return bool(names) and _CLIENTS_OWN not in names


def _checked(repo: str, root: Path) -> list[PulledSAE]:
    """The SAEs below a folder. Raises UserError where there is none, or one is damaged."""
    folders = {file.parent for file in root.rglob("*.safetensors")} if root.is_dir() else set()
    found = []
    for folder in sorted(f for f in folders if _CLIENTS_OWN not in f.parts):
        try:
            format, path = interop.find(folder)
        except ValueError:
            continue
        if format.name == "flash_sae_dist":
            try:
                load_sae(path)
            except ValueError as e:
                raise UserError(f"{' '.join(str(e).split())}; pull it again") from e
        found.append(PulledSAE(path, format.name))
    if not found:
        raise UserError(
            f"{repo} holds no SAE as safetensors under {root.name}; check the name and "
            "--subfolder (`flash-sae convert` reads .pt and .npz files of the hub)"
        )
    return found
