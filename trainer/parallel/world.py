"""The ranks of a job: process groups, device, and the few collectives that carry host values."""

import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """What the model is sharded over: ("shard",), or ("replicate", "shard") with several copies of the model."""
    host_group: dist.ProcessGroup
    """Gloo, for flags and small objects: never queued behind the device's collectives."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is raised on any rank."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag), dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.host_group)
        return bool(raised)

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)


def init_world(*, num_threads: int = 0, timeout_s: float = 600.0, replicas: int = 1) -> World:
    """Join the job that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or be alone.

    Args:
        replicas: whole copies of the model, each sharded over size / replicas neighbouring ranks; must divide the size.

    Raises:
        UserError: the rank's GPU is not there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    wanted = os.environ.get("LOUPE_DEVICE")  # launchers say; a job that asked for GPUs must not train on CPU unawares
    if (cuda or wanted == "cuda") and torch.cuda.device_count() <= local_rank:
        raise UserError(
            f"--gpus-per-node: rank {rank} is to have GPU {local_rank}, {platform.node()} shows "
            f"{torch.cuda.device_count()}; ask for fewer, or pass --cpu"
        )
    if cuda:
        torch.cuda.set_device(local_rank)
    if num_threads:
        torch.set_num_threads(num_threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    mesh = build_mesh(device, size, replicas)
    return World(rank, size, device, mesh, dist.new_group(backend="gloo", timeout=timeout))


def build_mesh(device: torch.device, size: int, replicas: int = 1) -> DeviceMesh:
    """Neighbouring ranks hold one copy's shards: gathers stay within a node where a copy does. A collective."""
    if replicas == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
