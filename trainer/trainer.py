"""The training loop. It knows *when*: accumulation, clipping, the finite check, periodic actions, stopping.
A task knows *what* a step is."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Batch, Loader
from data.plan import SampleRef
from trainer import metric_names, optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.ema import EMA
from trainer.errors import ExitCode, UserError
from trainer.metrics import Exporter, LossMeter, Stopwatch, peak_memory_bytes
from trainer.parallel.agreement import Agreement
from trainer.parallel.apply import reshard, set_gradient_sync
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import JsonlWriter
from trainer.step_plan import StepPlan, StepPlanner
from trainer.tasks.base import Task


@dataclass
class Progress:
    """What a run has become, beside its tensors. Saved in the checkpoint; the same on every rank."""

    step: int = 0
    """Steps done: the next one to do."""
    images: int = 0
    steps_skipped: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    """Time in training steps, over all attempts; saving and sampling are not counted."""
    substitutions: dict[SampleRef, SampleRef] = field(default_factory=dict)
    """Unreadable samples and what stands in for them, so that a resume trains on the very same images."""

    def to_json(self) -> dict[str, Any]:
        pairs = [[bad.dataset, bad.index, used.dataset, used.index] for bad, used in self.substitutions.items()]
        return {**self.__dict__, "substitutions": pairs}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Progress":
        pairs = {SampleRef(a, i): SampleRef(b, j) for a, i, b, j in tree["substitutions"]}
        return cls(**{**tree, "substitutions": pairs})


@dataclass
class Actions:
    """What to do between steps, when it is due; at the end of the run it is the caller's turn. Called on every rank."""

    on_sample: Callable[[int], None] | None = None
    sample_every: int = 0


