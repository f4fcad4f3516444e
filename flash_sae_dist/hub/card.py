"""The model card of a repository of SAEs, made from their runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..config.train import TrainConfig
from ..models.about import About

_TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "interpretability"]
_OF_THE_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_COLUMNS = ("SAE", "architecture", "hookpoint", "d_in", "d_sae", "k", "trained on",
            "L0", "FVU", "cosine", "never fired", "CE kept")  # fmt: skip
_MEASURED = {"l0": ".1f", "fvu": ".4f", "cosine": ".4f", "never_fired_fraction": ".1%"}


class CardEntry(NamedTuple):
    """What a card tells of one SAE."""

    place: str  # folder in the repository, "" for its root
    spec: dict[str, Any]  # config.json's
    about: About
    train: TrainConfig
    store: Mapping[str, Any]  # what its rows are, flat: `model.name`, `text.source`, ...
    evaluation: dict[str, Any] | None  # evaluation.json's


def is_public(name: str) -> bool:
    """Whether a model's or a data set's name is one on the hub, not a folder of this machine."""
    return not Path(name).expanduser().exists() and _OF_THE_HUB.fullmatch(name) is not None


def public_name(name: str) -> str:
    """A name on the hub as it is, of a folder of this machine its last part."""
    return name if is_public(name) else Path(name).expanduser().name


def card_of(repo: str, entries: list[CardEntry], license: str | None) -> str:
    """A README.md: metadata that the hub reads, what the SAEs are, how to load one."""
    # Not at the top: it takes long to import.
    from huggingface_hub import ModelCardData

    models, texts = _all(entries, _hub_model), _all(entries, _hub_text)
    data = ModelCardData(
        library_name="flash_sae_dist",
        license=license,
        base_model=models or None,
        datasets=texts or None,
        tags=_TAGS,
    )
    what = "A sparse autoencoder" if len(entries) == 1 else f"{len(entries)} sparse autoencoders"
    names = _all(entries, lambda e: e.about.model_name)
    of = f"of activations of {' and '.join(names)}" if names else "of imported activations"
    stated = license or "not stated; ask the owner of this repository"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo}",
        f"{what} {of}, trained with flash_sae_dist {__version__}.",
        _table(entries),
        _NOTE if any(e.evaluation for e in entries) else "",
        f"## How to load\n\n```python\n{_code(repo, entries[0])}```",
        f"## How they were made\n\n{_made(entries)}",
        f"License: {stated}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_NOTE = (
    "L0: mean active latents a token. FVU: fraction of variance unexplained. CE kept: share of the "
    "rise in cross-entropy by zeros in place of the activations that the SAE avoids. "
    "`evaluation.json` beside the weights has the rest, and on which rows it was measured."
)


def _all(entries: list[CardEntry], of: Any) -> list[str]:
    return list(dict.fromkeys(found for e in entries if (found := of(e)) is not None))


def _hub_model(entry: CardEntry) -> str | None:
    """The model's name, where it is on the hub."""
    name = entry.store.get("model.name") or entry.about.model_name
    return str(name) if name and is_public(name) else None


def _hub_text(entry: CardEntry) -> str | None:
    name = entry.store.get("text.name") if entry.store.get("text.source") == "hub" else None
    return str(name) if name and is_public(name) else None


def _table(entries: list[CardEntry]) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, entries)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(entry: CardEntry) -> list[str]:
    spec, measured = entry.spec, entry.evaluation or {}
    place = f"`{entry.place}`" if entry.place else "root"
    read = entry.about.hookpoint or "-"
    if entry.about.output_hookpoint is not None:
        read = f"{read} to {entry.about.output_hookpoint}"
    numbers = [str(spec["d_in"]), str(spec["d_sae"]), str(spec.get("k", "-"))]
    tokens = f"{entry.train.num_tokens:,} tokens"
    cells = [_cell(measured.get(name), form) for name, form in _MEASURED.items()]
    kept = _cell(measured.get("loss", {}).get("recovered"), ".1%")
    return [place, spec["architecture"], read, *numbers, tokens, *cells, kept]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _code(repo: str, entry: CardEntry) -> str:
    where = f'"{repo}", "{entry.place}"' if entry.place else f'"{repo}"'
    return (
        "from flash_sae_dist.models.base import SparseCoder\n\n"
        f"sae = SparseCoder.from_pretrained({where})\n"
        f"out = sae(x)  # x [n, {entry.spec['d_in']}] of {entry.about.hookpoint}; "
        "out.recon, out.codes\n"
    )


def _made(entries: list[CardEntry]) -> str:
    """What the SAEs were trained on and how, each line once for all that it holds of."""
    lines = dict.fromkeys(line for entry in entries for line in _told(entry))
    return "\n".join(f"- {line}" for line in lines)


def _told(entry: CardEntry) -> tuple[str, ...]:
    store, train = entry.store, entry.train
    lines = [f"model: {entry.about.model_name or 'not known, the activations were imported'}"]
    if (revision := store.get("model.revision")) is not None:
        lines.append(f"revision of the model: {revision}")
    if (source := store.get("text.source")) is not None:
        lines.append(f"text: {_text(store, source)}")
    if entry.about.context_length is not None:
        lines.append(f"context: {entry.about.context_length} tokens")
    rate = "the default" if train.lr is None else f"{train.lr:.3g}"
    lines.append(
        f"training: batches of {train.batch_tokens:,} tokens, "
        f"{rate} learning rate, seed {train.seed}, "
        f"{train.holdout:.1%} of the documents held out"
    )
    return tuple(lines)


def _text(store: Mapping[str, Any], source: str) -> str:
    names = [store.get(f"text.{key}") for key in ("name", "subset", "split", "revision")]
    if source == "hub" and names[0]:
        return ", ".join([public_name(str(names[0])), *(str(n) for n in names[1:] if n)])
    return {"files": "files of its trainer", "pydoc": "the manual pages of Python"}.get(
        source, f"a {source} of texts"
    )
