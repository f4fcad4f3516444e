"""One atomic write, one lock, one check that a folder can be written."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from .config.base import ConfigError

# A killed launcher takes its processes along within a second; the same command started again at
# once waits for that.
_WAIT_S = 15.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new empty file beside `path` to fill; it becomes `path` when the block ends, and is
    removed when the block raises.

    Readers see the old file or the new one, after a power cut too. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name: ranks on several hosts may write the same file, and containers may number
    # their processes alike. Opened with the umask's mode, which mkstemp would narrow to 0600.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        sync(partial)
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rename(partial: Path, final: Path) -> None:
    """Moves a synced file or folder to its name and makes the name durable."""
    os.replace(partial, final)
    # Some systems and network file systems cannot sync a folder.
    with suppress(OSError):
        sync(final.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, which ends with this process whatever happens; the folder is made.

    Raises ConfigError where another process keeps holding it. Systems and file systems without
    locks hold nothing.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        last = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise ConfigError(
                        f"another process is at work in {folder}; wait for it, or name another "
                        "folder"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def private_folder() -> Path:
    """This user's folder among the host's temporary files, made where it is missing.

    Its name can be guessed: raises ConfigError where it is a link, or others own or may write it.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"flash_sae_dist-{user}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be made: {e.strerror}; point TMPDIR to a folder that can be written"
        ) from e
    if hasattr(os, "getuid") and (
        not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077
    ):
        raise ConfigError(
            f"{folder} is no folder of yours alone, so what is read there may be another user's; "
            "remove it, or point TMPDIR to a folder of your own"
        )
    return folder


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
        # A real file: permissions say nothing about a read-only mount, or to root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(
            f"{key}={str(path)!r} cannot be written: {folder}: {e.strerror}; name another folder"
        ) from e
