"""The kernels compile for Hopper GPUs with the installed Triton, hardly spilling, and the encoder's
portable ones for others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_for_hopper.py")
# What a block of threads may have on a compute capability of 9.0.
SHARED_BYTES = 232_448
# What a multiprocessor keeps.
CODE_BYTES = 64 << 10


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
    others = [line for line in lines if len(line) == 1]
    assert len(others) == 4 * 19 + 2 * 5, "the encoder's portable kernels for four other GPUs"
    assert len(lines) == len(others) + 6 + 19 + 5 + 56
    for name, stack, shared, _, code in (line for line in lines if len(line) > 1):
        # A chunk of keys is held while others are counted.
        most = 160 if name == "dead-select-43712-True" else 32
        assert int(stack) <= most, f"{name} spills {stack} bytes"
        assert int(shared) <= SHARED_BYTES, name
        if name.startswith("hopper"):
            # Scales are another 512 products, in line.
            bound = CODE_BYTES + (4096 if "float8" in name else 0)
            assert int(code) <= bound, f"{name} has {code} bytes of instructions"
