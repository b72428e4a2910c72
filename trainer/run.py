"""One attempt of a run: everything built, wired and trained, with its pictures and its end."""

import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from data.loader import Loader
from data.reader import Dataset, cache_note, open_dataset, readable
from trainer import metric_names, run_counters
from trainer.actions import Actions
from trainer.activity import Activity
from trainer.bad_shards import BadShardRecord
from trainer.check_data import check_data
from trainer.config import RunConfig, check_layout, resolve_url, run_digest
from trainer.environment_record import machine_of, start_record
from trainer.errors import ExitCode, one_line
from trainer.evaluate import reconstruction
from trainer.evaluate.image_action import ImageAction
from trainer.evaluate.image_evaluation import ImageEvaluation
from trainer.evaluate.prompt_accuracy import accuracy_of_run
from trainer.evaluate.reconstruction_run import ReconstructionEvaluation
from trainer.evaluate.sampling import sample_prompts
from trainer.evaluate.validation import Validation
from trainer.exporter import Exporter
from trainer.flops import StepFlops
from trainer.goodput import Ledger
from trainer.goodput_keeper import GoodputKeeper
from trainer.host_memory import keep_freed_memory
from trainer.parallel.apply import compile_seconds, parallelize
from trainer.parallel.world import World, init_world
from trainer.pictures import loss_curves, sample_grid
from trainer.preemption import StopRequest
from trainer.profiling import Profiler
from trainer.progress import Progress
from trainer.requests import RankRequests
from trainer.run_checkpoints import checkpoints_of, snapshots_of
from trainer.run_folder import SUMMARY, RunFolder
from trainer.serving import Serving
from trainer.sinks import Sinks
from trainer.start_times import StartTimes, in_words
from trainer.step_plan import StepPlanner
from trainer.stopping import Interrupted
from trainer.stored import stored_columns
from trainer.stream import plan_stream
from trainer.summary import summarise
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tasks.base import Task
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tasks.latent_network import LatentNetworkTask
from trainer.trainer import Trainer
from trainer.watchdog import Watchdog

_FETCH_SHARE_OF_TIMEOUT = 0.75
"""Of data.timeout_s: a fetch that fails says why before the wait for its batch ends."""
_PATIENCE_WITH_DATA = 1.5
"""Times data.timeout_s: the rank that gets no batch says so before the watchdogs of those that wait for it end the job."""
CURVES_SHARE = 0.01
"""Of the time, at most, in which ranks wait for `curves.png`."""

TASKS = {
    "latent_diffusion": LatentDiffusionTask,
    "autoencoder": AutoencoderTask,
    "latent_network": LatentNetworkTask,
}


def run(config: RunConfig, folder: RunFolder, stop: StopRequest, start: StartTimes) -> ExitCode:
    """Train until done or stopped. After an error the process groups are left as they are: other ranks may never answer."""
    start.lap("import")
    check_layout(config, int(os.environ.get("WORLD_SIZE", 1)))  # before ranks form a mesh that cannot be
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ledger = Ledger(time.monotonic() - start.begun)
    with Watchdog(config.watchdog, folder, rank=rank, size=size) as watchdog, GoodputKeeper(ledger) as goodput:
        world = init_world(num_threads=config.parallel.num_threads, replicas=config.parallel.replicas)
        if world.device.type == "cpu":
            keep_freed_memory()
        start.lap("ranks")
        code = Run(config, folder, world, stop, watchdog, start, goodput).train()
        watchdog.doing("ending")
        dist.destroy_process_group()
    return code


