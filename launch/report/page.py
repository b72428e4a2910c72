"""The whole report: one HTML file that loads nothing. No torch.

Its content security policy allows the two scripts that are in it, by their digests, and no others: what a run folder says
cannot run even where escaping failed.
"""

import base64
import functools
import gzip
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.report import sections
from launch.report.charts import Chart, charts_of
from launch.report.compare import comparison
from launch.report.gather import RunReport
from launch.report.html import count, iso, script_json, text
from launch.report.quality import quality
from launch.report.summary import facts_of, mood
from launch.runs.text import moment

MARK = "<!doctype html>\n<!-- loupe report -->\n"
"""How a file of ours begins."""
HERE = Path(__file__).parent
MAX_SEGMENTS = 1000
MAX_MARKS = 60


def page(runs: Sequence[RunReport], *, live_s: int | None = None) -> str:
    """
    Args:
        live_s: the page loads itself again after so many seconds, and keeps its place.
    """
    charts = charts_of(runs)
    one = runs[0] if len(runs) == 1 else None
    data: dict[str, Any] = {"charts": [_plain(chart) for chart in charts], "liveS": live_s, "single": one is not None}
    data["lastStep"] = max((run.facts.last.step for run in runs if run.facts.last), default=0)
    if one is not None:
        data |= {"timeline": timeline_of(one), "bands": bands_of(one), "marks": marks_of(one)}
        title, body = one.name, _one(one, charts, data["timeline"])
    else:
        title, body = " / ".join(run.name for run in runs), comparison(runs, charts)
    contents = "".join(f'<a href="#{name}">{words}</a>' for name, words in _CONTENTS if f'<section id="{name}"' in body)
    made = f"Made {moment(runs[0].now)}" + (f", again every {live_s} s" if live_s else "")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    plotly, packed = _plotly()
    return (
        f'{MARK}<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script, plotly)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,"><title>{text(title, 100)} - Loupe</title>\n'
        f"<style>{(HERE / 'report.css').read_text(encoding='utf-8')}</style></head>\n"
        f'<body><a class="skip" href="#main">To the report</a><main id="main">\n{_head(runs, made, live=live_s is not None)}'
        f'<nav aria-label="Sections">{contents}</nav>\n{body}</main>\n<p id="status" role="status"></p>\n'
        f"<footer>Loupe run report. {made}. Times are {text(time.strftime('%Z'))}. "
        "In a chart: drag to zoom, double click to see all.</footer>\n"
        f'<script type="application/json" id="data">{script_json(data)}</script>\n'
        f'<script type="application/octet-stream" id="plotly">{packed}</script>\n<script>{script}</script>\n</body></html>\n'
    )


_CONTENTS = (
    ("summary", "Summary"), ("timeline-section", "Timeline"), ("losses", "Losses"), ("samples", "Samples"),
    ("reconstructions", "Reconstructions"), ("evaluation", "Evaluation"), ("quality", "Quality"), ("goodput", "Time"),
    ("speed", "Speed"), ("optimisation", "Optimisation"), ("config", "Config"), ("environment", "Environment"),
    ("starts", "Starts"), ("log", "Log"),
)  # fmt: skip


@functools.cache
def _plotly() -> tuple[str, str]:
    """(plotly's script, as its package brings it; gzipped in base64, 2 MB instead of 5)."""
    from plotly.offline import get_plotlyjs

    # read by the policy as the page's script makes it from the packed one
    script = get_plotlyjs()
    return script, base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    # plotly sets styles; its button for a picture makes a blob
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _head(runs: Sequence[RunReport], made: str, *, live: bool) -> str:
    pulse = '<span class="pulse">live</span>' if live else ""
    if len(runs) > 1:
        made = f'<p class="meta"><span>{made}</span></p>'
        return f'<header><p class="brand">Loupe</p><h1>{len(runs)} runs side by side{pulse}</h1>{made}</header>\n'
    run = runs[0]
    job, state = run.facts.job or {}, run.row.state
    config = run.facts.config.name if run.facts.config else ""
    ranks = f"{count(job.get('nodes'), 'node')} x {count(job.get('gpus_per_node'), 'rank')}" if job else ""
    facts = [f"config {config}" if config and config != run.name else "", str(job.get("cluster") or ""), ranks,
             f"since {moment(run.facts.first_start)}" if run.facts.first_start else "", made]  # fmt: skip
    detail = f'<p class="detail">{text(state.detail, 400)}</p>' if state.detail else ""
    meta = "".join(f"<span>{text(fact)}</span>" for fact in facts if fact)
    return (
        f'<header><p class="brand">Loupe</p><h1>{text(run.name)} '
        f'<span class="pill {mood(run)}">{text(state.word, 40)}</span>{pulse}</h1>'
        f'{detail}<p class="meta">{meta}</p></header>\n'
    )


