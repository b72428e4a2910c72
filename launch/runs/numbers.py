"""Time left and goodput of a run. Pure functions of what its folder says. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from launch.runs.read import Point, RunFacts, ended_at
from trainer.config import PhaseConfig
from trainer.goodput import ratio, totals_until
from trainer.phases import Schedule

WINDOW = 20
"""Records whose median speed is a phase's: one that a compilation or a slow disk has made slow says nothing of the rest."""
SILENT_S = 60.0
"""After its last word a start that should write every ten seconds is taken to be down."""


@dataclass(frozen=True)
class TimeLeft:
    seconds: float
    measured: bool
    """False where a phase is still to come whose speed is not known: then it is taken from the pixels of its images."""


def time_left(phases: Sequence[PhaseConfig], points: Sequence[Point]) -> TimeLeft | None:
    """Of the steps that the schedule still has, at each phase's images/s; None before there is a speed.

    A phase that this attempt has not seen is taken to be slower, or faster, than the newest one as its images have more
    pixels, or fewer. Saving, samples and restarts to come are not counted.
    """
    speeds = _speeds(points)
    if not points or points[-1].phase not in speeds:
        return None
    schedule, step = Schedule(phases), points[-1].step
    resolutions = {phase.name: phase.resolution for phase in phases}
    newest = points[-1].phase
    if newest not in resolutions:
        return None
    left_s, measured = 0.0, True
    for first_step, _, phase in schedule.beginnings():
        steps = first_step + phase.steps - max(step, first_step)
        if steps <= 0:
            continue
        speed = speeds.get(phase.name)
        if speed is None:
            measured = False
            speed = speeds[newest] * (resolutions[newest] / phase.resolution) ** 2
        left_s += steps * phase.batch_size / speed
    return TimeLeft(left_s, measured)


def _speeds(points: Sequence[Point]) -> dict[str, float]:
    """Images/s of each phase, from its newest records."""
    by_phase: dict[str, list[float]] = {}
    for point in points:
        if point.images_per_s > 0:
            by_phase.setdefault(point.phase, []).append(point.images_per_s)
    return {phase: median(speeds[-WINDOW:]) for phase, speeds in by_phase.items()}


def seconds_by_state(facts: RunFacts, *, now: float, alive: bool) -> dict[str, float]:
    """Of the run's ledger (trainer/goodput.py), to now while a job lives, else to the job's end; empty where no start has kept
    one. Between the end of one job and the next submission, when nobody wanted it to run, the clock stands still.

    What a start does since its last word is not known yet: only one that is silent for longer is down.
    """
    if facts.goodput is None:
        return {}
    end = now if alive else ended_at(facts.job) or 0.0
    if alive and now - (facts.goodput.first + facts.goodput.end_s) <= SILENT_S:
        return facts.goodput.totals()
    return totals_until(facts.goodput, end, facts.goodput_traces)


def goodput(facts: RunFacts, *, now: float, alive: bool) -> float | None:
    """Share of that time, 0 to 1, that went into steps that no earlier start had done; None where there is no ledger."""
    return ratio(seconds_by_state(facts, now=now, alive=alive))
