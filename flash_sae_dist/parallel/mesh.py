"""Makes and ends process groups: those of an SAE's members, of its replicas, of
its shards, and of the batches that the shards gather.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ..config.base import ConfigError
from .rendezvous import make_group


def with_index(device: torch.device) -> torch.device:
    """A device by its number: given none, PyTorch asks the driver for the current one, which takes
    14 us, five times a step (H200, 2026-11-30).
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def local_processes() -> int:
    """Processes of this launch on this host."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Mesh:
    """This rank's place: which device group it is in, which replica there, which shard of that
    replica.

    A group trains its own SAEs; its replicas split each batch; a replica's shards split the
    latents. A size of 1 takes the same path as any other and skips the communication.
    """

    group: int
    num_groups: int
    replica: int
    num_replicas: int
    shard: int
    num_shards: int
    shard_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    member_group: dist.ProcessGroup | None
    batch_group: dist.ProcessGroup | None = None
    """The shard group's ranks, a communicator of its own: batches are gathered while a step's
    collectives run, which a CUDA graph may hold."""

    @classmethod
    def single(cls) -> Mesh:
        """One process that holds everything."""
        return cls(0, 1, 0, 1, 0, 1, None, None, None)

    @property
    def members(self) -> int:
        """Ranks that train one SAE together."""
        return self.num_replicas * self.num_shards

    @property
    def member(self) -> int:
        """This rank's number among them; shards of a replica are neighbours."""
        return self.replica * self.num_shards + self.shard

    @property
    def is_lead(self) -> bool:
        """True on the rank that writes the files of its group."""
        return self.member == 0


def make_mesh(
    num_shards: int | None,
    num_replicas: int,
    *,
    device: torch.device,
    several_groups: bool = False,
    rendezvous_s: float = 600,
) -> Mesh:
    """Splits the running processes into groups of num_replicas x num_shards; None means all
    processes are shards.

    Collective. Raises ConfigError where the number of processes does not fit; several_groups
    allows more processes than one SAE takes (a grid). A group that is not up within rendezvous_s
    seconds, since a process died, raises.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if num_shards is None:
        if world % num_replicas:
            raise ConfigError(
                f"train.num_replicas={num_replicas} does not divide the {world} processes; "
                "change it or --num_processes"
            )
        num_shards = world // num_replicas
    members = num_shards * num_replicas
    if world % members or (world != members and not several_groups):
        raise ConfigError(
            f"train.num_shards={num_shards} x train.num_replicas={num_replicas} needs {members} "
            f"processes, but {world} run; set accelerate launch --num_processes {members}"
        )
    if world == 1:
        return Mesh.single()
    if device.type == "cuda" and device.index is not None:
        # NCCL's collectives of objects take the current one.
        torch.cuda.set_device(device)
    # [group, replica, shard] -> rank: shards of a replica are neighbours.
    ranks = torch.arange(world).view(world // members, num_replicas, num_shards)
    group, replica, shard = (ranks == dist.get_rank()).nonzero()[0].tolist()
    shards, replicas = ranks.flatten(0, 1), ranks.movedim(1, 2).flatten(0, 1)
    groups = [
        _my_group(rows, rendezvous_s) for rows in (shards, replicas, ranks.flatten(1), shards)
    ]
    return Mesh(group, world // members, replica, num_replicas, shard, num_shards, *groups)


def _my_group(ranks: torch.Tensor, seconds: float) -> dist.ProcessGroup | None:
    """Makes a group of each row of ranks and returns this rank's; None where it would be alone.
    Collective over all processes."""
    if ranks.shape[1] == 1:
        return None
    groups = [make_group(row, seconds) for row in ranks.tolist()]
    return next(group for group in groups if group is not None)


def real_groups(mesh: Mesh, device: torch.device) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The shard group and the replica group, for libraries that take no None: a group of this rank
    alone where it has no others. In a process that nothing launched the group of all comes up.
    """
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if mesh.shard_group is not None and mesh.replica_group is not None:
        return mesh.shard_group, mesh.replica_group
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return mesh.shard_group or alone, mesh.replica_group or alone


def end_groups() -> None:
    """Ends this process's groups and waits for their threads, which a reference cycle would keep
    up until the interpreter ends.

    A gloo thread that still has a tensor to let go of then aborts the process, its work done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
