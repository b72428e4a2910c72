"""What runs within a SLURM job: each task (a rank's launcher), and the end of the batch script. No torch.

Why not submitit's own handling of preemption: its tasks ignore SIGTERM, which is what SLURM preempts with, and its USR2
handler runs on one rank, within a signal handler, where no sharded save is possible. Here the trainer saves by itself;
a task only passes signals on and reports its rank's exit code. When all tasks have ended, the batch script decides.
The decision is not a rank's: `scontrol requeue` kills the job at once, so whoever calls it must be the last.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from launch.cancellation import asked_to_cancel
from launch.discovery.after import take_back
from launch.environment import Place, port_of_job
from launch.job import given_away, signal_name, trainer_command, update_job
from launch.log_tails import tails_kept
from launch.queue_states import slurm_state
from launch.ranks import CRASH_GRACE_S, Outcome, decide, end_job, log_path, outcome_of, signal_rank, start_rank
from launch.slurm_job.nodes import check_node, end_for_nodes, leave_out, too_many
from launch.slurm_job.reports import exits_dir, exits_here, note_asked, report_exit
from launch.slurm_job.requeued import DECISION, record_requeue
from launch.slurm_job.scancelled import note_scancel
from launch.slurm_job.unrecorded import decide_unrecorded, record_late, show_bug, within_limit
from trainer.errors import ExitCode, UserError, one_line
from trainer.run_folder import JOB, SUMMARY, RunFolder
from trainer.slurm_environment import slurm_job_id

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
"""What SLURM sends: CONT and TERM to preempt, USR2 before the time limit."""
CANCELLED = 128 + signal.SIGTERM
_RUNNING = ("RUNNING", "SIGNALING")
"""SIGNALING: its warning of the time limit is on its way, which on a busy node takes a while."""


class SignalRelay:
    """Passes signals on to the rank's process; one that comes before it exists waits for it."""

    def __init__(self) -> None:
        self.stop_requested_at: float | None = None
        self.asked_by: str | None = None
        """The first signal that asked to stop, by name."""
        self._process: subprocess.Popen[bytes] | None = None
        self._note: Callable[[str], None] | None = None
        self._early: list[int] = []
        for number in FORWARDED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCONT:
            self.stop_requested_at = self.stop_requested_at or time.monotonic()
            if self.asked_by is None:
                self.asked_by = signal.Signals(number).name
                if self._note:
                    self._note(self.asked_by)
        if self._process is None:
            self._early.append(number)
        else:
            self.pass_on(self._process, number)

    @property
    def stop_requested(self) -> bool:
        return self.stop_requested_at is not None

    def pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        signal_rank(process, number)

    def attach(self, process: subprocess.Popen[bytes], *, note: Callable[[str], None] | None = None) -> None:
        """
        Args:
            note: called with the name of the first signal that asks to stop.
        """
        self._process, self._note = process, note
        if note and self.asked_by:
            note(self.asked_by)
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
        if has_nothing_to_do(self.run_dir, self.work_dir, environment.job_id, rank):
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
    relay.attach(process, note=partial(note_asked, place.work_dir) if rank == 0 else None)
    with tails_kept(run_dir, logs_of_task(place.work_dir, environment.job_id, rank)):
        code = process.wait()
        # within: the last upload of a log may wait for storage, and the report says when the rank has ended
        stop_s = time.monotonic() - relay.stop_requested_at if relay.stop_requested_at is not None else None
        report_exit(
            place.work_dir, rank, code, stop_requested=relay.stop_requested, stop_s=stop_s, asked_by=relay.asked_by
        )
    if rank == 0:
        take_back(run_dir, place.work_dir)
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


