"""The training loop. It knows *when*: accumulation, clipping, the finite check, periodic actions, stopping.
A task knows *what* a step is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Batch
from data.loader import Loader, WorkerDied
from trainer import metric_names, optim, train_state
from trainer.actions import WHOLE_GRADIENT, Actions, Verdict
from trainer.activity import Activity
from trainer.bad_data import BadData
from trainer.bad_shards import BadShardRecord
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import InitFromConfig, RunConfig
from trainer.device_copy import DeviceCopy
from trainer.ema import EMA, averaged
from trainer.ema_snapshots import Snapshots
from trainer.errors import ExitCode, UserError
from trainer.exporter import Exporter
from trainer.flops import StepFlops
from trainer.garbage import GarbageCollection
from trainer.goodput import Ledger
from trainer.metrics import Stopwatch
from trainer.micro_batches import split
from trainer.parallel.apply import begin_micro_batch
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.progress import Progress
from trainer.readback import Readback
from trainer.reports import Reports
from trainer.run_folder import JsonlWriter
from trainer.saves import Saves
from trainer.spikes import SpikeGuard
from trainer.stage_times import OUTSIDE
from trainer.start_times import StartTimes
from trainer.step_plan import StepPlan, StepPlanner
from trainer.stopping import Interrupted, Stopping
from trainer.stragglers import Stragglers
from trainer.tasks.base import Task
from trainer.warm_start import warm_start
from trainer.watchdog import Watchdog


class Trainer:
    def __init__(
        self, config: RunConfig, task: Task, world: World, planner: StepPlanner, checkpoints: CheckpointManager,
        exporter: Exporter, records: JsonlWriter | None, stop: StopRequest, actions: Actions,
        bad_shards: BadShardRecord | None = None, activity: Activity | None = None, start: StartTimes | None = None,
        flops: StepFlops | None = None, snapshots: CheckpointManager | None = None,
    ) -> None:  # fmt: skip
        """`task.module` is sharded already. `records`: where rank 0 writes a line an interval; None on other ranks.
        `snapshots`: where those of the averages are written; None: there are none."""
        self.config, self.task, self.world, self.planner = config, task, world, planner
        self.checkpoints, self.exporter, self.stop, self.actions = checkpoints, exporter, stop, actions
        self.stopping = Stopping(world.host_group, stop, lambda: self.saves.failed)
        self.optimizer = optim.build_optimizer(task.module, config.optim)
        self.ema = EMA(task.module, offload=config.ema.offload, profiles=config.ema.profiles)
        self.spikes = SpikeGuard(config.optim.spikes, world.device) if config.optim.spikes else None
        self.update_ratio = optim.UpdateRatio(task.module)
        self.progress = Progress()
        self.total_steps = planner.schedule.total_steps
        self._flops, peak_flops = flops or StepFlops(), config.metrics.peak_flops
        self.reports = Reports(world, exporter, records, self.total_steps, flops=self._flops, peak_flops=peak_flops)
        self.stages = task.stages = self.reports.stages
        self._pending: Verdict | None = None
        self._roll_back_due = False
        self._gradient_norm = float("nan")
        self._to_device = DeviceCopy(world.device)
        self._garbage = GarbageCollection()
        self.start = start or StartTimes()
        self.activity = activity or Activity(Watchdog(None, None), Ledger(), world.device)
        sharded = [task.module, *(module for module, _ in task.frozen_sharded())]
        self.stragglers = Stragglers(config.metrics, world, self.reports, sharded)
        self._bad_data = BadData(config.data, world, exporter, self.reports, actions.name_of_shard, bad_shards)
        self.saves = Saves(
            checkpoints, world, exporter, self.reports, self.activity, self.total_steps, config.checkpoint.every_steps,
            lambda: train_state.tensors(task, self.ema, self.optimizer, self.spikes), actions.on_saved,
            Snapshots(snapshots, world, config.ema, self.total_steps, self.ema, task.module, self.reports)
            if snapshots else None,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ the loop

    def fit(self, make_loader: Callable[[StepPlanner, Progress], Loader]) -> ExitCode:
        """Train to the end of the schedule, from the newest checkpoint if there is one.

        Returns DONE, or REQUEUE once everything is saved after a request to stop.

        Raises:
            UserError: what only a person can mend: bad data beyond the limit, losses that stay non-finite.
        """
        if not self._restore() and self.config.init_from:
            self._warm_start(self.config.init_from)
        self.saves.go_on_from(self.progress)
        self.start.lap("restore")
        if self.progress.step >= self.total_steps:
            self.saves.finish()
            return ExitCode.DONE
        self.task.module.train()

        def train() -> ExitCode | None:
            self._bad_data.recall(self.progress)
            with make_loader(self.planner, self.progress) as loader:
                return self._train(loader)

        try:
            with self._garbage.held():
                while (code := train()) is None:
                    self._roll_back()
        except BaseException as e:
            if isinstance(e, WorkerDied) and self.actions.on_worker_death:
                self.actions.on_worker_death(str(e))
            self.saves.settle(timeout_s=30)
            raise
        self.stopping.close()  # not after an error: other ranks may never take part
        return code

    def _train(self, loader: Loader) -> ExitCode | None:
        """Steps to the end of the schedule or to a request to stop; None where the run is to be rolled back."""
        watch = Stopwatch()
        first, waited = self.progress.step, 0.0
        own = self.stragglers.own
        self.activity.starting_workers()
        self.stages.begin("data")
        for batch in loader.steps(first, self.total_steps):
            own.close()
            self.activity.loaded()
            waited += watch.lap()
            self.stages.enter("other")
            if not self._bad_data.none_is_new(batch, self.progress, loader):
                self.activity.loading(fresh=True)
                self.stages.enter("data")
                continue
            if batch.step == first:
                waited = 0.0  # for workers to start, not for data
                self.stages.begin("other")
                self.start.lap("first_batch")
            plan = self.planner.plan(batch.step)
            another_loss = self.task.begins_another_loss(plan)
            self.activity.stepping(plan.step, plan.phase_index, batch.images_BCHW.shape, another_loss)
            own.open()
            with self.stages("copy"):
                on_device = self._to_device(batch)
            self._train_step(on_device, plan)
            own.close()
            snapshot_is_due = self.saves.snapshot_is_due(plan.step + 1)
            if self.start.running or self._report_is_due(plan) or self._save_is_due(plan) or snapshot_is_due:
                # The wait for the device belongs to the steps. And what a roll back leaves behind is not saved first.
                self._resolve_pending()
            self._garbage.end_step()
            self._count(batch, plan, waited, watch.lap())
            self.stages.end_step()
            self.start.end("first_step")
            self.actions.after_step(self.progress.step)
            waited = 0.0
            if self._roll_back_due:
                return None
            self._report_and_save(plan)
            self.saves.note(self.progress)
            self.activity.in_step("agreeing with the other ranks")
            due = self.actions.due(self.progress.step, self.total_steps)
            agreed = self.stopping.poll(at_once=bool(due))  # an action may take longer than a stop has time
            if "stop" in agreed and self.progress.step < self.total_steps:
                return self._stop(plan)
            if "save_failed" in agreed:
                self.saves.finish()  # raises what went wrong, on all ranks at this step
            if due and not self._have_run(due):
                return self._stop(plan)
            watch.lap()
            own.open()
            self.activity.loading()
            self.stages.enter("data")
        return ExitCode.DONE

    def _stop(self, plan: StepPlan) -> ExitCode:
        self.reports.print(f"stopping at step {self.progress.step} as asked ({self.stop.received or 'another rank'})")
        self._report(plan)
        if self._roll_back_due:
            self.saves.await_earlier(self.progress)
            self.reports.print("not saved: too many spikes, the next start goes on from the checkpoint before")
        else:
            self._save(wait=True)
        return ExitCode.REQUEUE

    def _train_step(self, batch: Batch, plan: StepPlan) -> None:
        """Accumulate, clip, check, update. Everything stays on the device."""
        module, config = self.task.module, self.config
        micro_batches = split(batch, config.parallel.micro_batch_size)
        terms: list[dict[str, Tensor]] = []
        self.task.begin_step(plan)
        another_loss = self.task.begins_another_loss(plan)
        self._flops.begin_step(plan.phase_index, batch.images_BCHW.shape, another_loss=another_loss)
        for i, micro in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            begin_micro_batch(module, last=last, keep_gathered=config.parallel.keep_gathered)
            with self._flops.counting(self.stages, len(micro_batches)):
                terms.append(self.task.forward_backward(micro, plan, scale=1.0 / len(batch.captions)))
        terms_B = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
        self.stages.enter("optimizer")
        if self.spikes and (plan.begins_phase or another_loss):
            self.spikes.begin_phase()
        skip, spike, loss, norm = self._judge(
            terms_B["loss"], optim.squared_gradient_norm(module), self.task.own_gradient_norm(plan)
        )
        divisor = optim.clip_divisor(norm, config.optim.max_grad_norm)
        self.stragglers.own.open()
        self.ema.wait_for_copy()
        with self.update_ratio.measured(self._report_is_due(plan)):
            optim.step(self.optimizer, plan.learning_rate, skip, divisor)
        # before the average, which is of the weights as the step leaves them: a task may move some of them itself
        self.task.end_step(plan, 1.0 - skip)
        warm = plan.step >= config.ema.start_step
        with self.stages("average"):
            self.ema.update(plan.phase.ema_decay if warm else 0.0, skip, plan.step + 1)
        self.stages.enter("other")
        self.reports.add(terms_B, skip, self.task.noise_levels())
        recent = self.spikes.record(plan.step, loss, norm, spike, skip) if self.spikes else spike
        self._resolve_pending()
        self._pending = Verdict(plan.step, Readback(skip, spike, recent, norm), batch.keys, terms_B["loss"])

    def _judge(
        self, loss_B: Tensor, squared_norm: Tensor, tasks_norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(skip, spike, loss, norm): 1.0 on every rank where the step must not count, the global batch's mean loss, and the
        gradients' global norm. `squared_norm`: this rank's share of its square."""
        # a loss may be non-finite on one rank and its gradient finite
        unfit = ~loss_B.isfinite().all()
        if tasks_norm is not None:
            unfit = unfit | ~tasks_norm.isfinite()
        sums = torch.stack([unfit.double(), loss_B.double().sum(), squared_norm])
        if self.world.size > 1:
            dist.all_reduce(sums)  # one for all three: the device waits for each
        loss, norm = sums[1] / (loss_B.numel() * self.world.size), sums[2].sqrt().float()
        spike = self.spikes.judge(loss, norm) if self.spikes else torch.zeros_like(norm)
        return ((sums[0] > 0) | ~norm.isfinite() | (spike > 0)).float(), spike, loss, norm

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
        self._on_spike(verdict, int(recent_spikes)) if spike else self._on_non_finite(verdict)

    def _on_non_finite(self, verdict: Verdict) -> None:
        self.progress.skipped_in_a_row += 1
        self.exporter.of(metric_names.STEPS_SKIPPED, "non_finite").inc()
        images = verdict.bad_images(self.world)
        self.reports.print(f"step {verdict.step} skipped: non-finite loss or gradient ({images})")
        limit = self.config.optim.max_skipped_in_a_row
        if self.progress.skipped_in_a_row >= limit:
            look = "" if images == WHOLE_GRADIENT else "look at those images, or "
            raise UserError(f"optim.max_skipped_in_a_row: {limit} steps in a row were not finite, last in {images}; "
                            f"{look}begin a new run with a lower learning_rate")  # fmt: skip

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
        self.activity.doing("waiting for the save before a roll back", "checkpoint")
        self.saves.await_earlier(before)
        if not self._restore():
            self.reports.print("too many spikes, and no checkpoint yet to go back to: going on")
        else:
            resumed = self.planner.plan(self.progress.step)
            passed = end - resumed.position
            # whole batches, as one of an aspect bucket must not begin midway
            passed += -passed % resumed.phase.batch_size
            self.progress.passed_over.append((self.progress.step, passed))
            self.progress.roll_backs = before.roll_backs + 1
            self.progress.steps_skipped = before.steps_skipped
            self.exporter.of(metric_names.ROLL_BACKS).inc()
            self.reports.print(
                f"rolled back from step {before.step} to {self.progress.step}, passing over {passed} images"
            )
            self.planner = self.planner.passing_over(self.progress.passed_over)
            self.saves.go_on_from(self.progress)
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
        self.reports.count(progress.step, phase.batch_size, waited, computed, self._flops.kind)
        self.stragglers.count(waited + computed)
        self.activity.stepped(progress.step, waited + computed)

    def _report_and_save(self, plan: StepPlan) -> None:
        """In this order, so that a line about a step is there before the step is durable."""
        if self._report_is_due(plan):
            self._report(plan)
        if self.saves.snapshot_is_due(self.progress.step):
            with self.stages("checkpoint"):
                self.saves.snapshot(self.progress)
        if self._save_is_due(plan):
            self._save(wait=self.progress.step == self.total_steps or not self.config.checkpoint.asynchronous)

    def _have_run(self, actions: Sequence[Callable[[int], None]]) -> bool:
        """Samples or evaluation; False where a request to stop has ended them midway."""
        self.activity.doing("drawing samples or evaluating", "other")
        try:
            with self.stages(OUTSIDE), self._garbage.by_itself(), self.averaged():
                for action in actions:
                    action(self.progress.step)
        except Interrupted:
            return False
        return True

    def _report_is_due(self, plan: StepPlan) -> bool:
        return plan.ends_phase or (plan.step + 1) % self.config.metrics.every_steps == 0

    def _save_is_due(self, plan: StepPlan) -> bool:
        done = plan.step + 1
        if self.spikes and plan.ends_phase:
            return True  # no roll back goes behind the beginning of a phase, whose data may be another mix
        return done == self.total_steps or done % self.config.checkpoint.every_steps == 0

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the module is the average of its weights, in evaluation mode."""
        return averaged(self.task.module, self.ema)

    def _report(self, plan: StepPlan) -> None:
        self._resolve_pending()
        self._bad_data.agree(self.progress)
        self.reports.tell(
            plan, self.progress, gradient_norm=self._gradient_norm, update_ratio=self.update_ratio.take(),
            captions_cut=self.task.captions_cut,
        )  # fmt: skip
        self.stragglers.tell()
        self.saves.tell(self.progress)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, *, wait: bool) -> None:
        with self.stages("checkpoint"):
            self.saves.save(self.progress, wait=wait, prepare=lambda: self._bad_data.agree(self.progress))

    def _restore(self) -> bool:
        """From the newest checkpoint; False where there is none."""
        restored = self.saves.restore()
        if restored is None:
            return False
        self.progress = restored
        self.planner = self.planner.passing_over(self.progress.passed_over)
        return True

    def _warm_start(self, config: InitFromConfig) -> None:
        self.activity.doing("loading init_from", "restore")
        report = warm_start(self.task.module, self.ema, config, self.world)
        self.task.after_warm_start(report.loaded)
        self.progress.init_from = report.source
        for line in report.lines():
            self.reports.note(line)
        if self.actions.on_warm_start:
            self.actions.on_warm_start(report.to_json())
