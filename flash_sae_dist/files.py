"""One atomic write, one checksum, one lock, one check that a folder can be written and has space.

What is read back is compared with a crc32c first: small texts carry their own in their first line
(`seal`), binary files and those of other libraries' formats have theirs in a sealed file beside
them (`CHECKSUMS`, or a record of the same folder).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from crc32c import crc32c

from .config.base import ConfigError, UserError
from .sums import Part, combine

logger = logging.getLogger(__name__)


# Beside files of other libraries' formats; those libraries open files by name and pass over it.
CHECKSUMS = "checksums.json"
_BLANK = "crc32c:00000000"
_SEALED = re.compile(rb'(?:\{\s*"checksum": "|# checksum )crc32c:([0-9a-f]{8})["\n]')
# Either is enough to know a sealed text: no single flipped bit makes it one of before seals.
_LOOKS_SEALED = re.compile(rb'\{\s*"checksum"|# checksum|.{0,24}crc32c:', re.DOTALL)
# A killed launcher takes its processes along within a second; the same command started again at
# once waits for that.
_WAIT_S = 15.0
_LOCK = ".lock"
_BEAT_S, _DEAD_S = 10.0, 60.0
# A checksum is taken of blocks, and of a large file by threads of a span each: reading takes longer
# than the sum, which is one thread's work at a time.
_BLOCK, _SPAN, _THREADS = 1 << 23, 1 << 26, 4
# Written by this process at this moment.
_partials: set[Path] = set()


class UnreadableError(UserError):
    """A file that is there and cannot be read now: nothing tells whether it is damaged."""


def is_absent(error: OSError) -> bool:
    """Whether an error says that a file is not there; any other says nothing of what it holds."""
    return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)


def unreadable(path: Path | str, error: OSError) -> UnreadableError:
    """The error of a file that cannot be read now."""
    return UnreadableError(
        f"{path} is there but cannot be read now: {error.strerror or error}; nothing was changed: "
        "mend that (rights, disk, network, ulimit -n) and run the same command again"
    )


def check_readable(path: Path) -> bool:
    """Whether a file is there. Raises UnreadableError where it is, and cannot be read now."""
    try:
        with path.open("rb") as file:
            file.read(1)
        return True
    except OSError as e:
        if is_absent(e):
            return False
        raise unreadable(path, e) from e


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
    _partials.add(partial)
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield partial
        sync(partial)
        rename(partial, path)
    except BaseException as e:
        e.add_note(f"while writing {path}")
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    finally:
        _partials.discard(partial)


def drop_partials() -> None:
    """Removes what `replacing` has begun in this process, which is about to end."""
    for partial in list(_partials):
        with suppress(OSError):
            partial.unlink(missing_ok=True)


_TEMPORARY = re.compile(r".*\.[0-9a-f]{32}\.(tmp|partial)|step-\d+\.partial")


def sweep(folder: Path, *, below: Sequence[str] = (), deep: bool = False) -> None:
    """Removes temporary files that killed runs left in a folder, those below it by name or (deep)
    all of them. Whoever calls it holds the folder's lock.
    """
    folders = [folder, *(folder / name for name in below)]
    found = folder.rglob("*") if deep else (p for f in folders if f.is_dir() for p in f.iterdir())
    for path in [p for p in found if _TEMPORARY.fullmatch(p.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def seal(text: str) -> str:
    """Puts into a text the crc32c of all of it but line ends behind it, in place of its first
    `crc32c:00000000`.
    """
    assert _BLANK in text[:40]
    return text.replace(_BLANK, f"crc32c:{_text_crc(text.encode())}", 1)


def _text_crc(text: bytes) -> str:
    crc = crc32c(text.rstrip(b"\n"))
    return f"{crc:08x}"


def json_text(values: dict[str, Any], indent: int | None = None) -> str:
    """A sealed JSON object, whose first key is `checksum`."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return seal(json.dumps({"checksum": _BLANK} | rest, indent=indent))


