"""Refuses to be built where it does not run; all else stands in pyproject.toml."""

import sys

from setuptools import setup

if sys.platform == "win32":
    raise SystemExit(
        "flash_sae_dist runs on Linux and macOS, not on Windows itself; install it in WSL 2"
    )
setup()
