"""All that a report tells of one run, read from its folder: what cannot be read is said to be missing. No torch."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from launch.report.config_diff import Difference, against_recipe
from launch.report.events import Event, events_of
from launch.report.history import History, read_history
from launch.report.pictures import Frames, read_frames
from launch.report.quality import Measured, read_evaluations
from launch.runs.list import Row, row_of
from launch.runs.logs import Logs
from launch.runs.read import RunFacts, read_all, read_errors, read_record, restarts_of, seconds
from launch.runs.state import state_of
from launch.runs.text import printable
from trainer.config_text import to_yaml
from trainer.errors import UserError, one_line
from trainer.goodput import read_record as read_ledger
from trainer.run_folder import GOODPUT, SUMMARY, RunFolder

MAX_STARTS = 200
"""Newest ones, whose records are read."""
LOG_LINES = 60
MAX_LOG_RANKS = 2
MAX_LINE_CHARS = 400
UNHAPPY = ("stopped", "lost", "damaged", "cancelled")
"""States, by their first word, in which a run's last log lines are shown."""

T = TypeVar("T")


@dataclass(frozen=True)
class StartFacts:
    """One start: attempts/NNNN.json, and what became of it."""

    number: int
    record: dict[str, Any]
    time: float | None
    """Unix time of its begin: of its process, where it kept a ledger."""
    seconds: float | None
    """That its process lived, as far as is known."""

    @property
    def ranks(self) -> int:
        return int(seconds(self.record.get("world_size")) or 0)


@dataclass
class RunReport:
    name: str
    """Among the runs of the page."""
    row: Row
    now: float
    history: History
    samples: Frames
    reconstructions: Frames
    starts: list[StartFacts] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    differences: list[Difference] | None = None
    """From the recipe; None where that cannot be told."""
    config_yaml: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Measured] = field(default_factory=list)
    """Of its pictures, by `loupe evaluate run`."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """(who, line), of a run that ended otherwise than done."""
    missing: list[str] = field(default_factory=list)

    @property
    def facts(self) -> RunFacts:
        return self.row.facts

    @property
    def rank_seconds(self) -> float | None:
        """Time that its processes held devices, over ranks and starts."""
        known = [start.seconds * start.ranks for start in self.starts if start.seconds is not None]
        return math.fsum(known) if known else None

    @property
    def on_gpus(self) -> bool:
        return any(str(start.record.get("device", "")).startswith("cuda") for start in self.starts)


def gather(folder: RunFolder, now: float, *, name: str, picture_bytes: int) -> RunReport:
    """
    Args:
        picture_bytes: of samples and of reconstructions in the page, each.
    """
    facts = read_all([folder])[0]
    row = row_of(facts, state_of(facts), now)
    history = read_history(folder)
    final = facts.last.total_steps if facts.last else None
    report = RunReport(
        name, row, now, history,
        read_frames(folder, "samples", max_bytes=picture_bytes, final_step=final),
        read_frames(folder, "reconstructions", max_bytes=picture_bytes, final_step=final),
    )  # fmt: skip
    trying = _Trying(folder, report.missing)
    report.starts = trying(lambda: _starts(report, trying), [])
    report.events = trying(lambda: events_of(facts, history, trying), [])
    report.summary = trying(lambda: read_record(folder, SUMMARY), {}) if facts.finished else {}
    if facts.config is not None:
        report.config_yaml = to_yaml(facts.config)
        report.differences = trying(lambda: against_recipe(facts), None)
    report.evaluations = read_evaluations(folder, report.missing)
    if row.state.word.startswith(UNHAPPY):
        report.log = trying(lambda: _log(facts), [])
    # the history has read all of the metrics, and counted
    report.missing[:0] = [
        *(text for text in facts.damage if not text.endswith("unreadable line(s)")),
        *history.missing,
        *report.samples.missing,
        *report.reconstructions.missing,
    ]
    if facts.goodput is None and facts.starts:
        report.missing.append("goodput: no ledger; versions before it kept none")
    if facts.job is None:
        report.missing.append("job.json: none, so how it was started and restarted is not known")
    report.missing = list(dict.fromkeys(printable(text) for text in report.missing))
    return report


class _Trying:
    """Calls that may fail as reading does: then the reason is missing, and something else stands in."""

    def __init__(self, folder: RunFolder, missing: list[str]) -> None:
        self._folder, self._missing = folder, missing

    def __call__(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except read_errors() as e:
            self._missing.append(one_line(e).removeprefix(f"{self._folder.url}/"))
            return otherwise


def _starts(report: RunReport, trying: _Trying) -> list[StartFacts]:
    folder, number_of = report.facts.folder, report.facts.starts
    if number_of > MAX_STARTS:
        report.missing.append(f"attempts: the newest {MAX_STARTS} of {number_of} are told")
    by_number = {start.number: start for start in report.history.starts}
    kept = {int(name[:-5]) for name in folder.names(GOODPUT) if re.fullmatch(r"\d{4,9}\.json", name)}
    found = []
    for number in range(max(0, number_of - MAX_STARTS), number_of):
        record = trying(partial(read_record, folder, f"attempts/{number:04d}.json"), None)
        if record is None:
            continue
        ledger = trying(partial(read_ledger, folder, number), None) if number in kept else None
        begun, metrics = seconds(record.get("time")), by_number.get(number)
        lived = None
        if ledger is not None:
            begun, lived = ledger.first + ledger.begin_s, math.fsum(ledger.seconds.values())
        elif begun is not None and metrics is not None:
            lived = max(0.0, metrics.last_time - begun)
        found.append(StartFacts(number, record, begun, lived))
    return found


def _log(facts: RunFacts) -> list[tuple[str, str]]:
    """The last lines of the rank that is to blame and of rank 0."""
    restarts = restarts_of(facts.job)
    why = str(((facts.job or {}).get("ended") or {}).get("why", ""))
    blamed = [int(match) for match in re.findall(r"\brank (\d{1,9})\b", why)]
    blamed += [entry["rank"] for entry in restarts[-1:] if isinstance(entry.get("rank"), int)]
    ranks = list(dict.fromkeys([*blamed, 0]))[:MAX_LOG_RANKS]
    try:
        for wanted in (ranks, [0]):
            lines = [(line.label, printable(line.text)) for line in Logs(facts.folder, wanted).lines(LOG_LINES)]
            if lines:
                return [(who, text[:MAX_LINE_CHARS]) for who, text in lines[-LOG_LINES * len(wanted) :]]
    except (TypeError, AttributeError, KeyError) as e:
        raise UserError(f"logs: {one_line(e)}") from None
    return []
