"""What `features` wrote of one SAE, for programs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json
from .page import LATENTS


class FeatureFolder(NamedTuple):
    """The folder `features` of one SAE."""

    folder: Path

    @property
    def page(self) -> Path:
        """Its web page, which opens from the disk."""
        return self.folder / "index.html"

    def summary(self) -> dict[str, Any]:
        """The SAE, the store, how many rows were read, what was left out."""
        found: dict[str, Any] = read_json(self.folder / "summary.json")
        return found

    def latents(self) -> Iterator[dict[str, Any]]:
        """What is known of each latent, in their order."""
        with gzip.open(self.folder / LATENTS, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
