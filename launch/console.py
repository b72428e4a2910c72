"""Progress of a run, read from its run folder: on a terminal as it moves, otherwise a line an interval. No torch."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trainer.metric_names import shown_in_lines
from trainer.run_folder import CHECKPOINTS, SUMMARY, RunFolder

Record = dict[str, Any]
"""A line of metrics/NNNN.jsonl: step, total_steps, phase, images_per_s, loss by term, time, ..."""

WHERE = (
    ("samples", "sample images"),
    ("reconstructions", "reconstructed"),
    ("evaluation", "evaluations"),
    ("curves.png", "curves"),
    ("init_report.json", "began with"),
    ("metrics", "metrics"),
    (CHECKPOINTS, "checkpoints"),
    (SUMMARY, "summary"),
    ("logs", "logs"),
)


@dataclass(frozen=True)
class MetricsFile:
    name: str
    records: list[Record]
    notes: list[str]
    """What the attempt had to say before its first step."""


class MetricsTail:
    """What is new in the metrics files since the last look. Reads each byte once."""

    def __init__(self, folder: RunFolder, *, from_now: bool = False) -> None:
        self._folder = folder
        self._offsets: dict[str, int] = {}
        self._ended: set[str] = set()
        if from_now:
            self.poll()

    def poll(self) -> list[MetricsFile]:
        """New records by file, that is by attempt, oldest first."""
        names = self._folder.names("metrics")
        new = []
        for name in names:
            if name not in self._ended:
                lines = self._read(name)
                records = [line for line in lines if "step" in line]
                notes = [line["note"] for line in lines if "note" in line]
                if records or notes:
                    new.append(MetricsFile(name, records, notes))
        self._ended.update(names[:-1])  # only the newest attempt still grows
        return new

    def _read(self, name: str) -> list[Record]:
        with self._folder.fs.open(self._folder.path(f"metrics/{name}"), "rb") as file:
            file.seek(self._offsets.get(name, 0))
            data: bytes = file.read()
        whole = data.rfind(b"\n") + 1  # the rest is a line that is being written
        self._offsets[name] = self._offsets.get(name, 0) + whole
        return [record for line in data[:whole].splitlines() if (record := _record_of(line)) is not None]


def _record_of(line: bytes) -> Record | None:
    """None for what a full disk has left of a line: a supervisor that only shows it must not die of it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Pace:
    """Seconds per step over the last intervals of one attempt."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, float]] = deque(maxlen=20)

    def add(self, record: Record) -> None:
        self._points.append((record["step"], record["time"]))

    def restart(self) -> None:
        self._points.clear()

    def eta(self, record: Record) -> str:
        """Time left at this pace, `h:mm:ss`; `?` before there is a pace."""
        (first, start), (last, end) = self._points[0], self._points[-1]
        if last <= first:
            return "?"
        left_s = (record["total_steps"] - last) * (end - start) / (last - first)
        return str(timedelta(seconds=round(max(0.0, left_s))))


def losses(record: Record) -> str:
    return "  ".join(
        f"{term} {value:.4g}" if value is not None else f"{term} -"
        for term, value in record["loss"].items()
        if shown_in_lines(term)
    )


def line(record: Record, eta: str) -> str:
    return (
        f"step {record['step']}/{record['total_steps']}  {record['phase']}  {losses(record)}  "
        f"{record['images_per_s']:.1f} images/s  left {eta}"
    )


class Display(Protocol):
    def show(self, record: Record, eta: str) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """A line an interval."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write or (lambda text: print(text, flush=True))

    def show(self, record: Record, eta: str) -> None:
        self._write(line(record, eta))

    def note(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        pass


class TerminalDisplay:
    """A bar that moves, with notes above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False), console=console,
            auto_refresh=False,  # no thread of its own: ranks are forked from this process
        )  # fmt: skip
        self._task: TaskID | None = None

    def show(self, record: Record, eta: str) -> None:
        facts = f"{losses(record)}  {record['images_per_s']:.1f} images/s  left {eta}"
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(record["phase"], total=record["total_steps"], facts=facts)
        self._progress.update(
            self._task, completed=record["step"], description=record["phase"], facts=facts, refresh=True
        )

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def display_for(stream: Any = None) -> Display:
    console = Console(file=stream or sys.stdout)
    return TerminalDisplay(console) if console.is_terminal else PlainDisplay()


class Follower:
    """Shows what is new in a run folder each time it is polled."""

    """
    Args:
        from_now: nothing that was written before.
        from_newest: of what was written before the newest record only.
    """

    def __init__(
        self, folder: RunFolder, display: Display, *, from_now: bool = False, from_newest: bool = False
    ) -> None:
        self._tail = MetricsTail(folder, from_now=from_now)
        self._skip = from_newest
        self._display = display
        self._pace = Pace()
        self._file: str | None = None
        self.step = -1
        """Newest step seen."""

    def poll(self) -> None:
        new = self._tail.poll()
        skip, self._skip = self._skip, False
        if skip:
            new = new[-1:]
        for file in new:
            if self._file not in (None, file.name):
                self._display.note(f"started again: attempt {file.name.removesuffix('.jsonl')}")
            if self._file != file.name:
                self._pace.restart()
                self._file = file.name
            for note in [] if skip else file.notes:
                self._display.note(note)
            for record in file.records:
                self._pace.add(record)
                if not skip or record is file.records[-1]:
                    self._display.show(record, self._pace.eta(record))
                self.step = record["step"]


def where_things_are(folder: RunFolder) -> list[str]:
    """A line for each thing that the run has written."""
    return [f"{what + ':':<14} {folder.url}/{name}" for name, what in WHERE if folder.exists(name)]


def watch(
    folder: RunFolder,
    display: Display,
    ended: Callable[[], str | None],
    *,
    interval_s: float = 1.0,
    poll_ended_s: float = 5.0,
    waiting: Callable[[], str | None] = lambda: None,
) -> None:
    """Follow a run, from its newest interval, until `ended` says how it ended; that may cost a call to a scheduler and is
    asked less often. So is `waiting`, why there is nothing new, and only while there is not."""
    follower = Follower(folder, display, from_newest=True)
    asked = -poll_ended_s
    step_asked, said = -1, None
    while True:
        end = None
        asked_now = time.monotonic() - asked >= poll_ended_s
        if asked_now:
            end, asked = ended(), time.monotonic()
        follower.poll()  # after asking: nothing written before the end is missed
        if end is not None:
            display.note(end)
            return
        if asked_now and follower.step == step_asked and (why := waiting()) != said:
            said = why
            if why:
                display.note(why)
        step_asked = follower.step if asked_now else step_asked
        time.sleep(interval_s)
