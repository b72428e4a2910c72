"""What SLURM says of jobs: squeue is asked, since sacct needs a database. No torch."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.errors import UserError, one_line

TIMEOUT_S = 60.0
IDS_A_CALL = 200
OVER = frozenset({
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED",
})  # fmt: skip
"""States of a job that has ended and does not come back: SLURM shows it for some minutes more."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    state: str
    """`PENDING`, `RUNNING`, `COMPLETING`, ..."""
    reason: str
    """Why it waits; for a running one, its nodes."""
    name: str
    start: str
    """When it started, or is expected to; `N/A` where SLURM does not know."""

    @property
    def over(self) -> bool:
        return self.state in OVER


def ask_slurm(job_ids: Iterable[str]) -> dict[str, QueuedJob | None] | str:
    """The jobs by their ids, None for one that SLURM does not know (any more); or why it cannot be asked."""
    ids = sorted({job_id for job_id in job_ids if job_id and not set(job_id) - set("0123456789_")})
    found: dict[str, QueuedJob | None] = {}
    if not ids:
        return found
    if shutil.which("squeue") is None:
        return "no squeue on this machine; ask from a node of its cluster"
    for first in range(0, len(ids), IDS_A_CALL):
        part = ids[first : first + IDS_A_CALL]
        answer = _squeue(part)
        if answer is None and len(part) > 1:  # SLURM names no culprit, and knows the others
            answer = {}
            for job_id in part:
                one = _squeue([job_id])
                if isinstance(one, str):
                    return one
                answer |= one or {}
        if isinstance(answer, str):
            return answer
        found |= {job_id: (answer or {}).get(job_id) for job_id in part}
    return found


def _squeue(job_ids: Sequence[str]) -> dict[str, QueuedJob] | str | None:
    """One call; None where it knows none of the jobs."""
    command = [
        "squeue", "--noheader", "--array", "--states", "all", "--jobs", ",".join(job_ids), "--format", "%i|%T|%S|%R|%j",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"squeue does not answer ({one_line(e)})"
    if result.returncode:
        return None if "Invalid job id" in result.stderr else f"squeue: {one_line(RuntimeError(result.stderr))}"
    jobs = {}
    for line in result.stdout.splitlines():
        fields = line.split("|", 4)
        if len(fields) == 5:
            job_id, state, start, reason, name = fields
            jobs[job_id.strip()] = QueuedJob(state, reason.strip("()"), name, start)
    return jobs


def slurm_state(job_id: str, name: str | None = None) -> str | None:
    """`PENDING`, `RUNNING`, ...; None when SLURM does not know the job any more, or has given its number to another.

    Args:
        name: the job's, where it is known.

    Raises:
        UserError: SLURM cannot be asked.
    """
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T|%j", "--states", "all"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UserError(
            f"squeue: cannot say whether SLURM job {job_id} lives ({e}); ask from a node of its cluster"
        ) from None
    if result.returncode:
        if "Invalid job id" in result.stderr:
            return None
        reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"squeue: cannot say whether SLURM job {job_id} lives ({reason})")
    state, _, found = result.stdout.strip().partition("|")
    return None if not state or state in OVER or (name and found and name != found) else state


@functools.cache
def cluster_name() -> str | None:
    """Of the SLURM that is asked from here; None where it does not say. Job numbers of two clusters are the same."""
    if shutil.which("scontrol") is None:
        return None
    try:
        result = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", result.stdout, re.MULTILINE)
    return found[1] if found else None
