"""`StepPlan(step)`: all that is decided about a step before it runs. A pure function of config, seed, datasets and step,
so that the loader's processes plan for themselves and a resume needs only the step. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.plan import MixSegment, Mixture, SampleRef
from trainer.config import PhaseConfig, RunConfig
from trainer.phases import Schedule, learning_rate


@dataclass(frozen=True)
class StepPlan:
    step: int
    phase: PhaseConfig
    phase_index: int
    learning_rate: float
    position: int
    """Stream position of the global batch's first image."""
    ends_phase: bool


class StepPlanner:
    def __init__(self, config: RunConfig, shard_sizes: Mapping[str, Sequence[int]]) -> None:
        """`shard_sizes`: samples in each shard, by dataset."""
        self.schedule = Schedule(config.phases)
        self._warmup_steps = config.optim.warmup_steps
        everything = dict.fromkeys(shard_sizes, 1.0)
        self._mixture = Mixture(
            shard_sizes,
            seed=config.seed,
            window_shards=config.data.shuffle_window_shards,
            segments=[
                MixSegment(self.schedule.first_position(i), phase.data_mix or everything)
                for i, phase in enumerate(config.phases)
            ],
        )

    def plan(self, step: int) -> StepPlan:
        place = self.schedule.at(step)
        return StepPlan(
            step=step,
            phase=place.phase,
            phase_index=place.phase_index,
            learning_rate=learning_rate(place.phase, step, self._warmup_steps),
            position=place.position,
            ends_phase=self.schedule.is_last_of_phase(step),
        )

    def refs(self, position: int, count: int) -> tuple[SampleRef, ...]:
        """The samples at `count` stream positions; apart from the plan, as the workers alone need them."""
        return self._mixture.refs(position, count)
