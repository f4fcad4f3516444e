"""Shared fixtures: a fixed seed, and GPU tests skipped and counted without a CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

# Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before any
# test imports triton, if only through another library.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
