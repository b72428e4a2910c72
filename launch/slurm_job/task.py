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
from typing import Any

import submitit

from launch.cancellation import asked_to_cancel
from launch.environment import Place, port_of_job
from launch.job import signal_name, slurm_state, trainer_command, update_job
from launch.log_tails import tails_kept
from launch.ranks import CRASH_GRACE_S, decide, end_job, log_path, outcome_of, signal_rank, start_rank
from launch.slurm_job.nodes import check_node, end_for_nodes, leave_out, too_many
from trainer.errors import ExitCode, UserError
from trainer.run_folder import JOB, SUMMARY, RunFolder

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
"""What SLURM sends: CONT and TERM to preempt, USR2 before the time limit."""
CANCELLED = 128 + signal.SIGTERM


class SignalRelay:
    """Passes signals on to the rank's process; one that comes before it exists waits for it."""

    def __init__(self) -> None:
        self.stop_requested_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        for number in FORWARDED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCONT:
            self.stop_requested_at = self.stop_requested_at or time.monotonic()
        if self._process is None:
            self._early.append(number)
        else:
            self.pass_on(self._process, number)

    @property
    def stop_requested(self) -> bool:
        return self.stop_requested_at is not None

    def pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        signal_rank(process, number)

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._early:
            self.pass_on(process, number)


@dataclass(frozen=True)
class SlurmTask:
    """What submitit runs in each task: one rank."""

    run_dir: str
    work_dir: str
    code_dir: str
    gpus_per_node: int
    cpu: bool
    num_threads: int
    preflight: bool = False
    """Check each node before its ranks start."""

    def __call__(self) -> None:
        relay = SignalRelay()  # in place of submitit's handlers, which ignore SIGTERM
        environment = submitit.JobEnvironment()
        rank = environment.global_rank
        if ended_before_us(RunFolder(self.run_dir), environment.job_id, is_main=rank == 0):
            return
        place = Place(
            rank=rank, world_size=environment.num_tasks, local_rank=environment.local_rank,
            local_world_size=self.gpus_per_node, master_addr=rendezvous_host(environment),
            master_port=port_of_job(int(environment.raw_job_id), restart_count()), code_dir=self.code_dir,
            work_dir=self.work_dir, use_gpus=not self.cpu, num_threads=self.num_threads,
            one_machine=environment.num_nodes == 1,
        )  # fmt: skip
        code = self.unfit(environment, rank) if place.local_rank == 0 else None
        if code is None:
            code = run_rank(self.run_dir, place, relay, environment)
        leave(rank, code, stop_requested=relay.stop_requested)

    def unfit(self, environment: submitit.JobEnvironment, rank: int) -> int | None:
        """Check this node, whose first rank this is; the code to end with, reported, where it is not fit."""
        if not self.preflight:
            return None
        code = check_node(
            self.run_dir, self.work_dir, environment, restart=restart_count(), rank=rank, ranks=self.gpus_per_node,
            cpu=self.cpu,
        )  # fmt: skip
        if code is not None:
            report_exit(self.work_dir, rank, code, stop_requested=False)
        return code


def run_rank(run_dir: str, place: Place, relay: SignalRelay, environment: submitit.JobEnvironment) -> int:
    """Start the rank, wait for its end and report it; returns its exit code."""
    rank = place.rank
    attempt = f"SLURM job {environment.job_id}, restart {restart_count()}, on {socket.gethostname()}"
    print(f"rank {rank} of {place.world_size}: output in {log_path(place.work_dir, rank)}", flush=True)
    process = start_rank(trainer_command(run_dir, place.work_dir), place, attempt=attempt)
    relay.attach(process)
    with tails_kept(run_dir, logs_of_task(place.work_dir, environment.job_id, rank)):
        code = process.wait()
    stop_s = time.monotonic() - relay.stop_requested_at if relay.stop_requested_at is not None else None
    report_exit(place.work_dir, rank, code, stop_requested=relay.stop_requested, stop_s=stop_s)
    print(f"rank {rank}: ended with {signal_name(code)}", flush=True)
    return code


def restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def ended_before_us(folder: RunFolder, job_id: str, *, is_main: bool) -> bool:
    """Whether this is a later job of a chain, and the run came to its end in an earlier one: done, stopped or cancelled.

    Otherwise the run is this job's from now on, which `job.json` says.
    """
    job = folder.read_json(JOB) if folder.exists(JOB) else {}
    if job_id not in (job.get("chain") or ()):
        return False
    if folder.exists(SUMMARY) or job.get("ended") or asked_to_cancel(folder):
        print(f"job {job_id}: the run has ended before it: nothing to do", flush=True)
        return True
    if is_main:
        update_job(folder, job_id=job_id)
    return False