def yaml_text(text: str) -> str:
    """A sealed YAML text, whose first line is a comment."""
    return seal(f"# checksum {_BLANK}\n{text}")


def check_seal(data: bytes) -> bool:
    """Whether a text is sealed; those of before seals are not. Raises ValueError where it does not
    hold what was written.
    """
    found = _SEALED.match(data)
    if found is None:
        if _LOOKS_SEALED.match(data):
            raise ValueError("its checksum cannot be read")
        return False
    start, stop = found.span(1)
    blank = data[:start] + b"00000000" + data[stop:]
    if _text_crc(blank) != found[1].decode():
        raise ValueError("its crc32c changed")
    return True


def parse_json(data: bytes) -> dict[str, Any]:
    """The values of a JSON object without the checksum, which is compared where there is one.
    Raises ValueError where it is damaged or no object.
    """
    check_seal(data)
    try:
        values = json.loads(data.decode())
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, no JSON object")
    values.pop("checksum", None)
    return values


def write_json(path: Path, values: dict[str, Any], indent: int | None = None) -> None:
    """Replaces a file by a sealed JSON object."""
    write_text(path, json_text(values, indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises OSError, or ValueError where it is damaged."""
    return parse_json(path.read_bytes())


def checksum(path: Path) -> str:
    """crc32c of a file, in hex; a large one is read by several threads."""
    with path.open("rb") as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        spans = range(0, size, _SPAN)
        if len(spans) < 2:
            return combine([_read(descriptor, 0)])
        with ThreadPoolExecutor(min(_THREADS, len(spans))) as pool:
            return combine(list(pool.map(lambda at: _read(descriptor, at, _SPAN), spans)))


def _read(descriptor: int, start: int, size: int | None = None) -> Part:
    """The sum of a file's bytes from start, to its end or size of them."""
    crc, at, stop = 0, start, None if size is None else start + size
    while (want := _BLOCK if stop is None else min(_BLOCK, stop - at)) and (
        block := os.pread(descriptor, want, at)
    ):
        crc, at = crc32c(block, crc), at + len(block)
    return Part(start, at - start, crc)


def write_checksums(folder: Path, names: list[str]) -> None:
    """Writes `checksums.json` of files of a folder, after them."""
    write_json(folder / CHECKSUMS, {"crc32c": {n: checksum(folder / n) for n in names}}, indent=1)


def add_checksums(folder: Path, names: list[str]) -> None:
    """Adds files that were written to a folder's `checksums.json`, or begins it."""
    try:
        before = read_json(folder / CHECKSUMS)["crc32c"]
    except (FileNotFoundError, ValueError, KeyError):
        before = {}
    sums = {n: checksum(folder / n) for n in names}
    write_json(folder / CHECKSUMS, {"crc32c": {**before, **sums}}, indent=1)


def check_checksums(folder: Path) -> bool:
    """Whether a folder has a `checksums.json`. Raises ValueError where it is damaged, or a file
    that it names is gone or does not hold what was written.
    """
    try:
        recorded = read_json(folder / CHECKSUMS)
    except FileNotFoundError:
        return False
    except ValueError as e:
        raise ValueError(f"{CHECKSUMS} is damaged: {e}") from e
    sums = recorded.get("crc32c")
    if not isinstance(sums, dict):
        raise ValueError(f"{CHECKSUMS} names no files")
    for name, expected in sums.items():
        try:
            found = checksum(folder / Path(name).name)
        except FileNotFoundError as e:
            raise ValueError(f"{name} is missing") from e
        if found != expected:
            raise ValueError(f"{name} does not hold what was written: its crc32c changed")
    return True


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
def locked(folder: Path, *, below: Sequence[str] = (), deep: bool = False) -> Iterator[None]:
    """Holds a folder's lock, which ends with this process whatever happens; the folder is made,
    and temporary files of killed runs are swept from it (see `sweep`). Folders that were made for
    it and hold nothing else in the end go again.

    Raises ConfigError where another process keeps holding it. Where the system or the file system
    has no locks, a warning says so, and a file with this process's heartbeat stands for one.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor, is_locked = _locked_file(folder)
    try:
        if is_locked:
            sweep(folder, below=below, deep=deep)
            yield
        else:
            with owned(_OwnerFile(folder / ".owner.json"), str(folder)):
                sweep(folder, below=below, deep=deep)
                yield
    finally:
        with suppress(OSError):
            if missing and is_locked and os.listdir(folder) == [_LOCK]:
                (folder / _LOCK).unlink()
                for path in missing:
                    path.rmdir()
        os.close(descriptor)


def _locked_file(folder: Path) -> tuple[int, bool]:
    """A descriptor of a folder's lock, and whether it is held: False where there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever held the lock may remove it with the folder, at any moment.
        with suppress(FileNotFoundError):
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_locked = _flock(descriptor, folder)
                if not is_locked or os.path.samestat((folder / _LOCK).stat(), os.fstat(descriptor)):
                    return descriptor, is_locked
            except BaseException:
                os.close(descriptor)
                raise
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


def _flock(descriptor: int, folder: Path) -> bool:
    """Takes a lock; False where there are none."""
    try:
        import fcntl
    except ImportError:
        return False
    last = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > last:
                raise _busy(str(folder)) from None
            time.sleep(0.1)
        except OSError:
            return False


def _busy(place: str, who: str = "another process") -> ConfigError:
    return ConfigError(f"{who} is at work in {place}; wait for it, or name another folder")


class OwnerRecord(Protocol):
    """Where an owner's record is kept: a file, or an object of a remote store."""

    def read(self) -> dict[str, Any] | None: ...

    # As write, but where a record has come meanwhile it may stay.
    def create(self, record: dict[str, Any]) -> None: ...
    def write(self, record: dict[str, Any]) -> None: ...
    def remove(self) -> None: ...


class _OwnerFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        with suppress(FileNotFoundError, ValueError):
            data = json.loads(self.path.read_text())
            return data if isinstance(data, dict) else None
        return None

    def create(self, record: dict[str, Any]) -> None:
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        write_text(self.path, json.dumps(record))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def owned(record: OwnerRecord, place: str) -> Iterator[None]:
    """Keeps a record of this process, renewed every few seconds, where there are no locks. Raises
    ConfigError where the record of another that lives does not end in time.
    """
    logger.warning(
        "%s has no locks: a record there tells other launches of this one; start no two at once",
        place,
    )
    me = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid4().hex}
    last = time.monotonic() + _WAIT_S
    while (other := record.read()) is not None and _lives(other):
        if time.monotonic() > last:
            raise _busy(place, f"process {other.get('pid')} of host {other.get('host')}")
        time.sleep(0.2)
    # One that is left of a process that died is written over.
    (record.create if other is None else record.write)({**me, "time": time.time()})
    # Of two that wrote, the second is the owner.
    time.sleep(0.2)
    if (other := record.read()) is not None and other.get("id") != me["id"]:
        raise _busy(place, f"process {other.get('pid')} of host {other.get('host')}")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_S):
            # The next one may get through; an object store's errors are UserErrors.
            with suppress(OSError, UserError):
                record.write({**me, "time": time.time()})

    thread = threading.Thread(target=beat, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        with suppress(OSError, UserError):
            record.remove()


def _lives(other: dict[str, Any]) -> bool:
    """Whether the process of a record may still be at work."""
    try:
        if time.time() - float(other["time"]) > _DEAD_S:
            return False
        if other["host"] != socket.gethostname():
            return True
        os.kill(int(other["pid"]), 0)
    except (KeyError, TypeError, ValueError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


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


def check_space(key: str, path: str | Path, needed: int, what: str) -> None:
    """Raises ConfigError where the disk of a folder, which need not be there yet, has less space
    than is needed."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{key}={str(path)!r} has {free:,} bytes free, but {what} takes {needed:,}; free space "
            "there, or name a folder on another disk"
        )
