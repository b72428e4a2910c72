"""`loupe runs`: a table of the runs below some roots. No torch."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.runs.find import DEPTH, MAX_DEPTH, folders_in
from launch.runs.numbers import TimeLeft, seconds_by_state, time_left
from launch.runs.read import RunFacts, read_all
from launch.runs.state import STARTING, State, states_of
from launch.runs.text import age, duration, printable
from trainer.errors import UserError
from trainer.goodput import ratio
from trainer.run_names import roots_of

COLUMNS = ("run", "state", "phase", "step", "images/s", "time left", "checkpoint", "restarts", "goodput")
FIRST_TO_GO = ("phase", "images/s", "goodput", "restarts", "time left", "checkpoint")
"""Columns that a narrow terminal goes without, one after the other."""
RECENT_DAYS = 14
"""Runs that have ended longer ago are shown with --all."""
COLOURS = {
    "running": "green", STARTING: "yellow", "pending": "yellow", "cancelling": "yellow", "done": "blue", "lost": "red",
    "damaged": "red",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    facts: RunFacts
    state: State
    left: TimeLeft | None
    """None where no job has the run."""
    seconds: dict[str, float]
    """By state of the run's ledger; empty where it has none."""

    @property
    def goodput(self) -> float | None:
        return ratio(self.seconds)

    @property
    def restarts(self) -> int:
        return max(0, self.facts.starts - 1)


def row_of(facts: RunFacts, state: State, now: float) -> Row:
    phases = facts.config.phases if facts.config else ()
    left = time_left(phases, facts.points) if state.alive and state.word != STARTING and phases else None
    return Row(facts, state, left, seconds_by_state(facts, now=now, alive=state.alive))


def read_rows(roots: Sequence[str], now: float, *, depth: int = DEPTH) -> tuple[list[Row], list[str]]:
    """The runs below the roots, those that a job has first, then by their last sign of life; and what could not be read.

    Args:
        depth: levels of folders below a root. A run's name is its path from there.

    Raises:
        UserError: no root can be read.
    """
    names: dict[str, str] = {}
    folders, errors, unread = [], [], 0
    for root in roots:
        try:
            found, more = folders_in(root, depth=depth)
        except UserError as e:
            errors.append(str(e))
            unread += 1
            continue
        errors += [more] if more else []
        names |= {folder.url: folder.url.removeprefix(f"{root}/") for folder in found}
        folders += found
    if unread == len(roots):
        raise UserError("; ".join(errors))
    runs = read_all(folders)
    for facts in runs:
        facts.name = names[facts.folder.url]
    rows = [row_of(facts, state, now) for facts, state in zip(runs, states_of(runs), strict=True)]
    rows.sort(key=lambda row: (not row.state.alive, -row.facts.last_activity, row.facts.name))
    return rows, errors


def _unreadable(facts: RunFacts) -> str:
    """The files that could not be read; why is said below the table."""
    names = [text.partition(":")[0].partition(" (")[0] for text in facts.damage]
    return f", unreadable: {printable(', '.join(names))}" if names else ""


def cells(row: Row, now: float) -> list[str]:
    """In the order of COLUMNS; `-` for what is not known."""
    facts, last = row.facts, row.facts.last
    left = "-"
    if row.left is not None:
        left = ("" if row.left.measured else "~") + duration(row.left.seconds)
    checkpoint = "-"
    if facts.checkpoint is not None:
        when = f", {age(facts.checkpoint_time, now)}" if facts.checkpoint_time else ""
        checkpoint = f"{facts.checkpoint.step}{when}"
    return [
        printable(facts.name),
        printable(row.state.word)
        + (f" ({printable(row.state.reason)})" if row.state.reason else "")
        + _unreadable(facts),
        printable(last.phase) if last else "-",
        f"{last.step}/{last.total_steps}" if last else "-",
        f"{last.images_per_s:.1f}" if last and row.state.word != STARTING else "-",
        left,
        checkpoint,
        str(row.restarts),
        "-" if row.goodput is None else f"{100 * row.goodput:.0f} %",
    ]


def as_json(row: Row) -> dict[str, Any]:
    facts, last = row.facts, row.facts.last
    return {
        "name": facts.name,
        "url": facts.folder.url,
        "state": row.state.word,
        "state_detail": row.state.detail,
        "alive": row.state.alive,
        "phase": last.phase if last else None,
        "step": last.step if last else None,
        "total_steps": last.total_steps if last else None,
        "images_per_s": last.images_per_s if last else None,
        "time_of_last_metrics": last.time if last else None,
        "time_left_s": row.left.seconds if row.left else None,
        "time_left_is_measured": row.left.measured if row.left else None,
        "checkpoint_step": facts.checkpoint.step if facts.checkpoint else None,
        "checkpoint_time": facts.checkpoint_time,
        "restarts": row.restarts,
        "goodput": row.goodput,
        "goodput_seconds": row.seconds,
        "damage": facts.damage,
    }


