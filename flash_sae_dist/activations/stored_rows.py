"""Rows as a store holds them: bits of a float type, or int8 with a scale a row."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
_MOST = 127
_ENCODED_ROWS = 4096


def encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, D] as codes [n, D] int8 and scales [n] float32, on their device: the largest element
    of a row is 127 or -127 scales. A row that is not finite has a scale that is not.
    """
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    # Few at a time: in float32 they take four times their memory.
    parts = (torch.split(tensor, _ENCODED_ROWS) for tensor in (rows, codes, scales))
    for some, code, scale in zip(*parts, strict=True):
        wide = some.float()
        scale.copy_(wide.abs().amax(dim=1) / _MOST)
        divisors = torch.where(scale > 0, scale, 1.0)
        code.copy_((wide / divisors[:, None]).round_().clamp_(-_MOST, _MOST))
    return codes, scales


def decode_int8(
    codes: Tensor,  # [n, D] int8
    scales: Tensor,  # [n] float32
    out: Tensor,  # [n, D] of a float type, on the same device
) -> Tensor:
    """Writes codes times scales into out, computed in float32 and rounded once."""
    return torch.mul(codes, scales[:, None], out=out)


def float_dtype(dtype: str) -> torch.dtype:
    """What rows of a store's dtype are outside it, on any device: bfloat16 for int8, whose codes
    have no more bits.
    """
    found: torch.dtype = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    return found


class StoredRows(NamedTuple):
    """Rows of a hookpoint, as a store's arrays have them."""

    bits: Array  # [n, D]; bfloat16 as uint16
    scales: Array | None = None  # [n] float32, of int8 alone

    @classmethod
    def encode(cls, rows: Tensor, dtype: str) -> Self:
        """Rows [n, D] in host memory, rounded to a store's dtype."""
        if dtype == "int8":
            codes, scales = encode_int8(rows)
            return cls(codes.numpy(), scales.numpy())
        cast = rows.to(getattr(torch, dtype))
        return cls((cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy())

    def tensor(self) -> Tensor:
        """The numbers [n, D]: in the store's own float type, of int8 in float32."""
        bits = torch.from_numpy(np.ascontiguousarray(self.bits))
        if self.scales is not None:
            out = torch.empty(bits.shape, dtype=torch.float32)
            return decode_int8(bits, torch.from_numpy(self.scales), out)
        return bits.view(torch.bfloat16) if bits.dtype == torch.uint16 else bits

    def without(self, rows: Array) -> Self:
        """Writes zeros over some rows, by their numbers."""
        self.bits[rows] = 0
        if self.scales is not None:
            self.scales[rows] = 0
        return self

    def arrays(self, hookpoint: str) -> dict[str, Array]:
        """By their names in a store."""
        found = {f"activations/{hookpoint}": self.bits}
        if self.scales is not None:
            found[f"scales/{hookpoint}"] = self.scales
        return found
