"""What the commands of all stages share: options, workers, progress, status, and the way onto a cluster."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import click
from rich.console import Console

from data.commands import exported
from data.commands.begun import begin, check_begun, shown_settings, whole
from data.commands.progress import POLL_S, SHOWN, StageProgress, uncounted
from data.commands.progress import line as progress_line
from data.commands.shown import count
from data.stages.failed import give_up_failed, retry_failed
from data.stages.runner import LEASE_S, Stage, Stopped
from data.stages.status import Watcher, count_lines
from data.stages.store import STAGE, SUMMARY, Json, StageStore
from data.stages.workers import run_workers
from trainer.errors import ExitCode, UserError

TELL_WITHIN_S = 60.0
"""What reading receipts may take at the end."""


Tell = Callable[[str, Json], list[str]]
"""A stage's output and summary to lines."""


@dataclass(frozen=True)
class StageOptions:
    workers: int
    lease_s: float
    watch: bool
    retry_failed: bool
    give_up_failed: bool
    give_up_at_most: int | None
    dry_run: bool
    cluster: str
    array: int
    partition: str | None
    account: str | None
    time_limit: str | None
    cpus_per_task: int | None
    mem: str | None
    gpus_per_task: int
    image: str | None
    namespace: str | None
    secret: str | None
    volume_claims: tuple[str, ...]
    metrics_port: int | None
    metrics_bind: str | None
    discovery_dir: str | None


