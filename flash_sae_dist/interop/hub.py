"""Files of the Hugging Face hub as local ones."""

from __future__ import annotations

import glob
import re
from pathlib import Path

# owner/name, and nothing that looks like a path of several folders.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def local_copy_of(word: str) -> Path:
    """`local_copy` of owner/name, owner/name/FOLDER or a local path."""
    if Path(word).expanduser().exists():
        return Path(word).expanduser()
    repository = _REPOSITORY.match(word)
    if repository is None or word.startswith("."):
        return local_copy(word)
    return local_copy(repository[0], word[repository.end() :].strip("/"))


def local_copy(name: str | Path, subfolder: str = "", revision: str | None = None) -> Path:
    """A local path as it is; of a repository's name the folder that it, or a folder or file in it,
    was downloaded to. Raises ValueError where it is neither, or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path / subfolder
    if not _REPOSITORY.fullmatch(str(name)):
        raise ValueError(f"{name} is no file or folder, nor a repository's name, owner/name")
    # Not at the top: it takes long to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Names of a grid's SAEs may have brackets, which patterns take for a choice.
    inside = glob.escape(subfolder.rstrip("/"))
    wanted = [inside, f"{inside}/*"] if subfolder else None
    try:
        root = snapshot_download(str(name), revision=revision, allow_patterns=wanted)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as e:
        raise ValueError(
            f"{name} is no local path and could not be downloaded from the Hugging Face hub "
            f"({first_sentence(e)}); check the name, or download it"
        ) from e
    return Path(root) / subfolder


def first_sentence(error: Exception) -> str:
    """What an error of the hub's client begins with: what follows are guesses and advice."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.split(r"(?<=[a-z])\. (?=[A-Z])", line.strip())[0].rstrip(".")
