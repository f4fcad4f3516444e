"""Without a CUDA device the Triton kernels run in Triton's interpreter, chosen before they are
imported. New memory is poisoned: a cell that a kernel leaves unwritten shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No index, count or latent of any test.
_POISON = 0x3F3F3F3F


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        if out.is_meta or out.numel() == 0:
            return out
        with torch.no_grad():
            if out.is_floating_point():
                out.fill_(torch.nan)
            elif out.dtype in (torch.int16, torch.int32, torch.int64):
                out.fill_(_POISON & torch.iinfo(out.dtype).max)
        return out

    return made


@pytest.fixture(scope="module", autouse=True)
def _poison_new_memory() -> Iterator[None]:
    with torch.device("meta"):
        # At its first use torch notes which functions are constructors: these, not ours.
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))
        yield