def stage_options(command: Callable[..., Any], *, gives_up: bool = True) -> Callable[..., Any]:
    """Adds the options of `StageOptions` to a command, which gets them as `options`.

    Args:
        gives_up: whether the stage can do without items; else the option is not shown.
    """
    decorators = [
        click.option("--workers", type=click.IntRange(0), default=_cores(), show_default="cores of this machine",
                     help="Processes on this machine; 0: work in this one."),
        click.option("--watch", is_flag=True, help="Do no work; show how far all workers on all machines are."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
        click.option("--retry-failed", is_flag=True, help="Try items again that have failed too often."),
        click.option("--give-up-failed", is_flag=True, hidden=not gives_up,
                     help="Go on without items that have failed too often; they are counted and named in the output."),
        click.option("--give-up-at-most", type=click.IntRange(1), metavar="N", hidden=not gives_up,
                     help="Of a pass's items, that --give-up-failed may do without; 1 % or 3 when absent, and never all."),
        click.option("--lease-s", type=click.FloatRange(1), default=LEASE_S, show_default=True,
                     help="Seconds after which the work of a worker that is no longer heard of goes to another."),
        click.option("--cluster", type=click.Choice(["local", "slurm", "kubernetes"]), default="local", show_default=True,
                     help="Work here, submit a SLURM array, or print an Indexed Job for `kubectl create -f -`."),
        click.option("--array", type=click.IntRange(1), default=1, show_default=True, help="Jobs, on a cluster."),
        click.option("--partition", help="SLURM's."),
        click.option("--account", help="SLURM's."),
        click.option("--time", "time_limit", help="Of a job, as SLURM writes it (12:00:00); it goes on when started again."),
        click.option("--cpus-per-task", type=click.IntRange(1), help="Of a job; SLURM's default when absent."),
        click.option("--mem", help="Of a job, as SLURM writes it (16G)."),
        click.option("--gpus-per-task", type=click.IntRange(0), default=0, show_default=True, help="Of a job."),
        click.option("--image", help="Container of the pods."),
        click.option("--namespace", help="Kubernetes'."),
        click.option("--secret", help="Kubernetes': its keys become environment variables, such as storage credentials."),
        click.option("--volume-claim", "volume_claims", multiple=True, metavar="CLAIM:/path",
                     help="Kubernetes': a PersistentVolumeClaim that pods mount at /path, where its files are here, too. "
                     "Repeatable."),
        *exported.OPTIONS,
    ]  # fmt: skip

    def with_options(*args: Any, **kwargs: Any) -> Any:
        options = StageOptions(**{field.name: kwargs.pop(field.name) for field in fields(StageOptions)})
        return command(*args, options=options, **kwargs)

    with_options.__doc__, with_options.__name__ = command.__doc__, command.__name__
    with_options.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    wrapped: Callable[..., Any] = with_options
    for decorator in reversed(decorators):
        wrapped = decorator(wrapped)
    return wrapped


stage_options_of_all_or_nothing = partial(stage_options, gives_up=False)
"""Of stages that need every item."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(stage: Stage, out: str, options: StageOptions, tell: Tell | None = None, *, begun_anew: bool = False) -> None:
    """Do a stage as its command's options say, into folder or URL `out`.

    Args:
        tell: of the summary, when all is done, what to print beside the counts.
        begun_anew: what is there is of other settings, and goes before any work.

    Raises:
        UserError: items have failed, or what a worker met.
        click.exceptions.Exit: with code 75 when stopped by SIGTERM; started again, it goes on.
    """
    console = Console(stderr=True)
    if options.retry_failed and options.give_up_failed:
        raise UserError("--retry-failed, --give-up-failed: give one of them")
    if options.give_up_at_most and not options.give_up_failed:
        raise UserError("--give-up-at-most: goes with --give-up-failed; add that, or leave it out")
    if options.cluster == "local" and options.array > 1:
        raise UserError("--array: is of jobs on a cluster; add --cluster slurm or kubernetes, or take --workers here")
    if not begun_anew:
        check_begun(stage, out)  # before anything is queued
    submit = _submission(stage, options) if options.cluster != "local" else None
    if options.dry_run:
        _dry_run(stage, out, options)
        if submit:
            submit()
        return
    if options.retry_failed and (number := retry_failed(StageStore(out), stage)):
        click.echo(f"{out}: {count(number, 'failed item')} to be tried again")
    if options.give_up_failed:
        given_up = give_up_failed(StageStore(out), stage, at_most=options.give_up_at_most)
        for one in given_up if submit else ():  # else it is told at the end
            click.echo(f"given up: {one.pass_name} {one.item}, {one.parts} parts of it are kept: {one.why}", err=True)
    if submit:
        submit()
        return
    was_finished = StageStore(out).exists(SUMMARY)
    context = click.get_current_context(silent=True)
    begin(stage, out, command_line(context, to_keep=True) if context else None)
    wanted = exported.MetricsOptions(options.metrics_port, options.metrics_bind, options.discovery_dir)
    with exported.exported(stage.name, out, wanted) as metrics:
        also = metrics.update if metrics else lambda status: None
        with (
            StageProgress(out, console, also) as progress,
            exported.ticking(progress.tick, every_s=POLL_S, wanted=bool(metrics and not options.workers)),
        ):
            try:
                failures = run_workers(
                    stage, out, workers=options.workers, lease_s=options.lease_s, tick=progress.tick, tick_s=POLL_S,
                    on_death=metrics.died if metrics else lambda deaths: None,
                )  # fmt: skip
            except Stopped:
                click.echo(f"{out}: stopped; the same command goes on", err=True)
                raise click.exceptions.Exit(int(ExitCode.REQUEUE)) from None
    _tell(stage, out, failures, retried=options.retry_failed and was_finished)
    if tell:
        for line in tell(out, StageStore(out).read_json(SUMMARY)):
            click.echo(line)


def _tell(stage: Stage, out: str, failures: list[str], *, retried: bool) -> None:
    status = Watcher(out).poll(within_s=TELL_WITHIN_S)
    for one in status.passes:
        if one.counts:
            click.echo(f"{out}: {one.name}: " + ", ".join([*count_lines(one.counts), *uncounted(one)]))
    given_up = [f"{one.name} {item}: {why}" for one in status.passes for item, why in sorted(one.given_up.items())]
    for line in given_up[:SHOWN]:
        click.echo(f"given up: {line}", err=True)
    if len(given_up) > SHOWN:
        click.echo(f"given up: and {len(given_up) - SHOWN} more, see {out}/{SUMMARY}", err=True)
    if given_up and retried:
        click.echo(
            f"{out}: --retry-failed tries none of them, since the stage is finished; run it anew into another folder to have "
            "them",
            err=True,
        )
    if failures:
        for line in failures[:SHOWN]:
            click.echo(f"failed: {line}", err=True)
        spares = {one_pass.name for one_pass in stage.passes() if one_pass.spares}
        without = ", or with --give-up-failed to do without them" if _passes_of(failures) <= spares else ""
        raise UserError(
            f"{out}: {count(len(failures), 'item')} failed; mend the cause and run again with --retry-failed{without}; what is "
            "done stays done"
        )
    if status.finished and not sum(one.counts.get("kept", 0) for one in status.passes):
        why = (
            "all were left out, by the reasons above" if any(one.counts for one in status.passes) else "there was none"
        )
        click.echo(f"WARNING: {out}: nothing was kept: {why}; what follows has nothing to work on", err=True)


def _passes_of(failures: list[str]) -> set[str]:
    """Each failure begins with its pass."""
    return {line.partition(" ")[0] for line in failures}


_ITEM_OF = {
    "ingest": "SOURCEs, of tars some together",
    "faces": "shards of IN, or runs of them",
    "recaption": "shards of IN, or runs of them",
    "encode": "shards of IN, or runs of them",
    "build": "windows of shards of IN",
}


def _dry_run(stage: Stage, out: str, options: StageOptions) -> None:
    click.echo(f"{stage.name} into {out}")
    for name, value in stage.settings().items():
        for key, text in shown_settings(stage.name, name, value):
            click.echo(f"  {key}: {text}")
    first = stage.passes()[0]
    items = first.items(StageStore(out))
    what = f" ({_ITEM_OF[stage.name]})" if stage.name in _ITEM_OF else ""
    click.echo(f"  {len(items)} items{what}" + (f", the first {items[0]['name']}" if items else ""))
    where = (
        f"{options.array} jobs of {options.workers} workers"
        if options.cluster != "local"
        else f"{options.workers} workers"
    )
    click.echo(f"  {where}; passes: {', '.join(p.name for p in stage.passes())}")
    if StageStore(out).exists(STAGE):
        status = Watcher(out).poll(within_s=TELL_WITHIN_S)
        state = "finished: the command would do nothing" if status.finished else "has begun, and would go on"
        click.echo(f"  {out}: {state}; {progress_line(status)}")


def _submission(stage: Stage, options: StageOptions) -> Callable[[], None]:
    """What brings it to the queue; on a dry run, and for Kubernetes, what prints what would go there.

    Raises:
        UserError: an option is missing, or pods would not see a folder.
    """
    from data.commands.pods import check_places
    from launch.pods.stage_job import StageJob, job_manifest
    from launch.pods.volumes import parse_volume
    from launch.slurm_job.array import ArrayOptions, script_here, submit_array

    context = click.get_current_context()
    arguments = command_line(context)
    if options.cpus_per_task and "--workers" not in arguments:  # a job sees its node's cores, whatever it may use
        arguments += ["--workers", str(options.cpus_per_task)]
    name = f"loupe-{stage.name}"
    array = ArrayOptions(
        options.array, options.partition, options.account, options.time_limit, options.cpus_per_task, options.mem,
        options.gpus_per_task,
    )  # fmt: skip
    if options.cluster == "kubernetes":
        if options.image is None:
            raise UserError("--image: name the container that the pods run")
        volumes = [parse_volume(text) for text in options.volume_claims]
        check_places(context, volumes)
        job = StageJob(
            options.image, options.array, options.cpus_per_task, options.mem, options.gpus_per_task, options.namespace,
            options.secret, volumes, options.metrics_port, str(context.params["out"]).rstrip("/").rpartition("/")[2],
        )  # fmt: skip
        manifest = job_manifest(["loupe", *arguments], name=name, job=job)
        return lambda: click.echo(manifest, nl=False)
    command = [sys.executable, "-m", "launch.cli", *arguments]
    if options.dry_run:
        script = script_here(command, name=name, options=array)
        return lambda: click.echo(script, nl=False)

    def queue() -> None:
        job = submit_array(command, name=name, options=array)
        look = shlex.join(["loupe", *_words_to_watch(context)])
        click.echo(f"job {job}: {options.array} of {stage.name}; look with `{look}`")

    return queue


_PLACES = {
    "cluster",
    "array",
    "partition",
    "account",
    "time_limit",
    "cpus_per_task",
    "mem",
    "gpus_per_task",
    "image",
    "namespace",
    "secret",
    "volume_claims",
    "retry_failed",
    "give_up_failed",
    "give_up_at_most",
    "dry_run",
}


def _words_to_watch(context: click.Context) -> list[str]:
    work = context.params.get("work")
    return [*context.command_path.split()[1:], context.params["out"], *(["--work", work] if work else []), "--watch"]


_NOT_KEPT = {"workers", "lease_s", "watch", "overwrite", "metrics_port", "metrics_bind", "discovery_dir"}


def command_line(context: click.Context, *, to_keep: bool = False) -> list[str]:
    """The words that call this command with these options but where it runs: `data ingest SOURCE OUT --workers 4 ...`.

    Args:
        to_keep: for a later day, from any folder: with whole paths, and without what decides nothing of the output.
    """
    words = context.command_path.split()[1:]
    words = words if words[:1] == ["data"] or not to_keep else ["data", *words]
    options: list[str] = []
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if (
            param.name in _PLACES
            or (to_keep and param.name in _NOT_KEPT)
            or value is None
            or value == param.get_default(context)
        ):
            continue
        values = value if isinstance(value, (tuple, list)) else [value]
        if isinstance(param, click.Argument):
            words += [whole(param, str(v)) if to_keep else str(v) for v in values]
        elif isinstance(param, click.Option) and param.is_flag:
            options.append(param.opts[-1] if value else param.secondary_opts[-1])
        else:
            for v in values:
                options += [param.opts[-1], whole(param, str(v)) if to_keep else str(v)]
    return [*words, *options]
