"""What a run tells of its steps: metrics on every rank; records and lines on rank 0."""

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer import metric_names
from trainer.metrics import Exporter, LossMeter, peak_memory_bytes
from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.run_folder import JsonlWriter
from trainer.step_plan import StepPlan


class Reports:
    """Counts at each step, tells once an interval."""

    def __init__(self, world: World, exporter: Exporter, records: JsonlWriter | None, total_steps: int) -> None:
        """`records`: where rank 0 writes a line an interval; None on other ranks."""
        self.exporter = exporter
        self._world, self._records, self._total_steps = world, records, total_steps
        self._losses = LossMeter(world.device)
        self._images = 0
        self._seconds = 0.0
        self._captions_cut = 0

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

    def flush(self) -> None:
        """What is recorded of a step must be there when the step is durable."""
        if self._records:
            self._records.flush()

    def add(self, terms_B: dict[str, Tensor], skip: Tensor) -> None:
        """A step's loss terms, on the device; those of a refused step do not count."""
        self._losses.add(terms_B, skip)

    def forget(self) -> None:
        """Leave out the losses since the last report. A collective."""
        self._losses.take()

    def count(self, step: int, images: int, waited: float, computed: float) -> None:
        """A step is done: `waited` seconds for data, `computed` for the rest."""
        self._images += images
        self._seconds += waited + computed
        of = self.exporter.of
        of(metric_names.STEP).set(step)
        of(metric_names.IMAGES).inc(images)
        of(metric_names.LAST_STEP).set_to_current_time()
        of(metric_names.DATA_WAIT).inc(waited)
        if self._world.is_main:
            of(metric_names.STEP_SECONDS, "data").observe(waited)
            of(metric_names.STEP_SECONDS, "total").observe(waited + computed)

    def tell(
        self, plan: StepPlan, progress: Progress, *, gradient_norm: float, update_ratio: float | None, captions_cut: int
    ) -> None:
        """Means over the interval. A collective; waits for the device."""
        losses = self._losses.take()
        if not self._images:  # told at this very step already
            return
        speed = self._images / self._seconds if self._seconds else 0.0
        self._images, self._seconds = 0, 0.0
        memory = peak_memory_bytes(self._world.device)
        of = self.exporter.of
        for term, value in losses.items():
            of(metric_names.LOSS, term).set(value)
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
                "images_per_s": speed,
                "train_seconds": progress.train_seconds,
                "learning_rate": plan.learning_rate,
                "update_ratio": _finite(update_ratio),
                "gradient_norm": _finite(gradient_norm),
                "steps_skipped": progress.steps_skipped,
                "roll_backs": progress.roll_backs,
                "peak_memory_bytes": memory,
                "loss": losses,
            }
        )
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items() if metric_names.shown_in_lines(name))
        self.print(f"step {progress.step}/{self._total_steps}  {plan.phase.name}  {text}  {speed:.1f} images/s")


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
