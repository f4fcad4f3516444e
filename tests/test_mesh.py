"""Which ranks train together, and how long they wait for one another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flash_sae_dist.parallel import mesh, rendezvous
from flash_sae_dist.parallel.mesh import make_mesh

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shards", "replicas", "rank", "groups"),
    [
        (2, 2, 5, [[4, 5], [5, 7], [4, 5, 6, 7]]),
        (4, 1, 2, [[0, 1, 2, 3], None, [0, 1, 2, 3]]),
        (1, 4, 6, [None, [4, 5, 6, 7], [4, 5, 6, 7]]),
        (1, 1, 3, [None, None, None]),
        (8, 1, 7, [list(range(8)), None, list(range(8))]),
    ],
)
def test_groups(
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    replicas: int,
    rank: int,
    groups: list[list[int] | None],
) -> None:
    class Group:
        """What `new_group` made, of which ranks."""

        def __init__(self, ranks: list[int]) -> None:
            self.ranks = ranks

    waits: list[timedelta] = []
    made: list[list[int]] = []

    def new_group(ranks: list[int], timeout: timedelta) -> Any:
        waits.append(timeout)
        made.append(ranks)
        return Group(ranks) if rank in ranks else dist.GroupMember.NON_GROUP_MEMBER

    for name, value in (
        ("is_initialized", lambda: True),
        ("get_world_size", lambda: 8),
        ("get_rank", lambda: rank),
        ("new_group", new_group),
        ("ProcessGroup", Group),
    ):
        monkeypatch.setattr(mesh.dist, name, value)
    patient: list[Any] = []
    monkeypatch.setattr(rendezvous, "be_patient", patient.append)
    found = make_mesh(shards, replicas, device=CPU, several_groups=True)
    ours = [found.shard_group, found.replica_group, found.member_group, found.batch_group]
    # Batches are gathered over the shards, by a group that is not theirs.
    groups = [*groups, groups[0]]
    assert [getattr(group, "ranks", None) for group in ours] == groups
    assert found.batch_group is not found.shard_group or shards == 1
    assert all(wait <= timedelta(minutes=10) for wait in waits), "for all to come"
    assert [group for group in ours if group is not None] == patient, "once they are there"
    # Every rank makes every group, its own or not: as often as groups have ranks, each is in one.
    kinds = sum(group is not None for group in groups)
    assert sorted(r for ranks in made for r in ranks) == sorted(list(range(8)) * kinds)
    assert (found.group, found.replica, found.shard) == (
        rank // (shards * replicas),
        rank // shards % replicas,
        rank % shards,
    )
