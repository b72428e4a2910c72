"""Submitting from within a job, as a pipeline's driver does: sbatch passes the submitter's environment on, and SLURM sets over
it only what the new job has itself. Within an array's job the new one would take the array for its own, and the number of
restarts. No torch."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "LOUPE_JOB_STATE")
_OF_THE_USER = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"})


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what SLURM has told the job that this process is of, if it is of one."""
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {
        name: value for name, value in environment.items() if name in _OF_THE_USER or not name.startswith(_OF_A_JOB)
    }


@contextmanager
def as_outside_of_jobs() -> Iterator[None]:
    """For submitit, whose sbatch inherits this process' environment."""
    hidden = {name: value for name, value in os.environ.items() if name not in outside_of_jobs(os.environ)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
