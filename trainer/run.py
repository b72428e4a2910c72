"""One attempt of a run: everything built, wired and trained, with its pictures and its end."""

import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from data.demands import check_classes
from data.loader import Loader
from data.reader import Dataset, cache_note, open_dataset, readable
from trainer import metric_names
from trainer.actions import Actions
from trainer.bad_shards import BadShardRecord
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig, check_layout, explain_digests, resolve_url, run_digest
from trainer.config.task import TaskConfig
from trainer.errors import ExitCode, UserError
from trainer.evaluate.prompt_accuracy import encode_dataset, prompt_accuracy
from trainer.evaluate.reconstruction import flat, in_words
from trainer.evaluate.reconstruction_run import ReconstructionEvaluation
from trainer.evaluate.sampling import sample_prompts
from trainer.metrics import Exporter
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World, init_world
from trainer.pictures import loss_curves, sample_grid
from trainer.preemption import StopRequest
from trainer.progress import Progress
from trainer.requests import RankRequests
from trainer.run_folder import CHECKPOINTS, HANGS, SUMMARY, RunFolder
from trainer.step_plan import StepPlanner
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
SAVE_TIMEOUT = timedelta(hours=2)
"""Longest that ranks wait for one another's part of a save in the background."""


TASKS = {
    "latent_diffusion": LatentDiffusionTask,
    "autoencoder": AutoencoderTask,
    "latent_network": LatentNetworkTask,
}


def run(config: RunConfig, folder: RunFolder, stop: StopRequest) -> ExitCode:
    """Train until done or stopped. After an error the process groups are left as they are: other ranks may never answer."""
    check_layout(config, int(os.environ.get("WORLD_SIZE", 1)))  # before ranks form a mesh that cannot be
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with Watchdog(config.watchdog, folder, rank=rank, size=size) as watchdog:
        world = init_world(num_threads=config.parallel.num_threads, replicas=config.parallel.replicas)
        code = Run(config, folder, world, stop, watchdog).train()
        watchdog.doing("ending")
        dist.destroy_process_group()
    return code


