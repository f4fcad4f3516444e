"""Writes safetensors files piece by piece, their crc32c taken of the very bytes that are written.

A file's layout is known from its tensors' types and shapes, so that several processes may write
one file, each its own rows at their place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor

from .sums import Part, combine

# Bytes a write, and of page-locked memory between a device and the file.
_PIECE = 1 << 23
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    """What a tensor takes of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension."""
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Layout:
    """Where each tensor of a safetensors file lies."""

    def __init__(self, tensors: Mapping[str, Spec]) -> None:
        self.specs, self.starts = dict(tensors), dict[str, int]()
        table: dict[str, Any] = {}
        at = 0
        # The widest types first: every tensor is aligned, as the format's own library has it.
        for name, spec in sorted(
            self.specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
        ):
            offsets = [at, at + spec.bytes]
            dtype, shape = _NAMES[spec.dtype], list(spec.shape)
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            self.starts[name], at = at, offsets[1]
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.starts = {name: start + len(self.header) for name, start in self.starts.items()}
        self.size = len(self.header) + at

    def begin(self, path: Path) -> Part:
        """Gives an empty file its size and its header; returns the header's part."""
        with path.open("r+b", buffering=0) as file:
            os.truncate(file.fileno(), self.size)
            return _write(file.fileno(), 0, iter([np.frombuffer(self.header, np.uint8)]))

    def write(self, path: Path, tensors: Mapping[str, Tensor], first_row: int = 0) -> list[Part]:
        """Writes rows first_row .. of tensors, from any device, at their place and waits until they
        are on the disk; returns their parts. An error bears a note of the file.
        """
        parts = []
        try:
            with path.open("r+b", buffering=0) as file:
                for name, tensor in tensors.items():
                    at = self.starts[name] + first_row * self.specs[name].row_bytes
                    parts.append(_write(file.fileno(), at, _pieces(tensor)))
                os.fsync(file.fileno())
        except Exception as e:
            e.add_note(f"while writing {path}")
            raise
        return parts


def save(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a whole file and waits until it is on the disk; returns its crc32c in hex. An error
    bears a note of the file.
    """
    layout = Layout({name: Spec.of(tensor) for name, tensor in tensors.items()})
    try:
        path.touch()
        head = layout.begin(path)
    except Exception as e:
        e.add_note(f"while writing {path}")
        raise
    return combine([head, *layout.write(path, tensors)])


def _write(descriptor: int, start: int, pieces: Iterator[np.ndarray[Any, Any]]) -> Part:
    crc, at = 0, start
    for piece in pieces:
        crc = crc32c(piece.data, crc)
        left = memoryview(piece.data)
        while left:
            written = os.pwrite(descriptor, left, at)
            left, at = left[written:], at + written
    return Part(start, at - start, crc)


def _pieces(tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's bytes on the host; a piece is overwritten once the next is asked for."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    through = None
    if flat.is_cuda:
        with torch.cuda.device(flat.device):
            through = torch.empty(min(_PIECE, len(flat)), dtype=torch.uint8, pin_memory=True)
    for at in range(0, len(flat), _PIECE):
        piece = flat[at : at + _PIECE]
        if through is not None:
            piece = through[: len(piece)].copy_(piece)
        yield piece.numpy()
