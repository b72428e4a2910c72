"""A job that `scancel` has ended. None of its ranks is asked, so its batch script puts the end into `job.json`, while that may
still run, else whoever looks. SLURM itself forgets the job some minutes later. No torch."""

import contextlib
import re
import subprocess

from launch.cancellation import CANCELLED, asked_to_cancel
from launch.queue_states import TIMEOUT_S
from launch.ranks import end_job
from launch.reached import reached
from trainer.errors import storage_errors
from trainer.run_folder import JOB, RunFolder


def note_scancel(folder: RunFolder, job_id: str, restart: int) -> None:
    """By the job's own batch script, which SLURM has asked to end.

    Args:
        restart: the job's number of restarts at this start. It is larger by now where SLURM itself queues the job again.
    """
    result = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if is_scancelled(result.stdout, restart) and not asked_to_cancel(folder):
        record_scancel(folder, f"its job {job_id}")


def is_scancelled(facts: str, restart: int) -> bool:
    """From `scontrol show job -o` of a job that is completing."""
    found = dict(fact.split("=", 1) for fact in facts.split() if "=" in fact)
    in_time = _seconds(found.get("RunTime", "")) < _seconds(found.get("TimeLimit", ""))
    return (
        found.get("JobState") in ("COMPLETING", "CANCELLED")
        and found.get("Restarts") == str(restart)
        and found.get("PreemptTime", "None") == "None"
        and in_time
    )


def _seconds(text: str) -> float:
    """Of SLURM's [D-]HH:MM:SS; infinite where there is none, such as `UNLIMITED`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def note_if_allowed(folder: RunFolder, job_id: str) -> None:
    """By someone who looks at the run, and may not be allowed to write: then who may will note it, or nobody."""
    with contextlib.suppress(*storage_errors()):
        record_scancel(folder, f"its job {job_id}")


def record_scancel(folder: RunFolder, what: str) -> None:
    if not folder.exists(JOB) or folder.read_json(JOB).get("ended"):
        return
    saved = reached(folder).checkpoint
    newest = f"newest checkpoint: step {saved}" if saved >= 0 else "no checkpoint"
    end_job(folder, CANCELLED, f"cancelled by scancel of {what}, {newest}")
