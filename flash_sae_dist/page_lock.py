"""Page-locks host memory that was made by other means than torch's own, whose cache rounds tensors
up to powers of two, keeps them, and cannot share them with other processes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

# For the contexts of all devices.
_PORTABLE = 1


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def lock(address: int, size: int) -> int:
    """Locks memory, so that copies to and from a GPU run beside the host; CUDA's error code, 0 for
    none. Where it fails the memory still works: the host waits for each copy.
    """
    code = int(_cudart().cudaHostRegister(address, size, _PORTABLE))
    if code:
        # CUDA keeps the error for whatever is launched next.
        with suppress(RuntimeError):
            torch.empty(1, device="cuda").zero_()
    return code


def unlock(address: int) -> None:
    """Unlocks it. No copy may be under way."""
    _cudart().cudaHostUnregister(address)
