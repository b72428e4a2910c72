"""What a run does with its image evaluation: when it says what, where it is written, and that a stop ends it."""

import time
from collections.abc import Callable
from typing import Any

from trainer.activity import Activity
from trainer.errors import UserError
from trainer.evaluate.image_evaluation import ImageEvaluation
from trainer.evaluate.judged_sets import Stopped
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.reports import Reports
from trainer.run_folder import RunFolder
from trainer.stopping import Interrupted

SAY_S = 30.0
"""Between two lines of progress."""


class ImageAction:
    def __init__(
        self, evaluation: ImageEvaluation, world: World, folder: RunFolder, reports: Reports, activity: Activity,
        stop: StopRequest,
    ) -> None:  # fmt: skip
        self._evaluation, self._world, self._folder, self._reports = evaluation, world, folder, reports
        self._activity, self._stop = activity, stop
        self._said = 0.0

    def begin(self) -> None:
        """Real images and prompts, before the first step. Where the run is asked to stop meanwhile, the trainer hears of it."""
        self._said = time.monotonic()
        try:
            lines = self._evaluation.prepare(self._reports.note, lambda *how_far: self._advance("init", *how_far))
        except Stopped:
            return
        for line in lines:
            self._reports.note(line)

    def __call__(self, step: int, name: str, go_on: Callable[[], None] | None = None) -> dict[str, Any]:
        """After `step` steps, on the averaged weights. Returns what the summary has of it.

        Args:
            name: of the file.
            go_on: absent, at the end of the run, all ranks ask one another.

        Raises:
            Interrupted: on all ranks, when the run is asked to stop.
        """
        go_on = go_on or self._go_on
        go_on()
        self._said = time.monotonic()
        try:
            found = self._evaluation.measure(step, go_on, lambda *how_far: self._advance("other", *how_far))
        except UserError as e:
            # settings were proven at the start: this is of these weights, and later ones may draw better
            self._reports.note(f"WARNING: no image evaluation at step {step}: {e}")
            return {}
        self._reports.evaluated(step, found.values, found.in_words())
        if self._world.is_main:
            self._folder.write_json(*found.record)
            self._folder.write_json(f"evaluation/images-{name}.json", {"step": step, **found.numbers})
        return found.summary()

    def _go_on(self) -> None:
        if self._world.any(self._stop.received is not None):
            raise Interrupted

    def _advance(self, state: str, what: str, done: int, total: int) -> None:
        # the watchdog counts from here anew: the whole may take hours
        self._activity.doing(f"{what} of the image evaluation", state)
        if time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            self._reports.print(f"image evaluation: {what}, {done} of {total}")
