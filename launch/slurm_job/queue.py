"""Putting jobs into SLURM's queue, with all that they need in their folders before and their records after. No torch."""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from data.deadlines import call_within
from launch import snapshot
from launch.folder_lock import locked
from launch.job import JobSpec, check_folder, make_work_dir, record_job, remove_run
from launch.queue_states import cluster_name
from launch.slurm_job.checks import TOOLS, check_cluster
from launch.slurm_job.nested import as_outside_of_jobs, outside_of_jobs
from launch.slurm_job.script import Executor, Job, job_name, slurm_executor
from launch.slurm_job.task import SlurmTask
from launch.slurm_job.torchrun import TorchrunTask
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import UserError, one_line
from trainer.run_folder import CONFIG, JOB, RunFolder

SBATCH_S = 120.0
"""Longest wait for sbatch, which itself tries a busy controller for a while."""


def submit(jobs: Sequence[Job], *, array_dir: str | None, at_once: int | None, fresh: bool) -> list[str]:
    """Queue a run, or several as an array; returns the ids of the jobs: of the runs, or of the run's chain.

    Raises:
        UserError: SLURM is not here or does not take the job; a run folder cannot be taken. Nothing is queued.
    """
    for warning in check_cluster(jobs[0].spec):
        click.echo(f"WARNING: {warning}", err=True)
    executor = slurm_executor(jobs, array_dir=array_dir, at_once=at_once)
    test_only(executor.script())
    with ExitStack() as locks:
        for job in jobs:
            _take(job, locks, fresh=fresh)
        return _submit(jobs, executor, array=array_dir is not None)


def _take(job: Job, locks: ExitStack, *, fresh: bool) -> None:
    """Make the run folder ready, which no other submission may do until the job is recorded in it."""
    make_work_dir(job.spec, job.folder)
    locks.enter_context(locked(job.spec.work_dir, job.folder.url))
    check_folder(job.folder, job.config, fresh=fresh, have_lock=True)  # the one that came first has a job in it by now
    if fresh:
        remove_run(job.folder)
    fill_folder(job.spec, job.config, job.folder)
    Path(job.spec.work_dir, "slurm").mkdir(parents=True, exist_ok=True)


def _submit(jobs: Sequence[Job], executor: Executor, *, array: bool) -> list[str]:
    """A job waits for what is handed over to it: it is recorded by then."""
    executor.folder.mkdir(parents=True, exist_ok=True)
    first = _queue(executor)
    known = {
        "slurm_cluster": cluster_name(), "job_name": job_name(jobs[0].spec, jobs[0].config),
        "signal_delay_s": jobs[0].spec.slurm.signal_delay_s,
    }  # fmt: skip
    ids = [f"{first}_{i}" for i in range(len(jobs))] if array else [first]
    for job, job_id in zip(jobs, ids, strict=True):
        record_job(job.folder, job.spec, job_id=job_id, **known)
        _hand_over(job, job_id)
    job = jobs[0]
    for _ in range(job.spec.slurm.chain):
        ids.append(_queue(slurm_executor(jobs, successor=True)))
        # at once, and not over what the first job may have written meanwhile: cancelling must find every one
        job.folder.write_json(JOB, {**job.folder.read_json(JOB), "chain": ids})
        _hand_over(job, ids[-1])
    return ids


def _queue(executor: Executor) -> str:
    try:
        with as_outside_of_jobs():
            return call_within(executor.submit_script, time.monotonic() + SBATCH_S, "sbatch")
    except TimeoutError:
        raise UserError(f"sbatch: no answer in {SBATCH_S:.0f} s; look with squeue whether the job is there before you submit "
                        "again") from None  # fmt: skip
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


class NoSlurm(UserError):
    """No cluster is reached from this machine."""


def rehearse(jobs: Sequence[Job], *, array_dir: str | None, at_once: int | None) -> list[str]:
    """What `submit` would say of the job, which is neither written nor queued: warnings; one of them where there is no SLURM
    to be asked.

    Raises:
        UserError: SLURM would not take it.
    """
    unasked = "so the partition, its nodes, the account and --after are not checked; the submission does that"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return [f"{missing[0]}: not on this machine, {unasked}"]
    try:
        # first: where no cluster is reached it says so at once
        test_only(slurm_executor(jobs, array_dir=array_dir, at_once=at_once).script(), tell=False)
    except NoSlurm:
        return [f"sbatch: no SLURM is reached from here, {unasked}"]
    warnings = check_cluster(jobs[0].spec)
    test_only(slurm_executor(jobs, array_dir=array_dir, at_once=at_once).script())
    return warnings


def test_only(script: str, *, tell: bool = True) -> None:  # noqa: PT028  no test
    """Let SLURM itself say whether it would take the job, before anything is written.

    Args:
        tell: what it says against the job; otherwise only that there is no SLURM.

    Raises:
        UserError: it would not.
    """
    try:
        result = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False, timeout=SBATCH_S,
            env=outside_of_jobs(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer in {SBATCH_S:.0f} s; SLURM's controller is down or busy") from None
    if result.returncode:
        said = last_line(result.stderr)
        if any(words in result.stderr.lower() for words in ("configuration source", "unable to contact slurm")):
            raise NoSlurm(f"sbatch: {said}; no SLURM is reached from here, submit from a machine of the cluster")
        if not tell:
            return
        mend = "see --partition, --account, --qos, --time, --constraint, --exclude and the job's size"
        raise UserError(f"sbatch: {said}; {mend}")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ") if lines else "no reason given"
    )


def fill_folder(spec: JobSpec, config: RunConfig, folder: RunFolder) -> None:
    """The code and the config, before the job that needs them."""
    taken = snapshot.take(Path(spec.code_dir), include=spec.include)
    try:
        folder.claim(config)
    except OSError as e:
        raise UserError(f"{folder.url}: storage does not answer ({one_line(e)}); submit again when it does") from None
    if not folder.is_local:
        Path(spec.work_dir).mkdir(parents=True, exist_ok=True)
        RunFolder(spec.work_dir).write_text(CONFIG, to_yaml(config))
    for name in taken.untracked:
        click.echo(f"warning: {name} is not known to git; the job runs its copy", err=True)
