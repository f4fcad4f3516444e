"""Records of latents as files: a JSON object a line for programs, and a page that a browser opens
from the disk.

A page that is read from the disk may load scripts, and no other files: so the page's data are
scripts, latents in groups of which only those that are looked at are loaded.
"""

from __future__ import annotations

import gzip
import json
import shutil
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import replacing, write_json, write_text

LATENTS = "features.jsonl.gz"
LATENTS_A_FILE = 64
_DATA = "data"
# Tokens of the largest example that the list shows.
_BEFORE, _AFTER, _FOCUS = 8, 4, 6


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
        self._waiting: list[str] = []
        self._stack = ExitStack()
        partial = self._stack.enter_context(replacing(folder / LATENTS))
        # Without the time, the same latents are the same bytes.
        raw = self._stack.enter_context(partial.open("wb"))
        packed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0)
        self._lines = self._stack.enter_context(packed)

    def __enter__(self) -> FeatureFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, record: dict[str, Any]) -> None:
        """Adds the next latent."""
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        self._lines.write(f"{text}\n".encode())
        self._rows.append(_row(record))
        self._waiting.append(text)
        if len(self._waiting) == LATENTS_A_FILE:
            self._flush()

    def _flush(self) -> None:
        number = (len(self._rows) - 1) // LATENTS_A_FILE
        script = f"page.latents({number},[\n" + ",\n".join(self._waiting) + "]);\n"
        (self.folder / _DATA / f"latents-{number}.js").write_text(script, encoding="utf-8")
        self._waiting = []

    def finish(self) -> None:
        """Writes what is left, the page last: where it is, all is."""
        if self._waiting:
            self._flush()
        summary = self.summary | {"latents_a_file": LATENTS_A_FILE}
        write_json(self.folder / "summary.json", summary, indent=1)
        data = json.dumps(summary | {"rows": self._rows}, ensure_ascii=False, separators=(",", ":"))
        write_text(self.folder / _DATA / "summary.js", f"page.summary({data});\n")
        # features.jsonl.gz has its name from here on.
        self._stack.close()
        template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        write_text(self.folder / "index.html", template)


def _row(record: dict[str, Any]) -> list[Any]:
    """What the list shows and is searched by: number, density, largest and mean activation, tokens
    it raises, tokens it is active on, and the largest example in three parts.
    """
    raised = [text for text, *_ in record.get("raised", [])[:_FOCUS]]
    examples = record["examples"]
    focus = dict.fromkeys(e["tokens"][e["at"]] for e in examples if e["group"] == "top")
    parts = ["", "", ""]
    if examples:
        tokens, at = examples[0]["tokens"], examples[0]["at"]
        before, after = tokens[max(0, at - _BEFORE) : at], tokens[at + 1 : at + 1 + _AFTER]
        parts = ["".join(before), tokens[at], "".join(after)]
    numbers = [float(f"{record[name]:.4g}") for name in ("density", "max", "mean")]
    return [record["index"], *numbers, raised, list(focus)[:_FOCUS], parts]
