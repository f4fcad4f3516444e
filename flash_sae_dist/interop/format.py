"""What a format is: the paths that are of it, the architectures that it holds, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..models.about import About
from .contents import Contents

# What a file holds: tensors by their names in it, and its config.
Written = tuple[dict[str, Tensor], dict[str, Any]]
To = Callable[[Contents], Written]
# Our weights and keys of the section sae, from the file's own; the path is for errors.
From = Callable[[Path, dict[str, Any], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
# None is not read: a file of it is one of another architecture, as batch_topk's is of jumprelu.
Converters = Mapping[str, tuple[To, From | None]]


class Format(NamedTuple):
    """One library's form of an SAE's files."""

    name: str
    title: str  # for people
    converters: Converters  # by our names of architectures
    read: Callable[[Path, int | None], Contents]  # k where the file does not tell it
    write: Callable[[Contents, Path], None]
    is_folder: Callable[[set[str]], bool]  # by the names in it
    is_file: Callable[[Path], bool] = lambda path: False
    file: Callable[[About], str] | None = None  # the name of one that is no folder
    layer_norm: bool = False  # whether it says that tokens are standardised
    transcoders: frozenset[str] = frozenset()  # architectures of transcoders that it holds
    one_width: bool = True  # whether a crosscoder's hookpoints must be of one

    def check_holds(self, architecture: str, keys: Mapping[str, Any], what: str) -> None:
        """Raises ValueError where the format has no place for an SAE of those keys."""
        if keys.get("input_norm", "none") != "none" and not self.layer_norm:
            raise ValueError(
                f"{what} standardises its tokens (sae.input_norm={keys['input_norm']!r}), which "
                f"{self.title} has no word for; name another format"
            )
        if "d_out" in keys and architecture not in self.transcoders:
            raise ValueError(
                f"{what} is a transcoder of architecture {architecture!r}, which {self.title} "
                "cannot hold as written here; name another format"
            )
        if architecture not in self.converters:
            raise ValueError(
                f"{what} is of architecture {architecture!r}, which {self.title} cannot hold as "
                f"written here, only {', '.join(sorted(self.converters))}; name another format"
            )
        if self.one_width and len(set(widths := keys.get("sources", ()))) > 1:
            raise ValueError(
                f"{what} is a crosscoder of hookpoints of widths {list(widths)}, of which "
                f"{self.title} can hold only one; name another format"
            )


def converter(path: Path, formats: Converters, ours: str | None, theirs: object) -> From:
    """How to read an architecture. Raises ValueError naming the file's own word for one that is
    not read."""
    found = formats[ours][1] if ours is not None and ours in formats else None
    if found is None:
        read = ", ".join(sorted(name for name, (_, of) in formats.items() if of is not None))
        raise ValueError(
            f"{path} holds an SAE of architecture {theirs!r}, which is not read here; this format "
            f"is read for {read}"
        )
    return found
