"""Python objects and errors that all processes agree on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..config.base import ConfigError, UserError
from ..ending import sentence_of
from .mesh import Mesh

logger = logging.getLogger(__name__)
T = TypeVar("T")
# How long a file that one host has written may take to be seen by others: attribute caches of NFS
# hold for up to a minute.
LAG_S = 60.0


def raise_together(error: Exception | None) -> None:
    """Raises what any process met on all of them: a mistake that one process alone can find ends
    the others with the same sentence, not with a broken connection. Collective over all processes.

    The others raise ConfigError for a ConfigError, else UserError.
    """
    _raise_any(from_all(_met(error)), error)


def _met(error: Exception | None) -> tuple[bool, str | None]:
    return isinstance(error, ConfigError), _sentence(error)


def _raise_any(met: list[tuple[bool, str | None]], error: Exception | None) -> None:
    if found := [(kind, sentence) for kind, sentence in met if sentence is not None]:
        is_config_error, sentence = found[0]
        raise error or (ConfigError if is_config_error else UserError)(sentence)


def _sentence(error: Exception | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return str(error)
    return sentence_of(error) or f"another process failed: {type(error).__name__}: {error}"


def from_all(found: Any) -> list[Any]:
    """What each process has, by rank. Collective over all processes."""
    told: list[Any] = [found]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, found)
    return told


def together(make: Callable[[], T]) -> T:
    """What each process makes for itself; an error that any of them meets is raised on all.
    Collective over all processes.
    """
    made: Any = None
    error: Exception | None = None
    try:
        made = make()
    except Exception as e:  # raised below, once all know of it
        error = e
    raise_together(error)
    result: T = made
    return result


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; an error that it meets is raised on all.
    Collective over all processes.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    made: Any = together(lambda: make() if is_first else None)
    if dist.is_initialized():
        told = [made]
        dist.broadcast_object_list(told, src=0)
        made = told[0]
    result: T = made
    return result


def patiently(make: Callable[[], T], seconds: float = LAG_S) -> T:
    """What this process makes of files that another one sees: a shared file system may show them
    here later, so a failure is tried again for up to so many seconds.
    """
    ends, told = time.monotonic() + seconds, False
    while True:
        try:
            return make()
        except (UserError, OSError) as e:
            if time.monotonic() >= ends:
                raise
            if not told:
                logger.warning(
                    "%s; another process sees it, so a shared file system may lag: trying again "
                    "for up to %g s", e, seconds,
                )  # fmt: skip
                told = True
        time.sleep(min(1.0, seconds / 10))


def after_first(make: Callable[[], T]) -> T:
    """What each process makes of files, the first one before the others, which are then patient;
    an error that remains is raised on all. Collective over all processes.
    """
    if not dist.is_initialized():
        return make()
    is_first = dist.get_rank() == 0
    first = together(lambda: make() if is_first else None)
    made = together(lambda: None if is_first else patiently(make))
    result: T | None = first if is_first else made
    assert result is not None
    return result


def first_checks(check: Callable[[], None]) -> None:
    """Lets the first process check something; an error that it meets is raised on all.
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


def by_lead(do: Callable[[], None], mesh: Mesh) -> None:
    """Lets the lead of a mesh's members do something; an error that it meets is raised on all.
    Collective over the members.
    """
    by_member(do if mesh.is_lead else lambda: None, mesh)


def by_member(make: Callable[[], T], mesh: Mesh) -> list[T]:
    """What each member of a mesh makes, in their order; an error that any of them meets is raised
    on all. Collective over the members.
    """
    if mesh.members == 1:
        return [make()]
    made: Any = None
    error: Exception | None = None
    try:
        made = make()
    except Exception as e:  # raised below, once all know of it
        error = e
    told: list[Any] = [None] * mesh.members
    dist.all_gather_object(told, (made, _met(error)), group=mesh.member_group)
    _raise_any([met for _, met in told], error)
    return [one for one, _ in told]
