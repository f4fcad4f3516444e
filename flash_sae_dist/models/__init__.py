"""The architectures: `ARCHITECTURES` is the one place where one is registered."""

from __future__ import annotations

from typing import Any

from .topk import TopKSAE

# Each class has `Config: ClassVar[type[SAEConfig]]`, the keys of the section sae.
ARCHITECTURES: dict[str, type[Any]] = {"topk": TopKSAE}
