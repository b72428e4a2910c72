"""`loupe job -- COMMAND`: any of our commands, or another program, as a job or an array of jobs. No torch."""

import re
import shlex
import sys

import click

from launch.slurm_job.array import ArrayOptions, script_here, submit_array
from trainer.errors import UserError


@click.command("job", context_settings={"allow_interspersed_args": False, "show_default": True})
@click.option("--name", metavar="NAME", show_default=False, help="Of the job and its log.  [default: from COMMAND]")
@click.option("--array", default=1, type=click.IntRange(1, 1000), metavar="N", help="Jobs that all run COMMAND.")
@click.option("--partition", help="Partition.")
@click.option("--account", help="Account.")
@click.option("--time", "time_limit", metavar="TIME", help="Limit, as sbatch has it.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Cores of a job.")
@click.option("--mem", help="Memory of a job, such as 64G.")
@click.option("--gpus-per-task", default=0, type=click.IntRange(min=0), help="GPUs of a job.")
@click.option("--dry-run", is_flag=True, help="Print the job's script; queue nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def job(
    name: str | None, array: int, partition: str | None, account: str | None, time_limit: str | None,
    cpus_per_task: int | None, mem: str | None, gpus_per_task: int, dry_run: bool, command: tuple[str, ...],
) -> None:  # fmt: skip
    """Queue COMMAND on SLURM: `loupe ...` runs with this Python and this checkout, anything else as it is.

    A job that is preempted gets SIGTERM; where COMMAND ends with 75 upon it, it is queued again. Its log is NAME-JOB_INDEX.log
    in this folder, and $SLURM_ARRAY_TASK_ID its number in an array. Data stages have --cluster slurm --array N themselves, and
    trainings are `loupe submit`.

    \b
    Examples:
      loupe job --gpus-per-task 1 --partition gpu -- loupe evaluate autoencoder exports/mine s3://bucket/heldout
      loupe job --time 1:00:00 -- loupe export runs/first exports/first
      loupe job --array 8 --dry-run -- bash score.sh
    """
    words = [sys.executable, "-m", "launch.cli", *command[1:]] if command[0] == "loupe" else list(command)
    if name is None:
        name = "-".join(word for word in command[:3] if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", word)) or "job"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--name {name}: letters, digits, points, - and _ only")
    options = ArrayOptions(array, partition, account, time_limit, cpus_per_task, mem, gpus_per_task)
    if dry_run:
        click.echo(script_here(words, name=name, options=options), nl=False)
        return
    job_id = submit_array(words, name=name, options=options)
    click.echo(f"job {job_id}: {shlex.join(command)}; log {name}-{job_id}_0.log")
