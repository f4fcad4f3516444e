"""What a launch runs on: GPUs with their rates, processes and hosts."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from ..config.base import ConfigError, nearest_name
from ..training.host_memory import free_bytes, local_processes

GIB = 1 << 30


class Gpu(NamedTuple):
    """A kind of device and the rates that its libraries reach, not its data sheet's."""

    name: str
    memory_gib: float
    matmul_tflops: float  # bfloat16 with float32 sums
    copy_tb_s: float  # bytes read and written
    link_gb_s: float  # a direction, to the GPUs of its host
    network_gb_s: float  # a direction, of its share of the host's adapters
    measured: bool = False  # here; else 0.78 of the data sheet's flops and 0.9 of its bandwidth


# H200 and H100: docs/performance.md. Their networks, and all of the others, are of data sheets.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 139.8, 790, 4.3, 450, 50, measured=True),
        Gpu("H100", 79.1, 750, 3.0, 450, 50, measured=True),
        Gpu("B200", 178.0, 1755, 7.2, 900, 50),
        Gpu("A100", 79.2, 243, 1.83, 300, 25),
        Gpu("L40S", 44.4, 282, 0.78, 32, 12.5),
    )
}
DEFAULT = "H200"
# Of two cores and gloo, by order of magnitude: what the plain PyTorch reference gets.
CPU = Gpu("cpu", 0, 0.06, 0.01, 1, 1)


class Launch(NamedTuple):
    """The processes of a launch, and what each has."""

    gpu: Gpu
    processes: int
    hosts: int
    memory: int  # bytes that a process may take of its device's memory
    why: str = ""  # a remark on the GPU
    is_here: bool = True  # on this machine, whose disks and memory count
    store_gb_s: float | None = None  # of a host from the store, where that is known

    @property
    def on_gpu(self) -> bool:
        """Whether the processes compute on GPUs."""
        return self.gpu is not CPU

    @property
    def local(self) -> int:
        """Processes of a host."""
        return -(-self.processes // self.hosts)


def named(name: str) -> Gpu:
    """A kind of GPU by its name in the table, whatever its case, or `cpu`. Raises ConfigError."""
    known = {"cpu": CPU, **{key.lower(): gpu for key, gpu in GPUS.items()}}
    if name.lower() not in known:
        raise ConfigError(
            f"--gpu {name} is not in the planner's table{nearest_name(name, ['cpu', *GPUS])}"
        )
    return known[name.lower()]


def gpu_of(device: torch.device) -> tuple[Gpu, str]:
    """The kind of a device, and a remark where the table has rates of another one alone."""
    if device.type != "cuda":
        return CPU, ""
    called = torch.cuda.get_device_name(device)
    for name, gpu in GPUS.items():
        if name in re.split(r"[\s-]", called):
            return gpu, ""
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    gpu = GPUS[DEFAULT]._replace(name=called, memory_gib=memory, measured=False)
    return gpu, f"{called} is not in the planner's table: its rates are taken for an {DEFAULT}'s"


def memory_of(device: torch.device) -> int:
    """Bytes that this process may take: what is free on its GPU, or its share of the host's."""
    if device.type == "cuda":
        # What PyTorch keeps for tensors to come is free, too.
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        return min(free, int(share * whole) - torch.cuda.memory_reserved(device))
    return free_bytes() // local_processes()


def launch_here(device: torch.device, world: int, memory: int) -> Launch:
    """This launch, as the processes that run see it; memory is the least that any of them has."""
    gpu, why = gpu_of(device)
    return Launch(gpu, world, max(1, world // local_processes()), memory, why)


def launch_for(
    gpu: str | None,
    processes: int | None,
    hosts: int,
    store_gb_s: float | None = None,
    asked: int = 1,  # processes that the config names
) -> Launch:
    """A launch that is planned: on the GPU that is named, or the one that is here, or DEFAULT.
    Without a number it has a process a GPU that is here, or else as many as the config names.

    Raises ConfigError for a GPU that is not in the table and for processes that the hosts cannot
    have alike.
    """
    here = torch.cuda.device_count()
    if processes is None:
        processes = hosts * here if gpu is None and here else -(-asked // hosts) * hosts
    if processes % hosts:
        raise ConfigError(f"--processes {processes} cannot be split over --hosts {hosts} evenly")
    local = processes // hosts
    if gpu is None and here:
        device = torch.device("cuda", 0)
        kind, why = gpu_of(device)
        is_here = hosts == 1 and local <= here
        return Launch(kind, processes, hosts, memory_of(device), why, is_here, store_gb_s)
    kind, why = GPUS[DEFAULT], "no GPU is here: --gpu names another, or cpu"
    if gpu is not None:
        kind, why = named(gpu), ""
    if kind is CPU:
        return Launch(kind, processes, hosts, free_bytes() // local, why, hosts == 1, store_gb_s)
    return Launch(
        kind,
        processes,
        hosts,
        int(kind.memory_gib * GIB),
        why,
        is_here=False,
        store_gb_s=store_gb_s,
    )
