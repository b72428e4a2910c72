"""The history of a run from its metrics files: columns of numbers, notes, evaluations. Nothing in them is trusted. No torch."""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.runs.read import read_errors
from trainer.errors import one_line
from trainer.run_folder import RunFolder, parse_json

MAX_BYTES = 512 << 20
"""Of the metrics of one run: a million records. Of more, the newest starts are read."""
CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 20
MAX_COLUMNS = 200
MAX_NAME_CHARS = 80
MAX_TERMS, MAX_LEVELS = 8, 64
"""Of a validation."""
MAX_NOTES = 500
MAX_NOTE_CHARS = 500
GROUPS = ("loss", "loss_by_noise", "stages", "ranks")
"""Fields of a record that hold figures by name; all others that are numbers are columns, too."""


@dataclass(frozen=True)
class Note:
    time: float
    """Unix time."""
    text: str


@dataclass
class Start:
    """What the metrics of one start show."""

    number: int
    first_time: float
    last_time: float
    last_step: int
    phases: list[tuple[str, float, float]]
    """(phase, Unix times of its first and last record), in order; a roll back may bring one again."""


@dataclass
class History:
    """Records in the order in which they were written; a row each."""

    phases: list[str] = field(default_factory=list)
    """Of each row."""
    starts: list[Start] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Figures by step."""
    validations: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """By step: each term's values by noise level."""
    missing: list[str] = field(default_factory=list)
    """A line for each thing that is not read."""
    unreadable: int = 0
    """Lines that are no records."""
    _columns: dict[str, "array[float]"] = field(default_factory=dict)
    _rows: int = 0
    _left_out: set[str] = field(default_factory=set)

    def add(self, record: dict[str, Any], start: int) -> None:
        """Raises KeyError, TypeError, ValueError where it is no record of ours."""
        step, when = float(int(record["step"])), float(record["time"])
        if not (math.isfinite(when) and 0 <= step < 1e15 and 0 < when < 1e11):
            raise ValueError("no step, or no time")
        phase = str(record.get("phase"))[:MAX_NAME_CHARS]
        # by name: a damaged record might have one twice, and each column has one figure a record
        for name, value in dict(_figures(record)).items():
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= MAX_COLUMNS or len(name) > MAX_NAME_CHARS:
                    self._left_out.add(name[:MAX_NAME_CHARS])
                    continue
                column = self._columns[name] = array("d", [math.nan]) * self._rows
            column.append(value)
        self._rows += 1
        for column in self._columns.values():
            if len(column) < self._rows:
                column.append(math.nan)
        self.phases.append(phase)
        self._add_to_start(start, phase, when, int(step))

    def _add_to_start(self, number: int, phase: str, when: float, step: int) -> None:
        if not self.starts or self.starts[-1].number != number:
            self.starts.append(Start(number, when, when, step, []))
        start = self.starts[-1]
        start.last_time, start.last_step = when, step
        if start.phases and start.phases[-1][0] == phase:
            start.phases[-1] = (phase, start.phases[-1][1], when)
        else:
            start.phases.append((phase, start.phases[-1][2] if start.phases else when, when))

    def __len__(self) -> int:
        return self._rows

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def column(self, name: str) -> np.ndarray:
        """(rows,), float64; NaN where a record has no such figure."""
        found = self._columns.get(name)
        return np.full(self._rows, np.nan) if found is None else np.frombuffer(found, dtype=np.float64)

    def standing(self) -> np.ndarray:
        """Rows that stand, by step: where steps were done again, the newest record, and none beyond the newest step."""
        steps = self.column("step")
        newest = {float(step): row for row, step in enumerate(steps)}
        last = steps[-1] if self._rows else 0.0
        return np.array([newest[step] for step in sorted(newest) if step <= last], dtype=np.int64)

    def close(self) -> None:
        if self._left_out:
            self.missing.append(f"metrics: {len(self._left_out)} figure(s) beyond {MAX_COLUMNS} are left out")
        if self.unreadable:
            self.missing.append(f"metrics: {self.unreadable} line(s) cannot be read")


def _figures(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of a record, those of groups as `loss.denoising`."""
    for name, value in record.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield name, float(value)
        elif name in GROUPS and isinstance(value, dict):
            for inner, figure in value.items():
                if isinstance(figure, dict):
                    for innermost, deepest in figure.items():
                        if isinstance(deepest, int | float) and not isinstance(deepest, bool):
                            yield f"{name}.{inner}.{innermost}", float(deepest)
                elif isinstance(figure, int | float) and not isinstance(figure, bool):
                    yield f"{name}.{inner}", float(figure)


def read_history(folder: RunFolder) -> History:
    """Raises nothing that storage or a file can cause: that is `missing`."""
    history = History()
    try:
        names = [name for name in folder.names("metrics") if name.endswith(".jsonl") and name[:-6].isdigit()]
        sizes = {name: int(folder.fs.size(folder.path(f"metrics/{name}")) or 0) for name in names}
    except read_errors() as e:
        history.missing.append(f"metrics: cannot be listed ({one_line(e)})")
        return history
    if not names:
        history.missing.append("metrics: none yet")
    kept, total = [], 0
    for name in reversed(names):
        total += sizes[name]
        if total <= MAX_BYTES:
            kept.append(name)
    if len(kept) < len(names):
        history.missing.append(
            f"metrics: {len(names) - len(kept)} file(s) are left out: more than {MAX_BYTES >> 20} MiB"
        )
    for name in reversed(kept):
        try:
            for line in _lines(folder, f"metrics/{name}", sizes[name]):
                _take(history, line, int(name[:-6]))
        except read_errors() as e:
            history.missing.append(f"metrics/{name}: {one_line(e)}")
    history.close()
    return history


def _take(history: History, line: bytes, start: int) -> None:
    try:
        record = parse_json(line)
        if "step" in record:
            history.add(record, start)
            return
        if "note" in record and len(history.notes) < MAX_NOTES:
            history.notes.append(Note(float(record["time"]), str(record["note"])[:MAX_NOTE_CHARS]))
        validated = record.get("validation")
        if isinstance(validated, dict) and isinstance(validated.get("step"), int):
            history.validations[validated["step"]] = {
                str(term)[:MAX_NAME_CHARS]: [float(math.nan if v is None else v) for v in by_level[:MAX_LEVELS]]
                for term, by_level in list(validated["terms"].items())[:MAX_TERMS]
            }
        figures = record.get("evaluation")
        if isinstance(figures, dict) and isinstance(figures.get("step"), int):
            history.evaluations[figures["step"]] = {
                str(name)[:MAX_NAME_CHARS]: float(value)
                for name, value in list(figures.items())[:MAX_COLUMNS]
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
            }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        history.unreadable += 1


def _lines(folder: RunFolder, name: str, size: int) -> Iterator[bytes]:
    """Whole lines, read by pieces; what follows the last newline is being written."""
    rest = b""
    with folder.fs.open(folder.path(name), "rb") as file:
        read = 0
        while read < size:
            data = file.read(min(CHUNK_BYTES, size - read))
            if not data:
                break
            read += len(data)
            *lines, rest = (rest + data).split(b"\n")
            yield from (line for line in lines if line)
            if len(rest) > MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes; what follows it is left out")
