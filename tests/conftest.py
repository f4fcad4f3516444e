"""Shared fixtures: a fixed seed, and GPU tests skipped and counted without a CUDA device."""

from __future__ import annotations

import dataclasses
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
def _interpret_quickly() -> Iterator[None]:
    """Keeps Triton's interpreter from work without effect, three quarters of its time.

    At every call of a device function it looks through all of its language, to patch what is
    patched: here once a function, and what is patched stays so. Of every sum and difference of
    integers it finds out whether it overflows, to tell no one where `debug` is off.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        # Another Triton's, which tests only take longer with.
        yield
        return
    patch_language: Callable[[Any], Any] = interpreter._patch_lang
    options = interpreter.interpreter_builder.options
    assert not options.debug

    @functools.cache
    def once(fn: Any) -> Any:
        patch_language(fn)
        # A scope of no changes: nothing is restored when a kernel ends.
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        quick = dataclasses.replace(options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", quick)
        yield
