"""`loupe runs logs`: what all ranks of a run have said, in one stream. No torch."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from launch.log_tails import TAIL_BYTES, split_tail
from launch.runs.log_lines import Clock, Line, merged, timed
from launch.runs.read import earlier_jobs, read_points, read_tail
from launch.runs.text import printable
from launch.runs.waiting import waiting_of
from launch.status import end_of
from trainer.errors import UserError, one_line
from trainer.run_folder import JOB, RunFolder
from trainer.run_names import find_run

COLOURS = (
    "cyan",
    "green",
    "yellow",
    "magenta",
    "blue",
    "bright_cyan",
    "bright_green",
    "bright_yellow",
    "bright_magenta",
)
MAX_LINE_BYTES = 64 << 10
READ_BYTES = 1 << 20
MAX_TAIL_BYTES = 8 << 20
"""Of one log, for --tail."""
_START = re.compile(r"==== \d{4}-\d\d-\d\d ")
_OF_SUBMITIT = re.compile(r"submitit INFO ")
"""Where it has found what, in each task: nothing of the run."""
POLL_S = 0.5
REMOTE_POLL_S = 10.0
LOOK_S = 5.0
"""Between two looks for logs that are new, and for the run's end."""


@dataclass
class Log:
    """A log in a folder, and how much of it has been read."""

    folder: RunFolder
    name: str
    label: str
    rank: int | None
    uploaded: bool
    """An end of a log, in a remote run folder, which is written anew as the log grows."""
    clock: Clock
    read_to: int = 0
    """Byte of the whole log."""
    rest: bytes = field(default=b"")
    """Of a line that is being written."""

    def whole(self) -> Iterator[str]:
        """All its whole lines, a piece at a time."""
        if self.uploaded:
            yield from self.new()
            return
        size = self._size()
        while self.read_to < size:
            yield from self.new(upto=min(size, self.read_to + READ_BYTES))

    def tail(self, lines: int) -> Iterator[str]:
        """Its last lines, of the newest start and within MAX_TAIL_BYTES; the clock has then seen what stands before them."""
        if not self.uploaded:
            self.read_to = max(0, self._size() - MAX_TAIL_BYTES)
        first = 1 if self.read_to else 0  # it has lost its head
        texts = [text for text in self.new()[first:] if not _OF_SUBMITIT.match(text)]
        newest = max((i for i, text in enumerate(texts) if _START.match(text)), default=0)
        split = max(newest, len(texts) - lines)
        for text in texts[:split]:
            self.clock.of(text)
        yield from texts[split:]

    def new(self, upto: int | None = None) -> list[str]:
        """Whole lines that have been written since the last call, to byte `upto` of a log that is no uploaded end."""
        data = self._end_of_upload() if self.uploaded else self._appended(upto)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > MAX_LINE_BYTES:
            lines, self.rest = [*lines, self.rest], b""
        return [line[:MAX_LINE_BYTES].decode(errors="replace") for line in lines]

    def flush(self) -> list[str]:
        """The line that has no end, as it is."""
        rest, self.rest = self.rest, b""
        return [rest[:MAX_LINE_BYTES].decode(errors="replace")] if rest else []

    def _size(self) -> int:
        return int(self.folder.fs.size(self.folder.path(self.name)) or 0)

    def _appended(self, upto: int | None) -> bytes:
        size = self._size()
        if size < self.read_to:  # begun anew, by --fresh
            self.read_to, self.rest = 0, b""
        begin, self.read_to = self.read_to, max(self.read_to, min(size, upto or size))
        return bytes(self.folder.fs.cat_file(self.folder.path(self.name), start=begin, end=self.read_to))

    def _end_of_upload(self) -> bytes:
        data, _ = read_tail(self.folder, self.name, TAIL_BYTES + 100)
        begin, data = split_tail(data)
        end = begin + len(data)
        if end < self.read_to or begin > self.read_to:  # begun anew; or more was written between than it holds
            self.read_to, self.rest = begin, b""
        seen, self.read_to = self.read_to - begin, end
        return data[seen:]


