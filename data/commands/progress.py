"""How far a stage is: a bar or lines while its command works, and `--watch`."""

import time
from collections.abc import Callable

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.commands.shown import count, samples_line
from data.stages.runner import LEASE_S
from data.stages.status import PassStatus, StageStatus, Watcher, count_lines
from data.stages.store import STAGE, StageStore
from trainer.errors import UserError, one_line

LINE_EVERY_S = 30.0
"""Where there is no terminal."""
POLL_S = 2.0
SHOWN = 10
"""Items at work, and failed ones, that are listed."""
IDLE_S = 2 * LEASE_S
"""Without a lease that holds: then nobody works there. Workers that look for work hold none for a while."""
STUCK_LOOKS = 3


class StageProgress:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, out: str, console: Console, also: Callable[[StageStatus], None] = lambda status: None) -> None:
        """`also`: who else wants to know."""
        self._out, self._console, self._also = out, console, also
        self._watcher: Watcher | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._pass = ""
        self._told = time.monotonic()
        self._trouble = ""

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tick(self) -> None:
        """Show how far it is. Where that fails the workers go on, and it is said once."""
        try:
            self._look()
        except Exception as e:  # of whatever kind: nothing depends on what is shown
            if self._trouble != (trouble := one_line(e)):
                self._trouble = trouble
                self._console.print(f"progress is not known: {trouble}", markup=False, highlight=False, soft_wrap=True)

    def _look(self) -> None:
        if self._watcher is None:
            if not StageStore(self._out).exists(STAGE):
                return
            self._watcher = Watcher(self._out)
        status = self._watcher.poll()
        self._also(status)
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
            self._console.print(line(status), markup=False, highlight=False, soft_wrap=True)


def _speed(status: StageStatus) -> str:
    return f"{status.samples_per_s:,.0f} samples/s" if status.samples_per_s else ""


def line(status: StageStatus) -> str:
    current = status.current
    facts = [
        f"{current.name}: {current.done} of {current.items} items",
        *count_lines(current.counts)[:2],
        *uncounted(current),
        _left(status),
        _speed(status),
    ]
    if current.failed:
        facts.append(f"{len(current.failed)} failed")
    if given_up := sum(len(one.given_up) for one in status.passes):
        facts.append(f"{given_up} given up")
    return ", ".join(fact for fact in facts if fact)


def uncounted(one: PassStatus) -> list[str]:
    """Where there are more receipts than there was time to read."""
    return [f"counts of {one.counted} of {one.done} items so far"] if one.counted < one.done else []


def _left(status: StageStatus) -> str:
    """Of `ingest` at its end, what copies have left."""
    if not (status.finished and status.stage == "ingest"):
        return ""
    from data.ingest.stage import samples_left

    return samples_line(samples_left({one.name: one.counts for one in status.passes}))


def watch(out: str, console: Console) -> None:
    """Show a stage's progress until it has ended, or nobody works at it; Ctrl-C ends the watching only.

    Raises:
        UserError: it is not finished, and nobody works at it.
    """
    watcher = Watcher(out)
    idle = _Idle(out)
    if not console.is_terminal:
        while True:
            status = watcher.poll()
            click.echo(line(status))
            if status.finished:
                return
            idle.look(status)
            time.sleep(LINE_EVERY_S)
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                status = watcher.poll()
                tables = [_table(one) for one in status.passes if one.items is not None]
                live.update(Group(*tables, *filter(None, [_left(status)])), refresh=True)
                if status.finished:
                    return
                idle.look(status)
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        click.echo("no longer watching; the workers go on")


class _Idle:
    """Tells when nobody works at a stage any more."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._since: float | None = None
        self._stuck = 0
        """Looks in a row at which nothing was left but what has failed."""

    def look(self, status: StageStatus) -> None:
        """
        Raises:
            UserError: nobody works there, by this and earlier looks.
        """
        now = time.monotonic()
        if any(holder.deadline > time.time() for one in status.passes for _, holder in one.holders):
            self._since, self._stuck = None, 0
            return
        self._since = now if self._since is None else self._since
        failed = status.current.failed
        left = (status.current.items or 0) - status.current.done
        self._stuck = self._stuck + 1 if failed and left == len(failed) else 0
        if self._stuck < STUCK_LOOKS and now - self._since < IDLE_S:
            return
        lines = [f"{one.name} {item}: {why}" for one in status.passes for item, why in sorted(one.failed.items())]
        for text in lines[:SHOWN]:
            click.echo(f"failed: {text}", err=True)
        if lines:
            raise UserError(
                f"{self._out}: nobody works there, and {count(len(lines), 'item')} failed; mend the cause and run its command "
                "again with --retry-failed"
            )
        raise UserError(
            f"{self._out}: nobody has worked there for {now - self._since:.0f} s; run its command again, it goes on"
        )


def _table(one: PassStatus) -> Table:
    table = Table(title=f"{one.name}: {one.done} of {one.items} items", title_justify="left", expand=False)
    for column in ("item", "worker", "samples", "lease ends in"):
        table.add_column(column)
    for item, holder in sorted(one.holders)[:SHOWN]:
        left = holder.deadline - time.time()
        table.add_row(item, holder.worker, str(holder.samples), f"{left:.0f} s" if left > 0 else "expired")
    if len(one.holders) > SHOWN:
        table.add_row(f"and {len(one.holders) - SHOWN} more", "", "", "")
    for item, why in sorted(one.failed.items())[:SHOWN]:
        table.add_row(item, "failed", "", why[:80])
    for item, why in sorted(one.given_up.items())[:SHOWN]:
        table.add_row(item, "given up", "", why[:80])
    table.caption = ", ".join([*count_lines(one.counts), *uncounted(one)])
    return table
