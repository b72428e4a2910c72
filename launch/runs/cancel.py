"""`loupe runs cancel`: end the jobs of runs, after they have saved or at once, so that they do not come back. No torch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import click

from launch.runs.ending import Pauses, end_local, end_slurm
from launch.runs.find import find_runs
from launch.runs.read import RunFacts, ended, ended_at, read_all
from launch.runs.text import moment, printable
from launch.status import end_of
from trainer.errors import ExitCode, UserError
from trainer.run_folder import JOB, RunFolder


@click.command("cancel")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.option("--now", is_flag=True, help="At once, without a save: what came after the newest checkpoint is lost.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, type=click.FloatRange(min=1.0), metavar="SECONDS",
              help="Longest to wait for a save.")  # fmt: skip
def cancel(runs: tuple[str, ...], roots: tuple[str, ...], now: bool, timeout_s: float) -> int:
    """End the job of each RUN: it saves, ends, and is not started again. `loupe runs resume RUN` goes on from there.

    A job that waits in the queue is taken out of it. Several are all asked first, then waited for until they are gone; a
    pattern means all runs of such names that a job has.

    \b
    Examples:
      loupe runs cancel demo
      loupe runs cancel s3://bucket/runs/first --now
      loupe runs cancel 'rates-*' --root /shared/runs
    """
    folders = find_runs(runs, roots)
    several = len(folders) > 1
    failed = 0

    def tell(url: str, text: str) -> None:
        click.echo(f"{url}: {text}" if several else text)

    waiting: dict[str, Pauses] = {}
    for facts in read_all(folders):
        url = facts.folder.url
        waiting[url] = _ending(facts, now=now, timeout_s=timeout_s, say=partial(tell, url))
    try:
        with _progress(len(folders)) as show:
            while waiting:
                pause_s = 0.0
                for url, pauses in list(waiting.items()):
                    try:
                        pause_s = max(pause_s, next(pauses))
                        continue
                    except StopIteration:
                        _say_end(RunFolder(url))
                    except UserError as e:
                        if not several:
                            raise
                        failed += 1
                        click.echo(f"error: {e}", err=True)
                    del waiting[url]
                if waiting:
                    show(len(waiting))
                    time.sleep(pause_s)
    except KeyboardInterrupt:
        raise UserError(f"{', '.join(waiting)}: no longer waiting; ends when it has saved") from None
    return int(ExitCode.USAGE) if failed else 0


def _ending(facts: RunFacts, *, now: bool, timeout_s: float, say: Callable[[str], None]) -> Pauses:
    """Ends the job that has the run.

    Raises:
        UserError: none has it, or not one that can be ended from here.
    """
    folder, job, end = facts.folder, facts.job, ended(facts.job)
    if job is None:
        raise UserError(f"{folder.url}: no job is known to have it (no readable {JOB}); there is nothing to cancel")
    if end:
        when = f" since {moment(ended_at(job) or 0.0)}" if ended_at(job) else ""
        how = f"it is done{when}" if end.get("code") == 0 else f"it has ended{when} ({printable(str(end.get('why')))})"
        raise UserError(f"{folder.url}: no job has it, {how}")
    cluster = str(job.get("cluster"))
    if cluster == "slurm":
        return (yield from end_slurm(facts, job, now=now, timeout_s=timeout_s, say=say))
    if cluster == "local":
        return (yield from end_local(folder, job, now=now, timeout_s=timeout_s, say=say))
    if cluster == "kubernetes":
        raise UserError(f"{folder.url}: a Kubernetes job; `kubectl delete` it, which lets its pods save: "
                        f"job.batch.volcano.sh, or jobset, {printable(str(job.get('job')))}")  # fmt: skip
    raise UserError(f"{folder.url}: a job of {printable(cluster)}, which cannot be asked from here; end it there")


def _say_end(folder: RunFolder) -> None:
    click.echo(f"{folder.url}: {printable(end_of(folder) or 'ended')}")
    facts = read_all([folder])[0]
    if facts.checkpoint and (facts.finished or (ended(facts.job) or {}).get("code") == 0):
        click.echo(f"newest checkpoint: step {facts.checkpoint.step}; it was done before it could be cancelled")
    elif facts.checkpoint:
        click.echo(f"newest checkpoint: step {facts.checkpoint.step}; `loupe runs resume {folder.url}` goes on from it")


@contextlib.contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    """On a terminal: how many are left, renewed by what is given."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda left: None
        return
    with console.status("asking") as status:
        yield lambda left: status.update(f"waiting until {left} of {count} run(s) have ended")
