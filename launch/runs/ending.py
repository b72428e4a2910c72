"""How the job of a run is ended: in SLURM's queue, or on this machine. No torch.

Each function is a generator, so that many jobs are asked first and waited for together: it yields how many seconds to let pass,
until the job is gone.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from launch.cancellation import CANCELLED, ask_to_cancel
from launch.job import live_job, other_cluster_of, process_start, slurm_jobs_of, update_job
from launch.queue_states import QueuedJob, ask_slurm
from launch.runs.read import RunFacts, ended
from launch.runs.state import is_ours
from launch.runs.text import printable
from launch.status import end_of
from trainer.errors import UserError, one_line
from trainer.run_folder import JOB, RunFolder

Pauses: TypeAlias = Iterator[float]
"""Seconds to wait before the next look."""

POLL_S = 0.5
SLURM_POLL_S = 2.0
KILL_S = 30.0
"""Longest that a kill may take."""
SCANCEL_TIMEOUT_S = 60.0
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""States in which a job has no ranks, and nothing to save. In others, such as SUSPENDED, it has, and may not hear."""
SIGNALS = {"saves first": ["--signal=TERM"], "kill": ["--signal=HUP"]}
"""To the tasks only. A plain scancel, and one with KILL, sends SIGTERM and then waits for KillWait: too short for a save, and
too long for an end at once, before which ranks would save. SIGHUP ends them, and leaves no core files."""
WAITING = "`scontrol resume` it, or end it at once with --now, which loses what came after the newest checkpoint"


def _until(gone: Callable[[], bool], timeout_s: float, poll_s: float) -> "Iterator[float]":
    """Yields until it is gone, or its time is over; the caller asks again which."""
    end = time.monotonic() + timeout_s
    while not gone() and time.monotonic() <= end:
        yield poll_s


def _record_end(folder: RunFolder, why: str) -> None:
    """Where nobody of the job was left to say it. The job is gone: no one else writes the record."""
    if not ended(folder.read_json(JOB)):
        update_job(folder, ended={"code": CANCELLED, "why": why, "time": time.time()})


# ----------------------------------------------------------------------------------------------------------------- SLURM


def end_slurm(
    facts: RunFacts, job: dict[str, Any], *, now: bool, timeout_s: float, say: Callable[[str], None]
) -> Pauses:
    """End the SLURM job that has the run, and those of its chain.

    Raises:
        UserError: it is not there, is not ours to end, or has not ended in time.
    """
    folder = facts.folder
    if elsewhere := other_cluster_of(job):
        raise UserError(f"{folder.url}: SLURM job {job.get('job_id')} is of cluster {printable(elsewhere)}; cancel it from "
                        "a node of that")  # fmt: skip
    alive = [job_id for job_id in slurm_jobs_of(job) if _ask(job_id)]
    job_id, later = alive[0] if alive else str(job.get("job_id", "")), alive[1:]
    queued = _ask(job_id)
    if queued is None:
        raise UserError(f"{folder.url}: SLURM job {job_id} is gone already; `loupe runs resume` starts another")
    if not is_ours(facts, queued):
        raise UserError(f"{folder.url}: SLURM job {job_id} is called {printable(queued.name)} here, not "
                        f"{facts.config.name if facts.config else '?'}; go to the run's own cluster")  # fmt: skip
    ask_to_cancel(folder, job)
    if later:
        say(f"of its chain: scancel {' '.join(later)}")
        _scancel(*later)
    asked: str | None = None
    over = False

    def gone() -> bool:
        """A job that a preemption, or its time limit, has put into the queue meanwhile is taken out of it as well."""
        nonlocal asked, over
        queued = _ask(job_id)
        over = queued is None
        if queued is None:
            return True
        what = _what_ends(queued.state)
        if now:
            what = "kill" if what == "saves first" and asked is None else "at once"
        deaf = what == "saves first" and not _has_tasks(job_id)  # it has just begun: a signal would reach nobody
        if what != asked and queued.state != "COMPLETING" and not deaf:
            asked = what
            words = {
                "saves first": "asked to save and end",
                "waits": f"it saves when it goes on; until then: {WAITING}",
                "kill": "its ranks are killed; waiting until its nodes are free",
            }
            say(f"SLURM job {job_id} is {queued.state}: {words.get(what, 'scancel')}")
            if what != "waits":
                _scancel(*SIGNALS.get(what, ()), job_id)
        return False

    yield from _until(gone, KILL_S + SCANCEL_TIMEOUT_S if now else timeout_s, SLURM_POLL_S)
    if not over and asked == "waits":
        raise UserError(f"{folder.url}: SLURM job {job_id} is held, and nobody has asked it to save yet; {WAITING}, or cancel "
                        "again when it runs")  # fmt: skip
    if not over:
        raise UserError(f"{folder.url}: SLURM job {job_id} has not ended in time; it does so when it has saved, "
                        "or at once with --now")  # fmt: skip
    _record_end(folder, "cancelled at once" if now else "cancelled in the queue" if asked == "queued" else "cancelled")


