"""Tokenising ahead of the forward passes: the first parts of a text in the first process of a
launch, which needs them to begin, the others in a process of their own:

    python -m flash_sae_dist.activations.tokenising < JOB

which reads its job as a line of JSON, and ends when its standard input does: when the process that
started it is gone. It is started before its job is known, since its libraries take seconds to load,
in which a GPU would have used up the first part.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from .. import ending
from ..config.base import ConfigError, UserError
from ..config.run import RunConfig
from .language_model import load_tokenizer
from .records import Records
from .text import Making
from .text_parts import TextParts, made_parts

logger = logging.getLogger(__name__)
_POLL_S, _POLL_REMOTE_S = 0.05, 1.0
_PARALLEL = "TOKENIZERS_PARALLELISM"
_FAILED, _ASKED = "tokenising.json", "asked.json"

_Process = subprocess.Popen[str]


def making_of(config: RunConfig, tokenizer: Any, *, causal: bool) -> Making:
    """How a config's text becomes sequences."""
    assert config.text is not None
    assert config.cache is not None
    cache = config.cache
    return Making(
        config.text,
        tokenizer,
        cache.context_length,
        causal,
        cache.drop_special_tokens,
        cache.skip_first_tokens,
    )


@contextmanager
def early_process(rows: int, size: int, context_length: int) -> Iterator[_Process | None]:
    """The process that makes parts, before its job is known, where so many rows take more than one
    part of so many sequences; it ends with this context.
    """
    if rows <= size * context_length:
        yield None
        return
    process = _start_process()
    try:
        yield process
    finally:
        _end_process(process)


def _start_process() -> _Process:
    # Modules are found where this process finds them, whatever lies in the current folder.
    command = [sys.executable, "-P", "-m", "flash_sae_dist.activations.tokenising"]
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        # A terminal's Ctrl-C is for the first process alone.
        start_new_session=True,
    )


def _end_process(process: _Process) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):
            pipe.close()


class Tokeniser:
    """The text of a store while its rows are made. In the launch's first process it makes the
    parts; in all of them it waits for those that are not there. A context manager, which ends the
    process that it started.
    """

    def __init__(
        self,
        config: RunConfig,
        making: Making,
        parts: TextParts,
        place: str,  # folder or URL of the parts
        *,
        num_rows: int,
        first: bool,
        process: _Process | None = None,
    ) -> None:
        """num_rows: tokens to store, with which the text ends; process: one that was started
        before (`early_process`).
        """
        self.config, self.making, self.parts, self.first = config, making, parts, first
        self.place, self.num_rows = place, num_rows
        self.process, self._is_own = process, process is None
        self.failed: dict[str, Any] | None = None  # what that process met
        self._watcher = threading.Thread(target=self._watch, name="tokenising", daemon=True)
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        if self.process is None:
            return
        if self._watcher.ident is not None:
            # It reads what the process says until that ends.
            self.process.kill()
            self._watcher.join()
        if self._is_own:
            _end_process(self.process)

    def begin(self, enough: int, advance: Callable[[int], None], mark: Callable[[], None]) -> None:
        """Makes parts until they give that many tokens to store. mark is called before the first
        is written: a text that gives none leaves nothing behind. One process calls it.
        """
        for name in (_FAILED, _ASKED):
            self.parts.records.files.remove(f"records/{name}")
        if (damage := self.parts.drop_damaged()) is not None:
            logger.warning("%s: it is made anew", damage)
        advance(self.parts.rows_before[-1])
        self._keeps()
        if self.parts.ended or self.parts.rows_before[-1] >= enough:
            return
        known = list(self.parts.known())
        for table, part in made_parts(self.making, self.parts.size, self.num_rows, known, advance):
            mark()
            self.parts.add(table, part)
            self._keeps()
            if self.parts.rows_before[-1] >= enough:
                return

    def _keeps(self) -> None:
        ending.keeps(
            f"{self.parts.rows_before[-1]} tokens of the text are kept in {self.parts.records.root}"
            ", and the same command goes on behind them"
        )

    def compare(self) -> None:
        """Tokenises the text anew and raises ConfigError where it is another than that of the parts
        that are there. One process calls it.
        """
        known = self.parts.known()
        found = made_parts(self.making, self.parts.size, self.num_rows, [])
        # known first: else a part behind the last known one is tokenised for nothing.
        for before, (_, part) in zip(known, found, strict=False):
            what = "another text than this one" if not part.same_text(before) else None
            if what is None and not before.last and part.behind != before.behind:
                # It would go on at another place.
                what = "this text in other records (blank lines, files cut elsewhere)"
            if what is not None:
                raise ConfigError(
                    f"{self.parts.records.root} was begun with {what}, though under the same "
                    "config; name another cache.store (of a stream another output), or remove that "
                    "folder"
                )

    def follow(self, enough: int | None = None) -> None:
        """Starts the process that makes the parts that are left; given enough rows, those that
        hold as many, and others once they are asked for.
        """
        if not self.first or self.parts.ended:
            return
        if os.environ.get(_PARALLEL, "").lower() in ("0", "false", "no", "off"):
            logger.info(
                "%s=%s: the text is tokenised by one core", _PARALLEL, os.environ[_PARALLEL]
            )
        job = {
            "config": self.config.model_dump(mode="json", include={"output", *_SECTIONS}),
            "causal": self.making.causal,
            "size": self.parts.size,
            "place": self.place,
            "num_rows": self.num_rows,
            "enough": self.num_rows if enough is None else enough,
        }
        self.process = self.process or _start_process()
        self._watcher.start()
        assert self.process.stdin is not None
        # Of one that is gone already the watcher tells.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def ask(self, part: int) -> None:
        """Says that a part is needed, where no more than enough was to be made; called again and
        again, since others may ask for other parts.
        """
        if (self.parts.records.read(_ASKED) or {"part": -1})["part"] < part:
            self.parts.records.write(_ASKED, {"part": part})

    def wait(self) -> None:
        """Called again and again while a part is not there. Raises what its making met."""
        time.sleep(_POLL_S if self.parts.records.local else _POLL_REMOTE_S)
        if not self.first:
            if (failed := self.parts.records.read(_FAILED)) is not None:
                raise _error(failed)
            return
        if self.failed is not None and not self.parts.ended:
            raise _error(self.failed)

    def _watch(self) -> None:
        """Waits for the process in the first one, and tells all others where it fails: the first
        may have all that it needs itself.
        """
        assert self.process is not None
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        if self.process.wait() and not self._is_over:
            self.failed = _failure(said, self.process.returncode)
            with suppress(OSError, UserError):
                self.parts.records.write(_FAILED, self.failed)


