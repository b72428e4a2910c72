"""A command as an array of equal jobs that share its work, such as a data stage's workers, on SLURM. No torch."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.slurm_job.checks import check_partition, partitions
from launch.slurm_job.container import mount_words, srun_words, words_within
from launch.slurm_job.nested import outside_of_jobs
from launch.slurm_job.options import Container
from launch.slurm_job.queue import SBATCH_S, last_line, test_only
from trainer.config import CODE_ROOT
from trainer.errors import ExitCode, UserError

SIGNAL_S = 60
"""Before its time limit a job gets SIGTERM, so that its workers give back what they hold."""


@dataclass(frozen=True)
class ArrayOptions:
    jobs: int
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    gpus_per_task: int = 0
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    after: tuple[str, ...] = ()
    """Dependencies as sbatch writes them."""
    env: Mapping[str, str] = field(default_factory=dict)
    container: Container | None = None


def array_script(command: Sequence[str], *, name: str, options: ArrayOptions, code_dir: str) -> str:
    """The sbatch script. A job that ends with 75, stopped in time, is put back into the queue, unless it was cancelled."""
    asked = {
        "job-name": name,
        "array": f"0-{options.jobs - 1}",
        "ntasks": 1,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "dependency": ",".join(options.after) or None,
        "kill-on-invalid-dep": "yes" if options.after else None,
        "time": options.time_limit,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "gpus-per-task": options.gpus_per_task or None,
        "signal": f"TERM@{SIGNAL_S}",
        "output": f"{name}-%A_%a.log",
        # else the log of the start before is gone when the job is queued again
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    srun = ["srun", "--kill-on-bad-exit=1"]
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    task = [*map(shlex.quote, command)]
    if options.container:
        mounts = ",".join(["$PWD:$PWD", "$code_dir:$code_dir", *mount_words(options.container)])
        srun += srun_words(options.container, mounts, folder="$PWD")
        task = words_within(
            options.container, mounts, command, cpu=not options.gpus_per_task, env=options.env, folder="$PWD"
        )
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "trap : TERM  # bash would die of it while the workers give back what they hold; srun passes it on",
            f"code_dir={shlex.quote(code_dir)}",
            'export PYTHONPATH="$code_dir" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1',
            *(f"export {name}={shlex.quote(value)}" for name, value in options.env.items()),
            f"{' '.join([*srun, *task])} &",
            "wait $!  # a trap runs at once while bash waits, and only after a foreground command",
            "code=$?",
            "while kill -0 $! 2> /dev/null; do wait $!; code=$?; done",
            f'if [ "$code" -eq {int(ExitCode.REQUEUE)} ] && command -v scontrol > /dev/null; then',
            '  job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            '  [ "$(squeue --noheader --jobs "$job" --format %T)" = COMPLETING ] && exit 143  # scancel',
            '  exec scontrol requeue "$job"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def script_here(command: Sequence[str], *, name: str, options: ArrayOptions, code_dir: str | None = None) -> str:
    """The script, for the code that runs now where no copy is named."""
    return array_script(command, name=name, options=options, code_dir=code_dir or str(CODE_ROOT))


def submit_array(
    command: Sequence[str], *, name: str, options: ArrayOptions, code_dir: str | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> str:  # fmt: skip
    """Queue it; returns the array's id. Logs go to the folder that it is submitted from.

    Args:
        code_dir: a copy of the code; absent: the code that runs now.
        prepare: called once SLURM has said that it would take the job, before it does.

    Raises:
        UserError: SLURM is not here, or does not take it.
    """
    for tool in ("sbatch", "srun", "squeue"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found; submit from a login node of the cluster, or take --cluster local")
    script = script_here(command, name=name, options=options, code_dir=code_dir)
    check_partition(options.partition, partitions())
    test_only(script)
    prepare()
    try:
        result = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False, timeout=SBATCH_S,
            env=outside_of_jobs(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer in {SBATCH_S:.0f} s; look with squeue whether the jobs are there before you submit "
                        "again") from None  # fmt: skip
    if result.returncode:
        raise UserError(f"sbatch: {last_line(result.stderr)}")
    return result.stdout.strip().partition(";")[0]
