"""SAEs that a config names by their files, of whatever library, in place of those under output."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import interop
from ..config.base import ConfigError, UserError, sources_of
from ..config.run import EvaluateConfig
from ..files import checksum
from ..models.base import SparseCoder


class GivenSAE(NamedTuple):
    """An SAE in a file or folder of any format."""

    name: str
    folder: Path  # where its evaluation is written
    hookpoint: str
    contents: interop.Contents
    path: Path

    @property
    def target(self) -> str | None:
        """The hookpoint that a transcoder gives."""
        return self.contents.about.output_hookpoint if self.contents.transcodes else None

    @property
    def hookpoints(self) -> list[str]:
        """All whose rows it takes or gives."""
        return [*sources_of(self.hookpoint), *([] if self.target is None else [self.target])]

    @property
    def d_in(self) -> int:
        """Its width."""
        return int(self.contents.weights["W_enc"].shape[1])

    def made_of(self) -> dict[str, Any]:
        """What its files are: their checksums."""
        files = [self.path]
        if self.path.is_dir():
            files = sorted(p for p in self.path.iterdir() if p.is_file())
        return {"digest": {file.name: checksum(file) for file in files}}

    def load(self, device: torch.device | str = "cpu") -> SparseCoder:
        """The SAE itself. Raises UserError where this version has no such architecture."""
        try:
            return interop.build(self.path, self.contents).to(device)
        except ValueError as e:
            raise UserError(str(e)) from e


def given_saes(cfg: EvaluateConfig, output: Path, widths: dict[str, int] | None) -> list[GivenSAE]:
    """The SAEs of evaluate.saes. Raises ConfigError where one cannot be read, nobody tells its
    hookpoint, or that is not among those of a store, whose widths these are, or of another width.
    """
    try:
        paths = [interop.hub.local_copy_of(word) for word in cfg.saes]
    except ValueError as e:
        raise ConfigError(f"evaluate.saes: {e}") from e
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            place = interop.find(path)[1]
            contents = interop.read(path, k=cfg.k)
            interop.build(place, contents)
        except ValueError as e:
            raise ConfigError(f"evaluate.saes: {e}") from e
        hookpoint = cfg.hookpoint or contents.about.hookpoint
        names = sources_of(hookpoint or "")
        if hookpoint is None or (widths is not None and not set(names) <= widths.keys()):
            told = "tells no hookpoint" if hookpoint is None else f"reads {hookpoint!r}"
            known = f"one of {', '.join(widths)}" if widths else "a module's name"
            raise ConfigError(f"evaluate.saes: {path} {told}; set evaluate.hookpoint to {known}")
        sae = GivenSAE(name, output / name, hookpoint, contents, place)
        if contents.transcodes and (
            sae.target is None or (widths is not None and sae.target not in widths)
        ):
            told = "tells no" if sae.target is None else f"tells {sae.target!r} as"
            known = f", one of {', '.join(widths)}" if widths else ""
            raise ConfigError(
                f"evaluate.saes: {path} is a transcoder whose file {told} hookpoint that it gives"
                f"{known}; convert it with --output-hookpoint"
            )
        own = contents.keys.get("sources", [sae.d_in])
        if widths is not None and [*own] != (there := [widths[name] for name in names]):
            raise ConfigError(
                f"evaluate.saes: {path} is of width {_added(own)}, but {hookpoint} of "
                f"{_added(there)}; set evaluate.hookpoint"
            )
        found.append(sae)
    return found


def _added(widths: Iterable[int]) -> str:
    return " + ".join(map(str, widths))


def _names(paths: list[Path]) -> list[str]:
    """A folder's name for each: as many parts of its path as tell it from the others."""
    parts = [path.resolve().parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"evaluate.saes names {paths[0]} twice; drop one")
