"""Putting jobs into SLURM's queue, with all that they need in their folders before and their records after. No torch."""

import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import click
import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from launch import snapshot
from launch.job import JobSpec, record_job, remove_run
from launch.slurm_job.checks import check_cluster
from launch.slurm_job.script import Executor, Job, slurm_executor
from launch.slurm_job.task import SlurmTask
from launch.slurm_job.torchrun import TorchrunTask
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.run_folder import CONFIG, JOB, RunFolder


def submit(jobs: Sequence[Job], *, array_dir: str | None, at_once: int | None, fresh: bool) -> list[str]:
    """Queue a run, or several as an array; returns the ids of the jobs: of the runs, or of the run's chain.

    Raises:
        UserError: SLURM is not here or does not take the job; a run folder cannot be taken. Nothing is queued.
    """
    for warning in check_cluster(jobs[0].spec):
        click.echo(f"WARNING: {warning}", err=True)
    executor = slurm_executor(jobs, array_dir=array_dir, at_once=at_once)
    test_only(executor.script())
    for job in jobs:
        if fresh:
            remove_run(job.folder)
        fill_folder(job.spec, job.config, job.folder)
        Path(job.spec.work_dir, "slurm").mkdir(parents=True, exist_ok=True)
    executor.folder.mkdir(parents=True, exist_ok=True)
    first = _queue(executor)
    if array_dir is not None:
        ids = [f"{first}_{i}" for i in range(len(jobs))]
        for job, job_id in zip(jobs, ids, strict=True):
            _hand_over(job, job_id)
            record_job(job.folder, job.spec, job_id=job_id)
        return ids
    job, ids = jobs[0], [first]
    _hand_over(job, first)
    record_job(job.folder, job.spec, job_id=first)
    for _ in range(job.spec.slurm.chain):
        ids.append(_queue(slurm_executor(jobs, successor=True)))
        _hand_over(job, ids[-1])
        # at once, and not over what the first job may have written meanwhile: cancelling must find every one
        job.folder.write_json(JOB, {**job.folder.read_json(JOB), "chain": ids})
    return ids


def _queue(executor: Executor) -> str:
    try:
        return executor.submit_script()
    except (FailedJobError, FailedSubmissionError) as e:
        raise UserError(f"sbatch: {last_line(str(e))}") from None


def _hand_over(job: Job, job_id: str) -> None:
    """What submitit's task reads; it waits for it for a minute."""
    kind = TorchrunTask if job.spec.slurm.launcher == "torchrun" else SlurmTask
    spec = job.spec
    task = kind(
        spec.run_dir, spec.work_dir, spec.code_dir, spec.gpus_per_node, spec.cpu, job.config.parallel.num_threads,
        spec.preflight,
    )  # fmt: skip
    submission = DelayedSubmission(task)
    submission.set_timeout(spec.slurm.time_min or 1, 0)
    paths = submitit.core.utils.JobPaths(Path(spec.work_dir, "slurm"), job_id)
    temporary = paths.folder / f"{uuid.uuid4().hex}.pkl"
    submission.dump(temporary)
    temporary.rename(paths.submitted_pickle)


def test_only(script: str) -> None:
    """Let SLURM itself say whether it would take the job, before anything is written."""
    result = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if result.returncode:
        alone = any(words in result.stderr.lower() for words in ("configuration source", "unable to contact slurm"))
        mend = (
            "no SLURM is reached from here, submit from a machine of the cluster"
            if alone
            else "see --partition, --account, --time and the job's size"
        )
        raise UserError(f"sbatch: {last_line(result.stderr)}; {mend}")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ") if lines else "no reason given"
    )


def fill_folder(spec: JobSpec, config: RunConfig, folder: RunFolder) -> None:
    """The code and the config, before the job that needs them."""
    taken = snapshot.take(Path(spec.code_dir), include=spec.include)
    folder.claim(config)
    if not folder.is_local:
        Path(spec.work_dir).mkdir(parents=True, exist_ok=True)
        RunFolder(spec.work_dir).write_text(CONFIG, to_yaml(config))
    for name in taken.untracked:
        click.echo(f"warning: {name} is not known to git; the job runs its copy", err=True)
