"""What a run tells of its steps: metrics on every rank; records and lines on rank 0."""

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer import metric_names
from trainer.efficiency import Efficiency
from trainer.exporter import Exporter
from trainer.flops import StepFlops
from trainer.metrics import LossMeter, NoiseMeter, OfRanks, peak_memory_bytes, reduce_together
from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.run_folder import JsonlWriter
from trainer.sinks import Sinks
from trainer.stage_times import Stages, mean_of
from trainer.step_plan import StepPlan


class Reports:
    """Counts at each step, tells once an interval."""

    def __init__(
        self, world: World, exporter: Exporter, records: JsonlWriter | None, total_steps: int, *,
        flops: StepFlops | None = None, peak_flops: float | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            records: where rank 0 writes a line an interval; None on other ranks.
            flops: counts the operations of steps; None: no MFU.
            peak_flops: operations a second of a device, where the config says so.
        """
        self.exporter = exporter
        self.stages = Stages(world.device)
        self.sinks: Sinks | None = None
        self._efficiency = Efficiency(world, exporter, flops or StepFlops(), peak_flops, self.note)
        self._world, self._records, self._total_steps = world, records, total_steps
        self._losses, self._noise = LossMeter(world.device), NoiseMeter(world.device)
        self._of_ranks = OfRanks(world.rank, world.size, world.device)
        self._images = self._steps = 0
        self._seconds = 0.0
        self._captions_cut = 0
        exporter.of(metric_names.PLANNED_STEPS).set(total_steps)

    def print(self, text: str) -> None:
        if self._world.is_main:
            print(text, flush=True)

    def note(self, text: str, **figures: Any) -> None:
        """Something to know besides the steps: printed, and recorded with its figures, so that the launcher shows it."""
        self.print(text)
        if self._records:
            self._records.write({"time": time.time(), "note": text, **figures})

    def evaluated(self, step: int, values: Mapping[str, float], words: str) -> None:
        """An evaluation after `step` steps: exported, printed, and recorded apart from the losses; its words are what the
        launcher shows of it."""
        for name, value in values.items():
            self.exporter.of(metric_names.EVALUATION, name).set(value)
        text = f"evaluation at step {step}:  {words}"
        self.print(text)
        if self._records:
            found = {name: _finite(value) for name, value in values.items()}
            self._records.write({"time": time.time(), "note": text, "evaluation": {"step": step, **found}})

    def validated(self, step: int, terms: Mapping[str, Sequence[float]], words: str) -> None:
        """A validation after `step` steps, by term and noise level: exported, printed, and recorded as an evaluation is."""
        for term, by_level in terms.items():
            for level, value in enumerate(by_level):
                self.exporter.of(metric_names.VALIDATION_LOSS, term, str(level)).set(value)
        text = f"validation at step {step}:  {words}"
        self.print(text)
        if self._records:
            found = {term: [*map(_finite, by_level)] for term, by_level in terms.items()}
            self._records.write({"time": time.time(), "note": text, "validation": {"step": step, "terms": found}})

    def flush(self) -> None:
        """What is recorded of a step must be there when the step is durable."""
        if self._records:
            self._records.flush()

    def add(self, terms_B: dict[str, Tensor], skip: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> None:
        """A step's loss terms, on the device; those of a refused step do not count. `noise`: of `Task.noise_levels`."""
        self._losses.add(terms_B, skip)
        if noise:
            self._noise.add(*noise, skip)

    def forget(self) -> None:
        """Leave out the losses since the last report."""
        self._losses.clear()
        self._noise.clear()

    def count(self, step: int, images: int, waited: float, computed: float, kind: Hashable = None) -> None:
        """A step is done: `waited` seconds for data, `computed` for the rest. `kind`: as its operations were counted."""
        self._images += images
        self._steps += 1
        self._efficiency.count(kind)
        self._seconds += waited + computed
        of = self.exporter.of
        of(metric_names.STEP).set(step)
        of(metric_names.STEPS).inc()
        of(metric_names.IMAGES).inc(images)
        of(metric_names.LAST_STEP).set_to_current_time()
        of(metric_names.DATA_WAIT).inc(waited)

    def tell(
        self, plan: StepPlan, progress: Progress, *, gradient_norm: float, update_ratio: float | None, captions_cut: int
    ) -> None:
        """Means over the interval. A collective; waits for the device."""
        if not self._images:  # told at this very step already
            return
        seconds, speed = self._seconds, self._images / self._seconds if self._seconds else 0.0
        step_s = seconds / self._steps
        self._images, self._steps, self._seconds = 0, 0, 0.0
        memory = peak_memory_bytes(self._world.device)
        stages = self._tell_stages()
        mine = self._of_ranks.totals(step_s, stages.get("data", 0.0), memory)
        sums = reduce_together(self._losses.totals(), self._noise.totals(), mine)
        losses, by_noise = self._losses.means(sums[0]), self._noise.means(sums[1])
        ranks = self._tell_ranks(sums[2])
        efficiency = self._efficiency.tell(seconds)
        of = self.exporter.of
        for term, value in losses.items():
            of(metric_names.LOSS, term).set(value)
        for level, value in by_noise.items():
            of(metric_names.LOSS_BY_NOISE, level).set(value)
        of(metric_names.GRADIENT_NORM).set(gradient_norm)
        of(metric_names.LEARNING_RATE).set(plan.learning_rate)
        if update_ratio is not None:
            of(metric_names.UPDATE_RATIO).set(update_ratio)
        of(metric_names.IMAGES_PER_SECOND).set(speed)
        of(metric_names.PEAK_MEMORY).set(memory)
        self.exporter.clear(metric_names.PHASE)
        of(metric_names.PHASE, plan.phase.name).set(plan.phase_index)
        of(metric_names.CAPTIONS_CUT).inc(captions_cut - self._captions_cut)
        self._captions_cut = captions_cut
        if self._records is None or not losses:
            return
        self._records.write(
            {
                "time": time.time(),
                "step": progress.step,
                "total_steps": self._total_steps,
                "phase": plan.phase.name,
                "images": progress.images,
                **{name: self.exporter.total(metric) for name, metric in metric_names.IN_RECORDS.items()},
                "images_per_s": speed,
                "train_seconds": progress.train_seconds,
                "learning_rate": plan.learning_rate,
                "update_ratio": _finite(update_ratio),
                "gradient_norm": _finite(gradient_norm),
                "steps_skipped": progress.steps_skipped,
                "roll_backs": progress.roll_backs,
                "peak_memory_bytes": memory,
                "loss": losses,
                "loss_by_noise": by_noise,
                "stages": stages,
                "ranks": ranks,
                **efficiency,
            }
        )
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items() if metric_names.shown_in_lines(name))
        if self.sinks:
            self.sinks.write(progress.step, stages)
        self.print(f"step {progress.step}/{self._total_steps}  {plan.phase.name}  {text}  {speed:.1f} images/s")

    def _tell_stages(self) -> Mapping[str, float]:
        """Mean seconds a step of this rank, by stage. The host waits for the device here, as it does for the losses."""
        steps = self.stages.take()
        if self._world.is_main:
            series = {stage: self.exporter.of(metric_names.STEP_SECONDS, stage) for stage in steps[0]} if steps else {}
            for step in steps:
                for stage, seconds in step.items():
                    series[stage].observe(seconds)
        return mean_of(steps)

    def _tell_ranks(self, totals: Tensor) -> dict[str, dict[str, float]]:
        metrics = {"step_s": metric_names.RANKS_STEP, "data_wait_s": metric_names.RANKS_DATA_WAIT,
                   "peak_memory_bytes": metric_names.RANKS_MEMORY}  # fmt: skip
        ranks = dict(zip(metrics, self._of_ranks.statistics(totals), strict=True))
        for name, metric in metrics.items():
            for statistic, value in ranks[name].items():
                self.exporter.of(metric, statistic).set(value)
        return ranks


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
