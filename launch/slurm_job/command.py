"""`loupe job -- COMMAND`: any of our commands, or another program, as a job or an array of jobs. No torch."""

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from launch import snapshot
from launch.environment import given_variables
from launch.option_groups import GroupedCommand, option
from launch.slurm_job.array import ArrayOptions, script_here, submit_array
from launch.slurm_job.checks import check_after, check_container
from launch.slurm_job.container import check_paths
from launch.slurm_job.flags import after_option, container_options, env_option, include_option, queue_options
from launch.slurm_job.options import Container, container_of, parse_after, parse_mount
from trainer.errors import UserError

COPIES = "runs/.code"
"""Folder of the copies of the code, below the one that the command is given in."""
OF_IMAGES = ("/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/sbin", "/sys", "/tmp", "/usr")
"""What lies there is an image's own."""

EXAMPLES = """
\b
Examples:
  loupe job --gpus-per-task 1 --partition gpu -- loupe evaluate autoencoder exports/mine s3://bucket/heldout
  loupe job --time 1:00:00 --after 1234 -- loupe export runs/first exports/first
  loupe job --array 8 --dry-run -- bash score.sh
  loupe job --container /images/loupe.sif --container-runtime apptainer -- loupe export runs/first exports/first
"""
JOB, SLURM, CODE, CONTAINER = "Options", "SLURM", "Code and environment", "Container"


@click.command(
    "job", cls=GroupedCommand, epilog=EXAMPLES,
    context_settings={"allow_interspersed_args": False, "show_default": True, "max_content_width": 120},
)  # fmt: skip
@option(JOB, "--name", metavar="NAME", show_default=False, help="Of the job and its log.  [default: from COMMAND]")
@option(JOB, "--array", default=1, type=click.IntRange(1, 1000), metavar="N", help="Jobs that all run COMMAND.")
@after_option(JOB)
@option(JOB, "--dry-run", is_flag=True, help="Print the job's script; write and queue nothing.")
@queue_options(SLURM, limit="Limit, as sbatch has it.")
@option(SLURM, "--cpus-per-task", type=click.IntRange(min=1), help="Cores of a job.")
@option(SLURM, "--mem", help="Memory of a job, such as 64G.")
@option(SLURM, "--gpus-per-task", default=0, type=click.IntRange(min=0), help="GPUs of a job.")
@option(CODE, "--code-dir", metavar="PATH", show_default=False,
        help=f"The jobs' copy of the code, on a disk that all nodes see.  [default: {COPIES}/NAME-TIME]")  # fmt: skip
@include_option(CODE)
@option(CODE, "--no-copy", is_flag=True, help="Run this checkout itself, as it is when a job starts.")
@env_option(CODE, "the jobs' environment")
@container_options(CONTAINER, run="COMMAND", mounted="this folder and the code")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def job(
    name: str | None, array: int, after: tuple[str, ...], dry_run: bool, partition: str | None, account: str | None,
    qos: str | None, time_limit: str | None, constraint: str | None, exclude: str | None, cpus_per_task: int | None,
    mem: str | None, gpus_per_task: int, code_dir: str | None, includes: tuple[str, ...], no_copy: bool,
    env: tuple[str, ...], image: str | None, container_runtime: str, mounts: tuple[str, ...], container_python: str,
    command: tuple[str, ...],
) -> None:  # fmt: skip
    """Queue COMMAND on SLURM: `loupe ...` runs with this Python, or the container's, and a copy of this checkout as it is
    now; anything else as it is.

    It starts in this folder. A job that is preempted gets SIGTERM; where COMMAND ends with 75 upon it, it is queued again. Its
    log is NAME-JOB_INDEX.log in this folder, and $SLURM_ARRAY_TASK_ID its number in an array. Data stages have --cluster slurm
    --array N themselves, and trainings are `loupe submit`.
    """
    if no_copy and (code_dir or includes):
        raise UserError(f"--no-copy: goes without {'--code-dir' if code_dir else '--include'}; there is no copy then")
    if name is None:
        name = "-".join(word for word in command[:3] if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", word)) or "job"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--name {name}: letters, digits, points, - and _ only")
    container = container_of(image, container_runtime, mounts, container_python)
    ours = command[0] == "loupe"
    words = list(command)
    if ours:
        words = [container.python if container else sys.executable, "-m", "launch.cli", *command[1:]]
    options = ArrayOptions(
        array, partition, account, time_limit, cpus_per_task, mem, gpus_per_task, qos, constraint, exclude,
        tuple(map(parse_after, after)), given_variables(env), container,
    )  # fmt: skip
    include = snapshot.declared(includes)
    copy = None
    if not no_copy:
        copy = os.path.abspath(code_dir or f"{COPIES}/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    if container:
        check_paths({"this folder": os.getcwd(), "--code-dir": copy or str(snapshot.CODE_ROOT)})
        _warn_of_paths(container, command)
    if dry_run:
        click.echo(script_here(words, name=name, options=options, code_dir=copy), nl=False)
        return

    def prepare() -> None:
        for warning in [*check_after(options.after), *(check_container(container, python=ours) if container else [])]:
            click.echo(f"WARNING: {warning}", err=True)
        if copy is not None:
            taken = snapshot.take(Path(copy), include=include)
            for untracked in taken.untracked:
                click.echo(f"warning: {untracked} is not known to git; the job runs its copy", err=True)

    job_id = submit_array(words, name=name, options=options, code_dir=copy, prepare=prepare)
    click.echo(f"job {job_id}: {shlex.join(command)}; log {name}-{job_id}_0.log" + (f"; code {copy}" if copy else ""))


def _warn_of_paths(container: Container, command: Sequence[str]) -> None:
    """Of words that are files here and that the container may not have; it may as well be a file of the image's own."""
    seen = [os.getcwd(), *(parse_mount(mount)[1] for mount in container.mounts), *OF_IMAGES]
    for word in command:
        if word.startswith("/") and os.path.exists(word):
            path = os.path.normpath(word)
            if not any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in seen):
                click.echo(f"WARNING: {word}: not mounted in the container; add --container-mount {word}", err=True)
