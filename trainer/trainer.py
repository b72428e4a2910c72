"""The training loop. It knows *when*: accumulation, clipping, the finite check, periodic actions, stopping.
A task knows *what* a step is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Batch
from data.loader import Loader, WorkerDied
from trainer import metric_names, optim, train_state
from trainer.actions import Actions, Verdict
from trainer.bad_data import BadData
from trainer.bad_shards import BadShardRecord
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import InitFromConfig, RunConfig
from trainer.device_copy import DeviceCopy
from trainer.ema import EMA
from trainer.errors import ExitCode, UserError
from trainer.metrics import Exporter, Stopwatch
from trainer.micro_batches import split
from trainer.parallel.agreement import Agreement
from trainer.parallel.apply import begin_micro_batch, reshard
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.progress import Progress
from trainer.readback import Readback
from trainer.reports import Reports
from trainer.run_folder import JsonlWriter
from trainer.spikes import SpikeGuard
from trainer.step_plan import StepPlan, StepPlanner
from trainer.stragglers import Stragglers
from trainer.tasks.base import Task
from trainer.warm_start import warm_start
from trainer.watchdog import Watchdog


class Trainer:
    def __init__(
        self, config: RunConfig, task: Task, world: World, planner: StepPlanner, checkpoints: CheckpointManager,
        exporter: Exporter, records: JsonlWriter | None, stop: StopRequest, actions: Actions,
        bad_shards: BadShardRecord | None = None, watchdog: Watchdog | None = None,
    ) -> None:  # fmt: skip
        """`task.module` is sharded already. `records`: where rank 0 writes a line an interval; None on other ranks."""
        self.config, self.task, self.world, self.planner = config, task, world, planner
        self.checkpoints, self.exporter, self.stop, self.actions = checkpoints, exporter, stop, actions
        self.optimizer = optim.build_optimizer(task.module, config.optim)
        self.ema = EMA(task.module, offload=config.ema.offload)
        self.spikes = SpikeGuard(config.optim.spikes, world.device) if config.optim.spikes else None
        self.update_ratio = optim.UpdateRatio(task.module)
        self.progress = Progress()
        self.total_steps = planner.schedule.total_steps
        self.reports = Reports(world, exporter, records, self.total_steps)
        self._pending: Verdict | None = None
        self._roll_back_due = False
        self._gradient_norm = float("nan")
        self._to_device = DeviceCopy(world.device)
        self.watchdog = watchdog or Watchdog(None, None)
        sharded = [task.module, *(module for module, _ in task.frozen_sharded())]
        self.stragglers = Stragglers(config.metrics, world, self.reports, sharded)
        self._bad_data = BadData(config.data, world, exporter, self.reports, actions.name_of_shard, bad_shards)
        self._saved_step = -1

    # ------------------------------------------------------------------------------------------------------ the loop

    def fit(self, make_loader: Callable[[StepPlanner, Progress], Loader]) -> ExitCode:
        """Train to the end of the schedule, from the newest checkpoint if there is one.

        Returns DONE, or REQUEUE once everything is saved after a request to stop.

        Raises:
            UserError: what only a person can mend: bad data beyond the limit, losses that stay non-finite.
        """
        if not self._restore() and self.config.init_from:
            self._warm_start(self.config.init_from)
        if self.progress.step >= self.total_steps:
            return ExitCode.DONE
        self.task.module.train()
        agreement = Agreement(self.world.host_group)

        def train() -> ExitCode | None:
            self._bad_data.recall(self.progress)
            with make_loader(self.planner, self.progress) as loader:
                return self._train(loader, agreement)

        try:
            while (code := train()) is None:
                self._roll_back()
        except BaseException as e:
            if isinstance(e, WorkerDied) and self.actions.on_worker_death:
                self.actions.on_worker_death(str(e))
            self.checkpoints.settle(timeout_s=30)
            raise
        agreement.close()  # not after an error: other ranks may never take part
        return code

    def _train(self, loader: Loader, agreement: Agreement) -> ExitCode | None:
        """Steps to the end of the schedule or to a request to stop; None where the run is to be rolled back."""
        watch = Stopwatch()
        first, waited = self.progress.step, 0.0
        own = self.stragglers.own
        self.watchdog.loading(fresh=True)
        for batch in loader.steps(first, self.total_steps):
            own.close()
            self.watchdog.loaded()
            waited += watch.lap()
            if not self._bad_data.none_is_new(batch, self.progress, loader):
                self.watchdog.loading(fresh=True)
                continue
            if batch.step == first:
                waited = 0.0  # for workers to start, not for data
            plan = self.planner.plan(batch.step)
            self.watchdog.stepping(plan.phase_index, batch.images_BCHW.shape, self.task.begins_another_loss(plan))
            own.open()
            self._train_step(self._to_device(batch), plan)
            own.close()
            if self._report_is_due(plan) or self._save_is_due(plan):
                # The wait for the device belongs to the steps. And what a roll back leaves behind is not saved first.
                self._resolve_pending()
            self._count(batch, plan, waited, watch.lap())
            waited = 0.0
            if self._roll_back_due:
                return None
            self._run_due_actions(plan)
            self._note_saved()
            self.watchdog.doing("agreeing with the other ranks", step=True)
            agreed = agreement.poll(stop=self.stop.received is not None, save_failed=self.checkpoints.failed)
            if "stop" in agreed and self.progress.step < self.total_steps:
                self.reports.print(
                    f"stopping at step {self.progress.step} as asked ({self.stop.received or 'another rank'})"
                )
                self._report(plan)
                if self._roll_back_due:
                    self._await_earlier_save()
                    self.reports.print("not saved: too many spikes, the next start goes on from the checkpoint before")
                else:
                    self._save(wait=True)
                return ExitCode.REQUEUE
            if "save_failed" in agreed:
                self._finish_save()  # raises what went wrong, on all ranks at this step
            watch.lap()
            own.open()
            self.watchdog.loading()
        return ExitCode.DONE

    def _train_step(self, batch: Batch, plan: StepPlan) -> None:
        """Accumulate, clip, check, update. Everything stays on the device."""
        module, config = self.task.module, self.config
        micro_batches = split(batch, config.parallel.micro_batch_size)
        terms: list[dict[str, Tensor]] = []
        self.task.begin_step(plan)
        for i, micro in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            begin_micro_batch(module, last=last, keep_gathered=config.parallel.keep_gathered)
            terms.append(self.task.forward_backward(micro, plan, scale=1.0 / len(batch.captions)))
        terms_B = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
        norm = optim.clip_gradients(module, config.optim.max_grad_norm)
        if self.spikes and (plan.begins_phase or self.task.begins_another_loss(plan)):
            self.spikes.begin_phase()
        skip, spike, loss = self._judge(terms_B["loss"], norm, self.task.own_gradient_norm(plan))
        self.stragglers.own.open()
        self.ema.wait_for_copy()
        with self.update_ratio.measured(self._report_is_due(plan)):
            optim.step(self.optimizer, plan.learning_rate, skip)
        # before the average, which is of the weights as the step leaves them: a task may move some of them itself
        self.task.end_step(plan, 1.0 - skip)
        warm = plan.step >= config.ema.start_step
        self.ema.update(plan.phase.ema_decay if warm else 0.0, skip)
        self.reports.add(terms_B, skip)
        recent = self.spikes.record(plan.step, loss, norm, spike, skip) if self.spikes else spike
        self._resolve_pending()
        self._pending = Verdict(plan.step, Readback(skip, spike, recent, norm), batch.keys, terms_B["loss"])

    def _judge(self, loss_B: Tensor, norm: Tensor, tasks_norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(skip, spike, loss): 1.0 on every rank where the step must not count, and the global batch's mean loss."""
        # a loss may be non-finite on one rank and its gradient finite
        unfit = ~(norm.isfinite() & loss_B.isfinite().all())
        if tasks_norm is not None:
            unfit = unfit | ~tasks_norm.isfinite()
        sums = torch.stack([unfit.double(), loss_B.double().sum()])
        dist.all_reduce(sums)
        loss = sums[1] / (loss_B.numel() * self.world.size)
        spike = self.spikes.judge(loss, norm) if self.spikes else torch.zeros_like(norm)
        return ((sums[0] > 0) | (spike > 0)).float(), spike, loss

    def _resolve_pending(self) -> None:
        """Read the flags of the step before, one step late, so the host never waits for the step it has just queued."""
        if self._pending is None:
            return
        verdict, self._pending = self._pending, None
        skip, spike, recent_spikes, self._gradient_norm = verdict.flags.read()
        if not skip:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.steps_skipped += 1
        if spike:
            self._on_spike(verdict, int(recent_spikes))
        else:
            self._on_non_finite(verdict)

    def _on_non_finite(self, verdict: Verdict) -> None:
        self.progress.skipped_in_a_row += 1
        self.exporter.of(metric_names.STEPS_SKIPPED, "non_finite").inc()
        images = verdict.bad_images(self.world)
        self.reports.print(f"step {verdict.step} skipped: non-finite loss or gradient ({images})")
        limit = self.config.optim.max_skipped_in_a_row
        if self.progress.skipped_in_a_row >= limit:
            raise UserError(
                f"optim.max_skipped_in_a_row: {limit} steps in a row were not finite, last in {images}; look at those "
                "images, or begin a new run with a lower learning_rate; the newest checkpoint is from before"
            )

    def _on_spike(self, verdict: Verdict, recent: int) -> None:
        spikes = self.config.optim.spikes
        assert spikes is not None
        self.exporter.of(metric_names.STEPS_SKIPPED, "spike").inc()
        self.reports.print(
            f"step {verdict.step} skipped: loss or gradient norm ({self._gradient_norm:.3g}) beyond {spikes.sigma:g} "
            f"deviations of the steps before; {recent} such in the last {spikes.window_steps}"
        )
        self._roll_back_due = recent >= spikes.roll_back_after

    def _roll_back(self) -> None:
        """To the newest checkpoint, and on from there with the images that come after those seen since."""
        spikes, before = self.config.optim.spikes, self.progress
        assert spikes is not None
        assert self.spikes is not None
        self._resolve_pending()  # the step after the one that decided; it is left behind too, and asks for nothing
        self._roll_back_due = False
        if before.roll_backs >= spikes.max_roll_backs:
            raise UserError(
                f"optim.spikes.max_roll_backs: {before.roll_backs} roll backs did not help, losses leave their range again "
                f"at step {before.step}; look at the data, or begin a new run with a lower learning_rate"
            )
        last = self.planner.plan(before.step - 1)
        end = last.position + last.phase.batch_size
        self.watchdog.doing("waiting for the save before a roll back")
        self._await_earlier_save()
        if not self._restore():
            self.reports.print("too many spikes, and no checkpoint yet to go back to: going on")
        else:
            resumed = self.planner.plan(self.progress.step)
            passed = end - resumed.position
            passed += (
                -passed % resumed.phase.batch_size
            )  # whole batches, as one of an aspect bucket must not begin midway
            self.progress.passed_over.append((self.progress.step, passed))
            self.progress.roll_backs = before.roll_backs + 1
            self.progress.steps_skipped = before.steps_skipped
            self.exporter.of(metric_names.ROLL_BACKS).inc()
            self.reports.print(
                f"rolled back from step {before.step} to {self.progress.step}, passing over {passed} images"
            )
            self.planner = self.planner.passing_over(self.progress.passed_over)
        self.spikes.forget_spikes()
        self.reports.forget()

    # ---------------------------------------------------------------------------------------------- counting, reporting

    def _count(self, batch: Batch, plan: StepPlan, waited: float, computed: float) -> None:
        progress, phase = self.progress, plan.phase
        progress.step = plan.step + 1
        progress.images += phase.batch_size
        progress.train_seconds += waited + computed
        self._bad_data.add(batch)
        self.exporter.add(batch.counts)
        self.reports.count(progress.step, phase.batch_size, waited, computed)
        self.stragglers.count(waited + computed)
        self.watchdog.stepped(progress.step, waited + computed)

    def _run_due_actions(self, plan: StepPlan) -> None:
        """Metrics, checkpoint, samples or evaluation: in this order, so that a line about a step is there before the step is
        durable."""
        done, config = self.progress.step, self.config
        last = done == self.total_steps
        if self._report_is_due(plan):
            self._report(plan)
        if self._save_is_due(plan):
            self._save(wait=last or not config.checkpoint.asynchronous)
        due = [action for every, action in self.actions.at_intervals if done % every == 0 and not last]
        if due:
            self.watchdog.doing("drawing samples or evaluating")
            with self.averaged():
                for action in due:
                    action(done)

    def _report_is_due(self, plan: StepPlan) -> bool:
        return plan.ends_phase or (plan.step + 1) % self.config.metrics.every_steps == 0

    def _save_is_due(self, plan: StepPlan) -> bool:
        done = plan.step + 1
        if self.spikes and plan.ends_phase:
            return True  # no roll back goes behind the beginning of a phase, whose data may be another mix
        return done == self.total_steps or done % self.config.checkpoint.every_steps == 0

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
        self._bad_data.agree(self.progress)
        self.reports.tell(
            plan, self.progress, gradient_norm=self._gradient_norm, update_ratio=self.update_ratio.take(),
            captions_cut=self.task.captions_cut,
        )  # fmt: skip
        self.stragglers.tell()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, *, wait: bool) -> None:
        """Until everything has been copied and may change, or, with `wait`, until the checkpoint is committed."""
        started = time.perf_counter()
        self.watchdog.doing("saving")
        if wait:
            self._await_earlier_save()
        if self._saved_step == self.progress.step:
            return
        self._bad_data.agree(self.progress)
        self.reports.flush()
        try:
            (self.checkpoints.save if wait else self.checkpoints.begin_save)(
                train_state.tensors(self.task, self.ema, self.optimizer, self.spikes),
                step=self.progress.step,
                images_seen=self.progress.images,
                state=self.progress.to_json(),
            )
        except BaseException:
            self.exporter.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
            raise
        self._saved_step = self.progress.step
        if wait:
            self.exporter.of(metric_names.CHECKPOINT_LAST).set_to_current_time()
        if self.world.is_main:
            self.exporter.of(metric_names.CHECKPOINT_SECONDS).observe(time.perf_counter() - started)

    def _await_earlier_save(self) -> None:
        """Before a save that waits, worth a trial even where the one before has failed; and before a roll back."""
        try:
            self._finish_save()
        except (UserError, CheckpointError) as e:
            self.reports.print(f"WARNING: the save of step {self._saved_step} failed ({e})")
            self._saved_step = -1
        self._note_saved()

    def _finish_save(self) -> None:
        """Wait for the save in the background; one that failed is counted, and its error raised."""
        try:
            self.checkpoints.finish()
        except (UserError, CheckpointError):
            self.exporter.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
            raise

    def _note_saved(self) -> None:
        saved = self.checkpoints.poll()
        if saved:
            self.exporter.of(metric_names.CHECKPOINT_LAST).set(saved.time)

    def _restore(self) -> bool:
        """From the newest checkpoint; False where there is none."""
        self.watchdog.doing("restoring")
        restored = self.checkpoints.restore(
            train_state.tensors(self.task, self.ema, self.optimizer, self.spikes),
            on_set_aside=self._on_set_aside,
        )
        if restored is None:
            return False
        self.progress = Progress.from_json(restored.state)
        self.planner = self.planner.passing_over(self.progress.passed_over)
        self._saved_step = self.progress.step
        self.reports.print(f"resumed from {restored.path}: step {self.progress.step} of {self.total_steps}")
        return True

    def _warm_start(self, config: InitFromConfig) -> None:
        self.watchdog.doing("loading init_from")
        report = warm_start(self.task.module, self.ema, config, self.world)
        self.task.after_warm_start(report.loaded)
        self.progress.init_from = report.source
        for line in report.lines():
            self.reports.note(line)
        if self.actions.on_warm_start:
            self.actions.on_warm_start(report.to_json())

    def _on_set_aside(self, path: str, reason: str) -> None:
        self.exporter.of(metric_names.CHECKPOINT_FAILURES, "restore").inc()
        self.reports.print(
            f"WARNING: checkpoint {path} does not verify and is set aside ({reason}); trying the one before"
        )