def _failure(said: str, code: int) -> dict[str, Any]:
    """What the process that ended said of it."""
    lines = [line for line in said.splitlines() if '"sentence"' in line]
    if lines:
        told: dict[str, Any] = json.loads(lines[-1])
        return told
    return {
        "sentence": f"the process that tokenises the text ended with code {code}; look above "
        "for its last words (a kill for want of memory leaves none), and run the same command "
        "again: what was tokenised is kept",
        "is_config": False,
    }


_SECTIONS = ("model", "text", "cache")


def _error(failed: dict[str, Any]) -> UserError:
    return (ConfigError if failed["is_config"] else UserError)(failed["sentence"])


def _end_with_standard_input() -> None:
    while sys.stdin.read(1 << 16):
        pass
    os._exit(1)


def _is_enough(parts: TextParts, enough: int) -> bool:
    """Whether no part is needed beyond those that are there."""
    if parts.rows_before[-1] < enough:
        return False
    asked = parts.records.read(_ASKED)
    return asked is None or asked["part"] < len(parts.known())


def main() -> None:
    """Makes the parts that are left of a text."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # The process that started it ends it.
        signal.signal(number, signal.SIG_IGN)
    # What others print must not fill the pipe, which is read at the end.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if not (line := sys.stdin.readline()):
        # Whoever started it needed none, or is gone.
        return
    job = json.loads(line)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    try:
        config = RunConfig.model_validate(job["config"])
        assert config.cache is not None
        assert config.model is not None
        making = making_of(config, load_tokenizer(config.model), causal=job["causal"])
        parts = TextParts(Records(job["place"]), config.cache.context_length, job["size"])
        known = list(parts.known())
        made = made_parts(making, parts.size, job["num_rows"], known)
        while not parts.ended:
            if _is_enough(parts, job["enough"]):
                time.sleep(_POLL_S)
            else:
                parts.add(*next(made))
    except Exception as e:
        sentence = ending.sentence_of(e)
        if sentence is None:
            logger.exception("the process that tokenises the text failed")
            sentence = f"the process that tokenises the text failed: {type(e).__name__}: {e}"
        told = {"sentence": sentence, "is_config": isinstance(e, ConfigError)}
        print(json.dumps(told), file=answer, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
