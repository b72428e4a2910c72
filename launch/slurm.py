"""Submit a training job: `python launch/slurm.py RECIPE --cluster slurm|local ...`, also `loupe submit`. No torch."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script this folder is on sys.path, where its modules would pass for top-level ones
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _here)]

import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

import click

from launch import snapshot
from launch.console import display_for
from launch.entry import run_command
from launch.environment import Place, given_variables, variables_of
from launch.job import (
    JobSpec,
    absolute_run_dir,
    check,
    check_folder,
    load_config,
    profiled,
    remove_run,
    time_limit_min,
    trainer_command,
)
from launch.local import run_local
from launch.option_groups import GroupedCommand, option
from launch.runs.resume import options_of, slurm_only
from launch.slurm_job.checks import check_time
from launch.slurm_job.container import check_mounts
from launch.slurm_job.flags import after_option, container_options, env_option, include_option, queue_options
from launch.slurm_job.options import LAUNCHERS, SlurmOptions, container_of, parse_after
from launch.slurm_job.queue import fill_folder, rehearse, submit
from launch.slurm_job.script import Job, slurm_executor
from launch.slurm_job.sweep import elements, spec_of_element
from trainer.config import RunConfig
from trainer.config import replace as replace_fields
from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.run_folder import CONFIG, RunFolder

EXAMPLES = """
\b
Examples:
  loupe submit demo --cluster local --nodes 1 --gpus-per-node 2 --cpu
  loupe submit demo --cluster slurm --nodes 4 --gpus-per-node 8 --partition train --time 24:00:00
  loupe submit demo --cluster slurm --nodes 2 --set phases.perceptual.steps=500 --dry-run
  loupe submit runs/demo/config.yaml --cluster local      (goes on with that run)
  loupe submit demo --cluster slurm --array phases.0.learning_rate=1e-4,3e-4 --seeds 4 --at-once 2
  loupe submit demo --cluster slurm --time 4:00:00 --chain 5      (SLURM does not requeue)
  loupe submit demo --cluster slurm --container /images/loupe.sif --container-runtime apptainer