def shown(rows: Sequence[Row], now: float, *, everything: bool) -> list[Row]:
    """Without runs that ended long ago, unless `everything`."""
    since = now - RECENT_DAYS * 86_400
    return [
        row for row in rows if everything or row.state.alive or row.facts.last_activity >= since or row.facts.damage
    ]


def plain(rows: Sequence[Row], now: float) -> str:
    """Aligned columns, none of them cut."""
    lines = [list(COLUMNS), *(cells(row, now) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def table(rows: Sequence[Row], now: float, width: int) -> Table:
    """Of as many columns as `width` characters hold; only a long state is broken into lines."""
    lines = [cells(row, now) for row in rows]
    chosen = list(range(len(COLUMNS)))
    for column in FIRST_TO_GO:
        widths = [max(len(line[i]) for line in [list(COLUMNS), *lines]) for i in chosen]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
        chosen.remove(COLUMNS.index(column))
    out = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for i in chosen:
        right = COLUMNS[i] in ("images/s", "restarts", "goodput")
        out.add_column(COLUMNS[i], no_wrap=COLUMNS[i] != "state", justify="right" if right else "left")
    for row, line in zip(rows, lines, strict=True):
        colours = {COLUMNS.index("state"): COLOURS.get(row.state.word, "")}
        out.add_row(*(Text(line[i], colours.get(i, "")) for i in chosen))
    return out


def notes(rows: Sequence[Row], hidden: int, errors: Sequence[str]) -> list[str]:
    """Lines for stderr: what the table leaves out."""
    lines = [f"warning: {error}" for error in errors]
    for row in rows:
        lines += [f"warning: {printable(row.facts.folder.url)}: {printable(text)}" for text in row.facts.damage]
        if row.state.word in ("unknown here", "lost"):
            lines.append(f"{printable(row.facts.name)}: {printable(row.state.detail)}")
    return lines + ([f"{hidden} more ended over {RECENT_DAYS} days ago: --all shows them"] if hidden else [])


@click.command("list")
@click.option("--root", "given_roots", multiple=True, metavar="URL",
              help="Folder or URL with run folders below it. Repeatable.  [default: $LOUPE_RUNS, or runs]")  # fmt: skip
@click.option("--depth", default=DEPTH, show_default=True, type=click.IntRange(1, MAX_DEPTH), metavar="LEVELS",
              help="Of folders below a root: the runs of a sweep or an experiment may have one between.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help=f"Runs that ended over {RECENT_DAYS} days ago as well.")
@click.option("--json", "in_json", is_flag=True, help="One JSON array, for programs.")
@click.option("--watch", is_flag=True, help="Renew the table until Ctrl-C.")
@click.option("--interval", "interval_s", default=10.0, show_default=True, type=click.FloatRange(min=1.0),
              metavar="SECONDS", help="Between two looks of --watch.")  # fmt: skip
def list_runs(
    given_roots: tuple[str, ...], depth: int, everything: bool, in_json: bool, watch: bool, interval_s: float
) -> None:
    """The runs below a folder: state, phase, step, speed, time left, newest checkpoint, restarts, goodput.

    The state of a SLURM job is squeue's (no accounting database is needed), of a run on this machine that of its processes.
    Everything else is read from the run folders. A time left with ~ guesses the speed of a phase that has not begun.
    Goodput: time in training steps that stand, over the time since the first start.

    \b
    Examples:
      loupe runs
      loupe runs --root s3://bucket/runs --root /shared/runs --all
      loupe runs --watch --interval 30
      loupe runs --json | jq '.[] | select(.state == "lost") | .url'
    """
    roots = roots_of(given_roots)
    if watch:
        _watch(roots, depth=depth, everything=everything, in_json=in_json, interval_s=interval_s)
        return
    now = time.time()
    rows, errors = read_rows(roots, now, depth=depth)
    chosen = shown(rows, now, everything=everything)
    if in_json:
        click.echo(json.dumps([as_json(row) for row in chosen], indent=1))
    elif not rows:
        click.echo(f"no runs in {', '.join(roots)}")
    else:
        console = Console()
        if console.is_terminal:
            console.print(table(chosen, now, console.width))
        else:
            click.echo(plain(chosen, now))
    for line in notes([] if in_json else chosen, len(rows) - len(chosen), errors):
        click.echo(line, err=True)


def _watch(roots: Sequence[str], *, depth: int, everything: bool, in_json: bool, interval_s: float) -> None:
    console = Console()
    if in_json or not console.is_terminal:
        raise UserError("--watch: needs a terminal and no --json; call the command again instead")
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                now = time.time()
                rows, _ = read_rows(roots, now, depth=depth)
                live.update(table(shown(rows, now, everything=everything), now, console.width), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return
