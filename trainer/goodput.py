"""Where the time of a run goes, over all its starts: goodput/NNNN.json, one a start, and what they add up to. No torch.

Each start divides its time among `GOODPUT_STATES`, from the begin of rank 0's process to its last word. The next start
divides what lies between that word and its own begin: the hang that a watchdog has ended, what the start before has still
done since it last wrote, and being down. So the states add up to the time since the first start, however starts end.
Between the end of a job and a later submission by hand nobody wants the run to get on: the clock stands still ("idle").
"""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from trainer.metric_names import GOODPUT_STATES, IN_RECORDS
from trainer.run_folder import GOODPUT, HANGS, JOB, RunFolder, parse_json

Counters = dict[str, list[tuple[tuple[str, ...], float]]]
"""Of a run's counters, by name: (values of the labels, value)."""
_MAX_BYTES = 1 << 20
_MAX_JOB_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10
_FILES_TRIED = 4
"""Of the newest starts: damaged files, and metrics files without a step, are passed over."""
_AGREE_S = 1e-3
"""How well the parts of a record must add up to what it says of the time."""


def no_seconds() -> dict[str, float]:
    return dict.fromkeys(GOODPUT_STATES, 0.0)


class Ledger:
    """Divides this process's time among the states, by what the training thread says. Any thread may read it."""

    def __init__(
        self, age_s: float = 0.0, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        """
        Args:
            age_s: how long ago the process began; it has been in `init` since.
            clock: seconds that never go back.
            wall: Unix time.
        """
        self.begin = wall() - age_s
        """Unix time."""
        self.reached = 0
        """Steps that this or an earlier start has done: those below it are done again."""
        self._clock, self._lock = clock, threading.Lock()
        self._since = clock() - age_s
        self._state = "init"
        self._stay_s = 0.0
        self._seconds = no_seconds()

    def enter(self, state: str) -> None:
        """What passes from now on belongs to `state`."""
        with self._lock:
            self._lap()
            self._state, self._stay_s = state, 0.0

    def settle(self, seconds: float, then: str) -> None:
        """Of the time since `enter` only so many seconds were that state's; the rest, and what comes now, is `then`'s."""
        with self._lock:
            self._lap()
            rest = max(0.0, self._stay_s - seconds)
            self._seconds[self._state] -= rest
            self._seconds[then] += rest
            self._state, self._stay_s = then, 0.0

    def begin_later(self, seconds: float) -> None:
        """Give up so much of the beginning: the clock of the machine of the start before was ahead, or it lived on."""
        with self._lock:
            self._lap()
            self._seconds["init"] = max(0.0, self._seconds["init"] - seconds)

    def now(self) -> tuple[dict[str, float], str]:
        """(seconds in each state until now, the present state)."""
        with self._lock:
            self._lap()
            return dict(self._seconds), self._state

    def _lap(self) -> None:
        now = self._clock()
        self._seconds[self._state] += now - self._since
        self._stay_s += now - self._since
        self._since = now


# -------------------------------------------------------------------------------------------------- one start's record


@dataclass(frozen=True)
class StartRecord:
    """goodput/NNNN.json. Times are seconds since the run's first start: Unix times have too few digits for sums."""

    start: int
    first: float
    """Unix time of the run's first start, or of the first that kept a ledger."""
    begin_s: float
    before: dict[str, float]
    """Of all time before this start's begin."""
    idle_s: float
    """When the clock stood still, before this start's begin."""
    gap: dict[str, float]
    """What of `before` this start has found between the last word of the one before and its own begin. Below 0: what that
    one counted otherwise, before it was known that it hung."""
    seconds: dict[str, float] = field(default_factory=no_seconds)
    """Of this start, until its last word."""
    state: str = "init"
    """At its last word."""
    step: int = 0
    """Steps that any start has done by then."""
    counters: Counters = field(default_factory=dict)
    """Of the run, at its last word."""
    ended: bool = False
    """Its last word was said at its end."""

    @property
    def end_s(self) -> float:
        """Of its last word."""
        return self.begin_s + math.fsum(self.seconds.values())

    def totals(self) -> dict[str, float]:
        """Of all time until its last word."""
        return _added(self.before, self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "begin": self.first + self.begin_s, "end": self.first + self.end_s}


def _added(*parts: Mapping[str, float]) -> dict[str, float]:
    return {state: math.fsum(part.get(state, 0.0) for part in parts) for state in GOODPUT_STATES}


def _parse(start: int, tree: Any) -> StartRecord:
    """Raises ValueError, TypeError, KeyError where it is none of ours."""
    record = StartRecord(
        start, _number(tree["first"]), _number(tree["begin_s"]), _seconds(tree["before"]), _number(tree["idle_s"]),
        _seconds(tree["gap"], least=-math.inf), _seconds(tree["seconds"]), str(tree["state"]), int(tree["step"]),
        {
            str(name): [(tuple(map(str, labels)), _number(value)) for labels, value in series]
            for name, series in tree["counters"].items()
        },
        bool(tree["ended"]),
    )  # fmt: skip
    if record.state not in GOODPUT_STATES:
        raise ValueError(f"no state {record.state!r}")
    if abs(math.fsum(record.before.values()) + record.idle_s - record.begin_s) > _AGREE_S:
        raise ValueError("does not add up")
    return record


def _number(value: Any, *, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"no number of seconds: {str(value)[:40]}")
    return float(value)


def _seconds(tree: Mapping[str, Any], *, least: float = -_AGREE_S) -> dict[str, float]:
    return {state: _number(tree.get(state, 0.0), least=least) for state in GOODPUT_STATES}


def name_of(start: int) -> str:
    return f"{GOODPUT}/{start:04d}.json"


def _starts(folder: RunFolder) -> list[int]:
    """Those that have a record, newest first."""
    names = (re.fullmatch(r"(\d{4,9})\.json", name) for name in folder.names(GOODPUT))
    return sorted((int(match[1]) for match in names if match), reverse=True)


def _read_small(folder: RunFolder, name: str, limit: int) -> Any:
    """Raises ValueError where it is no JSON or larger than any of ours; OSError as storage does."""
    data = folder.fs.cat_file(folder.path(name), start=0, end=limit + 1)
    if len(data) > limit:
        raise ValueError(f"{name}: larger than {limit} bytes")
    return parse_json(data)


def read_record(folder: RunFolder, start: int) -> StartRecord | None:
    """None where it is damaged. Raises OSError as storage does."""
    try:
        return _parse(start, _read_small(folder, name_of(start), _MAX_BYTES))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def newest_record(folder: RunFolder, *, below: int | None = None) -> StartRecord | None:
    """Of the newest start, or the newest before start `below`, that has one which can be read."""
    starts = [start for start in _starts(folder) if below is None or start < below]
    found = (read_record(folder, start) for start in starts[:_FILES_TRIED])
    return next((record for record in found if record), None)


# ------------------------------------------------------------------------------------------- between two starts' records


@dataclass(frozen=True)
class Traces:
    """What else a run folder has of how a start went on after its last word; seconds since the run's first start."""

    hang: tuple[float, float] | None = None
    """From when to when its watchdog has seen no step."""
    seen_s: float = 0.0
    """When its metrics last told of a step."""
    idle: tuple[tuple[float, float], ...] = ()
    """Ends of jobs and the submissions that followed."""


def gap_until(last: StartRecord, until_s: float, traces: Traces) -> tuple[dict[str, float], float]:
    """What there was from a start's last word to `until_s`: (seconds of each state, seconds in which the clock stood still).
    Together they are exactly that time."""
    gap, at = no_seconds(), last.end_s
    if traces.hang:
        begin, end = traces.hang[0], min(max(traces.hang[1], at), until_s)
        if begin < at:
            # its ledger went on while nothing else did
            counted = min(at - begin, last.seconds[last.state])
            gap[last.state] -= counted
            gap["hang"] += counted
        else:
            begin = min(begin, until_s)
            gap[last.state] += begin - at
            at = begin
        gap["hang"] += max(0.0, end - at)
        at = max(at, end)
    elif not last.ended:
        # what it was doing when it last wrote is the best guess of the seconds after that
        seen = min(max(traces.seen_s, at), until_s)
        gap[last.state] += seen - at
        at = seen
    idle_s = sum(max(0.0, min(end, until_s) - max(begin, at)) for begin, end in traces.idle)
    idle_s = min(idle_s, max(0.0, until_s - at))
    gap["down"] += max(0.0, until_s - at) - idle_s
    return gap, idle_s


def traces_of(
    folder: RunFolder, last: StartRecord, *, job: Mapping[str, Any] | None = None, seen: float | None = None
) -> Traces:
    """Raises OSError as storage does; what is damaged is as if it were not there.

    Args:
        job: job.json, where it has been read.
        seen: Unix time of the newest record of that start's metrics, where that has been.
    """
    hang = _object(folder, f"{HANGS}/{last.start:04d}.json", _MAX_BYTES)
    if seen is None:
        found = (folder.last_step_record(f"metrics/{last.start:04d}.jsonl", _TAIL_BYTES) or {}).get("time")
        seen = float(found) if isinstance(found, int | float) else 0.0
    job = _object(folder, JOB, _MAX_JOB_BYTES) if job is None else job
    try:
        at = _number(hang["time"]) - last.first
        hung = (at - _number(hang["silent_s"]), at)
    except (KeyError, ValueError):
        hung = None
    return Traces(
        hung,
        seen - last.first,
        tuple((begin - last.first, end - last.first) for begin, end in idle_times(job)),
    )


def idle_times(job: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """Of job.json, Unix times: from the end of each job to the submission of the next."""
    earlier = job.get("earlier")
    jobs = [entry for entry in (*(earlier if isinstance(earlier, list) else ()), job) if isinstance(entry, dict)]
    for before, after in pairwise(jobs):
        ended = before.get("ended")
        begin, end = ended.get("time") if isinstance(ended, dict) else None, after.get("submitted_at")
        if isinstance(begin, int | float) and isinstance(end, int | float) and end > begin:
            yield float(begin), float(end)


def _object(folder: RunFolder, name: str, limit: int) -> dict[str, Any]:
    try:
        tree = _read_small(folder, name, limit)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def next_record(folder: RunFolder, start: int, ledger: Ledger) -> StartRecord:
    """The record of a start that begins now, which goes on where the one before ended; tells `ledger` how far that was.

    Raises OSError as storage does.
    """
    last = newest_record(folder, below=start)
    newest = (
        folder.last_step_record(f"metrics/{n:04d}.jsonl", _TAIL_BYTES) for n in range(start - 1, -1, -1)[:_FILES_TRIED]
    )
    records = [record for record in newest if record]
    ledger.reached = max([last.step if last else 0, *(int(record["step"]) for record in records)])
    if last is None:
        return StartRecord(start, ledger.begin, 0.0, no_seconds(), 0.0, no_seconds(), step=ledger.reached,
                           counters=_raised({}, records))  # fmt: skip
    begin_s = ledger.begin - last.first
    if begin_s < last.end_s:
        ledger.begin_later(last.end_s - begin_s)
        begin_s = last.end_s
    gap, idle_s = gap_until(last, begin_s, traces_of(folder, last))
    return StartRecord(
        start, last.first, begin_s, _added(last.totals(), gap), last.idle_s + idle_s, gap, step=ledger.reached,
        counters=_raised(last.counters, records),
    )  # fmt: skip


def _raised(counters: Counters, records: Sequence[Mapping[str, Any]]) -> Counters:
    """With what the newest records of the metrics know better: they are written more often."""
    raised = dict(counters)
    for field_name, metric in IN_RECORDS.items():
        found = [record[field_name] for record in records if isinstance(record.get(field_name), int | float)]
        known = math.fsum(value for _, value in counters.get(metric.name, ()))
        if found and max(found) > known:
            raised[metric.name] = [((), float(max(found)))]
    return raised


# -------------------------------------------------------------------------------------------------------- for everybody


@dataclass(frozen=True)
class StartSeconds:
    """What one start's time went into."""

    start: int
    begin: float
    """Unix time."""
    seconds: dict[str, float]
    """The way down to it from the last word of the start before included, as that is known."""


def read_goodput(folder: RunFolder, *, until: float | None = None) -> dict[str, float]:
    """Seconds of the run in each of `GOODPUT_STATES`, over all starts; empty where none has kept a ledger.

    They add up to the time from the first start to the newest one's last word, or to `until`, a Unix time: without the time
    between the end of a job and a later submission by hand.

    Raises OSError as storage does.
    """
    last = newest_record(folder)
    if last is None:
        return {}
    totals = last.totals()
    return totals if until is None else totals_until(last, until, traces_of(folder, last))


def totals_until(last: StartRecord, until: float, traces: Traces) -> dict[str, float]:
    """Of all time until `until`, a Unix time, or the last word where that came later."""
    if until - last.first <= last.end_s:
        return last.totals()
    return _added(last.totals(), gap_until(last, until - last.first, traces)[0])


def goodput_by_start(folder: RunFolder, newest: int = 100) -> list[StartSeconds]:
    """Of the newest starts, oldest first; those with a damaged record are left out. Raises OSError as storage does."""
    records = [read_record(folder, start) for start in reversed(_starts(folder)[:newest])]
    return [
        StartSeconds(record.start, record.first + record.begin_s, _added(record.gap, record.seconds))
        for record in records
        if record
    ]


def ratio(seconds: Mapping[str, float]) -> float | None:
    """Productive time over all time, 0 to 1; None where there is none."""
    wall_s = math.fsum(seconds.values())
    return min(1.0, max(0.0, seconds["productive"] / wall_s)) if wall_s > 0 else None


def in_words(seconds: Mapping[str, float], *, least: float = 0.005) -> str:
    """`productive 81 %, init 12 %, down 7 %`, the most first; shares below `least` are left out."""
    wall_s = math.fsum(seconds.values())
    shares: Sequence[tuple[str, float]] = (
        [(state, value / wall_s) for state, value in seconds.items()] if wall_s > 0 else []
    )
    return ", ".join(
        f"{state} {share:.0%}".replace("%", " %")
        for state, share in sorted(shares, key=lambda s: -s[1])
        if share >= least
    )
