"""A verb, or accelerate's launcher, on a host of its own: a network namespace, named by HOST."""

from __future__ import annotations

import ctypes
import importlib
import os
import socket

from accelerate.commands import launch

from flash_sae_dist.launch.entry import verb_main

_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000


def enter(host: str) -> None:
    """Moves this process into a network namespace, under a name that is that host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{host}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    socket.sethostname(host)


if __name__ == "__main__":
    enter(os.environ["HOST"])
    if os.environ["VERB"] == "launcher":
        launch.main()
    else:
        verb_main(importlib.import_module(f"flash_sae_dist.launch.{os.environ['VERB']}").run)
