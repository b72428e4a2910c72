"""What runs within a SLURM job: each task (a rank's launcher), and the end of the batch script. No torch.

Why not submitit's own handling of preemption: its tasks ignore SIGTERM, which is what SLURM preempts with, and its USR2
handler runs on one rank, within a signal handler, where no sharded save is possible. Here the trainer saves by itself;
a task only passes signals on and reports its rank's exit code. When all tasks have ended, the batch script decides.
The decision is not a rank's: `scontrol requeue` kills the job at once, so whoever calls it must be the last.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit

from launch.environment import Place, port_of_job
from launch.job import signal_name, slurm_state, trainer_command
from launch.ranks import CRASH_GRACE_S, decide, log_path, outcome_of, signal_rank, start_rank
from trainer.errors import ExitCode, UserError
from trainer.run_folder import RunFolder

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
"""What SLURM sends: CONT and TERM to preempt, USR2 before the time limit."""
CANCELLED = 128 + signal.SIGTERM


class SignalRelay:
    """Passes signals on to the rank's process; one that comes before it exists waits for it."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        for number in FORWARDED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCONT:
            self.stop_requested = True
        if self._process is None:
            self._early.append(number)
        else:
            signal_rank(self._process, number)

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._early:
            signal_rank(process, number)


@dataclass(frozen=True)
class SlurmTask:
    """What submitit runs in each task: one rank."""

    run_dir: str
    work_dir: str
    code_dir: str
    gpus_per_node: int
    cpu: bool
    num_threads: int

    def __call__(self) -> None:
        relay = SignalRelay()  # in place of submitit's handlers, which ignore SIGTERM
        environment = submitit.JobEnvironment()
        rank, world_size = environment.global_rank, environment.num_tasks
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        place = Place(
            rank=rank, world_size=world_size, local_rank=environment.local_rank,
            local_world_size=self.gpus_per_node, master_addr=_rendezvous_host(environment),
            master_port=port_of_job(int(environment.raw_job_id), restart), code_dir=self.code_dir,
            work_dir=self.work_dir, use_gpus=not self.cpu, num_threads=self.num_threads,
            one_machine=environment.num_nodes == 1,
        )  # fmt: skip
        attempt = f"SLURM job {environment.raw_job_id}, restart {restart}, on {socket.gethostname()}"
        print(f"rank {rank} of {world_size}: output in {log_path(self.work_dir, rank)}", flush=True)
        process = start_rank(trainer_command(self.run_dir, self.work_dir), place, attempt=attempt)
        relay.attach(process)
        code = process.wait()
        report_exit(self.work_dir, rank, code, stop_requested=relay.stop_requested)
        print(f"rank {rank}: ended with {signal_name(code)}", flush=True)
        _leave(rank, code, stop_requested=relay.stop_requested)


def _leave(rank: int, code: int, *, stop_requested: bool) -> None:
    """End this task so that `srun --kill-on-bad-exit` does what is right.

    Only rank 0 passes a 75 on: srun kills the other tasks at the first bad exit, and rank 0 may still be committing the
    checkpoint when the others are through. A crashed rank stays for a while: one that knows the reason may yet say so.
    """
    killed_by_the_stop = stop_requested and code < 0
    if code == ExitCode.REQUEUE or killed_by_the_stop:
        if rank == 0:
            sys.exit(ExitCode.REQUEUE)
    elif code in (ExitCode.STOP, ExitCode.USAGE):
        sys.exit(code)
    elif code != ExitCode.DONE:
        time.sleep(CRASH_GRACE_S)
        sys.exit(code if code > 0 else 128 - code)


def _rendezvous_host(environment: submitit.JobEnvironment) -> str:
    """Address of the node of rank 0: the first of the allocation, where the batch script runs as well.

    Raises:
        UserError: its name means nothing here and SLURM gives no address.
    """
    if environment.num_nodes == 1:
        return "127.0.0.1"
    name = environment.hostnames[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:  # SLURM's node names need not be host names
        address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
        if not address:
            raise UserError(
                f"SLURM_JOB_NODELIST: {name} has no address; node names must resolve on the nodes"
            ) from None
        return address


# ----------------------------------------------------------------------------------- from the tasks to the batch script


def _exits_dir(work_dir: str) -> Path:
    job_id, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    return Path(work_dir, "slurm", "exits", f"{job_id}.{restart}")


def report_exit(work_dir: str, rank: int, code: int, *, stop_requested: bool) -> None:
    """srun's own exit code is the highest of all tasks, those that it killed included: it cannot say what happened."""
    folder = _exits_dir(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"rank-{rank}.tmp"
    temporary.write_text(json.dumps({"code": code, "stop_requested": stop_requested, "time": time.time()}))
    temporary.replace(folder / f"rank-{rank}.json")


def end_of_batch(run_dir: str, work_dir: str, world_size: int, max_restarts: int, srun_code: int) -> int:
    """After all tasks: 75 when the job should be queued again, otherwise the job's exit code."""
    exits = {}
    for path in _exits_dir(work_dir).glob("rank-*.json"):
        exits[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    folder = RunFolder(run_dir)
    job_id = os.environ["SLURM_JOB_ID"]
    stop_requested = any(entry["stop_requested"] for entry in exits.values())
    codes = {rank: int(entry["code"]) for rank, entry in exits.items()} or {0: srun_code or 1}
    first = min(exits, key=lambda rank: float(exits[rank]["time"]), default=0)
    outcome = outcome_of(codes, first=first, world_size=world_size, stop_requested=stop_requested)
    try:
        state = slurm_state(job_id)
    except UserError as e:  # no SLURM commands on this node: then the script cannot requeue either, SLURM itself may
        print(f"warning: {e}", flush=True)
        state = "RUNNING"
    if outcome.kind != "done" and state != "RUNNING":
        # scancel, or SLURM is requeueing by itself. It would take our requeue too: a cancelled job would be back.
        print(f"job {job_id} is {state or 'gone'}: not queued again from here", flush=True)
        return CANCELLED
    log = log_path(work_dir, outcome.rank)
    decision = decide(folder, outcome, preempted=stop_requested, max_restarts=max_restarts, log=log)
    print(f"job {job_id}: {decision.why}" + ("; queued again" if decision.restart else ""), flush=True)
    return decision.code


def main(arguments: list[str]) -> int:
    run_dir, work_dir, world_size, max_restarts, srun_code = arguments
    try:
        return end_of_batch(run_dir, work_dir, int(world_size), int(max_restarts), int(srun_code))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return int(srun_code) or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
