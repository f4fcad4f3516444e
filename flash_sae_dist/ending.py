"""How a verb ends before its time: signals, and what other code raises, each in one sentence.

A first SIGTERM or SIGINT ends a process at once where nothing is under way, and is left to the loop
where `deferred` says so; a second one ends it at once anywhere. A thread does that, since the main
one may wait inside a collective, where Python's own handlers never run.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .config.base import UserError
from .files import drop_partials

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C reaches a process from the terminal and again from its launcher: one wish.
_SAME_WISH_S = 1.0
GOES_ON = "what was written before is kept, and the same command goes on from it"


class StopRequested(BaseException):
    """A signal asked a launch to stop, and it has; no error, so `except Exception` lets it pass."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.number, self.sentence = number, sentence

    @property
    def code(self) -> int:
        """The exit code: 128 + the signal, as a shell counts."""
        return 128 + self.number


class StopAsked(Exception):  # noqa: N818 (no error)
    """A wait was left for a signal; the loop that waited ends behind the step before."""


class _State:
    """What this process has been asked for, and where it is."""

    number = 0
    at = 0.0
    deferred = 0
    where = "before the first step"
    kept = ""
    last: Callable[[str, int], None] = staticmethod(lambda text, code: None)
    tell: Callable[[str], None] = staticmethod(lambda text: print(text, file=sys.stderr))


def requested() -> int:
    """The signal that asks this process to stop; 0 where none does."""
    return _State.number


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def keeps(text: str) -> None:
    """Notes what is kept should this launch fail from here on, and how it goes on."""
    _State.kept = text


def before_end(call: Callable[[str, int], None]) -> None:
    """Has `end_now` call this first, with its sentence and exit code."""
    _State.last = staticmethod(call)


def kept() -> str:
    """What `keeps` noted."""
    return _State.kept


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal ends nothing: the loop asks `requested` and stops by itself."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
        _State.where = "between two parts of the work"


@contextmanager
def listening(tell: Callable[[str], None]) -> Iterator[None]:
    """Heeds SIGTERM and SIGINT inside; tell is given the sentence of an end at once. Does nothing
    outside the main thread; a signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.number, _State.deferred, _State.tell = 0, 0, staticmethod(tell)
    _State.where, _State.kept = "before the first step", ""
    read, write = os.pipe()
    os.set_blocking(write, False)
    heeded = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, _nothing) for n in heeded}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            # A handler of C code cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(write)


def _nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _watch(read: int) -> None:
    while data := os.read(read, 64):
        for number in data:
            if number in _SIGNALS:
                _received(number)
    os.close(read)


def _received(number: int) -> None:
    now = time.monotonic()
    first = _State.number == 0
    if first:
        _State.number, _State.at = number, now
    if _State.deferred:
        if first:
            logger.warning(
                "%s: stopping after this step; a second signal ends at once", name_of(number)
            )
            return
        # A launcher ends the processes that are left when one has stopped; it kills later by
        # itself.
        launched = number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        if launched or now - _State.at < _SAME_WISH_S:
            return
    where = _State.where if first else "at once, for a second signal"
    end_now(f"stopped by {name_of(number)} {where}; {GOES_ON}", 128 + number)


def end_now(sentence: str, code: int) -> None:
    """Ends this process from any thread: what waits in a collective could not end itself."""
    with suppress(Exception):
        _State.last(sentence, code)
    with suppress(Exception):
        drop_partials()
    with suppress(Exception):
        _State.tell(sentence)
    sys.stderr.flush()
    os._exit(code)


# What to do about an error of the operating system, by its number.
_CURES = {
    errno.ENOSPC: "free space there, or name a folder on another disk",
    errno.EDQUOT: "free space there (the quota is used up), or name a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many files open; close some",
    errno.ENAMETOOLONG: "a name may have 255 bytes and a path 4095; use shorter ones",
    errno.EACCES: "this user may not; change the rights, or name another folder",
    errno.EPERM: "this user may not; change the rights, or name another folder",
    errno.EROFS: "it is mounted for reading alone; name another folder",
    errno.ENOMEM: "free memory",
    errno.EIO: "the disk or the network behind it fails; look at the system's log",
    errno.ESTALE: "the network file system lost it; mount it anew",
    errno.ENOENT: "something removed it meanwhile; put it back",
}
_OS_ERROR = re.compile(r"os error (\d+)")
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
# How gloo, NCCL and their stores tell that another process has gone.
_PEER_GONE = re.compile(r"Connection (closed|reset)|Broken pipe|gloo|NCCL")
# What they raise is no fault of ours, whatever its type.
_OTHERS = frozenset(
    ("transformers", "tokenizers", "datasets", "huggingface_hub", "accelerate", "fsspec", "s3fs")
    + ("gcsfs", "wandb", "tensorboard", "tensorboardX", "trackio", "mlflow", "aim", "comet_ml")
    + ("clearml", "dvclive", "swanlab")
)


def sentence_of(error: BaseException) -> str | None:
    """An error in one sentence with its cure; None for a fault of our own, which needs its
    traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, StopRequested):
        return error.sentence
    told = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error.errno, _path_of(error))
    if match := _OS_ERROR.search(told):
        return _of_system(int(match[1]), _noted_path(error))
    if isinstance(error, MemoryError) or _NO_MEMORY.search(told):
        return (
            f"not enough memory ({told}); lower train.batch_tokens, cache.batch_sequences or "
            + ("sae.d_sae, or use more processes")
        )
    if is_of_group(error):
        return f"another process of this launch ended or cannot be reached ({_shortened(told)})"
    if (package := _package_of(error)) is not None:
        return f"{package} failed: {type(error).__name__}: {_shortened(told)}"
    if isinstance(error, OSError):
        return _shortened(told) or type(error).__name__
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _of_system(number: int, path: str) -> str:
    what = f"{path}: {os.strerror(number)}" if path else os.strerror(number)
    return f"{what}; {_CURES.get(number, 'mend that')}"


def _path_of(error: OSError) -> str:
    names = [
        os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)
    ]
    return _shortened(" -> ".join(names)) or _noted_path(error)


def _noted_path(error: BaseException) -> str:
    """The path that `files.replacing` and others note on an error that names none."""
    notes = getattr(error, "__notes__", [])
    return next((n.removeprefix("while writing ") for n in notes if "while writing" in n), "")


def is_of_group(error: BaseException) -> bool:
    """Whether an error is torch.distributed's, whose classes are DistError and plain: it tells that
    a connection broke, not why.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _PEER_GONE.search(str(error)) is not None
    )


def _package_of(error: BaseException) -> str | None:
    """The package of others in which an error arose, after the last line of ours."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _OTHERS:
            return package
        if Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent):
            return None
    return None
