"""`StepPlan(step)`: all that is decided about a step before it runs. A pure function of config, seed, datasets and step,
so that the loader's processes plan for themselves and a resume needs only the step. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.buckets import shape_of
from data.epochs import ClassRows
from data.plan import BucketedMixture, MixSegment, Mixture, Plan, SampleRef
from data.schema import Bucket
from trainer.config import PhaseConfig, RunConfig, size_multiple
from trainer.phases import Schedule, learning_rate


@dataclass(frozen=True)
class StepPlan:
    step: int
    phase: PhaseConfig
    phase_index: int
    phase_step: int
    """Steps done since the phase began."""
    learning_rate: float
    position: int
    """Stream position of the global batch's first image."""
    begins_phase: bool
    ends_phase: bool


class StepPlanner:
    def __init__(
        self,
        config: RunConfig,
        shard_sizes: Mapping[str, Sequence[int]],
        passed_over: Sequence[tuple[int, int]] = (),
        *,
        buckets: Mapping[str, Sequence[Bucket]] | None = None,
        classes: Mapping[str, ClassRows] | None = None,
    ) -> None:
        """
        Args:
            shard_sizes: samples in each shard, by dataset.
            buckets: of each dataset, where batches are of one aspect bucket.
            classes: of the datasets that are drawn by class.
            passed_over: (step, images): from that step on the stream is so many images further, because a roll back
                passed over them. What happened at run time, and so part of the checkpoint.
        """
        self._config, self._shard_sizes, self._passed_over = config, shard_sizes, tuple(passed_over)
        self._buckets, self._classes = buckets, classes
        self.schedule = Schedule(config.phases)
        self._warmup_steps = config.optim.warmup_steps
        everything = dict.fromkeys(shard_sizes, 1.0)
        segments = [
            # A roll back to a phase's first step passes over images of that phase: it begins where it did.
            MixSegment(first + self._shift_at(first_step - 1), phase.data_mix or everything, phase.batch_size)
            for first_step, first, phase in self.schedule.beginnings()
        ]
        seed, window_shards = config.seed, config.data.shuffle_window_shards
        self._mixture: Plan
        if buckets is None:
            self._mixture = Mixture(
                shard_sizes, seed=seed, window_shards=window_shards, segments=segments, classes=classes
            )
        else:
            self._mixture = BucketedMixture(
                shard_sizes, buckets, seed=seed, window_shards=window_shards, segments=segments, classes=classes
            )
        self._aspects = {b.name: b.aspect for of_dataset in (buckets or {}).values() for b in of_dataset}
        self._multiple = size_multiple(config.task)

    def passing_over(self, passed_over: Sequence[tuple[int, int]]) -> "StepPlanner":
        """The same plan with other images passed over."""
        return StepPlanner(self._config, self._shard_sizes, passed_over, buckets=self._buckets, classes=self._classes)

    def _shift_at(self, step: int) -> int:
        return sum(images for since, images in self._passed_over if since <= step)

    def plan(self, step: int) -> StepPlan:
        place = self.schedule.at(step)
        return StepPlan(
            step=step,
            phase=place.phase,
            phase_index=place.phase_index,
            phase_step=place.step_in_phase,
            learning_rate=learning_rate(place, step, self._warmup_steps),
            position=place.position + self._shift_at(step),
            begins_phase=place.step_in_phase == 0,
            ends_phase=self.schedule.is_last_of_phase(step),
        )

    def shapes(self, resolution: int) -> dict[str, tuple[int, int]]:
        """(height, width) in pixels of the images of each aspect bucket; empty where all are squares."""
        return {name: shape_of(aspect, resolution, self._multiple) for name, aspect in self._aspects.items()}

    def shape(self, plan: StepPlan) -> tuple[int, int] | None:
        """(height, width) in pixels of a step's images; None: squares of the phase's resolution."""
        bucket = self._mixture.bucket_at(plan.position)
        return None if bucket is None else shape_of(self._aspects[bucket], plan.phase.resolution, self._multiple)

    def refs(self, position: int, count: int) -> tuple[SampleRef, ...]:
        """The samples at `count` stream positions; apart from the plan, as the workers alone need them."""
        return self._mixture.refs(position, count)
