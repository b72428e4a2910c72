"""What `loupe evaluate run` has measured of a run's pictures: tables, one for each definition of the figures. No torch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.report.html import count, figure, section, table, text
from launch.runs.read import read_errors, read_record
from launch.runs.read import seconds as number
from launch.runs.text import moment
from trainer.errors import UserError, one_line
from trainer.run_folder import EVALUATIONS, RunFolder

MAX_EVALUATIONS = 100
"""The newest steps'."""
MAX_FIGURES = 40
_NAME = re.compile(r"step-\d{8,15}-[0-9a-f]{12}\.json")


@dataclass(frozen=True)
class Measured:
    """evaluations/step-NNNNNNNN-DIGEST.json"""

    step: int
    definition: str
    """Of the figures: those of one may be compared."""
    record: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def read_evaluations(folder: RunFolder, missing: list[str]) -> list[Measured]:
    """By step; what cannot be read is `missing`."""
    try:
        names = [name for name in folder.names(EVALUATIONS) if _NAME.fullmatch(name)]
    except read_errors() as e:
        missing.append(f"{EVALUATIONS}: cannot be listed ({one_line(e)})")
        return []
    if len(names) > MAX_EVALUATIONS:
        missing.append(f"{EVALUATIONS}: the newest {MAX_EVALUATIONS} of {len(names)} are shown")
    found = []
    for name in names[-MAX_EVALUATIONS:]:
        try:
            found.append(_measured(read_record(folder, f"{EVALUATIONS}/{name}")))
        except read_errors() as e:
            missing.append(f"{EVALUATIONS}/{name}: {one_line(e)}".replace(f"{folder.url}/", ""))
    return sorted(found, key=lambda one: one.step)


def _measured(record: dict[str, Any]) -> Measured:
    """Raises:
    UserError: it is no record of ours.
    """
    try:
        return _parsed(record)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise UserError(f"no evaluation ({one_line(e)})") from None


def _parsed(record: dict[str, Any]) -> Measured:
    values, intervals = {}, {}
    for name, one in list(record["figures"].items())[:MAX_FIGURES]:
        value = number(one["value"]) if one["value"] is not None else None
        if value is None or not math.isfinite(value):
            continue
        values[str(name)[:60]] = value
        interval = one.get("interval")
        if isinstance(interval, dict):
            low, high = number(interval.get("low")), number(interval.get("high"))
            if low is not None and high is not None:
                intervals[str(name)[:60]] = (low, high)
    return Measured(int(record["step"]), str(record["definition"])[:40], record, values, intervals)


def quality(runs: Sequence[tuple[str, Sequence[Measured]]], swatch: Callable[[int], str] = lambda i: "") -> str:
    """A table for each definition, those with the newest evaluations first; a row an evaluation."""
    definitions: dict[str, list[tuple[int, str, Measured]]] = {}
    for i, (name, measured) in enumerate(runs):
        for one in measured:
            definitions.setdefault(one.definition, []).append((i, name, one))
    tables = []
    for rows in sorted(definitions.values(), key=lambda rows: -max(one.step for _, _, one in rows)):
        names = list(dict.fromkeys(name for _, _, one in rows for name in one.values))
        first = rows[0][2].record
        counts = _mapping(first.get("counts"))
        networks = ", ".join(
            f"{text(_mapping(network).get('name'), 40)} {text(str(_mapping(network).get('sha256', ''))[:8])}"
            for network in _listed(first.get("networks"))
        )
        about = (
            f"{text(count(counts.get('generated', '?'), 'picture'))} against "
            f"{text(count(counts.get('real', '?'), 'real image'))} of "
            f"{text(first.get('reference'), 200)} at {text(first.get('size'), 10)} px"
            + (f"; features of {networks}" if networks else "")
            + f". Definition {text(first.get('definition'), 40)}: figures of another one do not compare."
        )
        head = [
            *(["run"] if len(runs) > 1 else []),
            "step",
            "weights",
            "drawn by",
            *(text(n, 60) for n in names),
            "when",
        ]
        body = [_row(swatch(i) + text(run, 60) if len(runs) > 1 else None, one, names) for i, run, one in rows]
        tables.append(f'<p class="about">{about}</p>{table(head, body, label="Image quality")}')
    return section("quality", "Image quality", "".join(tables)) if tables else ""


def _row(run: str | None, one: Measured, names: Sequence[str]) -> list[str]:
    sampling = _mapping(one.record.get("sampling"))
    drawn = (
        f"{sampling.get('sampler', '?')}, {sampling.get('steps', '?')} steps, guidance {sampling.get('guidance', '?')}"
    )
    cut = one.record.get("truncated")
    if isinstance(cut, int) and cut > 0:
        drawn += f"; {count(cut, 'prompt')} longer than the text encoder takes, and cut"
    cells = []
    for name in names:
        shown = f"<b>{figure(one.values.get(name))}</b>"
        if name in one.intervals:
            low, high = one.intervals[name]
            shown += f"<br><small>{figure(low)} to {figure(high)}</small>"
        cells.append(shown)
    when = number(one.record.get("time"))
    last = text(moment(when)) if when else "-"
    return [
        *([run] if run is not None else []),
        figure(one.step),
        text(one.record.get("weights"), 60),
        text(drawn),
        *cells,
        last,
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value[:10] if isinstance(value, list) else []
