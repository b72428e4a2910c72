"""In which state runs are: of SLURM's jobs by one squeue, of this machine's by their processes. No torch, no sacct."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from launch.cancellation import CANCEL, CANCELLED, asked_to_cancel
from launch.job import live_job, other_cluster_of, slurm_jobs_of
from launch.queue_states import QueuedJob, ask_slurm
from launch.runs.read import RunFacts, ended, read_errors
from launch.slurm_job.scancelled import note_if_allowed
from trainer.errors import UserError, one_line

UNKNOWN = "unknown here"
STARTING = "starting"
"""A job has it, and its newest start has done no step yet: what the metrics say is of the one before."""


@dataclass(frozen=True)
class State:
    word: str
    """running, starting, pending, cancelling, done, stopped, cancelled, lost, unknown here, ..."""
    detail: str = ""
    """As which job, why it waits, or how it ended."""
    reason: str = ""
    """SLURM's word for why it waits."""

    @property
    def alive(self) -> bool:
        """A job has it, as far as can be told from here."""
        return self.word in ("running", STARTING, "pending", "cancelling", "suspended", "completing", "configuring")


def states_of(runs: Sequence[RunFacts]) -> list[State]:
    """The state of each run. Raises nothing that a folder or a scheduler can cause."""
    slurm = ask_slurm(
        job_id
        for facts in runs
        if _of_slurm(facts) and not ended(facts.job) and not other_cluster_of(facts.job or {})
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
    except read_errors() as e:
        return State(UNKNOWN, one_line(e))
    return State("done") if facts.finished else State(UNKNOWN, f"a job of {cluster}, which is not asked from here")


def _how_it_ended(end: dict[str, object], *, cancelled: bool) -> State:
    code, why = end.get("code"), str(end.get("why", ""))
    if code == 0:
        return State("done")
    if not cancelled and code != CANCELLED:
        return State(f"stopped ({code})", why)
    return State("cancelled", why.removeprefix("cancelled").strip(", ()"))


def _of_queue(facts: RunFacts, slurm: dict[str, QueuedJob | None] | str, *, cancelled: bool) -> State:
    ids = slurm_jobs_of(facts.job or {})
    job_id = ids[0]
    if elsewhere := other_cluster_of(facts.job or {}):
        where = f"SLURM job {job_id} of cluster {elsewhere}, which is not asked from here"
        return State("done") if facts.finished else State(UNKNOWN, where)
    if isinstance(slurm, str):
        return State("done") if facts.finished else State(UNKNOWN, f"SLURM job {job_id}: {slurm}")
    job = slurm.get(job_id)
    for later in ids[1:]:  # of a chain
        if (job is None or job.over) and slurm.get(later):
            job_id, job = later, slurm[later]
    if job is None or job.over:
        if facts.finished:
            return State("done")
        if job is not None and job.state == "CANCELLED" and not cancelled and is_ours(facts, job):
            note_if_allowed(facts.folder, job_id)
            newest = f", newest checkpoint: step {facts.checkpoint.step}" if facts.checkpoint else ""
            return State("cancelled", f"by scancel of its job {job_id}{newest}")
        state = f"SLURM job {job_id} is {job.state if job else 'gone'}"
        return State("cancelled", state) if cancelled else State("lost", f"{state}, without a word of its end")
    if facts.config is not None and not is_ours(facts, job):
        return State(UNKNOWN, f"SLURM job {job_id} is called {job.name} here: another cluster's?")
    wait = f", {job.reason}" if job.state == "PENDING" and job.reason else ""
    start = f", to start {job.start}" if job.state == "PENDING" and job.start not in ("N/A", "") else ""
    on = f" on {job.reason}" if job.state == "RUNNING" else ""
    detail = f"SLURM job {job_id}{on}{wait}{start}"
    word = "cancelling" if cancelled else job.state.lower()
    if word == "running" and (_is_starting(facts) or _began_since(facts, job)):
        word = STARTING
    return State(word, detail, job.reason if job.state == "PENDING" else "")


def _is_starting(facts: RunFacts) -> bool:
    return facts.points_of is None or facts.points_of < facts.starts - 1


def _began_since(facts: RunFacts, job: QueuedJob) -> bool:
    """Whether SLURM has started it after the last metrics: its ranks have not said so themselves yet."""
    try:
        return facts.last is not None and datetime.fromisoformat(job.start).timestamp() > facts.last.time
    except ValueError:
        return False


def is_ours(facts: RunFacts, job: QueuedJob) -> bool:
    """Job numbers of two clusters are the same, and a cluster that has lost its state counts anew; names seldom are."""
    name = (facts.job or {}).get("job_name")
    if isinstance(name, str):
        return job.name == name
    return facts.config is None or job.name == facts.config.name or job.name.startswith(f"{facts.config.name}-")


def _of_pods(facts: RunFacts) -> State:
    """Pods say in the run folder that they are at work. Whether the job waits or is gone, only the cluster knows."""
    job = f"Kubernetes job {(facts.job or {}).get('job')}"
    if live_job(facts.folder):
        return State(STARTING if _is_starting(facts) else "running", job)
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
        return State("cancelling" if cancelled else STARTING if _is_starting(facts) else "running", live)
    if facts.finished:
        return State("done")
    word = "cancelled" if cancelled else "lost"
    return State(word, "killed, or its machine was lost; `loupe runs resume` goes on from its newest checkpoint")
