"""Validation while a latent diffusion model is trained: its loss at fixed noise levels, of the same images with the same noise
each time. All ranks share the images; the module stays sharded.

K noise levels, N images, B images of a pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import draws
from data.demands import check_classes
from data.images import ImageError, read_image
from data.reader import BadShard, Dataset, StorageError, open_dataset
from data.transforms import training_image
from trainer.checkpoint.collective import Ranks
from trainer.config import LatentDiffusionConfig, PhaseConfig, RunConfig, resolve_url
from trainer.diffusion.paradigms import Paradigm
from trainer.errors import UserError, one_line
from trainer.losses.denoising import denoising_loss
from trainer.losses.perceptual import PerceptualContext
from trainer.metrics import reduce_together
from trainer.parallel.apply import autocast, reshard
from trainer.parallel.world import World
from trainer.rng import normal, uniform
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import pixels_to_images

MEANING = (
    "Mean over images of the squared error of the averaged model's prediction, and of the phase's perceptual loss without its "
    "gate and its weight, at the centres of equal parts of the diffusion's time; level 0 has the least noise. Images, captions "
    "and noise are the same each time, so that values compare within a run, and between runs of one codec and paradigm."
)


@dataclass(frozen=True)
class Chosen:
    """Images of a pass; for one that cannot be read, and to fill up the last pass, there is a stand-in."""

    numbers: list[int]
    pixels_BHWC: np.ndarray
    captions: list[str | None]
    labels: list[int]
    is_read: list[bool]
    skipped: list[dict[str, Any]]


@dataclass(frozen=True)
class Losses:
    """A term at each level."""

    means: tuple[float, ...]
    errors: tuple[float, ...]
    """Standard error of each mean, over images: how far other images would give others."""

    @property
    def mean(self) -> float:
        return math.fsum(self.means) / len(self.means)


@dataclass(frozen=True)
class Validated:
    terms: dict[str, Losses]
    """`denoising`, and by its name the phase's perceptual loss."""
    about: dict[str, Any]

    @property
    def numbers(self) -> dict[str, Any]:
        """For a file of JSON."""
        terms = {
            name: {"mean": _known(found.mean), "by_level": [*map(_known, found.means)],
                   "standard_error": [*map(_known, found.errors)]}
            for name, found in self.terms.items()
        }  # fmt: skip
        return {**terms, **self.about, "meaning": MEANING}

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        keys = ("resolution", "images", "dataset")
        return {**{n: _known(found.mean) for n, found in self.terms.items()}, **{key: self.about[key] for key in keys}}

    def in_words(self) -> str:
        told = "  ".join(f"{name} {found.mean:.4f}" for name, found in self.terms.items())
        by_level = " ".join(f"{value:.3g}" for value in self.terms["denoising"].means)
        seen = "" if self.about["dataset"]["held_out"] else "  (of images that it trains on)"
        lost = f"  ({len(self.about['skipped'])} images left out)" if self.about["skipped"] else ""
        return f"{told}  by level, least noise first: {by_level}{lost}{seen}"


