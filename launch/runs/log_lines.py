"""Lines of the logs of many ranks in one order. No torch.

Ranks write without times, so the order across ranks is as good as what the lines give away: the header of each start, the
times that some libraries write (ISO's form, and torch's C++ `[W1121 05:54:16.123`), and rank 0's `step N/M`, whose time the
metrics know. A line without any belongs to the one before it. Within a rank the order is exact.
"""

import heapq
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

_HEADER = re.compile(r"^==== (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}) ")
_ISO = re.compile(r"^\W{0,3}(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?")
_GLOG = re.compile(r"^(?:\[rank\d+\]:)?\[?[IWEF](\d\d)(\d\d) (\d\d:\d\d:\d\d)\.(\d{1,6})")
_STEP = re.compile(r"^step (\d{1,15})/\d+ ")


@dataclass(frozen=True)
class Line:
    time: float
    """Unix time, as far as it can be told; never less than that of the line before in the same log."""
    label: str
    """Of the log: `rank 3`, `slurm`."""
    text: str


class Clock:
    """The time of each line of one log.

    Args:
        step_times: times of the metrics' records by step, ascending; for the log that prints them, rank 0's.
    """

    def __init__(self, step_times: Mapping[int, Sequence[float]] | None = None, *, start: float = 0.0) -> None:
        self._step_times = step_times or {}
        self._now = start
        self._zone: tzinfo = datetime.now().astimezone().tzinfo or UTC
        self._year = datetime.now().year

    def of(self, text: str) -> float:
        found = self._told(text)
        if found is not None and found > self._now:
            self._now = found
        return self._now

    def _told(self, text: str) -> float | None:
        try:
            if header := _HEADER.match(text):
                when = datetime.strptime(header[1], "%Y-%m-%d %H:%M:%S %z")
                self._zone, self._year = when.tzinfo or self._zone, when.year
                return when.timestamp()
            if iso := _ISO.match(text):
                when = datetime.strptime(f"{iso[1]} {iso[2]}", "%Y-%m-%d %H:%M:%S")
                return when.replace(tzinfo=self._zone).timestamp() + _fraction(iso[3])
            if glog := _GLOG.match(text):
                when = datetime.strptime(f"{self._year}-{glog[1]}-{glog[2]} {glog[3]}", "%Y-%m-%d %H:%M:%S")
                return when.replace(tzinfo=self._zone).timestamp() + _fraction(glog[4])
        except ValueError:  # digits that are no date
            return None
        if step := _STEP.match(text):
            times = self._step_times.get(int(step[1]), ())
            at = bisect_left(times, self._now)  # a step done again has several: the first that is not over yet
            return times[at] if at < len(times) else None
        return None


def _fraction(digits: str | None) -> float:
    return float(f"0.{digits}") if digits else 0.0


def timed(label: str, texts: Iterable[str], clock: Clock) -> Iterator[Line]:
    for text in texts:
        yield Line(clock.of(text), label, text)


def merged(logs: Sequence[Iterable[Line]]) -> Iterator[Line]:
    """All lines by time; those of one log stay in their order, and of equal times together."""
    return heapq.merge(*logs, key=lambda line: line.time)
