"""What happened to a run besides steps: restarts, preemptions, hangs, roll backs, ends. No torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launch.report.history import History
from launch.runs.read import RunFacts, earlier_jobs, ended, ended_at, read_record, restarts_of, seconds
from launch.runs.show import reason_of
from trainer.run_folder import HANGS

MAX_HANGS = 100
MAX_EVENTS = 400

KINDS = ("preempted", "crash", "hang", "roll back", "skipped", "resumed", "ended", "warning")


@dataclass(frozen=True)
class Event:
    time: float
    """Unix time."""
    kind: str
    """Of KINDS."""
    text: str
    step: int | None = None


def events_of(facts: RunFacts, history: History, trying: Callable[..., Any]) -> list[Event]:
    """In order of time; the newest MAX_EVENTS."""
    found = [*_of_jobs(facts), *_of_hangs(facts, trying), *_of_metrics(history)]
    return sorted(found, key=lambda event: event.time)[-MAX_EVENTS:]


def _of_jobs(facts: RunFacts) -> Iterator[Event]:
    jobs = [*earlier_jobs(facts.job), *([facts.job] if facts.job else [])]
    for number, job in enumerate(jobs):
        submitted = seconds(job.get("submitted_at"))
        if number and submitted:
            yield Event(submitted, "resumed", "submitted again")
        for entry in restarts_of(job):
            when, reason = seconds(entry.get("time")), reason_of(entry)
            if when is None:
                continue
            kind = reason if reason in KINDS else "preempted" if reason.startswith(("preempted", "warned")) else "crash"
            code = entry.get("code")
            what = f"{reason}: rank {entry.get('rank')} ended with code {code}" if code is not None else reason
            step = entry.get("step")
            yield Event(when, kind, what, step if isinstance(step, int) else None)
        end, when = ended(job), ended_at(job)
        if end is not None and when is not None:
            how = "done" if end.get("code") == 0 else f"ended with code {end.get('code')}: {end.get('why')}"
            yield Event(when, "ended", how)


def _of_hangs(facts: RunFacts, trying: Callable[..., Any]) -> Iterator[Event]:
    if HANGS not in facts.files:
        return
    names = [name for name in trying(lambda: facts.folder.names(HANGS), []) if name.endswith(".json")]
    for name in names[-MAX_HANGS:]:
        record = trying(lambda name=name: read_record(facts.folder, f"{HANGS}/{name}"), {})
        when, silent_s = seconds(record.get("time")), seconds(record.get("silent_s"))
        if when is not None:
            after = f"{silent_s:.0f} s without a step" if silent_s is not None else "no step"
            step = record.get("step")
            what = f"{after}, rank {record.get('rank')} while {record.get('doing')}"
            yield Event(when, "hang", what, step if isinstance(step, int) else None)


def _of_metrics(history: History) -> Iterator[Event]:
    steps, times = history.column("step"), history.column("time")
    for name, kind, one in (
        ("roll_backs", "roll back", "rolled back"),
        ("steps_skipped", "skipped", "step(s) skipped"),
    ):
        counts = history.column(name)
        before = 0.0
        for row, count in enumerate(counts):
            # a restart may begin below: it went back to a checkpoint that knew of fewer
            if math.isfinite(count):
                if count > before and row:
                    more = count - before
                    what = f"{one} to before step {steps[row]:.0f}" if kind == "roll back" else f"{more:.0f} {one}"
                    yield Event(float(times[row]), kind, what, int(steps[row]))
                before = count
    for note in history.notes:
        if note.text.startswith("WARNING"):
            yield Event(note.time, "warning", note.text.removeprefix("WARNING: "))
