"""Records of latents as files: a JSON object a line for programs, and a page that a browser opens
from the disk.

A page that is read from the disk may load scripts, and no other files: so the page's data are
scripts, latents in groups of which only those that are looked at are loaded.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import replacing, write_json, write_text
from .lines import Line

LATENTS = "features.jsonl.gz"
LATENTS_A_FILE = 64
_DATA = "data"
# Of two threads.
_WRITES_AHEAD = 4


class FeatureFiles:
    """The folder of one SAE's latents: features.jsonl.gz, summary.json, index.html and data/."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        """Removes what an earlier run wrote there."""
        self.folder, self.summary = folder, summary
        # The page first: where it is, all is.
        for name in ("index.html", "features.jsonl.gz"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / _DATA, ignore_errors=True)
        (folder / _DATA).mkdir()
        self._rows: list[list[Any]] = []
        self._waiting: list[bytes] = []
        self._under_way: deque[Future[None]] = deque()
        self._stack = ExitStack()
        partial = self._stack.enter_context(replacing(folder / LATENTS))
        # Without the time, the same latents are the same bytes.
        raw = self._stack.enter_context(partial.open("wb"))
        packed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0)
        self._lines = self._stack.enter_context(packed)
        # Ended before what it writes to is closed.
        self._packing, self._writing = (
            self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))
            for name in ("packing", "writing")
        )

    def __enter__(self) -> FeatureFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, line: Line) -> None:
        """Adds the next latent."""
        self._rows.append(line.row)
        self._waiting.append(line.json)
        if len(self._waiting) == LATENTS_A_FILE:
            self._flush()

    def _flush(self) -> None:
        """Gives the latents that wait to two threads: packing alone takes as long as all else."""
        number, latents = (len(self._rows) - 1) // LATENTS_A_FILE, self._waiting
        self._waiting = []
        self._under_way.append(self._writing.submit(self._write, number, latents))
        self._under_way.append(self._packing.submit(self._pack, latents))
        while len(self._under_way) > _WRITES_AHEAD:
            self._under_way.popleft().result()

    def _write(self, number: int, latents: list[bytes]) -> None:
        script = b"page.latents(%d,[\n%b]);\n" % (number, b",\n".join(latents))
        (self.folder / _DATA / f"latents-{number}.js").write_bytes(script)

    def _pack(self, latents: list[bytes]) -> None:
        self._lines.write(b"\n".join(latents) + b"\n")

    def finish(self) -> None:
        """Writes what is left, the page last: where it is, all is."""
        if self._waiting:
            self._flush()
        while self._under_way:
            self._under_way.popleft().result()
        summary = self.summary | {"latents_a_file": LATENTS_A_FILE}
        write_json(self.folder / "summary.json", summary, indent=1)
        data = json.dumps(summary | {"rows": self._rows}, ensure_ascii=False, separators=(",", ":"))
        write_text(self.folder / _DATA / "summary.js", f"page.summary({data});\n")
        # features.jsonl.gz has its name from here on.
        self._stack.close()
        template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        write_text(self.folder / "index.html", template)
