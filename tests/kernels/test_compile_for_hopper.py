"""The kernels compile for Hopper GPUs with the installed Triton, without spilling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_for_hopper.py")
# What a block of threads may have on a compute capability of 9.0.
SHARED_BYTES = 232_448
# 64 KiB, behind which the slow way of shuffles may lie, which no warp takes.
CODE_BYTES = 68 << 10


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    """The filter is written in a part of Triton that changes between versions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines() if line]
    hopper = [name for name, *_ in lines if "hopper" in name]
    for dtype, filters, tiles in ((torch.bfloat16, 6, 3), (torch.float16, 1, 1)):
        assert sum(name.startswith("filter") and str(dtype) in name for name in hopper) == filters
        assert sum(name.startswith("tiles") and str(dtype) in name for name in hopper) == tiles
    assert len(lines) == 77
    for name, stack, shared, _, code in lines:
        # Where a selection's row is done anew, registers do not suffice.
        most = 1024 if name.startswith("pick-") and "groups" not in name else 32
        if name == "dead-select-43712-True":
            most = 160  # a chunk of keys is held while others are counted
        assert int(stack) <= most, f"{name} spills {stack} bytes"
        assert int(shared) <= SHARED_BYTES, name
        if name.startswith("filter-hopper") and "-False-" in name and "-0-torch" in name:
            # What comes later is fetched anew in each call: 4 us.
            assert int(code) <= CODE_BYTES, f"{name} has {code} bytes of instructions"
