"""`loupe runs watch`: a run's progress until it ends. No torch."""

import click

from launch.console import display_for, watch, where_things_are
from launch.runs.waiting import waiting_of
from launch.status import end_of
from trainer.run_names import find_run


@click.command("watch")
@click.argument("run")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
def watch_run(run: str, roots: tuple[str, ...]) -> None:
    """Follow RUN, from its newest interval, until it ends: a bar on a terminal, otherwise a line an interval. Ctrl-C ends the
    watching only.

    \b
    Examples:
      loupe runs watch demo
      loupe runs watch s3://bucket/runs/first
    """
    folder = find_run(run, roots)
    display = display_for()
    try:
        watch(folder, display, lambda: end_of(folder), waiting=lambda: waiting_of(folder))
    except KeyboardInterrupt:
        display.note("no longer watching; the run goes on")
    for text in where_things_are(folder):
        display.note(text)
    display.close()
