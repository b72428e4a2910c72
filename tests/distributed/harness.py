"""Run a function on several ranks, as a job's processes on this machine, and bring back what each returned."""

import atexit
import contextlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.warm_ranks import ERROR, JOB
from trainer.config import CODE_ROOT

_ATTEMPTS_AT_PORTS = 4


class RankError(RuntimeError):
    """An exception on a rank, with its traceback."""


def free_port() -> int:
    """Below those that the kernel gives to connections: a rank imports for seconds before it binds, and any other test's
    connection may have got the port by then."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, replicas: int = 1) -> list[Any]:
    """`function(world, *arguments)` on each rank (importable, as the ranks are new processes); results in rank order.
    `replicas`: copies of the model, as `init_world` takes it.

    An exception on a rank is raised here, and ends the others.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for attempt in range(_ATTEMPTS_AT_PORTS):
            try:
                _start(folder, world_size, (world_size, free_port(), name, replicas, function, arguments))
                break
            except RankError as e:  # a port that was free may be another test's a moment later
                if "EADDRINUSE" not in str(e) or attempt == _ATTEMPTS_AT_PORTS - 1:
                    raise
        # written by our own children a moment ago
        return [pickle.loads((folder / str(r)).read_bytes()) for r in range(world_size)]  # noqa: S301


_warm: subprocess.Popen[str] | None = None


def _start(folder: Path, world_size: int, arguments: tuple[Any, ...]) -> None:
    """Run the ranks to their end, as forks of a process that has imported what they need."""
    job = {
        "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ), "world_size": world_size,
        "call": pickle.dumps((_rank, arguments)),
    }  # fmt: skip
    (folder / JOB).write_bytes(pickle.dumps(job))
    (folder / ERROR).unlink(missing_ok=True)
    _ask(f"ranks {folder}")
    if (folder / ERROR).exists():
        raise RankError((folder / ERROR).read_text())


def _ask(line: str) -> str:
    """The answer of the process that forks the ranks, started by the first question."""
    global _warm
    if _warm is None:
        _warm = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.warm_ranks"], cwd=CODE_ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        atexit.register(_end)
    process = _warm
    assert process.stdin
    assert process.stdout
    try:
        print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
    except BaseException:  # a test's time is over, or Ctrl-C: its ranks end with it
        _end()
        raise
    assert answer, "the process that forks the ranks has died"
    return answer.strip()


class TrainerProcess:
    """`python -m trainer.train` without the time that its imports take: of `subprocess.Popen` what tests of it use.

    Args:
        output: file that standard output and error are appended to.
    """

    def __init__(self, arguments: Sequence[str], output: Path, *, environment: Mapping[str, str], folder: str) -> None:
        job = {"arguments": list(arguments), "output": str(output), "environment": dict(environment), "folder": folder}
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / JOB).write_bytes(pickle.dumps(job))
            self.pid = int(_ask(f"train {name}"))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (answer := _ask(f"poll {self.pid}")):
            self.returncode = int(answer)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if not _until(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired("trainer.train", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _end() -> None:
    global _warm
    if _warm is not None:
        os.killpg(_warm.pid, signal.SIGKILL)
        _warm.wait()
        _warm = None


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