def _what_ends(state: str) -> str:
    """How a job in this state is ended without losing steps."""
    if state in QUEUED:
        return "queued"
    return "saves first" if state == "RUNNING" else "waits"


def _ask(job_id: str) -> QueuedJob | None:
    """None: gone."""
    answer = ask_slurm([job_id])
    if isinstance(answer, str):
        raise UserError(f"SLURM job {job_id}: {answer}")
    job = answer.get(job_id)
    return None if job is None or job.over else job


def _has_tasks(job_id: str) -> bool:
    """Whether srun has started the job's ranks; the batch script is a step without a number."""
    result = _slurm("squeue", "--noheader", "--steps", "--jobs", job_id, "--format", "%i")
    return any(re.fullmatch(r"[\d_]+\.\d+", step.strip()) for step in result.stdout.splitlines())


def _slurm(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SCANCEL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UserError(f"{command[0]}: {one_line(e)}; ask from a node of the job's cluster") from None


def _scancel(*arguments: str) -> None:
    result = _slurm("scancel", *arguments)
    if result.returncode and "already complet" not in result.stderr:
        raise UserError(f"scancel: {' '.join(result.stderr.split())}")


# ---------------------------------------------------------------------------------------------------------- this machine


def end_local(
    folder: RunFolder, job: dict[str, Any], *, now: bool, timeout_s: float, say: Callable[[str], None]
) -> Pauses:
    """End the supervisor on this machine that has the run.

    Raises:
        UserError: it is not here, is not ours to end, or has not ended in time.
    """
    host = str(job.get("host"))
    if host != socket.gethostname():
        raise UserError(f"{folder.url}: its processes are on {printable(host)}; cancel it there")
    if not live_job(folder):
        raise UserError(f"{folder.url}: no job has it: {end_of(folder)}")
    pid, started = job.get("pid"), job.get("pid_start")
    # a number that another process has taken meanwhile must not be signalled
    if not isinstance(pid, int) or pid <= 1 or started is None or process_start(pid) != started:
        raise UserError(f"{folder.url}: in use, but its supervisor is not process {pid} here (a container's?); "
                        "stop it where it was started")  # fmt: skip

    def gone() -> bool:
        return process_start(pid) != started

    ask_to_cancel(folder, job)
    if not now:
        _signal(pid, signal.SIGTERM)
        say(f"process {pid}: asked to save and end")
        yield from _until(gone, timeout_s, POLL_S)
        if not gone():
            raise UserError(f"{folder.url}: process {pid} has not ended within {timeout_s:.0f} s; it does so when it has "
                            "saved, or at once with --now")  # fmt: skip
        return

    def interrupted() -> bool:
        """The supervisor takes the second SIGINT for: kill the ranks."""
        _signal(pid, signal.SIGINT)
        return gone()

    say(f"process {pid}: killed with its ranks")
    yield from _until(interrupted, KILL_S, POLL_S)
    if not gone():
        _signal(pid, signal.SIGKILL)  # its ranks die with it
        yield from _until(gone, KILL_S, POLL_S)
        if not gone():
            raise UserError(f"{folder.url}: process {pid} does not die; its disk or its driver may hang")
    _record_end(folder, "cancelled at once")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise UserError(f"process {pid}: another user's; cancel the run as the one who started it") from None
