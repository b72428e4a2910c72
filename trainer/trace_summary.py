"""What a trace of some steps says, on one page: where the time goes, when a device has nothing to do, and which communication
nothing hides. No torch: a trace is handed in as spans."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Interval = tuple[float, float]
SHOWN = 15
"""Operations in the table."""
GAPS = 3
"""Longest waits that are told."""


@dataclass(frozen=True)
class Span:
    """Something that took a while. Times are microseconds of one clock."""

    name: str
    begin: float
    end: float
    kind: Literal["stage", "host", "device", "communication", "wait"]
    """host: an operation on the processor; device: a kernel or copy on the GPU; communication: a collective, where it runs;
    wait: the host waits for the device."""
    own: float = 0.0
    """Microseconds of it that are of no operation within it."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points, as intervals apart from each other and in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Of a union."""
    return sum(end - begin for begin, end in intervals)


def without(these: Iterable[Interval], those: Iterable[Interval]) -> list[Interval]:
    """What of `these` no one of `those` covers."""
    left: list[Interval] = []
    covers, i = union(those), 0
    for begin, end in union(these):
        while i < len(covers) and covers[i][1] <= begin:
            i += 1
        j = i
        while j < len(covers) and covers[j][0] < end:
            if covers[j][0] > begin:
                left.append((begin, covers[j][0]))
            begin = max(begin, covers[j][1])
            j += 1
        if begin < end:
            left.append((begin, end))
    return left


@dataclass(frozen=True)
class Operation:
    name: str
    calls: float
    """A step."""
    ms: float
    """A step, without what it calls."""


@dataclass(frozen=True)
class Summary:
    """Of a window of whole steps."""

    num_steps: int
    step_ms: float
    idle: float
    """Share of the window in which the GPU, or without one this process, computes nothing; what only communicates is idle."""
    communication_ms: float
    """A step, whether hidden or not."""
    exposed_ms: float
    """A step: communication beside which nothing is computed."""
    kernels: float
    """A step; 0 without a GPU."""
    waits: float
    """A step: how often the host waits for the device, or reads a value."""
    stages_ms: dict[str, float]
    """A step, of the host: on a GPU, when work is queued and not when it is done."""
    operations: list[Operation]
    """The most costly first."""
    gaps: list[tuple[float, str, str]]
    """Longest times in which nothing is computed: ms, the operation before, and the one after."""


def summarise(spans: Sequence[Span], window: Interval, num_steps: int) -> Summary:
    """
    Args:
        window: begin and end of the steps, in the spans' microseconds; what lies outside does not count.
    """
    inside = [span for span in spans if span.begin >= window[0] and span.end <= window[1]]
    on_device = any(span.kind == "device" for span in inside)
    work = [span for span in inside if span.kind == ("device" if on_device else "host")]
    computing = union((span.begin, span.end) for span in work)
    talking = union((span.begin, span.end) for span in inside if span.kind == "communication")
    per_step = 1e-3 / num_steps
    totals: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, float] = defaultdict(float)
    for span in inside:
        if span.kind == "stage":
            stages[span.name] += (span.end - span.begin) * per_step
        elif span.kind == "communication" or ((span.kind == "device") == on_device and span.kind != "wait"):
            totals[span.name].append(span.end - span.begin if span.kind == "communication" else span.own)
    operations = [Operation(name, len(own) / num_steps, sum(own) * per_step) for name, own in totals.items()]
    duration = window[1] - window[0]
    return Summary(
        num_steps=num_steps,
        step_ms=duration * per_step,
        idle=1 - length(computing) / duration,
        communication_ms=length(talking) * per_step,
        exposed_ms=length(without(talking, computing)) * per_step,
        kernels=len(work) / num_steps if on_device else 0.0,
        waits=sum(span.kind == "wait" for span in inside) / num_steps,
        stages_ms=dict(stages),
        operations=sorted(operations, key=lambda operation: -operation.ms),
        gaps=_gaps(work, computing),
    )


def _gaps(work: Sequence[Span], computing: Sequence[Interval]) -> list[tuple[float, str, str]]:
    longest = sorted(itertools.pairwise(computing), key=lambda pair: pair[0][1] - pair[1][0])[:GAPS]
    # of several that end, or begin, at one time the outermost says most
    before = {span.end: span.name for span in sorted(work, key=lambda span: -span.begin)}
    after = {span.begin: span.name for span in sorted(work, key=lambda span: span.end)}
    return [((b[0] - a[1]) * 1e-3, before[a[1]], after[b[0]]) for a, b in longest]


def page(summary: Summary, title: str, device: str, trace: str) -> str:
    """Markdown. `trace`: the file that it is of."""
    s, table = summary, []
    for operation in s.operations[:SHOWN]:
        share = operation.ms / s.step_ms
        table.append(f"| `{operation.name[:80]}` | {operation.calls:,.4g} | {operation.ms:.2f} | {share:.1%} |")
    rest = s.operations[SHOWN:]
    if rest:
        ms = sum(operation.ms for operation in rest)
        calls = sum(operation.calls for operation in rest)
        table.append(f"| {len(rest)} others | {calls:,.4g} | {ms:.2f} | {ms / s.step_ms:.1%} |")
    stages = [
        f"| {name} | {ms:.2f} | {ms / s.step_ms:.1%} |" for name, ms in sorted(s.stages_ms.items(), key=lambda i: -i[1])
    ]
    gaps = [f"- {ms:.2f} ms after `{before[:80]}`, before `{after[:80]}`" for ms, before, after in s.gaps]
    counts = f"{s.kernels:,.0f} kernels; the host waits for the GPU {s.waits:,.3g} times" if s.kernels else (
        f"{s.waits:,.3g} values read by the host"
    )  # fmt: skip
    return "\n".join((
        f"# {title}",
        "",
        f"{s.num_steps} steps on {device}, {s.step_ms:.2f} ms each while they were traced. The whole trace is `{trace}`: open "
        "it in https://ui.perfetto.dev or chrome://tracing.",
        "",
        "| of a step | |", "|---|---|",
        f"| computing | {1 - s.idle:.1%} |",
        f"| idle, communication that nothing hides included | {s.idle:.1%} |",
        f"| communication | {s.communication_ms:.2f} ms |",
        f"| of it exposed: nothing is computed beside it | {s.exposed_ms:.2f} ms ({s.exposed_ms / s.step_ms:.1%}) |",
        f"| {counts} | |",
        "",
        "## Stages",
        "",
        "By the host's clock" + (": when work is queued, not when the GPU does it." if s.kernels else "."),
        "",
        "| stage | ms a step | share |", "|---|---|---|",
        *stages,
        "",
        "## Operations",
        "",
        "Time of their own, without what they call" + (", on the GPU." if s.kernels else "; of all threads."),
        "",
        "| operation | calls a step | ms a step | share |", "|---|---|---|---|",
        *table,
        "",
        "## Longest times without a computation",
        "",
        *(gaps or ["None."]),
        "",
    ))  # fmt: skip