class Validation:
    def __init__(self, config: RunConfig, task: LatentDiffusionTask, world: World, own: Sequence[Dataset]) -> None:
        """`own`: the datasets that the run trains on.

        Raises:
            UserError: naming the field: no such dataset, too few images, labels that the model does not know.
        """
        assert config.validation is not None
        section = config.validation
        self._section, self._task, self._world = section, task, world
        self._ranks = Ranks(world.host_group)
        # seeds and purposes of training are others, so that no noise is one that the model has seen
        self._seed = int(draws.raw(section.seed, "validation", 0, count=1)[0])
        given = section.dataset or next(iter(config.data.datasets.values()))
        self._url = given.url
        try:
            # of its own: what is found bad here does not concern the training
            self._dataset = open_dataset(
                resolve_url(given.url), name="validation", max_samples=given.max_samples,
                cache_dir=config.data.cache_dir, cache_gib=config.data.cache_gib, fetch=given.fetch,
            )  # fmt: skip
        except UserError as e:
            raise UserError(f"validation.dataset: {e}") from None
        self._count = min(section.count, self._dataset.num_samples)
        if self._count < 2:
            raise UserError(f"validation.dataset: {self._url} has {self._count} image; give two or more")
        self._check_labels(task.config)
        self._shares = _shared(self._dataset, own) if section.dataset else "all"
        self.warnings = self._look(max(section.resolution or phase.resolution for phase in config.phases))

    def _check_labels(self, task: LatentDiffusionConfig) -> None:
        if task.text.kind == "classes":
            check_classes("task.text.num_classes", task.text.num_classes, "validation.dataset", self._dataset.info)
            if self._dataset.read(0).label < 0:
                raise UserError(f"validation.dataset: samples of {self._url} have no labels, and task.text.kind is classes; "
                                "take a dataset with the run's classes")  # fmt: skip

    def _look(self, largest_px: int) -> list[str]:
        section, warnings = self._section, []
        if self._count < section.count:
            warnings.append(
                f"validation.count: {section.count}, and {self._url} has {self._count} images: all are used"
            )
        if section.dataset is None:
            warnings.append(f"validation.dataset: absent, so its loss is of the first {self._count} images of {self._url}, "
                            "which the run trains on")  # fmt: skip
        elif self._shares:
            warnings.append(
                f"validation.dataset: {self._url} shares {self._shares} with what the run trains on, so it is not held out"
            )
        short = self._dataset.short_side
        if section.dataset and short and short < largest_px:
            warnings.append(f"validation.dataset: images of {short} px are enlarged to {largest_px} px; build it with --size "
                            f"{largest_px}")  # fmt: skip
        return warnings

    @torch.no_grad()
    def measure(self, phase: PhaseConfig, go_on: Callable[[], None] = lambda: None) -> Validated:
        """With the weights that the module has now. A collective: every rank makes the same number of passes, of one size, and
        each pass is of the same images on any number of ranks.

        Args:
            phase: that is being trained.
            go_on: called before each pass; what it raises, on all ranks or none, ends the validation.

        Raises:
            UserError: on all ranks, fewer than two images can be read, or a rank's cannot be used.
        """
        section, world, task = self._section, self._world, self._task
        resolution = section.resolution or phase.resolution
        paradigm, num_levels = task.paradigm(resolution), section.levels
        times_K = paradigm.centre_times(num_levels)
        batch = min(section.batch_size, self._count)
        names = ["denoising"]
        if phase.perceptual and task.perceptual and task.perceptual.is_measured:
            names.append(task.perceptual.name)
        table = torch.zeros(len(names), num_levels, self._count, dtype=torch.float64, device=world.device)
        read_N = torch.zeros(self._count, dtype=torch.float64)
        skipped: list[dict[str, Any]] = []
        captions_cut = 0
        for first in range(0, -(-self._count // batch), world.size):
            go_on()
            start = (first + world.rank) * batch
            chosen, text = self._ranks.on_all(partial(self._prepared, start, batch, resolution))
            skipped += chosen.skipped
            captions_cut += text.num_cut
            probe = Probe(task, paradigm, self._seed, chosen, text, num_levels)
            here = [i for i, is_read in enumerate(chosen.is_read) if is_read]
            rows = [chosen.numbers[i] for i in here]
            read_N[rows] = 1.0
            for level, time in enumerate(times_K):
                if level:
                    go_on()
                losses = probe.losses(level, time, perceptual=len(names) > 1)
                for term, loss_B in enumerate(losses):
                    table[term, level, rows] = loss_B[here].double()
        for module, _ in task.frozen_sharded():
            reshard(module)
        # each value has one rank that knows it, so the sums are exact, and the means after them
        table, read_N = (found.cpu() for found in reduce_together(table, read_N.to(world.device)))
        gathered = world.gather((skipped, captions_cut))
        is_read_N = read_N > 0
        if int(is_read_N.sum()) < 2:
            raise UserError(f"validation.dataset: fewer than two of {self._count} images of {self._url} can be read; look at "
                            "them with `loupe data verify`")  # fmt: skip
        about = {
            "weights": "average",
            "phase": phase.name,
            "resolution": resolution,
            "paradigm": task.config.paradigm.kind,
            "times": [float(t) for t in paradigm.model_time(times_K)],
            "noise_levels": [float(level) for level in paradigm.noise_level(times_K)],
            "images": int(is_read_N.sum()),
            "skipped": [entry for entries, _ in gathered for entry in entries],
            "captions_cut": sum(cut for _, cut in gathered),
            "seed": section.seed,
            "batch_size": batch,
            "dataset": {"url": self._url, "digest": self._dataset.digest, "held_out": not self._shares},
            "ranks": world.size,
        }
        return Validated(
            {name: _losses(of_term[:, is_read_N]) for name, of_term in zip(names, table, strict=True)}, about
        )

    def _prepared(self, start: int, batch: int, resolution: int) -> tuple[Chosen, Any]:
        chosen = self._read(start, batch, resolution)
        return chosen, self._task.text.prepare(chosen.captions, chosen.labels)

    def _read(self, start: int, batch: int, resolution: int) -> Chosen:
        """Images `start` to `start + batch` of the chosen ones."""
        chosen = Chosen([], np.zeros((batch, resolution, resolution, 3), np.uint8), [], [], [], [])
        down = ""
        for i, number in enumerate(range(start, start + batch)):
            caption, label, is_read = None, -1, False
            if number < self._count:
                # the held-out ones evenly, whatever order they are in; of the run's own the first, which are fewer shards
                row = number * self._dataset.num_samples // self._count if self._section.dataset else number
                try:
                    if down:
                        raise StorageError(down)
                    sample = self._dataset.read(row)
                    chosen.pixels_BHWC[i] = training_image(read_image(sample.image, min_side=resolution), resolution)
                    caption, label, is_read = sample.texts[0] if sample.texts else "", sample.label, True
                except ImageError as e:
                    chosen.skipped.append({"sample": row, "reason": e.reason, "detail": e.detail})
                except BadShard as e:
                    chosen.skipped.append({"sample": row, "reason": e.reason, "detail": one_line(e)})
                except StorageError as e:
                    # one deadline a pass: the other ranks wait
                    down = one_line(e)
                    chosen.skipped.append({"sample": row, "reason": "storage", "detail": down})
            chosen.numbers.append(number)
            chosen.captions.append(caption)
            chosen.labels.append(label)
            chosen.is_read.append(is_read)
        return chosen


class Probe:
    """The model's losses on the images of one pass: latents and texts are made once, for all levels."""

    def __init__(
        self, task: LatentDiffusionTask, paradigm: Paradigm, seed: int, chosen: Chosen, text: Any, num_levels: int
    ) -> None:
        self._task, self._paradigm, self._seed = task, paradigm, seed
        self._numbers, self._num_levels = chosen.numbers, num_levels
        self._device = next(task.module.parameters()).device
        self._text = task.condition(text)
        pixels_BCHW = torch.from_numpy(chosen.pixels_BHWC).permute(0, 3, 1, 2)
        self._images_BCHW = pixels_to_images(pixels_BCHW.to(self._device))
        with autocast(self._device):
            self._z0_BCHW = task.codec.encode(self._images_BCHW).float()

    def losses(self, level: int, time: Tensor, *, perceptual: bool) -> list[Tensor]:
        """Denoising and perceptual loss (B,) at a time of the diffusion; computed as in training."""
        task, paradigm, z0 = self._task, self._paradigm, self._z0_BCHW
        positions = [number * self._num_levels + level for number in self._numbers]
        host_t_B = time.expand(len(positions))
        t_B = host_t_B.to(self._device)
        with autocast(self._device):
            noise = normal(self._seed, positions, "noise", z0.shape[1:], device=self._device)
            zt = paradigm.add_noise(z0, noise, t_B)
            prediction = task.module(zt, paradigm.model_time(t_B), self._text).float()
            denoising_B = denoising_loss(prediction, paradigm.target(z0, noise, t_B))
            if not perceptual:
                return [denoising_B]
            assert task.perceptual is not None
            context = PerceptualContext(
                threshold=math.inf, phase_step=0, paradigm=paradigm, images_BCHW=self._images_BCHW,
                denoising_B=denoising_B, text=self._text,
                uniform=lambda purpose: uniform(self._seed, positions, purpose),
                normal=lambda purpose: normal(self._seed, positions, purpose, z0.shape[1:], device=self._device),
            )  # fmt: skip
            z0_hat = paradigm.to_z0(prediction, zt, t_B)
            return [denoising_B, task.perceptual.measure(z0_hat, z0, paradigm.noise_level(host_t_B), context)]


def _losses(values_KN: Tensor) -> Losses:
    means_K = values_KN.mean(1)
    errors_K = values_KN.std(1) / math.sqrt(values_KN.shape[1])
    return Losses(tuple(means_K.tolist()), tuple(errors_K.tolist()))


def _shared(held_out: Dataset, own: Sequence[Dataset]) -> str:
    """Which images are in both, as far as their datasets and shards are the same; empty where none are."""
    same = [dataset.num_samples for dataset in own if dataset.digest == held_out.digest]
    if same:
        return f"{min(max(same), held_out.num_samples)} of its {held_out.num_samples} images"
    mine = held_out.shards.hashes[held_out.shard_sizes > 0]
    theirs = [dataset.shards.hashes[dataset.shard_sizes > 0] for dataset in own]
    found = int(np.isin(mine, np.concatenate(theirs)).sum())
    return f"{found} of its {len(mine)} shards" if found else ""


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
