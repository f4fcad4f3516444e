"""Python objects and errors that all processes agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..config.base import ConfigError
from .mesh import Mesh

T = TypeVar("T")


def raise_together(error: ConfigError | None) -> None:
    """Raises what any process met on all of them: a mistake that one process alone can find ends
    the others with the same sentence, not with a broken connection. Collective over all processes.
    """
    told = from_all(None if error is None else str(error))
    if sentences := [sentence for sentence in told if sentence]:
        raise error or ConfigError(sentences[0])


def from_all(found: Any) -> list[Any]:
    """What each process has, by rank. Collective over all processes."""
    told: list[Any] = [found]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, found)
    return told


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; the ConfigError that it meets is raised on all.
    Collective over all processes.
    """
    made: Any = None
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            made = make()
        except ConfigError as e:
            error = e
    raise_together(error)
    if dist.is_initialized():
        told = [made]
        dist.broadcast_object_list(told, src=0)
        made = told[0]
    result: T = made
    return result


def first_checks(check: Callable[[], None]) -> None:
    """Lets the first process check something; the ConfigError that it meets is raised on all.
    Collective over all processes.
    """
    from_first(check)


def from_lead(found: Any, mesh: Mesh) -> Any:
    """A Python object that the lead of a mesh's members has, on all of them. Collective over the
    members.
    """
    if mesh.members == 1:
        return found
    told: list[Any] = [None] * mesh.members
    dist.all_gather_object(told, found, group=mesh.member_group)
    return told[0]
