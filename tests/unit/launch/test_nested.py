"""What a submission from within a job hands to sbatch, which passes all of it on."""

import os
from pathlib import Path

import pytest

from launch.job import JobSpec
from launch.slurm_job import queue
from launch.slurm_job.array import ArrayOptions, submit_array
from launch.slurm_job.nested import outside_of_jobs
from launch.slurm_job.script import Job, slurm_executor
from trainer.recipes import load
from trainer.run_folder import RunFolder

OF_THE_JOB = {
    "SLURM_JOB_ID": "4242", "SLURM_ARRAY_JOB_ID": "4200", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "3",
    "SLURM_MEM_PER_NODE": "100", "SLURMD_NODENAME": "n1", "SUBMITIT_EXECUTOR": "slurm", "LOUPE_JOB_STATE": "RUNNING",
}  # fmt: skip
OF_THE_USER = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "AWS_ENDPOINT_URL": "http://s3"}


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each call of sbatch writes its environment, one after the other."""
    programs, seen = tmp_path / "programs", tmp_path / "environment"
    programs.mkdir()
    texts = {"sbatch": f'env >> {seen}\necho "Submitted batch job 77"', "srun": "", "squeue": "", "sinfo": "exit 1"}
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {**OF_THE_JOB, **OF_THE_USER}.items():
        monkeypatch.setenv(name, value)
    return seen


def check(handed: Path, calls: int) -> None:
    lines = handed.read_text().splitlines()
    assert not {line.partition("=")[0] for line in lines} & OF_THE_JOB.keys()
    for name, value in OF_THE_USER.items():
        assert lines.count(f"{name}={value}") == calls
    assert OF_THE_JOB.items() <= os.environ.items(), "this process is of its job still"


def test_a_run_submitted_from_within_a_job(handed: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "r")
    spec = JobSpec("demo", run, "slurm", code_dir=f"{run}/code", cpu=True)
    executor = slurm_executor([Job(spec, load("demo"), RunFolder(run))])
    executor.folder.mkdir(parents=True)
    queue.test_only(executor.script())
    assert queue._queue(executor) == "77"
    check(handed, 2)


def test_a_command_submitted_from_within_a_job(handed: Path) -> None:
    submit_array(["true"], name="x", options=ArrayOptions(2))
    check(handed, 2)


def test_outside_of_jobs_all_is_the_users() -> None:
    environment = {"SLURM_DEBUG": "1", "SLURM_RESTART_COUNT": "3", **OF_THE_USER}
    assert outside_of_jobs(environment) == environment
