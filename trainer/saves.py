"""When a run's checkpoints are written and read, and what is told of it. What one is: `trainer/checkpoint/`."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from trainer import metric_names
from trainer.activity import Activity
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import CheckpointManager
from trainer.ema_snapshots import Snapshots
from trainer.errors import UserError, one_line
from trainer.exporter import Exporter
from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.reports import Reports


@dataclass
class Saves:
    """Every call but `note` is a collective."""

    checkpoints: CheckpointManager
    world: World
    exporter: Exporter
    reports: Reports
    activity: Activity
    total_steps: int
    every_steps: int
    """From one save to the next."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """All that a checkpoint holds, as it is now."""
    on_saved: Callable[[Progress, int], None] = lambda progress, step: None
    """Told where the run is, and the step of its newest checkpoint, when it has one more or has been restored from it."""
    snapshots: Snapshots | None = None
    """Of the averages, where the run keeps such."""

    def __post_init__(self) -> None:
        self._step = -1
        """Of the save that was begun last, or restored from."""
        self._told: tuple[int, float] | None = None

    def save(self, progress: Progress, *, wait: bool, prepare: Callable[[], None]) -> None:
        """Until everything has been copied and may change, or, with `wait`, until the checkpoint is committed.

        Args:
            prepare: what else belongs to it, called before anything is copied, where something is.
        """
        started = time.perf_counter()
        self.activity.doing("saving", "checkpoint")
        if wait:
            self.await_earlier(progress)
        elif self.snapshots and self.snapshots.step < progress.step:
            self._finish_snapshot()  # or a run that goes on from this checkpoint would lack it
        if self._step == progress.step:
            return
        prepare()
        self.reports.flush()
        try:
            (self.checkpoints.save if wait else self.checkpoints.begin_save)(
                self.tensors(), step=progress.step, images_seen=progress.images, state=progress.to_json()
            )
        except BaseException:
            self.exporter.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
            raise
        self._step = progress.step
        self.exporter.of(metric_names.CHECKPOINT_SECONDS).observe(time.perf_counter() - started)
        if wait:
            self.note(progress)

    def await_earlier(self, progress: Progress) -> None:
        """Before a save that waits, worth a trial even where the one before has failed; and before a roll back."""
        try:
            self._finish_snapshot()
        except (UserError, CheckpointError) as e:
            self.reports.print(f"WARNING: a snapshot of the averages failed, and will be lacking ({e})")
        try:
            self._finish_checkpoint()
        except (UserError, CheckpointError) as e:
            self.reports.print(f"WARNING: the save of step {self._step} failed ({e})")
            self._step = -1
        self.note(progress)

    def finish(self) -> None:
        """Wait for the saves in the background; one that failed is counted, and its error raised."""
        self._finish_snapshot()
        self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        with self._counting_failures():
            self.checkpoints.finish()

    def _finish_snapshot(self) -> None:
        if self.snapshots:
            with self._counting_failures():
                self.snapshots.finish()

    @contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except (UserError, CheckpointError):
            self.exporter.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
            raise

    @property
    def failed(self) -> bool:
        """A save in the background has, on this rank."""
        return self.checkpoints.failed or (self.snapshots is not None and self.snapshots.failed)

    def settle(self, timeout_s: float) -> None:
        """Before a process ends with an error: let what is written in the background end, but not for longer each."""
        self.checkpoints.settle(timeout_s)
        if self.snapshots:
            self.snapshots.settle(timeout_s)

    def snapshot_is_due(self, step: int) -> bool:
        return self.snapshots is not None and self.snapshots.due(step)

    def snapshot(self, progress: Progress) -> None:
        """Of the averages, until they have been copied."""
        assert self.snapshots
        self.activity.doing("saving a snapshot of the averages", "checkpoint")
        with self._counting_failures():
            self.snapshots.save(progress.step, progress.images)

    def go_on_from(self, progress: Progress) -> None:
        """What is written from here on begins at these steps: after `restore`, or where there was nothing to restore."""
        if self.snapshots:
            self.activity.doing("looking through the averages' snapshots", "restore")
            self.snapshots.go_on_from(progress.step, progress.images)

    def note(self, progress: Progress) -> None:
        """Tell of a checkpoint that has been committed since the last call."""
        saved = self.checkpoints.poll()
        if saved is None:
            return
        of = self.exporter.of
        of(metric_names.CHECKPOINT_LAST).set(saved.time)
        of(metric_names.CHECKPOINT_DURATION).set(saved.seconds)
        of(metric_names.CHECKPOINT_BYTES).set(saved.bytes)
        self.reports.print(f"saved step {saved.step} in {saved.seconds:.1f} s")
        self.on_saved(progress, saved.step)

    def tell(self, progress: Progress) -> None:
        """Once an interval: how far apart checkpoints are in time."""
        steps, seconds = self._told or (progress.step, progress.train_seconds)
        if progress.step > steps:
            a_step_s = (progress.train_seconds - seconds) / (progress.step - steps)
            self.exporter.of(metric_names.CHECKPOINT_INTERVAL).set(self.every_steps * a_step_s)
        self._told = progress.step, progress.train_seconds

    def restore(self) -> Progress | None:
        """From the newest checkpoint; None where there is none."""
        started = time.perf_counter()
        self.activity.doing("restoring", "restore")
        restored = self.checkpoints.restore(self.tensors(), on_set_aside=self._on_set_aside)
        if restored is None:
            return None
        progress = Progress.from_json(restored.state)
        self._step, self._told = progress.step, None
        self.exporter.of(metric_names.STEP).set(progress.step)
        self.exporter.of(metric_names.RESTORE_SECONDS).set(time.perf_counter() - started)
        if self.world.is_main:
            self._tell_age(restored.path)
        self.on_saved(progress, progress.step)
        self.reports.print(f"resumed from {restored.path}: step {progress.step} of {self.total_steps}")
        return progress

    def _tell_age(self, checkpoint: str) -> None:
        """When the one that was restored from was committed, until there is a newer one."""
        try:
            committed = self.checkpoints.folder.committed_at(checkpoint.rpartition("/")[2])
        except Exception as e:  # no run ends for the want of this figure
            self.reports.print(f"WARNING: storage does not say when {checkpoint} was written: {one_line(e)}")
            return
        if committed is not None:
            self.exporter.of(metric_names.CHECKPOINT_LAST).set(committed)

    def _on_set_aside(self, path: str, reason: str) -> None:
        self.exporter.of(metric_names.CHECKPOINT_FAILURES, "restore").inc()
        self.reports.print(
            f"WARNING: checkpoint {path} does not verify and is set aside ({reason}); trying the one before"
        )
