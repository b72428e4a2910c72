"""Submit a training job: `python launch/slurm.py RECIPE --cluster slurm|local ...`, also `loupe submit`. No torch."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script this folder is on sys.path, where its modules would pass for top-level ones
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _here)]

import shlex
import shutil
import subprocess

import click
import submitit

from launch import snapshot
from launch.console import display_for
from launch.entry import run_command
from launch.environment import Place, variables_of
from launch.job import (
    JobSpec,
    SlurmOptions,
    absolute_run_dir,
    check,
    check_folder,
    load_config,
    record_job,
    remove_run,
    time_limit_min,
    trainer_command,
)
from launch.local import run_local
from launch.slurm_task import SlurmTask
from trainer.config import RunConfig, replace
from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.run_folder import CONFIG, RunFolder

EXAMPLES = """
\b
Examples:
  python launch/slurm.py demo --cluster local --nodes 1 --gpus-per-node 2 --cpu
  python launch/slurm.py demo --cluster slurm --nodes 4 --gpus-per-node 8 --partition train --time 24:00:00
  python launch/slurm.py demo --cluster slurm --nodes 2 --set phases.perceptual.steps=500 --dry-run
  python launch/slurm.py runs/demo/config.yaml --cluster local      (goes on with that run)
"""


class _Executor(submitit.SlurmExecutor):
    """submitit's, which makes a script also where SLURM is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Without what submitit takes for granted: 5 minutes, and an accounting key of its own name."""
        unasked = [f"#SBATCH --{name}=" for name in ("time", "wckey") if name not in self.parameters]
        lines = super()._make_submission_file_text(command, uid).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(tuple(unasked)))

    def script(self) -> str:
        """The sbatch script, as it is submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "")


def slurm_executor(spec: JobSpec, config: RunConfig) -> _Executor:
    """Asks for the job's resources and wraps its tasks; makes no file and calls no command."""
    options = spec.slurm
    executor = _Executor(folder=f"{spec.work_dir}/slurm")
    srun_args = [
        "--kill-on-bad-exit=1",
        "--wait=600",
    ]  # tasks that outlive the others would hold, and drain, their nodes
    if options.cpus_per_task:
        srun_args.append(f"--cpus-per-task={options.cpus_per_task}")  # since SLURM 22.05 srun does not take sbatch's
    parameters = {
        "job_name": config.name,
        "nodes": spec.nodes,
        "ntasks_per_node": spec.gpus_per_node,
        "gpus_per_node": None if spec.cpu else spec.gpus_per_node,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time_min,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "cpus_per_task": options.cpus_per_task,
        "signal_delay_s": options.signal_delay_s,
        "stderr_to_stdout": True,
        "srun_args": srun_args,
        "setup": _setup(spec),
        "teardown": _teardown(spec),
    }
    more: dict[str, object] = {"requeue": True}  # by sbatch's own names
    if options.mem:
        more["mem"] = options.mem
    executor.parameters = {k: v for k, v in parameters.items() if v is not None} | {"additional_parameters": more}
    return executor


def _setup(spec: JobSpec) -> list[str]:
    """Before the tasks. The task's own launcher comes from the snapshot as well."""
    return [
        "trap : TERM USR2  # bash would die of them while the ranks save; srun passes them on to the tasks",
        f"export PYTHONPATH={shlex.quote(spec.code_dir)} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
    ]


def _teardown(spec: JobSpec) -> list[str]:
    """After all tasks: requeue or not. 75 is also what `RequeueExit=75` in slurm.conf would requeue on."""
    arguments = [spec.run_dir, spec.work_dir, str(spec.world_size), str(spec.max_restarts)]
    end = shlex.join([sys.executable, "-m", "launch.slurm_task", *arguments])
    return [
        "code=$?",
        f'{end} "$code"',
        "decision=$?",
        "# no Python on this node, when srun starts the ranks in containers: rank 0's own word",
        '[ "$decision" -eq 126 ] || [ "$decision" -eq 127 ] && decision=$code',
        'if [ "$decision" -eq 75 ] && command -v scontrol > /dev/null; then',
        "  # scancel: SLURM would take the requeue all the same, and the cancelled job would be back",
        '  [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = COMPLETING ] && exit 143',
        '  exec scontrol requeue "$SLURM_JOB_ID"',
        'elif [ "$decision" -eq 75 ]; then',
        '  echo "no scontrol on this node: requeue job $SLURM_JOB_ID by hand, or set RequeueExit=75 in slurm.conf" >&2',
        "fi",
        'exit "$decision"',
    ]


def submit(spec: JobSpec, config: RunConfig, folder: RunFolder, *, fresh: bool) -> str:
    """Queue the job; returns its id.

    Raises:
        UserError: SLURM is not here or does not take the job; the run folder cannot be taken. Nothing is queued.
    """
    for tool in ("sbatch", "srun", "squeue"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found; submit from a login node of the cluster, or take --cluster local")
    executor = slurm_executor(spec, config)
    test_only(executor.script())
    if fresh:
        remove_run(folder)
    _fill_folder(spec, config, folder)
    task = SlurmTask(
        spec.run_dir, spec.work_dir, spec.code_dir, spec.gpus_per_node, spec.cpu, config.parallel.num_threads
    )
    try:
        job = executor.submit(task)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
        raise UserError(f"sbatch: {last_line(str(e))}") from None
    record_job(folder, spec, job_id=job.job_id)
    return str(job.job_id)


def test_only(script: str) -> None:
    """Let SLURM itself say whether it would take the job, before anything is written."""
    result = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch: {last_line(result.stderr)}; see --partition, --account, --time and the job's size")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ") if lines else "no reason given"
    )