class Run:
    """Everything of one attempt, built and wired."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, world: World, stop: StopRequest, watchdog: Watchdog | None = None
    ) -> None:
        """`watchdog`: told what the run does; it ends this process when that takes too long."""
        self.config, self.folder, self.world = config, folder, world
        if world.is_main:
            folder.claim(config)
        self.attempt = world.broadcast(self._register() if world.is_main else 0)
        if watchdog:
            watchdog.begin_attempt(self.attempt)
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
        self.task: Task = TASKS[config.task.kind](config, world.device)
        warnings = [*self.task.check(), *self._check_data()]
        self.planner, of_stream = plan_stream(config, self.datasets, self.task)
        warnings += of_stream
        self.stored = stored_columns(config, self.datasets, self.task, self.planner)
        self.evaluation: ReconstructionEvaluation | None = None
        if config.reconstructions:
            assert isinstance(self.task, AutoencoderTask)
            self.evaluation = ReconstructionEvaluation(config, self.task, world, list(self.datasets.values()))
            warnings += self.evaluation.warnings
        for module, units in [(self.task.module, self.task.sharding_units()), *self.task.frozen_sharded()]:
            parallelize(module, units, world, config.parallel)
        self.exporter = self._serve_metrics()
        self.records = folder.metrics_writer(self.attempt) if world.is_main else None
        digest = run_digest(config, {name: d.digest for name, d in self.datasets.items()})
        self.trainer = Trainer(
            config,
            self.task,
            world,
            self.planner,
            CheckpointManager(
                f"{folder.url}/{CHECKPOINTS}",
                keep_last=config.checkpoint.keep_last,
                config_digest=digest,
                code_version=version("loupe"),
                process_group=world.host_group,
                background_group=dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT),
                explain=lambda found: explain_digests(found, digest),
            ),
            self.exporter,
            self.records,
            stop,
            Actions(self._at_intervals(), self._write_init_report, self._count_worker_death, self._name_of_shard),
            BadShardRecord(folder, digest),
            watchdog,
        )
        if watchdog and not self._loads_in_this_process():
            watchdog.never_below(_PATIENCE_WITH_DATA * config.data.timeout_s)
        for warning in warnings:
            self.trainer.reports.note(f"WARNING: {warning}")
        window = config.data.shuffle_window_shards
        if of_cache := cache_note(list(self.datasets.values()), window, self._prefetch_shards()):
            self.trainer.reports.print(of_cache)

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

    def _check_data(self) -> list[str]:
        """Refuse labels that the model does not know, or that are not there; warn of what training does not stumble over."""
        warnings = []
        field, num_classes = _classes_of(self.config.task)
        for name, dataset in self.datasets.items():
            if num_classes:
                check_classes(field, num_classes, name, dataset.info)
            # numbered labels have no names: the first sample tells those from none
            if self.config.task.kind == "latent_network" and not dataset.class_names and dataset.read(0).label < 0:
                raise UserError(
                    f"data.datasets.{name}: its samples have no labels, which the latent_network task learns; build it "
                    "from a folder per class, or from a metadata.jsonl with labels"
                )
            largest = max(phase.resolution for phase in self.config.phases)
            if dataset.short_side and dataset.short_side < largest:
                warnings.append(
                    f"data.datasets.{name}: images of {dataset.short_side} px are enlarged to {largest} px; build it with "
                    f"--size {largest}"
                )
        return warnings

    def _register(self) -> int:
        return self.folder.start_attempt(
            {
                "time": time.time(),
                "host": platform.node(),
                "pid": os.getpid(),
                "world_size": self.world.size,
                "device": str(self.world.device),
                "job_id": os.environ.get("SLURM_JOB_ID"),
                "loupe": version("loupe"),
                "torch": torch.__version__,
            }
        )

    def _serve_metrics(self) -> Exporter:
        exporter, config = Exporter(), self.config.metrics
        exporter.of(metric_names.BUILD).info({"version": version("loupe"), "torch": torch.__version__})
        exporter.of(metric_names.WORLD_SIZE).set(self.world.size)
        exporter.of(metric_names.RESTARTS).set(self.attempt)
        if self.world.is_main:
            exporter.of(metric_names.WORKER_DEATHS).inc(len(self.folder.names("worker_deaths")))
            exporter.of(metric_names.HANGS).inc(len(self.folder.names(HANGS)))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        port = exporter.serve(config.bind_address, config.port + local_rank if config.port else 0)
        host = platform.node() if config.bind_address in ("0.0.0.0", "::") else config.bind_address
        targets = self.world.gather(f"{host}:{port}")
        if self.world.is_main:
            self.folder.write_json("metrics_targets.json", {"targets": targets, "attempt": self.attempt})
            print(f"metrics of rank 0 on http://{targets[0]}/metrics", flush=True)
        return exporter

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
            code = self.trainer.fit(self._make_loader)
            if code is ExitCode.DONE:
                found = self._at_the_end()
        finally:
            if self.records:
                self.records.close()
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
        actions: list[tuple[int, Callable[[int], None]]] = []
        if config.samples:
            actions.append((config.samples.every_steps, self._on_samples))
        if config.reconstructions:
            actions.append((config.reconstructions.every_steps, self._on_evaluation))
        return actions

    def _on_samples(self, step: int) -> None:
        self._draw_samples(step)
        self._draw_curves()

    def _on_evaluation(self, step: int) -> None:
        self._evaluate(step)
        self._draw_curves()

    def _name(self, step: int) -> str:
        """Of a file that is written at this step."""
        return "final" if step == self.trainer.total_steps else f"step-{step:08d}"

    def _evaluate(self, step: int) -> dict[str, Any]:
        assert self.evaluation is not None
        found = self.evaluation.measure()
        seen = "" if found.about["dataset"]["held_out"] else "  (of images that it trains on)"
        self.trainer.reports.evaluated(step, flat(found.figures), in_words(found.figures) + seen)
        if self.world.is_main:
            self.folder.write_json(f"evaluation/{self._name(step)}.json", {"step": step, **found.numbers})
            self.folder.write_bytes(f"reconstructions/{self._name(step)}.png", found.picture)
        return found.summary()

    def _draw_curves(self) -> None:
        if self.world.is_main:
            self.trainer.reports.flush()
            self.folder.write_bytes("curves.png", loss_curves(self.folder.metrics(), self.folder.evaluations()))

    def _draw_samples(self, step: int) -> None:
        task, config = self.task, self.config.samples
        assert isinstance(task, LatentDiffusionTask)
        assert config is not None
        prompts = list(config.prompts)[: config.count] or self._prompts(config.count)
        resolution = self.planner.plan(step - 1).phase.resolution
        latents = sample_prompts(task, self.world, prompts, config, resolution=resolution)
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
                found |= self._prompt_accuracy()
            if self.evaluation:
                found["evaluation"] = self._evaluate(self.trainer.total_steps)
        return found

    def _finish(self, found: dict[str, Any]) -> None:
        progress = self.trainer.progress
        summary = summarise(
            self.folder, self.config, images=progress.images, train_seconds=progress.train_seconds, extra=found
        )
        self.folder.write_json(SUMMARY, summary)
        print(f"done: {progress.images} images in {summary['wall_s']:.0f} s", flush=True)

    def _prompt_accuracy(self) -> dict[str, float]:
        task, config, samples = self.task, self.config.prompt_accuracy, self.config.samples
        assert isinstance(task, LatentDiffusionTask)
        assert config is not None
        assert samples is not None
        resolution, dataset = self.config.phases[-1].resolution, self._first_dataset()
        prompts = self._prompts(config.num_prompts)
        generated = sample_prompts(task, self.world, prompts, samples, resolution=resolution)
        training, captions = encode_dataset(dataset, task.codec, resolution=resolution, device=self.world.device)
        accuracy, chance = prompt_accuracy(generated, prompts, training, captions, config.num_neighbours)
        return {"prompt_accuracy": accuracy, "prompt_accuracy_chance": chance}


def _classes_of(task: TaskConfig) -> tuple[str, int | None]:
    """The field that says how many classes the task knows, and how many; None where labels play no part."""
    if task.kind == "latent_network":
        return "task.num_classes", task.num_classes
    if task.kind == "latent_diffusion" and task.text.kind == "classes":
        return "task.text.num_classes", task.text.num_classes
    return "", None
