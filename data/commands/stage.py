"""What the commands of all stages share: options, workers, progress, status, and the way onto a cluster."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.stages.runner import LEASE_S, Stage, Stopped, retry_failed
from data.stages.status import PassStatus, StageStatus, Watcher, count_lines
from data.stages.store import STAGE, StageStore, check_claim
from data.stages.workers import run_workers
from trainer.errors import ExitCode, UserError

LINE_EVERY_S = 30.0
"""Where there is no terminal."""
POLL_S = 2.0
_SHOWN = 10
"""Items at work, and failed ones, that are listed."""


@dataclass(frozen=True)
class StageOptions:
    workers: int
    lease_s: float
    watch: bool
    retry_failed: bool
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


def stage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `StageOptions` to a command, which gets them as `options`."""
    decorators = [
        click.option("--workers", type=click.IntRange(0), default=_cores(), show_default="cores of this machine",
                     help="Processes on this machine; 0: work in this one."),
        click.option("--watch", is_flag=True, help="Do no work; show how far all workers on all machines are."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
        click.option("--retry-failed", is_flag=True, help="Try items again that have failed too often."),
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(stage: Stage, out: str, options: StageOptions) -> None:
    """Do a stage as its command's options say, into folder or URL `out`.

    Raises:
        UserError: items have failed, or what a worker met.
        click.exceptions.Exit: with code 75 when stopped by SIGTERM; started again, it goes on.
    """
    console = Console(stderr=True)
    if options.watch:
        if not StageStore(out).exists(STAGE):
            raise UserError(f"{out}: nothing has begun there yet; watch it once workers have started")
        watch(out, console)
        return
    if options.cluster == "local" and options.array > 1:
        raise UserError("--array: is of jobs on a cluster; add --cluster slurm or kubernetes, or take --workers here")
    if options.dry_run:
        _dry_run(stage, out, options)
        if options.cluster != "local":
            _submit(stage, out, options)
        return
    if options.retry_failed and (count := retry_failed(StageStore(out), stage)):
        click.echo(f"{out}: {count} failed items are tried again")
    if options.cluster != "local":
        _submit(stage, out, options)
        return
    with _Progress(out, console) as progress:
        try:
            failures = run_workers(
                stage, out, workers=options.workers, lease_s=options.lease_s, tick=progress.tick, tick_s=POLL_S
            )
        except Stopped:
            click.echo(f"{out}: stopped; the same command goes on", err=True)
            raise click.exceptions.Exit(int(ExitCode.REQUEUE)) from None
    _tell(out, failures)


def _tell(out: str, failures: list[str]) -> None:
    status = Watcher(out).poll()
    for one in status.passes:
        if one.counts:
            click.echo(f"{out}: {one.name}: " + ", ".join(count_lines(one.counts)))
    if failures:
        for line in failures[:_SHOWN]:
            click.echo(f"failed: {line}", err=True)
        raise UserError(
            f"{out}: {len(failures)} items failed; mend the cause and run again with --retry-failed, what is done stays done"
        )


def _dry_run(stage: Stage, out: str, options: StageOptions) -> None:
    if StageStore(out).exists(STAGE):
        check_claim(StageStore(out), stage.name, stage.version, stage.settings())
    click.echo(f"{stage.name} into {out}")
    for name, value in stage.settings().items():
        click.echo(f"  {name}: {value}")
    first = stage.passes()[0]
    items = first.items(StageStore(out))
    click.echo(f"  {len(items)} items" + (f", the first {items[0]['name']}" if items else ""))
    where = (
        f"{options.array} jobs of {options.workers} workers"
        if options.cluster == "slurm"
        else f"{options.workers} workers"
    )
    click.echo(f"  {where}; passes: {', '.join(p.name for p in stage.passes())}")


def _submit(stage: Stage, out: str, options: StageOptions) -> None:
    """To the queue; on a dry run, and for Kubernetes, print what would go there."""
    from launch.job_array import ArrayOptions, PodOptions, job_manifest, script_here, submit_array

    StageStore(out)  # refuses a URL that cannot be opened before anything is queued
    arguments = command_line(click.get_current_context())
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
        pod = PodOptions(options.image, options.namespace, options.secret)
        click.echo(job_manifest(["loupe", *arguments], name=name, options=array, pod=pod), nl=False)
        return
    if options.dry_run:
        click.echo(script_here([sys.executable, "-m", "launch.cli", *arguments], name=name, options=array), nl=False)
        return
    job = submit_array([sys.executable, "-m", "launch.cli", *arguments], name=name, options=array)
    click.echo(f"job {job}: {options.array} of {stage.name}; look with `loupe {shlex.join(arguments)} --watch`")


_PLACES = {
    "cluster",
    "array",
    "partition",
    "account",
    "time_limit",
    "cpus_per_task",
    "mem",
    "gpus_per_task",
    "retry_failed",
    "dry_run",
}


def command_line(context: click.Context) -> list[str]:
    """The words that call this command with these options but where it runs: `data ingest SOURCE OUT --workers 4 ...`."""
    words = context.command_path.split()[1:]
    options: list[str] = []
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if param.name in _PLACES or value is None or value == param.get_default(context):
            continue
        values = value if isinstance(value, (tuple, list)) else [value]
        if isinstance(param, click.Argument):
            words += [str(v) for v in values]
        elif isinstance(param, click.Option) and param.is_flag:
            options.append(param.opts[-1] if value else param.secondary_opts[-1])
        else:
            for v in values:
                options += [param.opts[-1], str(v)]
    return [*words, *options]


# ------------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, out: str, console: Console) -> None:
        self._out, self._console = out, console
        self._watcher: Watcher | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._pass = ""
        self._told = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tick(self) -> None:
        if self._watcher is None:
            if not StageStore(self._out).exists("stage.json"):
                return
            self._watcher = Watcher(self._out)
        status = self._watcher.poll()
        current = status.current
        if current.items is None:
            return
        if self._console.is_terminal:
            if self._task is None or self._pass != current.name:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._pass, self._task = current.name, self._bar.add_task(current.name, total=current.items, speed="")
            self._bar.update(self._task, completed=current.done, speed=_speed(status))
        elif time.monotonic() - self._told > LINE_EVERY_S:
            self._told = time.monotonic()
            self._console.print(_line(status), markup=False, highlight=False, soft_wrap=True)


def _speed(status: StageStatus) -> str:
    return f"{status.samples_per_s:,.0f} samples/s" if status.samples_per_s else ""


def _line(status: StageStatus) -> str:
    current = status.current
    facts = [
        f"{current.name}: {current.done} of {current.items} items",
        *count_lines(current.counts)[:2],
        _speed(status),
    ]
    if current.failed:
        facts.append(f"{len(current.failed)} failed")
    return ", ".join(fact for fact in facts if fact)


def watch(out: str, console: Console) -> None:
    """Show a stage's progress until it has ended; Ctrl-C ends the watching only."""
    watcher = Watcher(out)
    if not console.is_terminal:
        while True:
            status = watcher.poll()
            click.echo(_line(status))
            if status.finished:
                return
            time.sleep(LINE_EVERY_S)
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                status = watcher.poll()
                live.update(Group(*(_table(one) for one in status.passes if one.items is not None)), refresh=True)
                if status.finished:
                    return
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        click.echo("no longer watching; the workers go on")


def _table(one: PassStatus) -> Table:
    table = Table(title=f"{one.name}: {one.done} of {one.items} items", title_justify="left", expand=False)
    for column in ("item", "worker", "samples", "lease ends in"):
        table.add_column(column)
    for item, holder in sorted(one.holders)[:_SHOWN]:
        left = holder.deadline - time.time()
        table.add_row(item, holder.worker, str(holder.samples), f"{left:.0f} s" if left > 0 else "expired")
    if len(one.holders) > _SHOWN:
        table.add_row(f"and {len(one.holders) - _SHOWN} more", "", "", "")
    for item, why in sorted(one.failed.items())[:_SHOWN]:
        table.add_row(item, "failed", "", why[:80])
    table.caption = ", ".join(count_lines(one.counts))
    return table