class Trainer:
    def __init__(
        self, config: RunConfig, task: Task, world: World, planner: StepPlanner, checkpoints: CheckpointManager,
        exporter: Exporter, records: JsonlWriter | None, stop: StopRequest, actions: Actions,
    ) -> None:  # fmt: skip
        """`task.module` is sharded already. `records`: where rank 0 writes a line an interval; None on other ranks."""
        self.config, self.task, self.world, self.planner = config, task, world, planner
        self.checkpoints, self.exporter, self.records, self.stop, self.actions = (
            checkpoints, exporter, records, stop, actions,
        )  # fmt: skip
        self.optimizer = optim.build_optimizer(task.module, config.optim)
        self.ema = EMA(task.module)
        self.progress = Progress()
        self.losses = LossMeter(world.device)
        self.total_steps = planner.schedule.total_steps
        self._pending: tuple[int, Tensor, Tensor, list[str], dict[str, Tensor]] | None = None
        self._gradient_norm = float("nan")
        self._interval_images = 0
        self._interval_seconds = 0.0
        self._new_substitutions: dict[SampleRef, tuple[SampleRef, str]] = {}
        self._cuts_seen = 0
        self._saved_step = -1

    # ------------------------------------------------------------------------------------------------------ the loop

    def fit(self, make_loader: Callable[[Mapping[SampleRef, SampleRef]], Loader]) -> ExitCode:
        """Train to the end of the schedule, from the newest checkpoint if there is one.

        Returns DONE, or REQUEUE once everything is saved after a request to stop.

        Raises:
            UserError: what only a person can mend: bad data beyond the limit, losses that stay non-finite.
        """
        self._restore()
        if self.progress.step >= self.total_steps:
            return ExitCode.DONE
        self.task.module.train()
        agreement = Agreement(self.world.host_group)
        loader = make_loader(self.progress.substitutions)
        watch = Stopwatch()
        first, code = self.progress.step, ExitCode.DONE
        try:
            for batch in loader.steps(first, self.total_steps):
                waited = watch.lap()
                if batch.step == first:
                    waited = 0.0  # for workers to start, not for data
                plan = self.planner.plan(batch.step)
                self._train_step(batch, plan)
                if self._report_is_due(plan):
                    self._resolve_pending()  # the wait for the device belongs to the steps, not to the report
                self._count(batch, plan, waited, watch.lap())
                self._run_due_actions(plan)
                stopping = agreement.poll(self.stop.received is not None)
                if stopping and self.progress.step < self.total_steps:
                    self._print(
                        f"stopping at step {self.progress.step} as asked ({self.stop.received or 'another rank'})"
                    )
                    self._report(plan)
                    self._save()
                    code = ExitCode.REQUEUE
                    break
                watch.lap()
        finally:
            loader.close()
        agreement.close()  # not after an error: other ranks may never take part
        return code

    def _train_step(self, batch: Batch, plan: StepPlan) -> None:
        """Accumulate, clip, check, update. Everything stays on the device."""
        module, config = self.task.module, self.config
        micro_batches = split(batch, config.parallel.micro_batch_size)
        terms: list[dict[str, Tensor]] = []
        for i, micro in enumerate(micro_batches):
            set_gradient_sync(module, i == len(micro_batches) - 1)
            terms.append(self.task.forward_backward(micro, plan, scale=1.0 / len(batch.captions)))
        terms_B = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
        norm = optim.clip_gradients(module, config.optim.max_grad_norm)
        skip = (~(norm.isfinite() & terms_B["loss"].isfinite().all())).float()
        dist.all_reduce(skip, dist.ReduceOp.MAX)  # a loss may be non-finite on one rank and its gradient finite
        optim.step(self.optimizer, plan.learning_rate, skip)
        warm = plan.step >= config.ema.start_step
        self.ema.update(plan.phase.ema_decay if warm else 0.0, skip)
        self.losses.add(terms_B, skip)
        self._resolve_pending()
        self._pending = (plan.step, skip, norm, batch.keys, terms_B)

    def _resolve_pending(self) -> None:
        """Read the flag of the step before, one step late, so the host never waits for the step it has just queued."""
        if self._pending is None:
            return
        step, skip, norm, keys, terms_B = self._pending
        self._pending = None
        self._gradient_norm = norm.item()
        if not skip.item():
            self.progress.skipped_in_a_row = 0
            return
        self.progress.steps_skipped += 1
        self.progress.skipped_in_a_row += 1
        self.exporter.of(metric_names.STEPS_SKIPPED, "non_finite").inc()
        finite_B = terms_B["loss"].isfinite().tolist()
        bad = [key for key, finite in zip(keys, finite_B, strict=True) if not finite]
        bad = [key for part in self.world.gather(bad) for key in part]
        images = (
            f"images {', '.join(bad[:8])}{' ...' if len(bad) > 8 else ''}" if bad else "the gradient, not one image"
        )
        self._print(f"step {step} skipped: non-finite loss or gradient ({images})")
        limit = self.config.optim.max_skipped_in_a_row
        if self.progress.skipped_in_a_row >= limit:
            raise UserError(
                f"optim.max_skipped_in_a_row: {limit} steps in a row were not finite, last in {images}; look at those "
                "images, or begin a new run with a lower learning_rate; the newest checkpoint is from before"
            )

    # ---------------------------------------------------------------------------------------------- counting, reporting

    def _count(self, batch: Batch, plan: StepPlan, waited: float, computed: float) -> None:
        progress, phase = self.progress, plan.phase
        progress.step = plan.step + 1
        progress.images = plan.position + phase.batch_size
        progress.train_seconds += waited + computed
        self._interval_images += phase.batch_size
        self._interval_seconds += waited + computed
        for s in batch.substitutions:
            self._new_substitutions[s.bad] = (s.used, s.reason)
        of = self.exporter.of
        of(metric_names.STEP).set(progress.step)
        of(metric_names.IMAGES).inc(phase.batch_size)
        of(metric_names.LAST_STEP).set_to_current_time()
        if self.world.is_main:
            of(metric_names.STEP_SECONDS, "data").observe(waited)
            of(metric_names.STEP_SECONDS, "total").observe(waited + computed)

    def _run_due_actions(self, plan: StepPlan) -> None:
        """Metrics, checkpoint, samples: in this order, so that a line about a step is there before the step is durable."""
        done, config = self.progress.step, self.config
        last = done == self.total_steps
        if self._report_is_due(plan):
            self._report(plan)
        if last or done % config.checkpoint.every_steps == 0:
            self._save()
        if self.actions.on_sample and done % self.actions.sample_every == 0 and not last:
            with self.averaged():
                self.actions.on_sample(done)

    def _report_is_due(self, plan: StepPlan) -> bool:
        return plan.ends_phase or (plan.step + 1) % self.config.metrics.every_steps == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the module is the average of its weights, in evaluation mode."""
        reshard(self.task.module)
        with self.ema.in_place_of_weights():
            self.task.module.eval()
            try:
                yield
            finally:
                reshard(self.task.module)
                self.task.module.train()

    def _report(self, plan: StepPlan) -> None:
        self._resolve_pending()
        self._share_substitutions()
        losses = self.losses.take()
        if not self._interval_images:  # reported at this very step already
            return
        speed = self._interval_images / self._interval_seconds if self._interval_seconds else 0.0
        self._interval_images, self._interval_seconds = 0, 0.0
        of = self.exporter.of
        for term, value in losses.items():
            of(metric_names.LOSS, term).set(value)
        of(metric_names.GRADIENT_NORM).set(self._gradient_norm)
        of(metric_names.LEARNING_RATE).set(plan.learning_rate)
        of(metric_names.IMAGES_PER_SECOND).set(speed)
        of(metric_names.PEAK_MEMORY).set(peak_memory_bytes(self.world.device))
        self.exporter.clear(metric_names.PHASE)
        of(metric_names.PHASE, plan.phase.name).set(plan.phase_index)
        of(metric_names.CAPTIONS_CUT).inc(self.task.captions_cut - self._cuts_seen)
        self._cuts_seen = self.task.captions_cut
        if self.records is None or not losses:
            return
        self.records.write(
            {
                "time": time.time(),
                "step": self.progress.step,
                "total_steps": self.total_steps,
                "phase": plan.phase.name,
                "images": self.progress.images,
                "images_per_s": speed,
                "learning_rate": plan.learning_rate,
                "gradient_norm": self._gradient_norm if math.isfinite(self._gradient_norm) else None,
                "steps_skipped": self.progress.steps_skipped,
                "peak_memory_bytes": peak_memory_bytes(self.world.device),
                "loss": losses,
            }
        )
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items() if not name.startswith("lpl_"))
        self._print(f"step {self.progress.step}/{self.total_steps}  {plan.phase.name}  {text}  {speed:.1f} images/s")

    def _share_substitutions(self) -> None:
        """All ranks learn which samples were replaced, count them, and stop together when they are too many."""
        everywhere = {bad: used for part in self.world.gather(self._new_substitutions) for bad, used in part.items()}
        self._new_substitutions.clear()
        for bad, (used, reason) in everywhere.items():
            if bad not in self.progress.substitutions:
                self.progress.substitutions[bad] = used
                self.exporter.of(metric_names.BAD_SAMPLES, reason).inc()
                self._print(f"sample {bad.index} of {bad.dataset} is unreadable ({reason}): replaced by {used.index}")
        limit = self.config.data.max_bad_samples
        if len(self.progress.substitutions) > limit:
            raise UserError(
                f"data.max_bad_samples: {len(self.progress.substitutions)} samples were unreadable, the limit is {limit}; "
                "check the dataset with `loupe data verify`, or raise the limit"
            )

    def _print(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        started = time.perf_counter()
        self._resolve_pending()
        self._share_substitutions()
        if self.records:
            self.records.flush()  # what is recorded of a step must be there when the step is durable
        try:
            self.checkpoints.save(
                train_state.tensors(self.task.module, self.ema, self.optimizer),
                step=self.progress.step,
                images_seen=self.progress.images,
                state=self.progress.to_json(),
            )
        except BaseException:
            self.exporter.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
            raise
        self._saved_step = self.progress.step
        self.exporter.of(metric_names.CHECKPOINT_LAST).set_to_current_time()
        if self.world.is_main:
            self.exporter.of(metric_names.CHECKPOINT_SECONDS).observe(time.perf_counter() - started)

    def _restore(self) -> None:
        restored = self.checkpoints.restore(
            train_state.tensors(self.task.module, self.ema, self.optimizer), on_set_aside=self._on_set_aside
        )
        if restored is None:
            return
        self.progress = Progress.from_json(restored.state)
        self._saved_step = self.progress.step
        self._print(f"resumed from {restored.path}: step {self.progress.step} of {self.total_steps}")

    def _on_set_aside(self, path: str, reason: str) -> None:
        self.exporter.of(metric_names.CHECKPOINT_FAILURES, "restore").inc()
        self._print(f"WARNING: checkpoint {path} does not verify and is set aside ({reason}); trying the one before")


def split(batch: Batch, micro_batch_size: int | None) -> list[Batch]:
    """The rank's batch in micro-batches that share its memory."""
    size = len(batch.captions)
    step = min(micro_batch_size or size, size)
    return [
        replace(
            batch,
            positions_B=batch.positions_B[i : i + step],
            images_BCHW=batch.images_BCHW[i : i + step],
            captions=batch.captions[i : i + step],
            labels_B=batch.labels_B[i : i + step],
            keys=batch.keys[i : i + step],
            substitutions=batch.substitutions if i == 0 else (),
        )
        for i in range(0, size, step)
    ]
