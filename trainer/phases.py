"""The phase schedule: which phase a step belongs to and where in the sample stream it begins. No torch.

Pure functions of the config, so that the loader can prefetch across a phase's end and a resume needs only the step.
"""

import bisect
from collections.abc import Sequence
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
        images = list(accumulate((phase.steps * phase.batch_size for phase in phases), initial=0))
        self._first_positions = images[:-1]
        self.total_steps = self._ends[-1]
        self.total_images = images[-1]

    def at(self, step: int) -> PhaseStep:
        """The place of `step`, 0 <= step < total_steps."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the schedule of {self.total_steps} steps")
        i = bisect.bisect_right(self._ends, step)
        step_in_phase = step - (self._ends[i] - self.phases[i].steps)
        position = self._first_positions[i] + step_in_phase * self.phases[i].batch_size
        return PhaseStep(self.phases[i], i, step_in_phase, position)

    def images_before(self, step: int) -> int:
        """Images seen before `step`, 0 <= step <= total_steps."""
        return self.total_images if step == self.total_steps else self.at(step).position

    def first_position(self, phase_index: int) -> int:
        """Stream position at which a phase begins."""
        return self._first_positions[phase_index]

    def is_last_of_phase(self, step: int) -> bool:
        return step + 1 in self._ends


def learning_rate(phase: PhaseConfig, step: int, warmup_steps: int) -> float:
    """The phase's rate, warmed up linearly over the first `warmup_steps` of the run."""
    return phase.learning_rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else phase.learning_rate
