"""What a run comes to, in words and figures: for its cards, and for a table of several. No torch."""

import math
from collections import Counter
from dataclasses import dataclass

from launch.report.gather import RunReport
from launch.report.html import count, figure
from launch.runs.read import ended_at
from launch.runs.state import STARTING
from launch.runs.text import duration, moment

CALM, BUSY, BAD = "calm", "busy", "bad"


@dataclass(frozen=True)
class Fact:
    title: str
    value: str
    detail: str = ""
    share: float | None = None
    """0 to 1: a bar."""


def mood(run: RunReport) -> str:
    """Of the state's word: `calm`, `busy` or `bad`."""
    word = run.row.state.word
    if word.startswith(("lost", "damaged", "stopped")):
        return BAD
    return BUSY if run.row.state.alive else CALM


def facts_of(run: RunReport) -> list[Fact]:
    """Always the same, in the same order; `-` for what is not known."""
    last = run.facts.last
    return [
        _progress(run),
        _images(run),
        _loss(run),
        _speed(run),
        _goodput(run),
        _restarts(run),
        _cost(run),
        _time(run, last),
    ]


def _progress(run: RunReport) -> Fact:
    last = run.facts.last
    if last is None:
        return Fact("Step", "-", "no step recorded")
    share = min(1.0, max(0.0, last.step / last.total_steps)) if last.total_steps > 0 else None
    by = ", by the start before" if run.row.state.word == STARTING else ""
    return Fact("Step", f"{figure(last.step)} / {figure(last.total_steps)}", f"phase {last.phase}{by}", share)


def _images(run: RunReport) -> Fact:
    raw = run.facts.last.raw if run.facts.last else {}
    seen, done = raw.get("images"), raw.get("images_total")
    again = done - seen if isinstance(done, int | float) and isinstance(seen, int | float) else 0
    return Fact("Images", figure(seen), f"{figure(again)} more in repeated steps" if again > 0 else "trained on")


def _loss(run: RunReport) -> Fact:
    losses = run.facts.last.raw.get("loss") if run.facts.last else None
    if not isinstance(losses, dict) or not losses:
        return Fact("Loss", "-", "none recorded")
    name = "loss" if "loss" in losses else next(iter(losses))
    other = next((term for term in ("denoising", "reconstruction", "lpl") if term in losses and term != name), None)
    return Fact("Loss", figure(losses[name]), f"{other} {figure(losses[other])}" if other else str(name))


def _speed(run: RunReport) -> Fact:
    last = run.facts.last
    if last is None:
        return Fact("Speed", "-", "images/s")
    mfu = last.raw.get("mfu")
    told = f", MFU {100 * mfu:.1f} %" if isinstance(mfu, int | float) and math.isfinite(mfu) else ""
    return Fact("Speed", f"{last.images_per_s:.4g}", f"images/s{told}")


def _goodput(run: RunReport) -> Fact:
    share = run.row.goodput
    if share is None:
        return Fact("Goodput", "-", "no ledger kept")
    wall_s = math.fsum(run.row.seconds.values())
    return Fact("Goodput", f"{100 * share:.1f} %", f"of {duration(wall_s)}", share)


def _restarts(run: RunReport) -> Fact:
    kinds = Counter(event.kind for event in run.events if event.kind in ("preempted", "crash", "hang", "roll back"))
    # a hang is a restart's reason and has a record of its own
    words = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    return Fact(
        "Restarts", str(run.row.restarts), words or ("why is not recorded" if run.row.restarts else "none was needed")
    )


def _cost(run: RunReport) -> Fact:
    spent = run.rank_seconds
    unit = "GPU-hours" if run.on_gpus else "rank-hours, on CPU"
    if spent is None:
        return Fact("Cost", "-", "no start recorded")
    hours = spent / 3600
    ranks = max((start.ranks for start in run.starts), default=0)
    large = figure(round(hours) if math.isfinite(hours) else None)
    return Fact("Cost", f"{hours:.2f}" if hours < 100 else large, f"{unit}, {count(ranks, 'rank')}")


def _time(run: RunReport, last: object) -> Fact:
    if run.row.left:
        guess = "" if run.row.left.measured else "about "
        return Fact(
            "Time left", guess + duration(run.row.left.seconds), f"until {moment(run.now + run.row.left.seconds)}"
        )
    begin, end = run.facts.first_start, ended_at(run.facts.job) or run.facts.last_activity
    if not begin or end < begin:
        return Fact("Time", "-", "not known")
    return Fact("Time", duration(end - begin), f"until {moment(end)}" if not run.row.state.alive else "so far")
