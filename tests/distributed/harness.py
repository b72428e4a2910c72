"""Run a function on several ranks, as a job's processes on this machine, and bring back what each returned."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

_ATTEMPTS_AT_PORTS = 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, replicas: int = 1) -> list[Any]:
    """`function(world, *arguments)` on each rank (importable, as the ranks are new processes); results in rank order.
    `replicas`: copies of the model, as `init_world` takes it.

    An exception on a rank is raised here, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(_ATTEMPTS_AT_PORTS):
            try:
                mp.spawn(_rank, (world_size, free_port(), folder, replicas, function, arguments), nprocs=world_size)
                break
            except mp.ProcessRaisedException as e:  # a port that was free may be another test's a moment later
                if "EADDRINUSE" not in str(e) or attempt == _ATTEMPTS_AT_PORTS - 1:
                    raise
        # written by our own children a moment ago
        return [pickle.loads((Path(folder) / str(r)).read_bytes()) for r in range(world_size)]  # noqa: S301


def _rank(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    replicas: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from trainer.parallel.world import init_world

    world = init_world(num_threads=1, timeout_s=120, replicas=replicas)
    result = function(world, *arguments)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    world.barrier()
    dist.destroy_process_group()
