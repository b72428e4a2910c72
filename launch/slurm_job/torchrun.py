"""A node's task where torchrun starts the ranks: `--launcher torchrun`. No torch in the task itself.

torchrun's workers are launchers of ranks, as srun's tasks are without it: they start the trainer, pass signals on, write
its log and report its end. torchrun says of all that failed only that something did; the reports say what.
"""

import os
import socket
import subprocess
import sys
import time

import submitit

from launch.environment import Place, port_of_job
from launch.ranks import CRASH_GRACE_S, die_with_parent, kill_rank, signal_rank
from launch.slurm_job.reports import exits_here
from launch.slurm_job.task import (
    SignalRelay,
    SlurmTask,
    has_nothing_to_do,
    leave,
    rendezvous_host,
    restart_count,
    run_rank,
)
from trainer.errors import ExitCode

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
"""Of others, USR2 among them by default, torchrun dies and leaves its workers behind."""
SHUTDOWN_S = 3600
"""Longest that torchrun lets its workers save, by default 30 s. SLURM's own SIGKILL comes first; a crash does not wait."""
POLL_S = 0.5


class _FirstStop(SignalRelay):
    """Passes the first request to stop on: a second would break into torchrun's wait for its workers."""

    passed = False

    def pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        if self.stop_requested and not self.passed:
            self.passed = True
            signal_rank(process, number)


class TorchrunTask(SlurmTask):
    """What submitit runs in each task: one node."""

    def __call__(self) -> None:
        relay = _FirstStop()
        environment = submitit.JobEnvironment()
        first_rank = environment.node * self.gpus_per_node
        if has_nothing_to_do(self.run_dir, self.work_dir, environment.job_id, first_rank):
            return
        if (unfit := self.unfit(environment, first_rank)) is not None:
            leave(0, unfit, stop_requested=relay.stop_requested)
        command = torchrun_command(self, environment, rendezvous_host(environment))
        # torchrun's own default is one thread a rank, which would pass for the user's word
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.gpus_per_node))}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, env={**threads, **os.environ},
            preexec_fn=die_with_parent(os.getpid()),
        )  # fmt: skip
        relay.attach(process)
        code = self._wait(process)
        mine = {rank: end for rank, end in exits_here(self.work_dir).items() if end["node"] == str(environment.node)}
        if not mine:
            sys.exit(code if code >= 0 else 128 - code)
        # as a task of srun ends with its rank's code: the first rank's where it is here, else that of one that knows why
        rank = 0 if 0 in mine else max(mine, key=lambda rank: mine[rank]["code"] == ExitCode.STOP)
        bad = [rank for rank, end in mine.items() if end["code"] not in (ExitCode.DONE, ExitCode.REQUEUE)]
        rank = bad[0] if bad and mine[rank]["code"] != ExitCode.STOP else rank
        leave(rank, int(mine[rank]["code"]), stop_requested=relay.stop_requested)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Until torchrun has ended. When a rank anywhere has crashed, the others wait for it, stop signal or not."""
        deadline: float | None = None
        while (code := process.poll()) is None:
            time.sleep(POLL_S)
            ends = exits_here(self.work_dir).values()
            if deadline is None and any(end["code"] not in (ExitCode.DONE, ExitCode.REQUEUE) for end in ends):
                deadline = time.monotonic() + CRASH_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                kill_rank(process)  # its workers die with it, and the ranks with them
        return code


def torchrun_command(task: SlurmTask, environment: submitit.JobEnvironment, host: str) -> list[str]:
    port = port_of_job(int(environment.raw_job_id), restart_count())
    is_host = environment.node == 0
    rank = [
        task.run_dir, task.work_dir, task.code_dir, str(int(task.cpu)), str(task.num_threads),
        str(int(environment.num_nodes == 1)),
    ]  # fmt: skip
    return [
        sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={environment.num_nodes}", f"--nproc-per-node={task.gpus_per_node}", "--max-restarts=0",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={environment.job_id}.{restart_count()}",
        # node names need not resolve, and two test nodes may be one machine: who is the host is not to be guessed
        f"--rdzv-conf=is_host={int(is_host)}", f"--local-addr={host if is_host else _own_address(host, port)}",
        f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={SHUTDOWN_S}",
        "-m", "launch.slurm_job.torchrun", *rank,
    ]  # fmt: skip


def _own_address(host: str, port: int) -> str:
    """Of this node's interfaces the one that leads to `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)  # nothing is sent
        return str(sock.getsockname()[0])


def main(arguments: list[str]) -> int:
    """One of torchrun's workers. A rank that saved and stopped has not failed: torchrun would end the others."""
    run_dir, work_dir, code_dir, cpu, num_threads, one_machine = arguments
    die_with_parent(os.getppid())()
    relay = SignalRelay()
    place = Place(
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]), local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        master_addr=os.environ["MASTER_ADDR"], master_port=int(os.environ["MASTER_PORT"]), code_dir=code_dir,
        work_dir=work_dir, use_gpus=cpu == "0", num_threads=int(num_threads), one_machine=one_machine == "1",
    )  # fmt: skip
    code = run_rank(run_dir, place, relay, submitit.JobEnvironment())
    if code in (ExitCode.DONE, ExitCode.REQUEUE):
        return 0
    if code not in (ExitCode.STOP, ExitCode.USAGE):
        # torchrun ends the other ranks at once, by a preemption's own signal; one of them may yet say why this one fell
        time.sleep(CRASH_GRACE_S)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