class Logs:
    """The logs of a run: beside the run on this machine or a shared disk, else the ends of them that a remote folder has.

    Args:
        ranks: of these ranks only, and of srun's tasks for them; empty: all, and the batch script's.
    """

    def __init__(self, folder: RunFolder, ranks: Sequence[int]) -> None:
        self._run, self._ranks = folder, frozenset(ranks)
        self.job: dict[str, Any] = folder.read_json(JOB) if folder.exists(JOB) else {}
        work_dir = str(self.job.get("work_dir") or "")
        self._earlier_jobs = {str(job.get("job_id")) for job in earlier_jobs(self.job)}
        chain = [str(job_id) for job_id in self.job.get("chain") or ()]
        self._earlier_jobs |= (
            set(chain[: chain.index(str(self.job["job_id"]))]) if str(self.job.get("job_id")) in chain else set()
        )
        self.place = folder
        if not folder.is_local and work_dir and Path(work_dir, "logs").is_dir():
            self.place = RunFolder(work_dir)
        self.logs: dict[str, Log] = {}
        self.step_times: dict[int, list[float]] = {}

    @property
    def uploaded(self) -> bool:
        return not self.place.is_local

    def look(self) -> list[Log]:
        """Logs that are there and were not at the last look, by rank."""
        found = []
        for name in self.place.names("logs"):
            if match := re.fullmatch(r"rank-(\d{1,9})(?:\.\d{8}-\d{6})?\.log", name):  # of pods: one a start
                found.append((int(match[1]), f"logs/{name}", f"rank {match[1]}", int(match[1])))
            elif match := re.fullmatch(r"\d+(?:_\d+)?_(\d{1,9})_log\.out", name):
                found.append(self._of_slurm(f"logs/{name}", int(match[1])))
        if self.place.is_local:
            for name in self.place.names("slurm"):
                if match := re.fullmatch(r"\d+(?:_\d+)?_(\d{1,9})_log\.(?:out|err)", name):
                    found.append(self._of_slurm(f"slurm/{name}", int(match[1])))
        fresh = []
        for _, name, label, rank in sorted(found):
            if name not in self.logs and (not self._ranks or rank in self._ranks):
                clock = Clock(self.step_times if label == "rank 0" else None)
                self.logs[name] = Log(self.place, name, label, rank, self.uploaded, clock)
                fresh.append(self.logs[name])
        return fresh

    @staticmethod
    def _of_slurm(name: str, task: int) -> tuple[int, str, str, int]:
        """The file of task 0 is the batch script's as well. Before those of the ranks: it speaks first."""
        return (-1, name, "slurm" if task == 0 else f"task {task}", task)

    def lines(self, tail: int | None) -> Iterator[Line]:
        """The whole lines that the logs hold now; None: all of them, else so many last ones of each."""
        self._read_step_times(everything=tail is None)
        self.look()
        logs = [
            timed(log.label, log.whole() if tail is None else log.tail(tail), log.clock)
            for log in self.logs.values()
            if tail is None or self._is_of_newest(log)
        ]
        return merged(logs)

    def _is_of_newest(self, log: Log) -> bool:
        """Not of a SLURM job before this one, whose tasks had files of their own."""
        match = re.fullmatch(r"(?:logs|slurm)/(\d+(?:_\d+)?)_\d{1,9}_log\.(?:out|err)", log.name)
        return match is None or match[1] not in self._earlier_jobs

    def _read_step_times(self, *, everything: bool) -> None:
        names = [name for name in self._run.names("metrics") if name.endswith(".jsonl")]
        for name in names if everything else names[-4:]:
            points, _ = read_points(self._run, f"metrics/{name}", max_bytes=MAX_TAIL_BYTES)
            for point in points:
                self.step_times.setdefault(point.step, []).append(point.time)
        for times in self.step_times.values():
            times.sort()


def show(line: Line, width: int) -> str:
    number = re.sub(r"\D", "", line.label)
    colour = COLOURS[int(number) % len(COLOURS)] if number else "white"
    return f"{click.style(f'{line.label:<{width}} |', fg=colour)} {printable(line.text)}"


@click.command("logs")
@click.argument("run")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(min=0), help="This rank's only. Repeatable.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines until the run ends, or Ctrl-C.")
@click.option(
    "--tail",
    default=100,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Last lines of each log, of its newest start.",
)
@click.option("--since-start", is_flag=True, help="All lines, from the first start on.")
def logs(run: str, roots: tuple[str, ...], ranks: tuple[int, ...], follow: bool, tail: int, since_start: bool) -> None:
    """What the ranks of RUN have said, and SLURM's batch script; each line behind the name of who said it.

    All starts of a run are in one log a rank. Across ranks lines are in order of time as far as they tell one: by the starts,
    by times that libraries write, and by the steps of rank 0.

    \b
    Examples:
      loupe runs logs demo --follow
      loupe runs logs demo --rank 0 --rank 3 --tail 20
      loupe runs logs s3://bucket/runs/first --since-start > first.log
    """
    folder = find_run(run, roots)
    try:
        found = Logs(folder, ranks)
        lines = found.lines(None if since_start else tail)
        width = max((len(log.label) for log in found.logs.values()), default=6)
        for line in lines:
            click.echo(show(line, width))
        _say_what_is_missing(found, ranks, follow=follow)
        if follow:
            _follow(found, folder, width)
        else:
            _show_new([log for log in found.logs.values() if log.rest], width, ended=True)
    except KeyboardInterrupt:
        click.echo("no longer following; the run goes on", err=True)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does: click ends quietly then
        raise
    except OSError as e:
        raise UserError(f"{folder.url}: its logs cannot be read ({one_line(e)})") from None


def _say_what_is_missing(found: Logs, ranks: Sequence[int], *, follow: bool) -> None:
    work_dir, host = found.job.get("work_dir"), found.job.get("host")
    if found.uploaded:
        click.echo(
            f"these are the ends of the logs, as last written to {found.place.url}/logs; the whole ones are in "
            f"{work_dir}/logs, on the disks of {host} and the job's nodes", err=True,
        )  # fmt: skip
    if not found.logs and not follow:
        of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        raise UserError(f"{found.place.url}/logs: no logs{of}; has the run started? `loupe runs show` tells")


def _follow(found: Logs, folder: RunFolder, width: int) -> None:
    end: str | None = None
    looked, said = -LOOK_S, None
    quiet = not found.logs
    while end is None:
        if time.monotonic() - looked >= LOOK_S or found.uploaded:
            found.look()
            # before reading: nothing that was said before the end is missed
            end, looked = end_of(folder), time.monotonic()
            why = waiting_of(folder) if end is None and quiet else None
            if why and why != said:
                click.echo(why, err=True)
            said, quiet = why, True
        quiet = not _show_new(found.logs.values(), width, ended=end is not None) and quiet
        if end is None:
            time.sleep(REMOTE_POLL_S if found.uploaded else POLL_S)
    click.echo(end, err=True)


def _show_new(logs: Iterable[Log], width: int, *, ended: bool) -> bool:
    """What has been written since the last look, and whether that was anything; `ended`: lines without an end, too."""
    lines: list[Line] = []
    for log in logs:
        lines += timed(log.label, [*log.new(), *(log.flush() if ended else [])], log.clock)
    for line in sorted(lines, key=lambda line: line.time):
        click.echo(show(line, width))
    return bool(lines)