def has_nothing_to_do(run_dir: str, work_dir: str, job_id: str, rank: int) -> bool:
    """`ended_before_us`; a run folder that does not answer ends this task, which says so in its rank's log."""

    def ask() -> bool:
        folder = RunFolder(run_dir)
        if other := given_away(folder, job_id):
            print(f"job {job_id}: {run_dir} is {other}'s, this one ends", flush=True)
            return True
        if ended_before_us(folder, job_id, is_main=rank == 0):
            return True
        if rank == 0:
            record_late(folder, exits_dir(work_dir))
            record_requeue(folder, exits_dir(work_dir))
        return False

    try:
        return within_limit(ask, f"to read {run_dir}/{JOB}")
    except Exception as e:  # each storage client has errors of its own
        log = log_path(work_dir, rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(f"error: nothing was started: {type(e).__name__}: {one_line(e)}\n")
        report_exit(work_dir, rank, 1, stop_requested=False)
        raise


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


def job_id_here() -> str:
    return slurm_job_id(os.environ) or os.environ["SLURM_JOB_ID"]


def end_of_batch(run_dir: str, work_dir: str, world_size: int, max_restarts: int, srun_code: int) -> int:
    """After all tasks: 75 when the job should be queued again, otherwise the job's exit code."""
    exits = exits_here(work_dir)
    folder = RunFolder(run_dir)
    job_id = job_id_here()
    if other := given_away(folder, job_id):
        print(f"job {job_id}: the run folder is {other}'s: this one ends", flush=True)
        return int(ExitCode.STOP)
    record_late(folder, exits_dir(work_dir))
    chain = (folder.read_json(JOB).get("chain") or []) if folder.exists(JOB) else []
    if job_id in chain and not exits and srun_code == 0:
        return 0  # a later job of the chain, which had nothing to do
    outcome, stop_requested = _outcome(exits, world_size, srun_code)
    saved_in = [
        float(entry["stop_s"]) for entry in exits.values() if entry["code"] == ExitCode.REQUEUE and entry.get("stop_s")
    ]
    if saved_in and folder.exists(JOB):
        # the next submission's --signal-delay must be longer; also where the save was through only after the time limit
        update_job(folder, stop_s=max(saved_in))
    if outcome.kind != "done" and not _is_running(job_id):
        if not _later_in(chain, job_id):
            note_scancel(folder, job_id, restart_count())
        return CANCELLED
    attempt = f"{job_id}.{restart_count()}"
    if outcome.code == ExitCode.BAD_NODE and (why := too_many(folder, work_dir, attempt)):
        print(f"job {job_id}: {why}", flush=True)
        return end_for_nodes(folder, why)
    log = log_path(work_dir, outcome.rank)
    asked_by = next((str(entry["asked_by"]) for entry in exits.values() if entry.get("asked_by")), None)
    decision = decide(folder, outcome, preempted=stop_requested, max_restarts=max_restarts, log=log, asked_by=asked_by)
    later = _later_in(chain, job_id)
    then = "the next job of the chain goes on" if later else "queued again"
    if decision.restart and outcome.code == ExitCode.BAD_NODE:
        left_out = leave_out(folder, work_dir, attempt, exits_dir(work_dir), later=later)
        then += f", without {', '.join(left_out)}" if left_out else ""
    if decision.restart and chain and not later:
        then = "the chain is at its end"
        end_job(folder, decision.code, f"{decision.why}; the chain is at its end, `loupe runs resume` goes on")
    print(f"job {job_id}: {decision.why}" + (f"; {then}" if decision.restart else ""), flush=True)
    return decision.code


def _later_in(chain: list[str], job_id: str) -> list[str]:
    return chain[chain.index(job_id) + 1 :] if job_id in chain else []


def end_unrecorded(
    run_dir: str, work_dir: str, world_size: int, max_restarts: int, srun_code: int, error: Exception
) -> int:
    """As `end_of_batch`, which gave `error`."""
    job_id = job_id_here()
    outcome, stop_requested = _outcome(exits_here(work_dir), world_size, srun_code)
    if outcome.kind != "done" and not _is_running(job_id):
        return CANCELLED
    log = log_path(work_dir, outcome.rank)
    decision = decide_unrecorded(
        RunFolder(run_dir), exits_dir(work_dir), outcome, preempted=stop_requested, max_restarts=max_restarts, log=log,
        error=error,
    )  # fmt: skip
    print(f"job {job_id}: {decision.why}" + ("; queued again" if decision.restart else ""), flush=True)
    return decision.code


def _outcome(exits: dict[int, dict[str, Any]], world_size: int, srun_code: int) -> tuple[Outcome, bool]:
    """How this start ended by the reports of its ranks, and whether it was asked to."""
    stop_requested = _was_asked(exits)
    codes = {rank: int(entry["code"]) for rank, entry in exits.items()} or {0: srun_code or 1}
    first = min(exits, key=lambda rank: float(exits[rank]["time"]), default=0)
    return outcome_of(codes, first=first, world_size=world_size, stop_requested=stop_requested), stop_requested


def _was_asked(exits: dict[int, dict[str, Any]]) -> bool:
    """Whether the job was asked to stop. Some time after a rank's crash srun ends the other tasks, by the same SIGTERM as a
    preemption's: that is no request."""
    crashed = min(
        (
            float(entry["time"])
            for entry in exits.values()
            if not entry["stop_requested"] and entry["code"] not in (ExitCode.DONE, ExitCode.REQUEUE)
        ),
        default=math.inf,
    )
    # half of what a crashed rank stays for is left to clocks that differ
    return any(
        entry["stop_requested"] and float(entry["time"]) - (entry.get("stop_s") or 0.0) < crashed + CRASH_GRACE_S / 2
        for entry in exits.values()
    )


def _is_running(job_id: str) -> bool:
    """False after scancel, or where SLURM is requeueing by itself. It would take our requeue too: a cancelled job would be
    back."""
    try:
        state = slurm_state(job_id)
    except UserError as e:  # no SLURM commands on this node: then the script cannot requeue either, SLURM itself may
        print(f"warning: {e}", flush=True)
        state = os.environ.get("LOUPE_JOB_STATE") or "RUNNING"
    if state not in _RUNNING:
        print(f"job {job_id} is {state or 'gone'}: not queued again from here", flush=True)
    return state in _RUNNING


def main(arguments: list[str]) -> int:
    """Leaves the decision in a file: an exit code could be that of what was to run this, as of a container."""
    run_dir, work_dir, world_size, max_restarts, srun_code = arguments
    try:
        code = within_limit(
            lambda: end_of_batch(run_dir, work_dir, int(world_size), int(max_restarts), int(srun_code)),
            f"to read and write {run_dir}/{JOB}",
        )
    except Exception as e:  # of storage, of a damaged record, or of ours: none is a reason to leave the decision open
        show_bug(e)
        code = end_unrecorded(run_dir, work_dir, int(world_size), int(max_restarts), int(srun_code), e)
    folder = exits_dir(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DECISION).write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