def leave(rank: int, code: int, *, stop_requested: bool) -> None:
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


def logs_of_task(work_dir: str, job_id: str, rank: int) -> list[Path]:
    """The rank's log, and of rank 0 the batch script's."""
    batch = [Path(work_dir, "slurm", f"{job_id}_0_log.out")] if rank == 0 else []
    return [log_path(work_dir, rank), *batch]


def rendezvous_host(environment: submitit.JobEnvironment) -> str:
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


def job_id_here() -> str:
    """As squeue has it: of an array's job, the array's number and its own in it. Its plain number is for one of them the
    array's own, and would mean all of them."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ["SLURM_JOB_ID"]


def report_exit(work_dir: str, rank: int, code: int, *, stop_requested: bool, stop_s: float | None = None) -> None:
    """srun's own exit code is the highest of all tasks, those that it killed included: it cannot say what happened.

    Args:
        stop_s: seconds from the request to stop to the rank's end.
    """
    folder = _exits_dir(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"rank-{rank}.tmp"
    node = os.environ.get("SLURM_NODEID", "0")
    report = {"code": code, "stop_requested": stop_requested, "stop_s": stop_s, "time": time.time(), "node": node}
    temporary.write_text(json.dumps(report))
    temporary.replace(folder / f"rank-{rank}.json")


def exits_here(work_dir: str) -> dict[int, dict[str, Any]]:
    """What the ranks of this start have reported, by rank."""
    found = {}
    for path in _exits_dir(work_dir).glob("rank-*.json"):
        found[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    return found


def end_of_batch(run_dir: str, work_dir: str, world_size: int, max_restarts: int, srun_code: int) -> int:
    """After all tasks: 75 when the job should be queued again, otherwise the job's exit code."""
    exits = exits_here(work_dir)
    folder = RunFolder(run_dir)
    job_id = job_id_here()
    chain = (folder.read_json(JOB).get("chain") or []) if folder.exists(JOB) else []
    if job_id in chain and not exits and srun_code == 0:
        return 0  # a later job of the chain, which had nothing to do
    stop_requested = any(entry["stop_requested"] for entry in exits.values())
    codes = {rank: int(entry["code"]) for rank, entry in exits.items()} or {0: srun_code or 1}
    first = min(exits, key=lambda rank: float(exits[rank]["time"]), default=0)
    outcome = outcome_of(codes, first=first, world_size=world_size, stop_requested=stop_requested)
    try:
        state = slurm_state(job_id)
    except UserError as e:  # no SLURM commands on this node: then the script cannot requeue either, SLURM itself may
        print(f"warning: {e}", flush=True)
        state = os.environ.get("LOUPE_JOB_STATE") or "RUNNING"
    if outcome.kind != "done" and state != "RUNNING":
        # scancel, or SLURM is requeueing by itself. It would take our requeue too: a cancelled job would be back.
        print(f"job {job_id} is {state or 'gone'}: not queued again from here", flush=True)
        return CANCELLED
    attempt = f"{job_id}.{restart_count()}"
    if outcome.code == ExitCode.BAD_NODE and (why := too_many(folder, work_dir, attempt)):
        print(f"job {job_id}: {why}", flush=True)
        return end_for_nodes(folder, why)
    saved_in = [
        float(entry["stop_s"]) for entry in exits.values() if entry["code"] == ExitCode.REQUEUE and entry.get("stop_s")
    ]
    if saved_in:
        update_job(folder, stop_s=max(saved_in))  # the next submission's --signal-delay must be longer
    log = log_path(work_dir, outcome.rank)
    decision = decide(folder, outcome, preempted=stop_requested, max_restarts=max_restarts, log=log)
    then = "queued again"
    if decision.restart and outcome.code == ExitCode.BAD_NODE:
        left_out = leave_out(folder, work_dir, attempt, _exits_dir(work_dir))
        then = f"queued again, without {', '.join(left_out)}" if left_out else "queued again"
    if decision.restart and chain:
        then = "the next job of the chain goes on" if job_id != chain[-1] else "the chain is at its end"
        if job_id == chain[-1]:
            end_job(folder, decision.code, f"{decision.why}; the chain is at its end, `loupe runs resume` goes on")
    print(f"job {job_id}: {decision.why}" + (f"; {then}" if decision.restart else ""), flush=True)
    return decision.code


def main(arguments: list[str]) -> int:
    """Leaves the decision in a file: an exit code could be that of what was to run this, as of a container."""
    run_dir, work_dir, world_size, max_restarts, srun_code = arguments
    try:
        code = end_of_batch(run_dir, work_dir, int(world_size), int(max_restarts), int(srun_code))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = int(srun_code) or 1
    folder = _exits_dir(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decision").write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
