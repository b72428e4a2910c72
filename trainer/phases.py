"""The phase schedule: which phase a step belongs to and where in the sample stream it begins. No torch.

Pure functions of the config, so that the loader can prefetch across a phase's end and a resume needs only the step.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trainer.config import PhaseConfig


@dataclass(frozen=True)
class PhaseStep:
    """A step's place in the schedule."""

    phase: PhaseConfig
    phase_index: int
    step_in_phase: int
    position: int
    """Stream position of the first image of the global batch: images seen before this step."""


class Schedule:
    def __init__(self, phases: Sequence[PhaseConfig]) -> None:
        self.phases = tuple(phases)
        self._ends = list(accumulate(phase.steps for phase in phases))
        images = accumulate((phase.steps * phase.batch_size for phase in phases), initial=0)
        self._first_positions = list(images)[:-1]
        self.total_steps = self._ends[-1]

    def at(self, step: int) -> PhaseStep:
        """The place of `step`, 0 <= step < total_steps."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the schedule of {self.total_steps} steps")
        i = bisect.bisect_right(self._ends, step)
        step_in_phase = step - (self._ends[i] - self.phases[i].steps)
        position = self._first_positions[i] + step_in_phase * self.phases[i].batch_size
        return PhaseStep(self.phases[i], i, step_in_phase, position)

    def beginnings(self) -> Iterator[tuple[int, int, PhaseConfig]]:
        """(first step, stream position of its first image, phase) of each phase."""
        first_steps = [0, *self._ends[:-1]]
        return zip(first_steps, self._first_positions, self.phases, strict=True)

    def is_last_of_phase(self, step: int) -> bool:
        return step + 1 in self._ends


def learning_rate(place: PhaseStep, step: int, warmup_steps: int) -> float:
    """The phase's rate at a step: by the phase's schedule, warmed up linearly over the run's first `warmup_steps`."""
    run_warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return place.phase.learning_rate * run_warmup * rate_factor(place.phase, place.step_in_phase)


def rate_factor(phase: PhaseConfig, step: int) -> float:
    """The phase's schedule at its own `step`: 1 where the rate is whole."""
    rate, last = phase.rate_schedule, phase.steps - 1
    if step < rate.warmup_steps:
        return (step + 1) / rate.warmup_steps
    if rate.kind == "cosine":  # Loshchilov & Hutter 2017, eq. 5, one period without restart
        done = (step - rate.warmup_steps) / max(1, last - rate.warmup_steps)
        return rate.final_factor + (1.0 - rate.final_factor) * (1.0 + math.cos(math.pi * done)) / 2
    if rate.kind == "wsd":  # warm-up, stable, decay (Hu et al. 2024, eq. 1), decaying linearly
        left = min(1.0, (last - step) / rate.decay_steps)
        return rate.final_factor + (1.0 - rate.final_factor) * left
    return 1.0
