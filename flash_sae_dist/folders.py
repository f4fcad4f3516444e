"""Whether a folder can be written, asked before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .config import ConfigError


def check_writable(key: str, path: str | Path) -> None:
    """Raises ConfigError naming a config's key where its folder can be neither made nor written.

    Leaves nothing behind: of a folder that is not there yet, the nearest one above it is tried.
    """
    folder = Path(path).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"{key}={str(path)!r}: {folder} is a file; name a folder")
        # A file of its own: rights tell nothing of a mount that is read only, or to root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(
            f"{key}={str(path)!r} cannot be written: {folder}: {e.strerror}; name another folder"
        ) from e