def _one(run: RunReport, charts: Sequence[Chart], drawn: dict[str, Any]) -> str:
    summary = sections.cards(facts_of(run)) + sections.missing(run, named=False)
    broken = mood(run) == "bad"
    log = sections.end_and_log(run)
    samples_about = "The same prompts and seeds at each step."
    if run.summary.get("prompt_accuracy") is not None:
        chance = run.summary.get("prompt_accuracy_chance") or 0.0
        samples_about += (
            f" Prompt accuracy at the end: {_percent(run.summary['prompt_accuracy'])}, by chance {_percent(chance)}."
        )
    parts = [
        f'<section id="summary" aria-label="Summary">{summary}</section>',
        log if broken else "",
        sections.timeline(run, drawn=bool(drawn["segments"])),
        sections.charts_section("losses", "Losses", charts, tools=sections.SCALE_TOOLS),
        sections.frames("samples", "Samples", [(run.name, run.samples)], samples_about),
        sections.frames(
            "reconstructions", "Reconstructions", [(run.name, run.reconstructions)], "The same images at each step."
        ),
        sections.charts_section("evaluation", "Evaluation", charts),
        quality([(run.name, run.evaluations)]),
        sections.goodput(run),
        sections.charts_section("speed", "Speed", charts),
        sections.charts_section("optimisation", "Optimisation", charts),
        sections.config(run), sections.environment(run), sections.starts(run),
        "" if broken else log,
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _plain(chart: Chart) -> Chart:
    """Plotly takes names as a kind of HTML."""
    traces = [{**trace, "name": text(trace["name"], 60)} for trace in chart["traces"]]
    return {
        **{name: value for name, value in chart.items() if name not in ("section", "about", "title")},
        "traces": traces,
    }


def timeline_of(run: RunReport) -> dict[str, Any]:
    """Bars of what ran when, and what happened."""
    phases = list(dict.fromkeys(phase for start in run.history.starts for phase, _, _ in start.phases))
    begun = {start.number: start.time for start in run.starts}
    ended_at = {start.number: start.time + start.seconds for start in run.starts if start.time and start.seconds}
    segments = []
    for start in run.history.starts[-MAX_SEGMENTS:]:
        begin, first = begun.get(start.number), start.phases[0][1]
        if begin is not None and begin < first:
            segments.append(
                {"phase": "starting", "colour": -1, "from": iso(begin), "to": iso(first), "start": start.number}
            )
        segments += [
            {
                "phase": text(phase, 60),
                "colour": phases.index(phase),
                "from": iso(a),
                "to": iso(b),
                "start": start.number,
            }
            for phase, a, b in start.phases
            if b > a
        ]
        left = ended_at.get(start.number, 0.0)
        if left > start.last_time:
            segments.append(
                {
                    "phase": "saving, ending",
                    "colour": -2,
                    "from": iso(start.last_time),
                    "to": iso(left),
                    "start": start.number,
                }
            )
    shown = ("preempted", "crash", "hang", "roll back", "skipped", "resumed", "ended")
    events = [{"kind": e.kind, "time": iso(e.time), "text": text(e.text, 160)} for e in run.events if e.kind in shown]
    shown_phases = list(dict.fromkeys(text(phase, 60) for phase in phases))
    return {
        "phases": shown_phases,
        "segments": [s for s in segments[-MAX_SEGMENTS:] if s["from"] and s["to"]],
        "events": [e for e in events if e["time"]],
    }


def bands_of(run: RunReport) -> list[dict[str, Any]]:
    """Phases over steps: name, first and last step."""
    rows, steps = run.history.standing(), run.history.column("step")
    bands: list[dict[str, Any]] = []
    for row in rows:
        phase, step = text(run.history.phases[row], 60), int(steps[row])
        if bands and bands[-1]["name"] == phase:
            bands[-1]["to"] = step
        else:
            bands.append({"name": phase, "from": bands[-1]["to"] if bands else 0, "to": step})
    return bands[:MAX_MARKS]


def marks_of(run: RunReport) -> list[dict[str, Any]]:
    """Steps at which something happened to the run."""
    kinds = ("preempted", "crash", "hang", "roll back")
    found = [{"step": e.step, "kind": e.kind} for e in run.events if e.kind in kinds and e.step is not None]
    return found[-MAX_MARKS:]
