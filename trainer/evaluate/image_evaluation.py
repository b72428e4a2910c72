"""FID and its like while a text-to-image model is trained: the figures of `loupe evaluate run`, by the same code. The module
stays sharded, and a picture lives no longer than the networks look at it.

N pictures, B of them that a network sees at once.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.background import Background
from trainer.checkpoint.collective import Ranks
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.errors import UserError
from trainer.evaluate.features.networks import LoadedNetwork, build_network
from trainer.evaluate.image_measures import check_counts, flat
from trainer.evaluate.image_sets import Picture, Selection
from trainer.evaluate.images_run import (
    Settings,
    cache_of,
    finite,
    judges_of_generated,
    judges_of_real,
    more_than_there,
    numbers_of,
    provenance_of,
)
from trainer.evaluate.judged_sets import PART, Judged, Judging, batch_rows
from trainer.evaluate.judges import Judge, Rows
from trainer.evaluate.samples_run import drawn_again, open_reference, prompt_numbers, prompts_of, record_of
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.sampling import job
from trainer.sampling.drawing import Progress, Work, lots_to_draw, prepare
from trainer.sampling.model import ShardedModel
from trainer.sampling.options import Options, Part
from trainer.sampling.prompts import Prompt, read_prompts
from trainer.tasks.base import Task
from trainer.tasks.latent_diffusion import LatentDiffusionTask

SECTION = "image_evaluation"
_FIELDS = {
    "--allow-few": f"{SECTION}.allow_few=true", "--cache": f"{SECTION}.cache", "--classes": f"{SECTION}.prompts",
    "--guidance": f"{SECTION}.guidance_scale", "--guidance-interval": f"{SECTION}.guidance_interval",
    "--guidance-rescale": f"{SECTION}.guidance_rescale", "--lot": f"{SECTION}.lot", "--metrics": f"{SECTION}.metrics",
    "--network": f"{SECTION}.networks", "--network-sha256": f"{SECTION}.networks, sha256", "--out": f"{SECTION}.cache",
    "--prompt": f"{SECTION}.prompts", "--prompts": f"{SECTION}.prompts", "--reference": f"{SECTION}.reference",
    "--sampler": f"{SECTION}.sampler", "--size": f"{SECTION}.resolution", "--steps": f"{SECTION}.num_steps",
}  # fmt: skip
"""Options of `loupe evaluate run`, and of `loupe sample`, by the names that they have in a run's config."""
_HOST = torch.device("cpu")
_WAIT_S = 0.2
"""Between two looks at whether the figures are there."""


def in_fields(error: UserError) -> UserError:
    """An error of the commands' code, naming fields in place of options."""
    words = re.sub(r"--[a-z][a-z0-9-]*", lambda option: _FIELDS.get(option[0], option[0]), str(error))
    return UserError(words if words.startswith(SECTION) else f"{SECTION}: {words}")


@contextmanager
def _by_fields() -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise in_fields(e) from None


