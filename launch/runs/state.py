"""In which state runs are: of SLURM's jobs by one squeue, of this machine's by their processes. No torch, no sacct."""

import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.cancellation import CANCEL, CANCELLED, asked_to_cancel
from launch.job import live_job, slurm_jobs_of
from launch.runs.read import READ_ERRORS, RunFacts, ended
from trainer.errors import UserError, one_line

SQUEUE_TIMEOUT_S = 60.0
IDS_A_CALL = 200
OVER = frozenset({
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
})  # fmt: skip
UNKNOWN = "unknown here"


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


@dataclass(frozen=True)
class State:
    word: str
    """running, pending, cancelling, done, stopped, cancelled, lost, not started, unknown here, ..."""
    detail: str = ""
    """As which job, why it waits, or how it ended."""

    @property
    def alive(self) -> bool:
        """A job has it, as far as can be told from here."""
        return self.word in ("running", "pending", "cancelling", "suspended", "completing", "configuring")


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
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SQUEUE_TIMEOUT_S)
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


def states_of(runs: Sequence[RunFacts]) -> list[State]:
    """The state of each run. Raises nothing that a folder or a scheduler can cause."""
    slurm = ask_slurm(
        job_id
        for facts in runs
        if _of_slurm(facts) and not ended(facts.job)
        for job_id in slurm_jobs_of(facts.job or {})
    )
    return [_state(facts, slurm) for facts in runs]


def state_of(facts: RunFacts) -> State:
    return states_of([facts])[0]


def _of_slurm(facts: RunFacts) -> bool:
    return (facts.job or {}).get("cluster") == "slurm"


def _state(facts: RunFacts, slurm: dict[str, QueuedJob | None] | str) -> State:
    job, end = facts.job, ended(facts.job)
    if job is None:
        if any(text.startswith("job.json") for text in facts.damage) or not facts.files:
            return State("damaged", facts.damage[0])
        return State("done") if facts.finished else State(UNKNOWN, "not started by a launcher")
    cluster = str(job.get("cluster"))
    try:
        cancelled = CANCEL in facts.files and asked_to_cancel(facts.folder) is not None
        if end is not None:
            return _how_it_ended(end, cancelled=cancelled)
        if cluster == "slurm":
            return _of_queue(facts, slurm, cancelled=cancelled)
        if cluster == "local":
            return _of_processes(facts, cancelled=cancelled)
        if cluster == "kubernetes":
            return _of_pods(facts)
    except READ_ERRORS as e:
        return State(UNKNOWN, one_line(e))
    return State("done") if facts.finished else State(UNKNOWN, f"a job of {cluster}, which is not asked from here")


def _how_it_ended(end: dict[str, object], *, cancelled: bool) -> State:
    code, why = end.get("code"), str(end.get("why", ""))
    if code == 0:
        return State("done")
    return State("cancelled" if cancelled or code == CANCELLED else f"stopped ({code})", why)


def _of_queue(facts: RunFacts, slurm: dict[str, QueuedJob | None] | str, *, cancelled: bool) -> State:
    ids = slurm_jobs_of(facts.job or {})
    job_id = ids[0]
    if isinstance(slurm, str):
        return State("done") if facts.finished else State(UNKNOWN, f"SLURM job {job_id}: {slurm}")
    job = slurm.get(job_id)
    for later in ids[1:]:  # of a chain
        if (job is None or job.over) and slurm.get(later):
            job_id, job = later, slurm[later]
    if job is None or job.over:
        if facts.finished:
            return State("done")
        state = f"SLURM job {job_id} is {job.state if job else 'gone'}"
        return State("cancelled", state) if cancelled else State("lost", f"{state}, without a word of its end")
    if facts.config is not None and not is_ours(facts, job):
        return State(UNKNOWN, f"SLURM job {job_id} is called {job.name} here: another cluster's?")
    wait = f", {job.reason}" if job.state == "PENDING" and job.reason else ""
    start = f", to start {job.start}" if job.state == "PENDING" and job.start not in ("N/A", "") else ""
    on = f" on {job.reason}" if job.state == "RUNNING" else ""
    detail = f"SLURM job {job_id}{on}{wait}{start}"
    return State("cancelling" if cancelled else job.state.lower(), detail)


def is_ours(facts: RunFacts, job: QueuedJob) -> bool:
    """Job numbers of two clusters are the same; their names seldom are."""
    return facts.config is None or job.name == facts.config.name or job.name.startswith(f"{facts.config.name}-")


def _of_pods(facts: RunFacts) -> State:
    """Pods say in the run folder that they are at work. Whether the job waits or is gone, only the cluster knows."""
    job = f"Kubernetes job {(facts.job or {}).get('job')}"
    if live_job(facts.folder):
        return State("running", job)
    return (
        State("done")
        if facts.finished
        else State(UNKNOWN, f"{job} has no pods at work: it waits, or is gone; ask kubectl")
    )


def _of_processes(facts: RunFacts, *, cancelled: bool) -> State:
    job = facts.job or {}
    if not facts.folder.is_local and job.get("host") != socket.gethostname():
        if facts.finished:
            return State("done")
        return State(UNKNOWN, f"process {job.get('pid')} on {job.get('host')}, which cannot be asked from here")
    try:
        live = live_job(facts.folder)
    except UserError as e:
        return State(UNKNOWN, one_line(e))
    if live:
        return State("cancelling" if cancelled else "running", live)
    if facts.finished:
        return State("done")
    word = "cancelled" if cancelled else "lost"
    return State(word, "killed, or its machine was lost; `loupe runs resume` goes on from its newest checkpoint")
