"""Shared fixtures: a fixed seed, and GPU tests skipped and counted without a CUDA device."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _patch_language_once() -> Iterator[None]:
    """Triton's interpreter looks through all of its language at every call of a device function,
    to patch what is patched: half of the time of these tests. Here it does so once a function, and
    what is patched stays so.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_language: Callable[[Any], Any] = interpreter._patch_lang

    @functools.cache
    def once(fn: Any) -> Any:
        patch_language(fn)
        # A scope of no changes: nothing is restored when a kernel ends.
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