@dataclass(frozen=True)
class Measured:
    numbers: dict[str, Any]
    """As evaluation.json of `loupe evaluate run`."""
    record: tuple[str, dict[str, Any]]
    """File of the run's folder, and what goes into it."""

    @property
    def values(self) -> dict[str, float]:
        """By figure; NaN where one is not finite."""
        found = flat(self.numbers["figures"])
        return {name: float("nan") if value is None else value for name, value in found.items()}

    def in_words(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        _, record = self.record
        return {**flat(record["figures"]), **{key: record[key] for key in ("counts", "reference", "definition")}}


@dataclass
class _Ready:
    """What is the same at each interval."""

    work: Work
    judges: list[Judge]
    real: dict[str, Judged] = field(default_factory=dict)
    """On rank 0."""


class ImageEvaluation:
    def __init__(self, config: RunConfig, task: Task, world: World, stop: StopRequest) -> None:
        """A collective. Networks and real images are opened, so that what is wrong with them is told at once.

        Args:
            stop: looked at while real images are measured.

        Raises:
            UserError: naming the field: no such weights or images, or too few of them.
        """
        assert config.image_evaluation is not None
        assert isinstance(config.task, LatentDiffusionConfig)
        assert isinstance(task, LatentDiffusionTask)
        section = config.image_evaluation
        self._config, self._section, self._task, self._world, self._stop = config, section, task, world, stop
        self._ranks = ranks = Ranks(world.host_group)
        self._resolution = section.resolution or config.phases[-1].resolution
        self._settings = Settings(
            self._resolution, section.resize, section.metrics, None, section.reference_count, section.seed, section.batch_size,
            section.resamples, section.allow_few,
        )  # fmt: skip
        self._is_of_classes = config.task.text.kind == "classes"
        with _by_fields():
            names = [network.name for network in section.networks]
            self._metrics = self._settings.chosen(names, has_prompts=not self._is_of_classes)
            self._sampling = Options(
                "", sampler=section.sampler, steps=section.num_steps, guidance=section.guidance_scale,
                guidance_interval=section.guidance_interval, guidance_rescale=section.guidance_rescale,
                seed=section.noise_seed, size=(self._resolution,) * 2,
            ).settings(config)  # fmt: skip
            self._sampling.check(config.task)
            self._real = ranks.on_all(lambda: open_reference(section.reference, config))
            count = section.num_samples or len(self._real)
            if section.prompts is not None:
                count = ranks.on_rank_0(lambda: len(self._prompts()))
            self._networks = ranks.on_all(self._build_networks)
            of_real = min(section.reference_count or len(self._real), len(self._real))
            self._check_counts(count, of_real)
            self._settings = replace(self._settings, count=count, reference_count=of_real)
        self._ready: _Ready | None = None

    def _check_counts(self, generated: int, real: int) -> None:
        dimensions = {network.name: network.network.dimensions for network in self._networks}
        check_counts(generated, real, dimensions, self._metrics, allow_few=self._section.allow_few)

    def _build_networks(self) -> list[LoadedNetwork]:
        return [build_network(one.name, one.weights, one.sha256) for one in self._section.networks]

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """The networks are on the device; at other times its memory is the training's."""
        try:
            for network in self._networks:
                network.to(self._world.device)
            yield
        finally:
            for network in self._networks:
                network.to(_HOST)

    # ------------------------------------------------------------------------------------------------------ once a start

    def prepare(self, say: Callable[[str], None], progress: Progress = lambda what, done, total: None) -> list[str]:
        """Prompts, and what the networks give of real images, from the cache if it is there. A collective, before the first
        step and with the module sharded. Returns what there is to know, in lines.

        Args:
            say: told of files of the cache that are damaged.
            progress: as of `measure`.

        Raises:
            UserError: naming the field: real images or prompts that cannot be used, a cache that ranks do not share.
            Stopped: on all ranks; what is done is kept.
        """
        section, world, ranks, task = self._section, self._world, self._ranks, self._task
        judging = Judging(
            world.device, section.batch_size, world, progress, say, lambda: self._stop.received is not None
        )
        with _by_fields(), self._at_hand():
            prompts = ranks.on_rank_0(self._prompts)
            captioned = all(isinstance(prompt, str) for prompt in prompts)
            self._metrics = self._settings.chosen([network.name for network in self._networks], has_prompts=captioned)
            model = ShardedModel(self._config, task.module, task.text, task.codec, world.device)
            work = ranks.on_all(lambda: prepare(model, prompts, self._sampling, lot=section.lot))
            selection = Selection(self._real, self._resolution, section.resize, section.reference_count, section.seed)
            cache = ranks.on_rank_0(lambda: cache_of(section.cache))
            real = judging.judged(selection, judges_of_real(self._networks), cache, "real")
            # as many as can be read
            ranks.on_rank_0(lambda: self._check_counts(len(prompts), min(len(judged) for judged in real.values())))
        self._ready = _Ready(work, judges_of_generated(self._networks, self._metrics), real)
        sampling, cost = self._sampling, model.cost(self._sampling)
        lines = [
            f"image evaluation each {section.every_steps} steps: {job.pictures(len(prompts))} of {self._resolution} px by "
            f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g} ({cost.passes} network passes each), "
            f"against {self._real.url}: {', '.join(self._metrics)}"
        ]
        given = None if section.prompts else section.num_samples
        lines += [f"{SECTION}.{line}" for line in (
            *drawn_again("num_samples", given, self._real),
            *more_than_there("reference_count", section.reference_count, len(self._real), self._real.url),
        )]  # fmt: skip
        if any(work.cut):
            lines.append(
                f"WARNING: {SECTION}: {sum(work.cut)} of {len(prompts)} prompts are longer than the text encoder takes"
            )
        return lines

    def _prompts(self) -> list[Prompt]:
        if self._section.prompts is not None:
            return read_prompts(self._section.prompts)
        return prompts_of(self._real, self._section.num_samples, self._section.seed, classes=self._is_of_classes)

    # -------------------------------------------------------------------------------------------------------- each time

    def measure(
        self, step: int, go_on: Callable[[], None] = lambda: None, progress: Progress = lambda what, done, total: None
    ) -> Measured:  # fmt: skip
        """With the weights that the module has now, after `step` steps. A collective.

        Args:
            go_on: called before each lot of pictures, and while figures are computed; what it raises, on all ranks or none,
                ends the evaluation.
            progress: given what is being done, how much of it is, and of how much.

        Raises:
            UserError: on all ranks, pictures or features are not finite, or a metric cannot be computed of them.
        """
        assert self._ready is not None, "`prepare` comes first"
        started = time.monotonic()
        with _by_fields():
            with self._at_hand():
                rows = self._drawn_rows(self._ready, go_on, progress)
            drawn_s = time.monotonic() - started
            compute: Background[dict[str, Any]] = Background("image figures")
            if self._world.is_main:
                compute.start(partial(self._numbers, self._ready, step, rows))
            # the others have a deadline on what they wait for, and all hear of a request to stop
            progress("computing figures", 0, 1)
            while self._world.broadcast(compute.running):
                compute.wait(_WAIT_S)
                go_on()
            numbers = self._ranks.on_rank_0(compute.collect)
        assert numbers is not None
        numbers["seconds"] = {"drawing": round(drawn_s, 1), "in_all": round(time.monotonic() - started, 1)}
        return Measured(numbers, record_of(numbers, numbers["model"]["identity"]))

    def _drawn_rows(self, ready: _Ready, go_on: Callable[[], None], progress: Progress) -> dict[str, Rows]:
        """By judge, of all pictures in their order, on rank 0."""
        world, lot, total = self._world, ready.work.lot, len(ready.work.prompts)
        batches, parts = _batches(total, self._section.batch_size), list[dict[str, Rows]]()
        for first in range(0, len(batches), world.size):
            now = batches[first : first + world.size]
            # sharded passes are collectives: where a rank has fewer lots, or none, it draws one again
            num_lots = max(len(lots_to_draw(batch, lot, Part())) for batch in now)
            is_own = world.rank < len(now)
            mine = now[world.rank] if is_own else now[0]
            lots, pixels = lots_to_draw(mine, lot, Part()), dict[int, np.ndarray]()
            for k in range(num_lots):
                go_on()
                positions = lots[min(k, len(lots) - 1)]
                drawn = self._ranks.on_all(partial(ready.work.images, positions))
                pixels |= dict(zip(positions, drawn, strict=True))
            found = self._ranks.on_all(partial(self._judged, ready, mine if is_own else range(0), pixels))
            parts += [part for part in _on_rank_0(world, found) if part]
            progress("drawing pictures", now[-1].stop, total)
        if not world.is_main:
            return {}
        return {
            judge.name: {key: np.concatenate([part[judge.name][key] for part in parts]) for key in parts[0][judge.name]}
            for judge in ready.judges
        }

    def _judged(self, ready: _Ready, positions: range, pixels: dict[int, np.ndarray]) -> dict[str, Rows]:
        """Of no picture, nothing."""
        if not positions:
            return {}
        side = self._resolution
        pictures = [Picture(position, pixels[position], side, side, "png") for position in positions]
        prompts = [ready.work.prompts[position] for position in positions]
        said = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        return batch_rows(ready.judges, pictures, said, self._section.batch_size, self._world.device)

    def _numbers(self, ready: _Ready, step: int, rows: dict[str, Rows]) -> dict[str, Any]:
        work, total = ready.work, len(ready.work.prompts)
        work.model.step = step
        drawn = work.about()
        # a checkpoint of this step may never be written
        model = {**drawn, "identity": {**drawn["identity"], "checkpoint": None}, "source": "training"}
        about = {"url": None, "kind": "drawn while training", "found": total}
        identity = {"size": self._resolution, "drawn": model["identity"]}
        places = np.arange(total)
        generated = {
            judge.name: Judged(
                None, judge.numbers(), {"place": places, "index": places, **rows[judge.name]},
                {"key": {"images": identity}, "skipped": {"count": 0, "reasons": {}, "listed": []}}, was_there=False,
            )
            for judge in ready.judges
        }  # fmt: skip
        numbers = numbers_of(
            generated, ready.real, (about, self._real.about()), self._settings, self._networks, self._metrics
        )
        more = {
            "kind": "training", "model": model, "prompts": prompt_numbers(work.prompts), "ranks": self._world.size,
            **provenance_of(self._world.device),
        }  # fmt: skip
        found: dict[str, Any] = finite({**numbers, **more})
        return found


def _batches(total: int, batch_size: int) -> list[range]:
    """Positions that networks see at once: the batches of the parts of `judged_sets`, as they round alike."""
    parts = [range(first, min(first + PART, total)) for first in range(0, total, PART)]
    return [part[first : first + batch_size] for part in parts for first in range(0, len(part), batch_size)]


def _on_rank_0(world: World, value: dict[str, Rows]) -> list[dict[str, Rows]]:
    """Every rank's value, on rank 0 alone: all pictures' features would not fit into the memory of each."""
    found: list[Any] = [None] * world.size
    dist.gather_object(value, found if world.is_main else None, dst=0, group=world.host_group)
    return found if world.is_main else []
