"""Sections of the page about one run, as HTML. No torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report.charts import Chart
from launch.report.gather import RunReport, StartFacts
from launch.report.html import count, element, figure, pairs, section, table, text
from launch.report.pictures import Frames
from launch.report.summary import Fact
from launch.runs.read import seconds
from launch.runs.text import duration, moment
from trainer.metric_names import GOODPUT_STATES

MAX_EVENTS_LISTED = 40
MAX_STARTS_LISTED = 30
MAX_HOSTS_LISTED = 16


def cards(facts: Sequence[Fact]) -> str:
    def card(fact: Fact) -> str:
        bar = ""
        if fact.share is not None:
            bar = f'<div class="meter" aria-hidden="true"><i style="width:{100 * fact.share:.2f}%"></i></div>'
        return (
            f'<div class="card"><dt>{text(fact.title)}</dt><dd><b>{text(fact.value)}</b>{bar}'
            f"<small>{text(fact.detail)}</small></dd></div>"
        )

    return f'<dl class="cards">{"".join(map(card, facts))}</dl>'


def missing(run: RunReport, *, named: bool) -> str:
    """What the report lacks."""
    if not run.missing:
        return ""
    items = "".join(f"<li>{text(line, 400)}</li>" for line in run.missing)
    of = f" of {text(run.name)}" if named else ""
    title = f"<summary>{count(len(run.missing), 'thing')}{of} missing or not readable</summary>"
    return f'<details class="missing"{" open" if len(run.missing) <= 4 else ""}>{title}<ul>{items}</ul></details>'


# ----------------------------------------------------------------------------------------------------------- charts


def chart_box(chart: Chart) -> str:
    name, about = chart["id"], chart.get("about") or ""
    ids = f"chart-{text(name)}"
    note = f"<p>{text(about)}</p>" if about else ""
    unit = f' <span class="unit">{text(chart["unit"])}</span>' if chart.get("unit") else ""
    return (
        f'<figure class="chart{" wide" if chart.get("wide") else ""}" aria-labelledby="{ids}-title"><figcaption>'
        f'<h3 id="{ids}-title">{text(chart["title"])}{unit}</h3>{note}</figcaption>'
        f'<div class="plot" id="{ids}" data-chart="{text(name)}" role="img" aria-label="{text(spoken(chart))}"></div></figure>'
    )


def spoken(chart: Chart) -> str:
    """A chart in words, for those who do not see it."""
    parts = []
    for trace in chart["traces"][:12]:
        known = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if y is not None]
        if known:
            parts.append(
                f"{trace['name']}: {figure(known[0][1])} at step {known[0][0]}, {figure(known[-1][1])} at step {known[-1][0]}"
            )
    return f"{chart['title']}. " + "; ".join(parts)


def charts_section(name: str, title: str, charts: Sequence[Chart], *, tools: str = "") -> str:
    of_it = [chart for chart in charts if chart["section"] == name]
    if not of_it:
        return ""
    return section(name, title, f'<div class="grid">{"".join(map(chart_box, of_it))}</div>', tools=tools)


SCALE_TOOLS = (
    '<div class="tools"><fieldset class="switch"><legend class="hidden">Scale of losses</legend>'
    '<label><input type="radio" name="scale" value="log" checked><span>log</span></label>'
    '<label><input type="radio" name="scale" value="linear"><span>linear</span></label></fieldset>'
    '<label class="check"><input type="checkbox" id="smooth" checked> smooth</label></div>'
)

# ------------------------------------------------------------------------------------------------- timeline, goodput


def timeline(run: RunReport, *, drawn: bool) -> str:
    if not drawn and not run.events:
        return ""
    plot = (
        '<figure class="chart wide" aria-label="When which phase was trained">'
        '<div class="plot timeline" id="timeline" role="img" '
        'aria-label="Phases over time; what happened is listed below"></div></figure>'
    )
    rows = [
        (_when(event.time), f'<span class="kind {_kind_class(event.kind)}">{text(event.kind)}</span>',
         figure(event.step) if event.step is not None else "", text(event.text, 300))
        for event in run.events[-MAX_EVENTS_LISTED:]
    ]  # fmt: skip
    before = len(run.events) - len(rows)
    listed = ""
    if rows:
        caption = count(len(run.events), "event") + (f", the newest {len(rows)}" if before else "")
        listed = (
            f"<details{' open' if len(rows) <= 8 else ''}><summary>{caption}</summary>"
            + table(("when", "what", "step", "how"), rows, label="Events")
            + "</details>"
        )
    return section("timeline-section", "Timeline", (plot if drawn else "") + listed)


def _when(time: float | None) -> str:
    return f'<span class="when">{text(moment(time))}</span>' if time else "-"


def _kind_class(kind: str) -> str:
    return {"crash": "bad", "hang": "bad", "roll back": "warn", "skipped": "warn", "warning": "warn"}.get(kind, "calm")


def goodput_bar(shares: Mapping[str, float]) -> str:
    """A bar of seconds by state, and its legend."""
    total = math.fsum(shares.values())
    if total <= 0:
        return ""
    known = [(state, shares.get(state, 0.0)) for state in GOODPUT_STATES if shares.get(state, 0.0) / total > 5e-4]
    bar = "".join(
        f'<i class="state-{state}" style="width:{100 * value / total:.3f}%" title="{state} {100 * value / total:.1f} %"></i>'
        for state, value in known
    )
    legend = "".join(
        f'<li><i class="state-{state}"></i><span>{state}</span><b>{100 * value / total:.1f} %</b>'
        f"<small>{duration(value)}</small></li>"
        for state, value in known
    )
    return f'<div class="goodput"><div class="bar" aria-hidden="true">{bar}</div><ul>{legend}</ul></div>'


def goodput(run: RunReport) -> str:
    if not run.row.seconds:
        return ""
    return section("goodput", "Where the time went", goodput_bar(run.row.seconds))


# ---------------------------------------------------------------------------------------------------------- pictures


def frames(name: str, title: str, runs: Sequence[tuple[str, Frames]], about: str) -> str:
    """One slider for the frames of all runs: each shows its newest one at or before the step."""
    runs = [(run, found) for run, found in runs if found.frames]
    if not runs:
        return ""
    orders = sorted({frame.order for _, found in runs for frame in found.frames})
    labels = {frame.order: frame.label for _, found in runs for frame in found.frames}
    several = len(runs) > 1
    boxes = "".join(
        f'<div class="frames">{f"<h3>{text(run)}</h3>" if several else ""}{_images(found, f"{title} of {run}")}</div>'
        for run, found in runs
    )
    newest = f"<output>{text(labels[orders[-1]])}</output>"
    if len(orders) > 1:
        last, values = len(orders) - 1, " ".join(map(str, orders))
        marks = "|".join(labels[order] for order in orders)
        slider = (
            '<div class="slider"><button type="button" data-by="-1" aria-label="Earlier">&#8592;</button>'
            f'<input type="range" min="0" max="{last}" value="{last}" step="1" data-orders="{values}" '
            f'data-labels="{text(marks, 10_000)}" aria-label="{text(title)} at step" '
            f'aria-valuetext="{text(labels[orders[-1]])}">'
            f'<button type="button" data-by="1" aria-label="Later">&#8594;</button>{newest}</div>'
        )
    else:
        slider = f'<div class="slider">{newest}</div>'
    content = f'<p class="about">{text(about)}</p><div class="player">{slider}<div class="stage">{boxes}</div></div>'
    return section(name, title, content)


def _images(found: Frames, title: str) -> str:
    return "".join(
        f'<img src="{frame.url}" width="{frame.width}" height="{frame.height}" data-order="{frame.order}" '
        f'alt="{text(title)}, {text(frame.label)}"{"" if frame is found.frames[-1] else " hidden"}>'
        for frame in found.frames
    )


# ------------------------------------------------------------------------------------------------- config, environment


def config(run: RunReport) -> str:
    if not run.config_yaml:
        return ""
    if run.differences is None:
        shown = ""
    elif run.differences:
        recipe = text((run.facts.job or {}).get("recipe") or "recipe")
        rows = [
            (f"<code>{text(d.field)}</code>", text(d.values[0], 200), f"<b>{text(d.values[1], 200)}</b>")
            for d in run.differences
        ]
        shown = table(("field", f"recipe {recipe}", "this run"), rows, label="Config against the recipe")
    else:
        shown = '<p class="about">As the recipe has it, field by field.</p>'
    # not `text`: that makes one line of it
    whole = "\n".join(text(line) for line in run.config_yaml.splitlines())
    return section(
        "config", "Config", f'{shown}<details><summary>Whole config</summary><pre tabindex="0">{whole}</pre></details>'
    )


def environment(run: RunReport) -> str:
    if not run.starts:
        return ""
    newest = run.starts[-1].record
    code, versions, system = (_mapping(newest.get(name)) for name in ("code", "versions", "system"))
    listed = newest.get("hosts")
    hosts = listed if isinstance(listed, list) else [newest.get("host")]
    shown = ", ".join(map(str, hosts[:MAX_HOSTS_LISTED])) + (" ..." if len(hosts) > MAX_HOSTS_LISTED else "")
    devices = _mapping(newest.get("devices"))
    commit = str(code.get("commit") or "")[:12]
    facts = pairs([
        ("commit", commit + (", with changes" if code.get("dirty") else "") if commit else None),
        ("loupe", newest.get("loupe")),
        *((name, value) for name, value in {"torch": newest.get("torch"), **versions}.items()),
        ("devices", ", ".join(f"{count} x {name}" for name, count in devices.items()) or newest.get("device")),
        ("hosts", f"{shown} ({newest.get('num_hosts', len(hosts))})"),
        *((name, value) for name, value in system.items()),
        *(_mapping(newest.get("job")).items()), *(_mapping(newest.get("settings")).items()),
    ])  # fmt: skip
    packages = _mapping(newest.get("packages"))
    more = (
        f"<details><summary>{len(packages)} packages</summary>{pairs(packages.items())}</details>" if packages else ""
    )
    return section("environment", "Environment", f'<p class="about">Of the newest start.</p>{facts}{more}')


def starts(run: RunReport) -> str:
    if not run.starts:
        return ""
    steps = {start.number: start.last_step for start in run.history.starts}
    rows = [_start_row(start, steps.get(start.number)) for start in run.starts[-MAX_STARTS_LISTED:]]
    return section(
        "starts", "Starts",
        table(("start", "when", "ranks", "on", "first step after", "lived", "last step"), rows, label="Starts of the run"),
    )  # fmt: skip


def _start_row(start: StartFacts, step: int | None) -> Sequence[str]:
    parts = {str(name): seconds(value) or 0.0 for name, value in _mapping(start.record.get("start_seconds")).items()}
    slowest = max(parts, key=lambda part: parts[part], default="")
    first = f"{sum(parts.values()):.1f} s, most {text(slowest)} {parts[slowest]:.1f} s" if parts else "-"
    return (
        str(start.number), _when(start.time), str(start.ranks or "-"),
        text(start.record.get("host", "-"), 60), first, duration(start.seconds) if start.seconds is not None else "-",
        figure(step) if step is not None else "-",
    )  # fmt: skip


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def end_and_log(run: RunReport) -> str:
    if not run.log:
        return ""
    width = max(len(who) for who, _ in run.log)
    lines = "\n".join(f'<span class="who">{text(who.ljust(width))}</span> {text(line)}' for who, line in run.log)
    return section("log", "Last lines of the log", element("pre", lines, tabindex="0", class_="log"))
