"""Bundles of jobs handed out to groups of processes as these get free."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..parallel import agree
from ..parallel.mesh import Mesh
from .plan import Bundle, Plan


def in_order(plan: Plan) -> list[Bundle]:
    """A plan's bundles in the order in which they are handed out: the longest first, so that the
    last ones to end are short.
    """
    return sorted((b for group in plan.groups for b in group), key=lambda bundle: -bundle.cost)


def bundles_for(plan: Plan, mesh: Mesh) -> Iterator[Bundle]:
    """The bundles that this rank's group trains. A group takes the next one when it asks for it:
    none waits for another, whatever their steps take. Collective over all processes when it
    begins, over the members from then on.
    """
    bundles = in_order(plan)
    if mesh.num_groups == 1:
        yield from bundles
        return
    assert dist.is_initialized()
    counter = distributed_c10d._get_default_store()
    # A process may train several grids one after another.
    key = agree.from_first(lambda: f"flash_sae_dist/bundles/{uuid4().hex}")
    while True:
        taken = counter.add(key, 1) if mesh.is_lead else 0
        number: int = agree.from_lead(taken, mesh) - 1
        if number >= len(bundles):
            return
        yield bundles[number]
