"""The rows that SAEs are measured on: of a store, or of a model that runs on the text for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..activations.aligned import AlignedLoaders
from ..activations.language_model import LanguageModel, tapped
from ..activations.loader import ActivationLoader
from ..activations.origin import loaded_parts, text_digest
from ..activations.probe import check_ids
from ..activations.store import ActivationStore
from ..activations.text import TokenTable
from ..config.data import ModelConfig
from ..training.made_of import rows_made_of
from .unseen import MeasuredRows

# Another order than any training's.
_SEED = -1 & 0x7FFFFFFF


class EvaluationRows(Protocol):
    """Rows of hookpoints, each of which is read once."""

    @property
    def told(self) -> str:
        """What they are."""
        ...

    def count(self, asked: int) -> int:
        """Rows that there are for so many asked for: a row measured twice is no new evidence."""
        ...

    @contextmanager
    def batches(
        self, hookpoints: list[str], num_tokens: int, batch_tokens: int, device: torch.device
    ) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """Batches of num_tokens rows in all, the same tokens of each hookpoint."""
        ...

    def made_of(self, hookpoint: str) -> dict[str, Any]:
        """What the rows are, as a store's `made_of`."""
        ...


class StoreRows:
    """Rows of a store, from everywhere in it."""

    def __init__(self, store: ActivationStore, measured: MeasuredRows) -> None:
        self.store, self.measured = store, measured

    @property
    def told(self) -> str:
        """See EvaluationRows."""
        return self.measured.told

    def count(self, asked: int) -> int:
        """See EvaluationRows."""
        return min(asked, self.measured.available)

    @contextmanager
    def batches(
        self, hookpoints: list[str], num_tokens: int, batch_tokens: int, device: torch.device
    ) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """See EvaluationRows."""
        num_steps = -(-num_tokens // batch_tokens)
        options: dict[str, Any] = {"seed": _SEED, "num_steps": num_steps, "device": device}
        options |= {"holdout": self.measured.holdout, "only_held_out": self.measured.holdout > 0}
        size = -(-num_tokens // num_steps)
        loaders = AlignedLoaders(
            lambda name: ActivationLoader(self.store, name, batch_tokens=size, **options),
            hookpoints,
        )

        def cut() -> Iterator[tuple[Tensor, ...]]:
            left = num_tokens
            for batch in loaders:
                # The loader's passes are of one size; the last may reach beyond what was asked for.
                parts = tuple(part[:left] for part in batch)
                yield parts
                left -= len(parts[0])

        with loaders:
            yield cut()

    def made_of(self, hookpoint: str) -> dict[str, Any]:
        """See EvaluationRows."""
        return rows_made_of(self.store, hookpoint)


class ModelRows:
    """Rows of a model's forward passes over a text, kept on the host."""

    told = "rows of the model itself"

    def __init__(
        self,
        lm: LanguageModel,
        cfg: ModelConfig,
        table: TokenTable,
        hookpoints: list[str],
        batch_sequences: int,
    ) -> None:
        self.lm, self.table = lm, table
        self._parts = {**loaded_parts(cfg, lm), "text": text_digest(table)}
        self._rows = self._collect(hookpoints, batch_sequences)

    def _collect(self, hookpoints: list[str], batch_sequences: int) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in hookpoints}
        table, device, kept = self.table, self.lm.device, torch.empty(0, dtype=torch.bool)
        check_ids(self.lm, int(table.ids.max()))

        def take(hookpoint: str, value: Tensor) -> None:
            rows[hookpoint].append(value[kept].float().cpu())

        with tapped(self.lm, hookpoints, take) as run:
            for at in range(0, len(table.ids), batch_sequences):
                part = slice(at, at + batch_sequences)
                kept = torch.from_numpy(np.array(table.keep[part])).to(device)
                ids = torch.from_numpy(table.ids[part].astype(np.int64)).to(device)
                run(ids, torch.from_numpy(np.array(table.attention[part])).to(device))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def count(self, asked: int) -> int:
        """See EvaluationRows."""
        return min(asked, min(len(rows) for rows in self._rows.values()))

    @contextmanager
    def batches(
        self, hookpoints: list[str], num_tokens: int, batch_tokens: int, device: torch.device
    ) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """See EvaluationRows."""
        rows = [torch.split(self._rows[name][:num_tokens], batch_tokens) for name in hookpoints]
        yield (tuple(part.to(device) for part in parts) for parts in zip(*rows, strict=True))

    def made_of(self, hookpoint: str) -> dict[str, Any]:
        """See EvaluationRows."""
        return {"parts": {**self._parts, "hookpoint": hookpoint}, "rows": None}
