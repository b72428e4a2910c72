"""Why a run that is followed says nothing: its job waits in SLURM's queue. No torch."""

from launch.job import other_cluster_of, slurm_jobs_of
from launch.queue_states import ask_slurm
from launch.runs.read import ended
from launch.runs.text import printable
from trainer.run_folder import JOB, RunFolder


def waiting_of(folder: RunFolder) -> str | None:
    """In words; None where it does not wait, or that cannot be asked from here."""
    job = folder.read_json(JOB) if folder.exists(JOB) else {}
    if job.get("cluster") != "slurm" or ended(job) or other_cluster_of(job):
        return None
    answer = ask_slurm(slurm_jobs_of(job))
    if isinstance(answer, str):
        return None
    for job_id in slurm_jobs_of(job):
        queued = answer.get(job_id)
        if queued is None or queued.over:  # then the next of its chain
            continue
        if queued.state != "PENDING":
            return None
        start = f", to start {queued.start}" if queued.start not in ("N/A", "") else ""
        return printable(f"waiting: SLURM job {job_id} is pending ({queued.reason or 'no reason given'}{start})")
    return None
