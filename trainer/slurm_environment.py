"""What SLURM tells a process of its job. No torch."""

from collections.abc import Mapping


def slurm_job_id(environ: Mapping[str, str]) -> str | None:
    """As squeue has it, None outside of a job. Of an array's job: the array's number and its own in it. Its plain number is for
    one of them the array's own, and would mean all of them."""
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else environ.get("SLURM_JOB_ID")
