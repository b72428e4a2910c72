"""The processes of a job of a test's own SLURM, for tests that kill or stop them: told from those of all other clusters on
this machine by their environment."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.slurm_cluster import SlurmCluster

STEP_DAEMON = "slurmstepd"


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    words: tuple[str, ...]
    """Its command line."""
    environment: dict[str, str]

    @property
    def node(self) -> str:
        return self.environment["SLURMD_NODENAME"]

    def runs(self, module: str) -> bool:
        """Whether it is `python -m MODULE`."""
        return any(pair == ("-m", module) for pair in zip(self.words, self.words[1:], strict=False))

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def processes_of(cluster: SlurmCluster, job_id: str, *, node: str | None = None) -> list[Process]:
    """What the job has running now, on one node or all: batch script, srun, tasks, ranks, data workers. Not SLURM's own
    daemons, nor what has ended and is not yet waited for."""
    return [
        process
        for process in _processes()
        if process.environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
        and process.environment.get("SLURM_JOB_ID") == job_id
        and "SLURMD_NODENAME" in process.environment
        and process.environment["SLURMD_NODENAME"] == (node or process.node)
    ]


def rank_of(cluster: SlurmCluster, job_id: str, rank: int) -> Process:
    """The trainer's own process; not its data workers, which have its environment and may have its command line."""
    found = [
        process
        for process in processes_of(cluster, job_id)
        if process.runs("trainer.train") and process.environment.get("RANK") == str(rank)
    ]
    pids = {process.pid for process in found}
    [process] = [process for process in found if process.parent not in pids]
    return process


def wait_for_rank(cluster: SlurmCluster, job_id: str, rank: int, *, timeout_s: float) -> Process:
    end = time.monotonic() + timeout_s
    while True:
        try:
            return rank_of(cluster, job_id, rank)
        except ValueError:
            assert time.monotonic() < end, f"rank {rank} of job {job_id} has not started in {timeout_s:.0f} s"
            time.sleep(0.1)


def wait_until_gone(cluster: SlurmCluster, job_id: str, *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while left := processes_of(cluster, job_id):
        assert time.monotonic() < end, f"left of job {job_id} after {timeout_s:.0f} s: {left}"
        time.sleep(0.2)


# --------------------------------------------------------------------------------------------------------------- nodes


def strike_node(cluster: SlurmCluster, job_id: str, node: str, number: int) -> list[int]:
    """Send a signal to all that makes up a node: its slurmd, SLURM's step daemons and all that the job runs there. SIGKILL:
    its power is cut; SIGSTOP: it says nothing any more, and its connections stay. Returns the pids."""
    running = processes_of(cluster, job_id, node=node)
    step_daemons = {process.parent for process in running if _name(process.parent) == STEP_DAEMON}
    assert step_daemons, f"job {job_id} runs nothing on {node}"
    pids = [cluster.daemons[node].pid, *step_daemons, *(process.pid for process in running)]
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it died with its parent
    if number == signal.SIGKILL:
        cluster.daemons[node].wait(timeout=20)
    return pids


def kill_all(pids: list[int]) -> None:
    """Of a node that had been stopped, so that it can be started again."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_node(cluster: SlurmCluster, node: str, is_it: Callable[[str], bool], *, timeout_s: float) -> str:
    end = time.monotonic() + timeout_s
    while not is_it(state := cluster.node_state(node)):
        assert time.monotonic() < end, f"{node} is {state} after {timeout_s:.0f} s\n{cluster.logs()}"
        time.sleep(0.2)
    return state


def _processes() -> Iterator[Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            folder = Path(entry.path)
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace")
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has ended, or belongs to the machine
            pairs = (text.partition("=") for text in environment.split("\0") if "=" in text)
            yield Process(
                int(entry.name), parent, tuple(words.split("\0")[:-1]), {name: value for name, _, value in pairs}
            )


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
