"""`loupe runs report`: one HTML file about a run, or about several side by side. No torch."""

import os
import re
import secrets
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import click

from launch.runs.text import size
from trainer.errors import UserError, one_line
from trainer.run_folder import RunFolder
from trainer.run_names import find_run

MAX_RUNS = 12
PICTURE_BYTES = 8 << 20
"""Of samples in a report, and as many of reconstructions: shared by its runs."""
LEAST_EVERY_S = 2
LATE_S = 600.0
"""A run that cannot be asked for from here is followed while it writes."""


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where a RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.option(
    "--out", metavar="FILE",
    help="Where to write it.  [default: report.html in the run's folder; of several runs, or a remote one, here]",
)  # fmt: skip
@click.option("--open", "open_it", is_flag=True, help="Show it in the browser.")
@click.option("--live", is_flag=True, help="Write it again until the run ends; the page follows and keeps its place.")
@click.option(
    "--every",
    default=10,
    show_default=True,
    type=click.IntRange(min=LEAST_EVERY_S),
    metavar="SECONDS",
    help="Of --live.",
)
def report(
    runs: tuple[str, ...], roots: tuple[str, ...], out: str | None, open_it: bool, live: bool, every: int
) -> None:
    """Write a report of RUN, one HTML file that needs no network: state, timeline, losses, speed, goodput, samples by step,
    config, environment. Of several: their curves over each other, their figures, and where their configs differ.

    What cannot be read, or is not there yet, is said in the report.

    \b
    Examples:
      loupe runs report demo --open
      loupe runs report demo --live --open
      loupe runs report sweep-lr-1 sweep-lr-2 sweep-lr-3 --out sweep.html
      loupe runs report s3://bucket/runs/first --out first.html
    """
    folders = list({folder.url: folder for folder in (find_run(run, roots) for run in runs)}.values())
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs: {MAX_RUNS} at most fit side by side; name fewer")
    path = Path(out or default_path(folders))
    check_path(path)
    alive = write_report(folders, path, live_s=every if live else None)
    click.echo(f"{path}  ({size(path.stat().st_size)})")
    if open_it and not webbrowser.open(path.resolve().as_uri()):
        click.echo("no browser here; open the file where there is one", err=True)
    if not live:
        return
    if not alive:
        click.echo("no job has it, so the report stays as it is")
    try:
        while alive:
            time.sleep(every)
            alive = write_report(folders, path, live_s=every)
    except KeyboardInterrupt:
        click.echo("no longer written; the run goes on", err=True)
        write_report(folders, path, live_s=None)


def default_path(folders: Sequence[RunFolder]) -> str:
    if len(folders) == 1 and folders[0].is_local:
        return str(Path(folders[0].root) / "report.html")
    names = "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(folder.url)) for folder in folders)
    return f"report-{names[:100]}.html"


def check_path(path: Path) -> None:
    """
    Raises:
        UserError: a file is there that is no report.
    """
    from launch.report.page import MARK

    try:
        with open(path, "rb") as file:
            if file.read(len(MARK)) != MARK.encode():
                raise UserError(f"{path}: there is a file that is no report; give another --out")
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path}: {one_line(e)}; give another --out") from None


def write_report(folders: Sequence[RunFolder], path: Path, *, live_s: int | None) -> bool:
    """Whether a run of them goes on; where none does, the page does not load itself again.

    Raises:
        UserError: the file cannot be written.
    """
    from launch.report.gather import gather
    from launch.report.page import page

    now = time.time()
    names = names_of([folder.url for folder in folders])
    picture_bytes = PICTURE_BYTES // len(folders)
    found = [
        gather(folder, now, name=name, picture_bytes=picture_bytes) for folder, name in zip(folders, names, strict=True)
    ]
    alive = any(
        run.row.state.alive or _writes_elsewhere(run.row.state.word, run.facts.last_activity, now) for run in found
    )
    data = page(found, live_s=live_s if alive else None).encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({one_line(e)}); give another --out") from None
    return alive


def _writes_elsewhere(word: str, last_activity: float, now: float) -> bool:
    from launch.runs.state import UNKNOWN

    return word == UNKNOWN and now - last_activity < LATE_S


def names_of(urls: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell the runs apart."""
    parts = [url.rstrip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)
