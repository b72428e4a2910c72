"""`loupe runs cancel`: end a run's job, after it has saved or at once, so that it does not come back. No torch."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import click

from launch.cancellation import CANCELLED, ask_to_cancel
from launch.job import live_job, process_start, slurm_jobs_of, update_job
from launch.runs.find import find_run
from launch.runs.read import RunFacts, ended, read_all
from launch.runs.state import QueuedJob, ask_slurm, is_ours
from launch.runs.text import printable
from launch.status import end_of
from trainer.errors import UserError, one_line
from trainer.run_folder import JOB, RunFolder

POLL_S = 0.5
SLURM_POLL_S = 2.0
KILL_S = 30.0
"""Longest that a kill may take."""
SCANCEL_TIMEOUT_S = 60.0


@click.command("cancel")
@click.argument("run")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.option("--now", is_flag=True, help="At once: what came after the newest checkpoint is lost.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, type=click.FloatRange(min=1.0), metavar="SECONDS",
              help="Longest to wait for the save.")  # fmt: skip
def cancel(run: str, roots: tuple[str, ...], now: bool, timeout_s: float) -> None:
    """End the job of RUN: it saves, ends, and is not started again. `loupe runs resume RUN` goes on from there.

    A job that waits in the queue is taken out of it. Waits until the job is gone.

    \b
    Examples:
      loupe runs cancel demo
      loupe runs cancel s3://bucket/runs/first --now
    """
    folder = find_run(run, roots)
    facts = read_all([folder])[0]
    job = facts.job
    if job is None:
        raise UserError(f"{folder.url}: no job is known to have it (no readable {JOB}); there is nothing to cancel")
    if ended(job):
        raise UserError(f"{folder.url}: no job has it, it has ended ({printable(str(ended(job)))})")
    cluster = str(job.get("cluster"))
    if cluster == "slurm":
        _cancel_slurm(facts, job, now=now, timeout_s=timeout_s)
    elif cluster == "local":
        _cancel_local(folder, job, now=now, timeout_s=timeout_s)
    elif cluster == "kubernetes":
        raise UserError(f"{folder.url}: a Kubernetes job; `kubectl delete` it, which lets its pods save: "
                        f"job.batch.volcano.sh, or jobset, {printable(str(job.get('job')))}")  # fmt: skip
    else:
        raise UserError(f"{folder.url}: a job of {printable(cluster)}, which cannot be asked from here; end it there")
    click.echo(f"{folder.url}: {printable(end_of(folder) or 'ended')}")
    checkpoint = read_all([folder])[0].checkpoint
    if checkpoint:
        click.echo(f"newest checkpoint: step {checkpoint.step}; `loupe runs resume {run}` goes on from it")


def _wait_until(gone: Callable[[], bool], timeout_s: float, poll_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not gone():
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)
    return True


def _record_end(folder: RunFolder, why: str) -> None:
    """Where nobody of the job was left to say it. The job is gone: no one else writes the record."""
    if not ended(folder.read_json(JOB)):
        update_job(folder, ended={"code": CANCELLED, "why": why, "time": time.time()})


# ----------------------------------------------------------------------------------------------------------------- SLURM


def _cancel_slurm(facts: RunFacts, job: dict[str, Any], *, now: bool, timeout_s: float) -> None:
    folder = facts.folder
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
        click.echo(f"of its chain: scancel {' '.join(later)}")
        _scancel(*later)
    asked: str | None = None

    def gone() -> bool:
        """A job that a preemption, or its time limit, has put into the queue meanwhile is taken out of it as well."""
        nonlocal asked
        queued = _ask(job_id)
        if queued is None:
            return True
        what = "at once" if now else "saves first" if queued.state == "RUNNING" else "queued"
        deaf = what == "saves first" and not _has_tasks(job_id)  # it has just begun: a signal would reach nobody
        if what != asked and queued.state != "COMPLETING" and not deaf:
            asked = what
            click.echo(
                f"SLURM job {job_id} is {queued.state}: "
                + ("asked to save and end" if what == "saves first" else "scancel")
            )
            # a signal goes to the tasks only; scancel alone would give a save KillWait, by default 30 s
            _scancel(*(["--signal=TERM"] if what == "saves first" else []), job_id)
        return False

    try:
        done = _wait_until(gone, KILL_S + SCANCEL_TIMEOUT_S if now else timeout_s, SLURM_POLL_S)
    except KeyboardInterrupt:
        raise UserError(f"{folder.url}: no longer waiting; job {job_id} ends when it has saved") from None
    if not done:
        raise UserError(f"{folder.url}: SLURM job {job_id} has not ended in time; it does so when it has saved, "
                        "or at once with --now")  # fmt: skip
    _record_end(folder, "cancelled at once" if now else "cancelled in the queue" if asked == "queued" else "cancelled")


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


def _cancel_local(folder: RunFolder, job: dict[str, Any], *, now: bool, timeout_s: float) -> None:
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
        click.echo(f"process {pid}: asked to save and end")
        if not _wait_until(gone, timeout_s, POLL_S):
            raise UserError(f"{folder.url}: process {pid} has not ended within {timeout_s:.0f} s; it does so when it has "
                            "saved, or at once with --now")  # fmt: skip
        return

    def interrupted() -> bool:
        """The supervisor takes the second SIGINT for: kill the ranks."""
        _signal(pid, signal.SIGINT)
        return gone()

    click.echo(f"process {pid}: killed with its ranks")
    if not _wait_until(interrupted, KILL_S, POLL_S):
        _signal(pid, signal.SIGKILL)  # its ranks die with it
        if not _wait_until(gone, KILL_S, POLL_S):
            raise UserError(f"{folder.url}: process {pid} does not die; its disk or its driver may hang")
    _record_end(folder, "cancelled at once")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise UserError(f"process {pid}: another user's; cancel the run as the one who started it") from None