"""
ONCE = ("sweeps", "seeds", "at_once", "after")
"""Meant for one submission: `loupe runs resume` does not repeat them."""


def dry_run_text(jobs: Sequence[Job], *, array_dir: str | None, at_once: int | None) -> str:
    """What would be run, and with which config. Of the environment only our variables: the rest may hold secrets."""
    spec, config = jobs[0].spec, jobs[0].config
    if spec.cluster == "slurm":
        commands = slurm_executor(jobs, array_dir=array_dir, at_once=at_once).script()
        if spec.slurm.chain:
            waits = slurm_executor(jobs, successor=True).parameters["dependency"]
            commands = f"{commands.rstrip()}\n# and {spec.slurm.chain} more, with #SBATCH --dependency={waits}\n"
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
                f"# rank {rank}\n" + " ".join([*settings, shlex.join(trainer_command(spec.run_dir, spec.work_dir))])
            )
        commands = "\n".join(lines) + "\n"
    configs = [f"# {job.spec.run_dir}/config.yaml\n{to_yaml(job.config)}" for job in jobs]
    return "\n".join([commands, *configs])


RUN, SLURM, ENVIRONMENT, CONTAINER, SEVERAL = (
    "Options",
    "SLURM",
    "Environment",
    "Container (SLURM)",
    "Several jobs (SLURM)",
)


@click.command(cls=GroupedCommand, epilog=EXAMPLES, context_settings={"max_content_width": 120, "show_default": True})
@click.argument("recipe")
@option(RUN, "--cluster", type=click.Choice(["slurm", "local"]), required=True,
        help="Queue on SLURM, or run and supervise on this machine.")  # fmt: skip
@option(RUN, "--nodes", default=1, help="Nodes.")
@option(RUN, "--gpus-per-node", default=1, help="Ranks per node, a GPU each.")
@option(RUN, "--cpu", is_flag=True, help="Ranks without GPUs.")
@option(RUN, "--set", "overrides", multiple=True, metavar="FIELD=VALUE",
        help="Change a field of the config, such as phases.0.batch_size=64. Repeatable.")  # fmt: skip
@option(RUN, "--profile", is_flag=True,
        help="Trace five steps of each start, after its first ten (--set profile.num_steps=, .after_steps=, .ranks=): "
        "RUN/profile gets a page and the trace.")  # fmt: skip
@option(RUN, "--run-dir", metavar="PATH|URL", help="The run folder.  [default: runs/NAME]", show_default=False)
@option(RUN, "--code-dir", metavar="PATH", show_default=False,
        help="The job's copy of the code, on a disk that all nodes see.  [default: RUN/code]")  # fmt: skip
@include_option(RUN)
@option(RUN, "--fresh", is_flag=True, help="Remove an earlier run in the run folder first.")
@option(RUN, "--dry-run", is_flag=True,
        help="Print what would run, and the config; write nothing, but ask SLURM whether it would take it.")  # fmt: skip
@option(RUN, "--max-restarts", default=5,
        help="Crashes that are answered by a restart, in 24 hours of training; not preemptions.")  # fmt: skip
@option(RUN, "--discovery-dir", metavar="DIR", show_default=False,
        help="Folder on a disk that Prometheus sees too, to find the ranks by.  [default: $LOUPE_DISCOVERY_DIR]")  # fmt: skip
@option(RUN, "--no-preflight", is_flag=True,
        help="Start without the check of each machine, after which a job goes on without those that fail.")  # fmt: skip
@option(RUN, "--rehearse-preemption", type=int, metavar="STEP",
        help="Preempt the first attempt after this step, as a cluster would (local).")  # fmt: skip
@queue_options(
    SLURM, limit="Limit of an attempt, minutes or [D-]HH:MM:SS; the job saves and is queued again before it."
)
@option(SLURM, "--cpus-per-task", type=click.IntRange(min=1), help="Cores per rank.")
@option(SLURM, "--mem", help="Memory per node, such as 64G.")
@option(SLURM, "--signal-delay", "signal_delay_s", default=120, type=click.IntRange(min=1), metavar="SECONDS",
        help="Warning before the time limit; a save must fit.")  # fmt: skip
@option(SLURM, "--launcher", type=click.Choice(LAUNCHERS), default="srun",
        help="A task per rank, or a task per node that runs torchrun.")  # fmt: skip
@env_option(ENVIRONMENT, "the ranks' environment (SLURM)")
@container_options(CONTAINER, run="the ranks", mounted="the run folder, the code and local data")
@option(SEVERAL, "--array", "--sweep", "sweeps", multiple=True, metavar="FIELD=VALUES",
        help="A run for each value, a,b,c or 0-7, in RUN-FIELD-VALUE; the array's own log is in RUN-array. Repeatable: all "
        "combinations.")  # fmt: skip
@option(SEVERAL, "--seeds", type=click.IntRange(min=1), metavar="N", help="As --array seed=0-(N-1).")
@option(SEVERAL, "--at-once", type=click.IntRange(min=1), metavar="N", help="Of an array, at most so many at a time.")
@after_option(SEVERAL)
@option(SEVERAL, "--chain", default=0, metavar="N",
        help="N more jobs, which go on one after the other where SLURM does not requeue.")  # fmt: skip
def main(
    recipe: str, cluster: str, nodes: int, gpus_per_node: int, cpu: bool, overrides: tuple[str, ...],
    profile: bool, run_dir: str | None, code_dir: str | None, includes: tuple[str, ...], fresh: bool, dry_run: bool,
    max_restarts: int, discovery_dir: str | None, no_preflight: bool, rehearse_preemption: int | None,
    partition: str | None, account: str | None, qos: str | None,
    time_limit: str | None, constraint: str | None, exclude: str | None, cpus_per_task: int | None, mem: str | None,
    signal_delay_s: int, launcher: str, env: tuple[str, ...], image: str | None, container_runtime: str,
    mounts: tuple[str, ...], container_python: str, sweeps: tuple[str, ...], seeds: int | None, at_once: int | None,
    after: tuple[str, ...], chain: int,
) -> int:  # fmt: skip
    """Train RECIPE: a recipe's name (see `loupe recipes`), or the config.yaml of an earlier run.

    The same command again goes on from the newest checkpoint.
    """
    if discovery_dir:
        path = discovery_dir if "://" in discovery_dir else os.path.abspath(discovery_dir)
        overrides = (*overrides, f"metrics.discovery_dir={json.dumps(path)}")
    if profile:
        overrides = profiled(overrides)
    config = load_config(recipe, overrides)
    run_dir, own_code_dir = absolute_run_dir(run_dir, recipe, config)
    given = options_of(click.get_current_context())
    _check_together(given, cluster)
    spec = JobSpec(
        recipe=recipe, run_dir=run_dir, cluster=cluster, nodes=nodes, gpus_per_node=gpus_per_node, cpu=cpu,
        max_restarts=max_restarts, code_dir=str(Path(code_dir).absolute()) if code_dir else own_code_dir,
        include=snapshot.declared(includes), preflight=not no_preflight, rehearse_preemption=rehearse_preemption,
        slurm=SlurmOptions(
            partition, account, qos, time_limit_min(time_limit) if time_limit else None, constraint, exclude,
            cpus_per_task, mem, signal_delay_s, launcher,
            container_of(image, container_runtime, mounts, container_python), tuple(map(parse_after, after)), chain,
            given_variables(env),
        ),
        options={name: value for name, value in given.items() if name not in ONCE},
    )  # fmt: skip
    array = bool(sweeps) or seeds is not None
    if array:
        parts = elements(sweeps, seeds)
        jobs = [
            _job(spec_of_element(spec, part), load_config(recipe, [*overrides, *part.overrides]), fresh=fresh)
            for part in parts
        ]
    else:
        jobs = [_job(spec, config, fresh=fresh)]
    for warning in dict.fromkeys(warning for job in jobs for warning in _check(job, fresh=fresh)):
        click.echo(f"WARNING: {warning}", err=True)
    array_dir = f"{spec.work_dir}-array" if array else None
    if dry_run:
        for warning in rehearse(jobs, array_dir=array_dir, at_once=at_once) if cluster == "slurm" else ():
            click.echo(f"WARNING: {warning}", err=True)
        click.echo(dry_run_text(jobs, array_dir=array_dir, at_once=at_once), nl=False)
        return 0
    if cluster == "local":
        return _run_here(jobs[0], fresh=fresh)
    ids = submit(jobs, array_dir=array_dir, at_once=at_once, fresh=fresh)
    for i, job in enumerate(jobs):
        size = f"{nodes} node(s) x {gpus_per_node}"
        click.echo(f"job {ids[i]}: {job.config.name} on {size}; run folder {job.spec.run_dir}")
    if chain:
        click.echo(f"and {chain} more that go on with it, one after the other: {', '.join(ids[1:])}")
    look = (
        "loupe runs --root " + shlex.quote(os.path.dirname(run_dir))
        if array
        else f"loupe runs watch {shlex.quote(run_dir)}"
    )
    click.echo(f"follow it with: {look}")
    return 0


def _check_together(given: dict[str, Any], cluster: str) -> None:
    """
    Raises:
        UserError: options that go with SLURM only, or not with each other.
    """
    if cluster != "slurm":
        unheard = slurm_only(main)
        for parameter in main.params:
            if parameter.name in unheard and given.get(str(parameter.name)):
                raise UserError(f"{parameter.opts[0]}: goes with --cluster slurm")
    array = [name for name in ("sweeps", "seeds") if given.get(name)]
    if array and given.get("chain"):
        raise UserError(
            "--chain: goes with one run; a job of an array is queued again by SLURM, or by `loupe runs resume`"
        )
    if given.get("at_once") and not array:
        raise UserError("--at-once: goes with --array or --seeds")


def _job(spec: JobSpec, config: RunConfig, *, fresh: bool) -> Job:
    folder = RunFolder(spec.run_dir)
    check_folder(folder, config, fresh=fresh)
    return Job(spec, config, folder)


def _check(job: Job, *, fresh: bool) -> list[str]:
    """Warnings; raises UserError for what cannot run."""
    resumes = not fresh and job.folder.exists(CONFIG)
    if job.spec.cluster == "slurm":
        check_time(job.spec, job.folder)
        if job.spec.slurm.container:
            check_mounts(job.spec.slurm.container, job.config, code_dir=job.spec.code_dir, work_dir=job.spec.work_dir)
    # what it began with may be gone by now
    return check(job.spec, replace_fields(job.config, init_from=None) if resumes else job.config)


def _run_here(job: Job, *, fresh: bool) -> int:
    def prepare() -> None:
        if fresh:
            remove_run(job.folder)
        fill_folder(job.spec, job.config, job.folder)

    return run_local(job.spec, job.config, job.folder, display_for(), prepare)


if __name__ == "__main__":
    sys.exit(run_command(main, prog_name="launch/slurm.py"))
