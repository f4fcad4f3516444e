"""SAELens's store of activations, but for how it reads a data set of tokens: many rows at once.

SAELens makes a tensor on the device of every single row, which took longer than the forward pass
of a small language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

_ROWS_AT_ONCE = 64


class Store(ActivationsStore):  # type: ignore[misc]
    """See the module."""

    def _iterate_tokenized_sequences(self) -> Iterator[Tensor]:
        if not self.is_dataset_tokenized:
            yield from super()._iterate_tokenized_sequences()
            return
        column: str = self.tokens_column
        data: Any = self.dataset.select_columns([column]).with_format("numpy")
        for rows in data.iter(batch_size=_ROWS_AT_ONCE):
            for row in rows[column]:
                # Not on the device yet, to which a batch goes as a whole.
                yield torch.tensor(row[: self.context_size], dtype=torch.long)
                self.n_dataset_processed += 1
