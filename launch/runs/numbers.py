"""Time left and goodput of a run. Pure functions of what its folder says. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from launch.runs.read import Point, RunFacts, earlier_jobs, ended_at, seconds
from trainer.config import PhaseConfig
from trainer.phases import Schedule

WINDOW = 20
"""Records whose median speed is a phase's: one that a compilation or a slow disk has made slow says nothing of the rest."""


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


def goodput(facts: RunFacts, *, now: float, alive: bool) -> float | None:
    """Productive training time over the time that the run took, 0 to 1.

    Productive are the seconds of the training steps that stand, waiting for data included. Each step counts once: the
    trainer takes its clock back to the checkpoint together with the step, so what a crash or a roll back has lost is not
    in it. Steps that were refused (not finite, or spikes) are taken off as so many average steps. Not productive are
    therefore: steps done again, starting up to the first step, saving that holds the steps up, samples and evaluations,
    waiting to be queued again, and hangs. What compiles within a step is part of its time.

    The time is counted from the first start: to now while a job lives, else to the job's end as recorded, else to the last
    record. Between the end of one job and the next submission, when nobody wanted it to run, the clock stands still.

    None before the first record, or where its records are of an earlier version that kept no clock.
    """
    last = facts.last
    if last is None or last.train_seconds is None or facts.first_start is None or last.step <= 0:
        return None
    end = now if alive else max(ended_at(facts.job) or 0.0, last.time)
    wall_s = end - facts.first_start - _idle_s(facts.job or {})
    if wall_s <= 0:
        return None
    refused = min(1.0, last.steps_skipped / last.step)
    return min(1.0, last.train_seconds * (1.0 - refused) / wall_s)


def _idle_s(job: dict[str, Any]) -> float:
    """Seconds between the ends of earlier jobs and the submissions that followed."""
    jobs = [*earlier_jobs(job), job]
    idle = 0.0
    for before, after in pairwise(jobs):
        end, begin = ended_at(before), seconds(after.get("submitted_at"))
        if end is not None and begin is not None:
            idle += max(0.0, begin - end)
    return idle