def _fill_folder(spec: JobSpec, config: RunConfig, folder: RunFolder) -> None:
    """The code and the config, before the job that needs them."""
    taken = snapshot.take(Path(spec.code_dir))
    folder.claim(config)
    if not folder.is_local:
        Path(spec.work_dir).mkdir(parents=True, exist_ok=True)
        RunFolder(spec.work_dir).write_text(CONFIG, to_yaml(config))
    for name in taken.untracked:
        click.echo(f"warning: {name} is not known to git; the job runs its copy", err=True)


def dry_run_text(spec: JobSpec, config: RunConfig) -> str:
    """What would be run, and with which config. Of the environment only our variables: the rest may hold secrets."""
    if spec.cluster == "slurm":
        commands = slurm_executor(spec, config).script()
    else:
        lines = []
        for rank in range(spec.world_size):
            place = Place(
                rank=rank, world_size=spec.world_size, local_rank=rank, local_world_size=spec.world_size,
                master_addr="127.0.0.1", master_port=0, code_dir=spec.code_dir, work_dir=spec.work_dir,
                use_gpus=not spec.cpu, num_threads=config.parallel.num_threads, one_machine=True,
            )  # fmt: skip
            variables = variables_of(place, {}) | {"MASTER_PORT": "<a free one>"}
            settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
            lines.append(
                " ".join([f"# rank {rank}\n", *settings, shlex.join(trainer_command(spec.run_dir, spec.work_dir))])
            )
        commands = "\n".join(lines) + "\n"
    return f"{commands}\n# {spec.run_dir}/config.yaml\n{to_yaml(config)}"


@click.command(epilog=EXAMPLES, context_settings={"max_content_width": 120, "show_default": True})
@click.argument("recipe")
@click.option("--cluster", type=click.Choice(["slurm", "local"]), required=True,
              help="Queue on SLURM, or run and supervise on this machine.")  # fmt: skip
@click.option("--nodes", default=1, help="Nodes.")
@click.option("--gpus-per-node", default=1, help="Ranks per node, a GPU each.")
@click.option("--cpu", is_flag=True, help="Ranks without GPUs.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE",
              help="Change a field of the config, such as phases.0.batch_size=64. Repeatable.")  # fmt: skip
@click.option("--run-dir", metavar="PATH|URL", help="The run folder.  [default: runs/NAME]", show_default=False)
@click.option("--code-dir", metavar="PATH", show_default=False,
              help="The job's copy of the code, on a disk that all nodes see.  [default: RUN/code]")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Remove an earlier run in the run folder first.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and the config; write nothing.")
@click.option("--max-restarts", default=5, help="Crashes that are answered by a restart; preemptions do not count.")
@click.option("--rehearse-preemption", type=int, metavar="STEP",
              help="Preempt the first attempt after this step, as a cluster would (local).")  # fmt: skip
@click.option("--partition", help="SLURM: partition.")
@click.option("--account", help="SLURM: account.")
@click.option("--qos", help="SLURM: quality of service.")
@click.option("--time", "time_limit", metavar="TIME", help="SLURM: limit of an attempt, minutes or [D-]HH:MM:SS; the "
              "job saves and is queued again before it.")  # fmt: skip
@click.option("--constraint", help="SLURM: features that nodes must have.")
@click.option("--exclude", help="SLURM: nodes to avoid.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="SLURM: cores per rank.")
@click.option("--mem", help="SLURM: memory per node, such as 64G.")
@click.option("--signal-delay", "signal_delay_s", default=120, type=click.IntRange(min=1), metavar="SECONDS",
              help="SLURM: warning before the time limit; a save must fit.")  # fmt: skip
def main(
    recipe: str, cluster: str, nodes: int, gpus_per_node: int, cpu: bool, overrides: tuple[str, ...],
    run_dir: str | None, code_dir: str | None, fresh: bool, dry_run: bool, max_restarts: int,
    rehearse_preemption: int | None, partition: str | None, account: str | None, qos: str | None,
    time_limit: str | None, constraint: str | None, exclude: str | None, cpus_per_task: int | None, mem: str | None,
    signal_delay_s: int,
) -> int:  # fmt: skip
    """Train RECIPE: a recipe's name (see `loupe recipes`), or the config.yaml of an earlier run.

    The same command again goes on from the newest checkpoint.
    """
    config = load_config(recipe, overrides)
    run_dir, own_code_dir = absolute_run_dir(run_dir, recipe, config)
    spec = JobSpec(
        recipe=recipe, run_dir=run_dir, cluster=cluster, nodes=nodes, gpus_per_node=gpus_per_node, cpu=cpu,
        max_restarts=max_restarts, code_dir=str(Path(code_dir).absolute()) if code_dir else own_code_dir,
        rehearse_preemption=rehearse_preemption,
        slurm=SlurmOptions(
            partition, account, qos, time_limit_min(time_limit) if time_limit else None, constraint, exclude,
            cpus_per_task, mem, signal_delay_s,
        ),
    )  # fmt: skip
    folder = RunFolder(run_dir)
    check_folder(folder, config, fresh=fresh)
    resumes = not fresh and folder.exists(CONFIG)
    check(spec, replace(config, init_from=None) if resumes else config)  # what it began with may be gone by now
    if dry_run:
        click.echo(dry_run_text(spec, config), nl=False)
        return 0
    if cluster == "local":

        def prepare() -> None:
            if fresh:
                remove_run(folder)
            _fill_folder(spec, config, folder)

        return run_local(spec, config, folder, display_for(), prepare)
    job_id = submit(spec, config, folder, fresh=fresh)
    click.echo(f"job {job_id}: {config.name} on {nodes} node(s) x {gpus_per_node}; run folder {run_dir}")
    click.echo(f"follow it with: loupe runs watch {shlex.quote(run_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, prog_name="launch/slurm.py"))
