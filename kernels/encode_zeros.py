"""Zeros that the encoder for Hopper keeps from call to call (encode_first.py)."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Zeros(threading.local):
    """Zeros that a call of the encoder takes, and gives back as zeros: its last kernel sees to it.
    That is one launch less than to make them. Each thread has its own of each stream, in whose
    order they are used; those that are not given back, as after an error, are made anew."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def take(self, words: int, device: torch.device) -> tuple[Tensor, bool]:
        """At least so many [words] int32, and whether they may be given back."""
        if torch.cuda.is_current_stream_capturing():
            # A graph's memory is the graph's: it is replayed beside what else a stream does.
            return torch.zeros(words, dtype=torch.int32, device=device), False
        stream = torch.cuda.current_stream(device)
        held = self._held.pop((stream.device_index, stream.cuda_stream), None)
        if held is not None and held.numel() >= words:
            return held, True
        zeros = torch.zeros(words, dtype=torch.int32, device=device)
        return zeros, _may_stay(zeros)

    def give(self, zeros: Tensor, may_stay: bool) -> None:
        if may_stay:
            stream = torch.cuda.current_stream(zeros.device)
            self._held[stream.device_index, stream.cuda_stream] = zeros


def _may_stay(zeros: Tensor) -> bool:
    """Whether memory is the allocator's own, not a pool's of graphs, which takes back all of it:
    torch.compile's have a call before that is not captured, but allocates there."""
    at = zeros.data_ptr()
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # another allocator
        return False
    for segment in segments:
        if segment["address"] <= at < segment["address"] + segment["total_size"]:
            return tuple(segment.get("segment_pool_id", (-1, -1))) == (0, 0)
    return False
