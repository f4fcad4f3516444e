"""Where the rows that training reads again are kept: nowhere, in host or in device memory."""

from __future__ import annotations

import logging
import os
from typing import Literal

import numpy as np
import torch

from ..config.base import ConfigError
from ..config.train import Preload
from ..parallel.mesh import local_processes
from .blocks import BlockReader, BlockSpace

logger = logging.getLogger(__name__)
Kept = Literal["none", "host", "device"]
# The share of the free memory that `auto` takes: a step's own workspace is not there yet.
_MODEST = 0.25


class HostRows:
    """Blocks kept in host memory once they have been read and verified."""

    def __init__(self, reader: BlockReader) -> None:
        self.reader = reader
        # The system gives the pages as they are written.
        self.blocks = np.empty((reader.num_blocks, reader.chunk_bytes), dtype=np.uint8)
        self.is_there = np.zeros(reader.num_blocks, dtype=bool)

    def read_into(self, block: int, space: BlockSpace) -> None:
        """BlockReader.read_into, from memory where the block has been read before."""
        rows = space.rows.reshape(-1).view(np.uint8)
        if self.is_there[block]:
            np.copyto(rows, self.blocks[block])
            return
        self.reader.read_into(block, space)
        np.copyto(self.blocks[block], rows)
        self.is_there[block] = True


def _free_device_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _host_bytes()
    return int(torch.cuda.mem_get_info(device)[0])


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kept_by_auto(size: int, epochs: float, free_device: int, free_host: int) -> Kept:
    """Where auto keeps a hookpoint's rows, of so many bytes, that a GPU and, for a remote store,
    the host have so much free memory for.
    """
    if epochs > 1 and size <= _MODEST * free_device:
        return "device"
    return "host" if epochs > 1 and size <= _MODEST * free_host else "none"


def choose_preload(
    asked: Preload,
    reader: BlockReader,
    epochs: float,
    device: torch.device,
    *,
    tell: bool = False,
) -> Kept:
    """What `train.preload` comes to here; with `tell` a log line says so.

    auto keeps rows that are read again: in the memory of a GPU where they take a quarter of what is
    free at the most; in that of the host where the store is remote and they take as little. A local
    store's rows are in the page cache as well. Raises ConfigError where what is asked for does not
    fit.
    """
    size = reader.num_blocks * reader.chunk_bytes
    free = {"device": _free_device_bytes(device), "host": _host_bytes() // local_processes()}
    if asked == "none":
        return asked
    if asked != "auto":
        if size > free[asked]:
            raise ConfigError(
                f"train.preload={asked!r} needs {size / 1e9:.1f} GB of the {asked}'s memory, of "
                f"which there are {free[asked] / 1e9:.1f} GB; set train.preload=auto or none"
            )
        return asked
    why = f"{epochs:.2g} epochs are read" if epochs <= 1 else "the page cache does as well"
    on_device = free["device"] if device.type == "cuda" else 0
    kept = kept_by_auto(size, epochs, on_device, free["host"] if reader.remote else 0)
    if kept != "none":
        why = f"{size / 1e9:.3g} GB of rows, {free[kept] / 1e9:.3g} GB free"
    if tell:
        logger.info("train.preload=auto: %s (%s)", kept, why)
    return kept
