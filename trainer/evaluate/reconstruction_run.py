"""Evaluation of an autoencoder while it is trained: all ranks share the images, each measures its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.images import ImageError, read_image
from data.reader import BadShard, Dataset, StorageError, open_dataset
from data.transforms import training_image
from trainer.checkpoint.collective import Ranks
from trainer.config import RunConfig, resolve_url
from trainer.errors import UserError, one_line
from trainer.evaluate.codec_report import plain, provenance
from trainer.evaluate.reconstruction import MEANING, Judges, Measurement, Output, Pixels, check_side
from trainer.models.efficientnet import load_efficientnet_lite0
from trainer.models.lpips_weights import build_lpips
from trainer.models.reconstruction import Reconstructed
from trainer.parallel.world import World
from trainer.pictures import reconstruction_grid
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import pixels_to_images

BATCH = 8
"""Images of a forward pass: the same on any number of ranks."""


@dataclass(frozen=True)
class Evaluated:
    figures: dict[str, Any]
    """`Measurement.numbers`."""
    about: dict[str, Any]
    """Of what, by what, with what."""
    shown: Sequence[tuple[Pixels, Pixels]]

    @property
    def numbers(self) -> dict[str, Any]:
        """For a file of JSON."""
        return {**plain({**self.figures, **self.about}), "meaning": MEANING}

    @property
    def picture(self) -> bytes:
        return reconstruction_grid(self.shown)

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        out: dict[str, Any] = plain({**self.figures, "dataset": self.about["dataset"]["url"]})
        return out


class ReconstructionEvaluation:
    """Of images spread evenly over a dataset, at the last phase's resolution, so that all figures of a run compare."""

    def __init__(self, config: RunConfig, task: AutoencoderTask, world: World, own: Sequence[Dataset]) -> None:
        """`own`: the datasets that the run trains on.

        Raises:
            UserError: naming the field: no such dataset, too few or too small images, weights that are not there.
        """
        assert config.reconstructions is not None
        section = config.reconstructions
        self._task, self._world, self._ranks = task, world, Ranks(world.host_group)
        self._resolution = config.phases[-1].resolution
        self._dataset, self._url = own[0], next(iter(config.data.datasets.values())).url
        if section.dataset:
            self._url = section.dataset.url
            try:
                self._dataset = open_dataset(
                    resolve_url(self._url), name="held-out", max_samples=section.dataset.max_samples,
                    cache_dir=config.data.cache_dir,
                )  # fmt: skip
            except UserError as e:
                raise UserError(f"reconstructions.dataset: {e}") from None
        self._held_out = all(self._dataset.digest != dataset.digest for dataset in own)
        self._count = min(section.count, self._dataset.num_samples)
        if self._count < 2:
            raise UserError(f"reconstructions.dataset: {self._url} has {self._count} image; give two or more")
        self.warnings = self._look(section.count, given=section.dataset is not None)
        grid = min(section.grid, self._count)
        self._shown = {k * self._count // grid for k in range(grid)}
        self._judges = self._build_judges(config).to(world.device)
        lpips = self._judges.lpips
        check_side(self._resolution, f"phases.{len(config.phases) - 1}.resolution", lpips.network if lpips else None)

    def _look(self, wanted: int, *, given: bool) -> list[str]:
        warnings = []
        if self._count < wanted:
            warnings.append(f"reconstructions.count: {wanted}, and {self._url} has {self._count} images: all are used")
        if given and not self._held_out:
            warnings.append(f"reconstructions.dataset: the run trains on {self._url} too, so it is not held out")
        return warnings

    def _build_judges(self, config: RunConfig) -> Judges:
        section = config.reconstructions
        assert section is not None
        lpips = build_lpips(section.lpips, "reconstructions.lpips") if section.lpips else self._task.lpips
        features = None
        if section.features_url is not None:
            features = load_efficientnet_lite0(resolve_url(section.features_url), "reconstructions.features_url")
        return Judges(lpips, features)

    @torch.no_grad()
    def measure(self, go_on: Callable[[], None] = lambda: None) -> Evaluated:
        """With the weights that the module has now. A collective: every rank makes the same number of passes.

        Args:
            go_on: called before each pass; what it raises, on all ranks or none, ends the evaluation.

        Raises:
            UserError: on all ranks, fewer than two images can be read, or a rank's cannot be used.
        """
        world = self._world
        per_rank = -(-self._count // world.size)
        mine = range(world.rank * per_rank, min((world.rank + 1) * per_rank, self._count))
        measurement, skipped = Measurement(self._judges, shown=self._shown), []
        stand_in = np.zeros((self._resolution, self._resolution, 3), np.uint8)
        for start in range(0, per_rank, BATCH):
            go_on()
            chunk, lost = self._ranks.on_all(partial(self._read, mine[start : start + BATCH]))
            skipped += lost
            pixels = np.stack([pixels for _, pixels in chunk] or [stand_in])
            images = pixels_to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(world.device))
            output = self._reconstruct(images)
            if chunk:
                measurement.add(images, output, [number for number, _ in chunk])
        everywhere = world.gather((len(measurement), skipped))
        if sum(number for number, _ in everywhere) < 2:
            raise UserError(f"reconstructions.dataset: fewer than two of {self._count} images of {self._url} can be "
                            "read; look at them with `loupe data verify`")  # fmt: skip
        whole = measurement.joined(world)
        about = {
            "size": self._resolution,
            "weights": "average",
            "dataset": {"url": self._url, "digest": self._dataset.digest, "held_out": self._held_out},
            "judges": self._judges.numbers(),
            "skipped": [entry for _, entries in everywhere for entry in entries],
            "ranks": world.size,
            **provenance(world.device),
        }
        return Evaluated(whole.numbers(), about, [whole.shown[number] for number in sorted(whole.shown)])

    def _reconstruct(self, images_BCHW: Tensor) -> Output:
        """Through the module's own forward pass, which gathers its shards, in float32: as an export computes."""
        task = self._task
        teacher = task.teacher if task.config.reconstructs == "latents" else None
        out: Reconstructed = task.module(images_BCHW if teacher is None else teacher.encode(images_BCHW), None)
        pictures = out.x if teacher is None else teacher.decode(out.x)
        maps = dict(zip(task.config.model.decoder_maps, out.maps, strict=True))
        if out.quantized is None:
            return Output(pictures, out.raw, maps)
        assert task.config.model.kind == "vq"
        return Output(pictures, out.raw, maps, out.quantized.indices_BHW, task.config.model.codebook.size)

    def _read(self, numbers: range) -> tuple[list[tuple[int, Pixels]], list[dict[str, Any]]]:
        """Images by their number, and those that cannot be read."""
        images, skipped = [], list[dict[str, Any]]()
        down = ""
        for number in numbers:
            row = number * self._dataset.num_samples // self._count
            try:
                if down:
                    raise StorageError(down)
                sample = self._dataset.read(row)
                pixels = training_image(read_image(sample.image, min_side=self._resolution), self._resolution)
            except ImageError as e:
                skipped.append({"sample": row, "key": sample.key, "reason": e.reason, "detail": e.detail})
            except BadShard as e:
                skipped.append({"sample": row, "reason": e.reason, "detail": one_line(e)})
            except StorageError as e:
                # one deadline a pass: the other ranks wait
                down = one_line(e)
                skipped.append({"sample": row, "reason": "storage", "detail": down})
            else:
                images.append((number, pixels))
        return images, skipped
