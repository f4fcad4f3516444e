"""Batches of whole sequences of a text, for losses that run the model with an SAE spliced in."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .stream_order import StreamOrder


class Sequences(NamedTuple):
    """A batch of sequences on a device."""

    ids: Tensor  # [S, T] int64
    attention: Tensor  # [S, T] bool, False on padding
    trained: Tensor  # [S, T] bool, positions whose activations the SAE reconstructs
    counted: Tensor  # [S, T] bool, tokens whose prediction counts

    @classmethod
    def of(cls, packed: Tensor) -> Sequences:
        """From a batch of `TokenBatches`, [S, 4 T]."""
        ids, *masks = packed.view(len(packed), 4, -1).unbind(1)
        attention, trained, counted = (mask.bool() for mask in masks)
        return cls(ids.long(), attention, trained, counted)


class TokenBatches:
    """Sequences in a stream's order, [S, 4 T] int32 a batch, which `Sequences.of` reads. A batch
    source of `BatchFeed`; a context manager.

    Padding and special tokens are not trained on, as in a store; of held-out documents neither
    activations nor predictions count. The last sequences of a part of the text, where they are
    fewer than a batch, are left out.
    """

    dtype = torch.int32

    def __init__(self, order: StreamOrder, context_length: int, start_step: int) -> None:
        """order: of passes of as many sequences as a batch has."""
        self.order = order
        self.shapes = [(order.batch_sequences, 4 * context_length)]
        self._batches = self._all(start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.order.leave()

    def fill_(self, out: Tensor) -> None:
        """Writes the next batch. Raises what the text met."""
        out.copy_(next(self._batches))

    def _all(self, skip: int) -> Iterator[Tensor]:
        for table, trained, sequences in self.order.sequences():
            if skip:
                skip -= 1
                continue
            keep, own = table.keep[sequences], trained[sequences]
            attention = table.attention[sequences]
            parts = (table.ids[sequences], attention, own, attention & (own | ~keep))
            yield torch.cat([torch.from_numpy(part).to(torch.int32) for part in parts], dim=1)