class Run:
    """Everything of one attempt, built and wired."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, world: World, stop: StopRequest, watchdog: Watchdog | None = None,
        start: StartTimes | None = None, goodput: GoodputKeeper | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            watchdog: told what the run does; it ends this process when that takes too long.
            start: of this process.
            goodput: keeps the run's goodput and counters in its folder; without it they are this process's alone.
        """
        self.config, self.folder, self.world = config, folder, world
        self.start = start or StartTimes()
        self.start.on_end = self._tell_start
        self._curves_drawn = self._curves_took = 0.0
        self._compiled_before = compile_seconds()  # by another run of this process
        if world.is_main:
            folder.claim(config)
        machines = world.gather(machine_of(world.device))
        self.attempt = world.broadcast(
            folder.start_attempt(start_record(world, machines, os.environ)) if world.is_main else 0
        )
        if watchdog:
            watchdog.begin_attempt(self.attempt)
        self._goodput = goodput
        self._counters = goodput.open(folder, self.attempt) if goodput and world.is_main else {}
        self.datasets = {
            name: open_dataset(
                resolve_url(d.url),
                name=name,
                max_samples=d.max_samples,
                cache_dir=config.data.cache_dir,
                cache_gib=config.data.cache_gib,
                fetch=d.fetch,
                deadline_s=_FETCH_SHARE_OF_TIMEOUT * config.data.timeout_s,
            )
            for name, d in config.data.datasets.items()
        }
        self.start.lap("data")
        self.task: Task = TASKS[config.task.kind](config, world.device)
        self.start.lap("model")
        warnings = [*self.task.check(), *check_data(config, self.datasets)]
        self.planner, of_stream = plan_stream(config, self.datasets, self.task)
        warnings += of_stream
        self.stored = stored_columns(config, self.datasets, self.task, self.planner)
        self.start.lap("data")
        self.evaluation: ReconstructionEvaluation | None = None
        if config.reconstructions:
            assert isinstance(self.task, AutoencoderTask)
            self.evaluation = ReconstructionEvaluation(config, self.task, world, list(self.datasets.values()))
            warnings += self.evaluation.warnings
        self.validation: Validation | None = None
        if config.validation:
            assert isinstance(self.task, LatentDiffusionTask)
            self.validation = Validation(config, self.task, world, list(self.datasets.values()))
            warnings += self.validation.warnings
        images = ImageEvaluation(config, self.task, world, stop) if config.image_evaluation else None
        flops = StepFlops()
        if config.metrics.count_flops:
            flops = StepFlops(self.task.module, [module for module, _ in self.task.frozen_sharded()])
        for module, units in [(self.task.module, self.task.sharding_units()), *self.task.frozen_sharded()]:
            parallelize(module, units, world, config.parallel)
        flops.attach()
        compiled = compile_seconds if config.parallel.compile else None
        ledger = goodput.ledger if goodput else Ledger()
        self.activity = Activity(watchdog or Watchdog(None, None), ledger, world.device, compiled)
        self.exporter = self._make_exporter()
        self.serving = Serving(config, folder, world, self.attempt, self.exporter)
        self.records = folder.metrics_writer(self.attempt) if world.is_main else None
        digest = run_digest(config, {name: d.digest for name, d in self.datasets.items()})
        self.trainer = Trainer(
            config,
            self.task,
            world,
            self.planner,
            checkpoints_of(config, folder, world, digest, self.attempt),
            self.exporter,
            self.records,
            stop,
            Actions(
                self._at_intervals(),
                self._write_init_report,
                self._count_worker_death,
                self._on_saved,
                self._name_of_shard,
            ),
            BadShardRecord(folder, digest),
            self.activity,
            self.start,
            flops,
            snapshots_of(config, folder, world, digest, self.attempt),
        )
        told = world, folder, self.trainer.reports, self.activity, stop
        self.images = ImageAction(images, *told) if images else None
        self._profiler = Profiler(config.profile, world, folder, self.trainer.reports, self.activity)
        self.trainer.actions.after_step = self._profiler.end_step
        if world.is_main and config.metrics.sinks:
            self.trainer.reports.sinks = Sinks(config, folder, self.exporter, self.trainer.reports.note)
        self.start.lap("model")
        if watchdog and not self._loads_in_this_process():
            watchdog.never_below(_PATIENCE_WITH_DATA * config.data.timeout_s)
        for warning in warnings:
            self.trainer.reports.note(f"WARNING: {warning}")
        window = config.data.shuffle_window_shards
        if of_cache := cache_note(list(self.datasets.values()), window, self._prefetch_shards()):
            self.trainer.reports.print(of_cache)

    def _tell_start(self) -> None:
        """The first step is done: how long it took until then."""
        self.exporter.of(metric_names.FIRST_STEP).set_to_current_time()
        self.start.split("compile", of="first_step", seconds=compile_seconds() - self._compiled_before)
        for part, seconds in self.start.seconds.items():
            self.exporter.of(metric_names.START_SECONDS, part).set(seconds)
        self.trainer.reports.print(f"first step {in_words(self.start.seconds)} after this start")
        if self.world.is_main:
            rounded = {part: round(seconds, 3) for part, seconds in self.start.seconds.items()}
            try:
                self.folder.add_to_attempt(self.attempt, start_seconds=rounded)
            except Exception as e:  # no run ends for the want of this figure; a save that fails will say what is wrong
                self.trainer.reports.note(f"WARNING: how long the start took is not recorded ({one_line(e)})")

    def _write_init_report(self, report: dict[str, Any]) -> None:
        if self.world.is_main:
            self.folder.write_json("init_report.json", report)

    def _prefetch_shards(self) -> int:
        data = self.config.data
        return data.shuffle_window_shards if data.prefetch_shards is None else data.prefetch_shards

    def _count_worker_death(self, what: str) -> None:
        """In the run's folder, as this process ends with it; the next attempts count it in their metrics."""
        self.folder.write_json(f"worker_deaths/{self.attempt:04d}-rank-{self.world.rank}.json", {"what": what})

    def _name_of_shard(self, dataset: str, shard: int) -> str:
        found = self.datasets.get(dataset)
        return f"{found.shards_url}/{found.shards[shard].name}" if found else f"shard {shard} of {dataset}"

    def _make_exporter(self) -> Exporter:
        exporter = Exporter(metric_names.OF_RANK_0 if self.world.is_main else metric_names.OF_EVERY_RANK)
        exporter.of(metric_names.BUILD).info({"version": version("loupe"), "torch": torch.__version__})
        exporter.of(metric_names.WORLD_SIZE).set(self.world.size)
        run_counters.begin_at_zero(exporter, self.config.metrics.sinks)
        if self.world.is_main:
            self._restarts = run_counters.Restarts(exporter, self.folder)
            run_counters.take_up(exporter, self._counters)
            if self._goodput:
                # until it is restored: what the start before had reached, not 0
                exporter.of(metric_names.STEP).set(self._goodput.ledger.reached)
                tell = run_counters.Goodput(exporter).tell
                self._goodput.export(tell, lambda: run_counters.counters_of(exporter))
        return exporter

    def _on_saved(self, progress: Progress, step: int) -> None:
        if self.world.is_main:
            self._restarts.tell(train_seconds=progress.train_seconds, checkpoint=step)
            run_counters.at_least(
                self.exporter, steps=progress.step, images=progress.images, roll_backs=progress.roll_backs
            )

    def _loads_in_this_process(self) -> bool:
        """From local files: nothing is fetched, and no wait has a deadline of its own."""
        return not self.config.data.num_workers and all(dataset.is_local for dataset in self.datasets.values())

    def _make_loader(self, planner: StepPlanner, progress: Progress) -> Loader:
        data = self.config.data
        return Loader(
            self.datasets,
            RankRequests(planner, self.world.rank, self.world.size),
            seed=self.config.seed,
            random_crop=data.random_crop,
            flip_probability=data.flip_probability,
            caption_weights=data.caption_weights,
            num_workers=data.num_workers,
            prefetch_steps=data.prefetch_steps,
            timeout_s=data.timeout_s,
            substitutions=progress.substitutions,
            left_out=progress.bad_shards,
            prefetch_shards=0 if self._loads_in_this_process() else self._prefetch_shards(),
            decode=data.decode,
            pin_memory=self.world.device.type == "cuda",
            stored=self.stored,
        )

    def train(self) -> ExitCode:
        if self.folder.exists(SUMMARY):
            if self.world.is_main:
                print(f"nothing to do: {self.folder.url}/{SUMMARY} says this run is done", flush=True)
            return ExitCode.DONE
        found: dict[str, Any] = {}
        try:
            if self.images:
                self.images.begin()
                self.start.lap("data")
            code = self.trainer.fit(self._make_loader)
            # samples and figures take longer than a step
            self.activity.doing("ending", "other")
            if code is ExitCode.DONE:
                found = self._at_the_end()
        except Interrupted:
            code = ExitCode.REQUEUE
        finally:
            self._profiler.close()
            self.serving.withdraw()
            if self.trainer.reports.sinks:
                self.trainer.reports.sinks.close()
            if self.records:
                self.records.close()
        if code is ExitCode.DONE:  # else the job waits for this process, to be queued again before its time limit
            self._draw_curves()
        if code is ExitCode.DONE and self.world.is_main:
            self._finish(found)
        return code

    # ----------------------------------------------------------------------------------------------- pictures, the end

    def _first_dataset(self) -> Dataset:
        return next(iter(self.datasets.values()))

    def _prompts(self, count: int) -> list[str]:
        """Captions, or classes, spread evenly over the training data."""
        dataset = self._first_dataset()
        count = min(count, dataset.num_samples)
        samples = [readable(dataset, i * dataset.num_samples // count) for i in range(count)]
        if isinstance(self.task, LatentDiffusionTask) and self.task.config.text.kind == "classes":
            return [str(sample.label) for sample in samples]
        return [sample.texts[0] if sample.texts else "" for sample in samples]

    def _at_intervals(self) -> list[tuple[int, Callable[[int], None]]]:
        config = self.config
        sections = (
            (config.samples, self._draw_samples), (config.reconstructions, self._evaluate),
            (config.validation, self._validate), (config.image_evaluation, self._evaluate_images),
        )  # fmt: skip
        return [(section.every_steps, partial(self._act, action)) for section, action in sections if section]

    def _act(self, action: Callable[[int, Callable[[], None]], object], step: int) -> None:
        action(step, self.trainer.stopping.go_on)
        self._draw_curves_again()

    def _validate(self, step: int, go_on: Callable[[], None] = lambda: None) -> dict[str, Any]:
        assert self.validation is not None
        found = self.validation.measure(self.planner.plan(step - 1).phase, go_on)
        terms = {name: losses.means for name, losses in found.terms.items()}
        self.trainer.reports.validated(step, terms, found.in_words())
        if self.world.is_main:
            self.folder.write_json(f"evaluation/validation-{self._name(step)}.json", {"step": step, **found.numbers})
        return found.summary()

    def _name(self, step: int) -> str:
        """Of a file that is written at this step."""
        return "final" if step == self.trainer.total_steps else f"step-{step:08d}"

    def _evaluate(self, step: int, go_on: Callable[[], None] = lambda: None) -> dict[str, Any]:
        assert self.evaluation is not None
        found = self.evaluation.measure(go_on)
        seen = "" if found.about["dataset"]["held_out"] else "  (of images that it trains on)"
        words = reconstruction.in_words(found.figures) + seen
        self.trainer.reports.evaluated(step, reconstruction.flat(found.figures), words)
        if self.world.is_main:
            self.folder.write_json(f"evaluation/{self._name(step)}.json", {"step": step, **found.numbers})
            self.folder.write_bytes(f"reconstructions/{self._name(step)}.png", found.picture)
        return found.summary()

    def _evaluate_images(self, step: int, go_on: Callable[[], None] | None = None) -> dict[str, Any]:
        assert self.images
        return self.images(step, self._name(step), go_on)

    def _draw_curves_again(self) -> None:
        """While it trains, unless the ranks would wait too often for what takes the longer the longer the run is."""
        now = time.monotonic()
        if now - self._curves_drawn < self._curves_took / CURVES_SHARE:
            return
        self._draw_curves()
        self._curves_drawn = time.monotonic()
        self._curves_took = self._curves_drawn - now

    def _draw_curves(self) -> None:
        if self.world.is_main:
            self.trainer.reports.flush()
            found = self.folder.metrics(), self.folder.evaluations(), self.folder.validations()
            self.folder.write_bytes("curves.png", loss_curves(*found))

    def _draw_samples(self, step: int, go_on: Callable[[], None] = lambda: None) -> None:
        task, config = self.task, self.config.samples
        assert isinstance(task, LatentDiffusionTask)
        assert config is not None
        prompts = list(config.prompts)[: config.count] or self._prompts(config.count)
        resolution = self.planner.plan(step - 1).phase.resolution
        latents = sample_prompts(task, self.world, prompts, config, resolution=resolution, go_on=go_on)
        if self.world.is_main:
            images = task.decode(latents.to(self.world.device)).permute(0, 2, 3, 1).cpu().numpy()
            self.folder.write_bytes(f"samples/{self._name(step)}.png", sample_grid(images, prompts))

    def _at_the_end(self) -> dict[str, Any]:
        """Last pictures and measures, on all ranks; what the summary has of them."""
        found: dict[str, Any] = {}
        with self.trainer.averaged():
            if self.config.samples:
                self._draw_samples(self.trainer.total_steps)
            if self.config.prompt_accuracy:
                assert isinstance(self.task, LatentDiffusionTask)
                prompts = self._prompts(self.config.prompt_accuracy.num_prompts)
                found |= accuracy_of_run(self.config, self.task, self.world, prompts, self._first_dataset())
            if self.evaluation:
                found["evaluation"] = self._evaluate(self.trainer.total_steps)
            if self.validation:
                found["validation"] = self._validate(self.trainer.total_steps)
            if self.images:
                found["image_evaluation"] = self._evaluate_images(self.trainer.total_steps)
        return found

    def _finish(self, found: dict[str, Any]) -> None:
        progress = self.trainer.progress
        summary = summarise(
            self.folder, self.config, images=progress.images, train_seconds=progress.train_seconds, extra=found
        )
        self.folder.write_json(SUMMARY, summary)
        print(f"done: {progress.images} images in {summary['wall_s']:.0f} s", flush=True)
