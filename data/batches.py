"""One step's batch for one rank: from what the plan asks for to pixels, captions and labels.

A batch is made from its request alone: crop, flip and caption follow from the stream position. So a run resumes at any
step at once, and numbers do not depend on workers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from data import draws
from data.buckets import row_ranges
from data.counts import Sums
from data.encode.stored import States, Stored
from data.images import ImageError, read_image
from data.plan import SampleRef
from data.reader import BadShard, Dataset, StorageError
from data.schema import Sample
from data.storage import DamagedShard, MissingShard
from data.transforms import training_image
from trainer.errors import UserError

_MAX_REPLACEMENTS = 8
"""Undecodable replacements in a row for one sample; that many mean the dataset is at fault, not an image."""
_MAX_DRAWS = 64
"""Of a replacement, those in shards that cannot be read included."""
Decode = Literal["fast", "balanced", "exact"]
DECODE_MARGIN: dict[Decode, int | None] = {"fast": 1, "balanced": 2, "exact": None}
"""JPEGs are decoded no smaller than so many times the resolution; None: in full.

PSNR against `exact`, mean of 80 photos of 640 x 427 px: to 256 px fast 35 dB, balanced 95 dB; to 128 px 32 and 40; to 64 px 33
and 37. Where the JPEG decoder's own halving is all that is to be done, as from 512 to 256 px, fast gives 46 dB."""


ShardKey = tuple[str, int]
"""(dataset, shard)."""
OF_SHARDS = (MissingShard.reason, DamagedShard.reason)
"""Reasons of substitutions that are a shard's."""


class LeftOut(NamedTuple):
    """A shard that a run has agreed not to read."""

    reason: str
    """`missing_shard` or `damaged_shard`."""
    since: int
    """The first step whose batch has none of it. Batches of the steps before were made of it, and are so again."""


@dataclass(frozen=True)
class BatchRequest:
    """What one rank needs for one step."""

    step: int
    first_position: int
    refs: tuple[SampleRef, ...]
    """refs[i] stands at stream position first_position + i."""
    resolution: int
    """Side of the square images, in pixels; with `shape`, of the square of equal area."""
    shape: tuple[int, int] | None = None
    """(height, width) of the images of the batch's aspect bucket, in pixels; absent: squares."""


@dataclass(frozen=True)
class Substitution:
    """A sample that could not be decoded, and what took its place."""

    position: int
    bad: SampleRef
    used: SampleRef
    reason: str
    """One of few words, fit to label a count."""


@dataclass
class Batch:
    step: int
    resolution: int
    """Side of the images, in pixels; of those of an aspect bucket, the side of the square of equal area."""
    positions_B: torch.Tensor
    """int64; places in the stream."""
    images_BCHW: torch.Tensor
    """uint8, RGB."""
    captions: list[str]
    labels_B: torch.Tensor
    """int64; -1 where none."""
    keys: list[str]
    """dataset/key; names images in errors."""
    substitutions: tuple[Substitution, ...]
    """Made in this batch."""
    latents_BCHW: torch.Tensor | None = None
    """Where they are stored: raw, as they are stored, (B, C, h, w) or moments (B, 2C, h, w). Images are then (B, 3, 0, 0)."""
    states: tuple[States | None, ...] = ()
    """Where they are stored: of each of the run's text encoders."""
    bad_shards: Mapping[ShardKey, str] = field(default_factory=dict)
    """What its maker found unreadable since the batch before, and why."""
    counts: Sums = field(default_factory=dict)
    """What its maker has counted since the batch before."""


@dataclass(frozen=True)
class Failure:
    """An error that crosses from worker to trainer as a value: torch would wrap the message in a traceback."""

    message: str
    of_storage: bool = False


def unwrap(made: "Batch | Failure") -> Batch:
    if isinstance(made, Failure):
        raise StorageError(made.message) if made.of_storage else UserError(made.message)
    return made


def as_it_is(made: Any) -> Any:
    return made


class Steps(TorchDataset[Any]):
    """Step to batch; what the workers run."""

    def __init__(
        self,
        datasets: dict[str, Dataset],
        request: Callable[[int], BatchRequest],
        *,
        seed: int,
        random_crop: bool,
        flip_probability: float,
        caption_weights: dict[str, float],
        substitutions: dict[SampleRef, SampleRef],
        stored: Stored | None = None,
        decode: Decode = "balanced",
    ) -> None:
        self.memory: Callable[[tuple[int, ...]], torch.Tensor] = uint8_memory
        """For the images of a batch, uint8 of a shape; whoever runs this may have it elsewhere."""
        self._decode_margin = DECODE_MARGIN[decode]
        self._datasets, self._request, self._seed = datasets, request, seed
        self._random_crop, self._flip_probability = random_crop, flip_probability
        self._caption_weights = caption_weights
        self._substitutions = substitutions
        self._stored = stored or Stored()

    def __getitem__(self, step: int) -> Batch | Failure:
        try:
            return self._batch(self._request(step))
        except UserError as e:
            return Failure(str(e))
        except StorageError as e:
            return Failure(str(e), of_storage=True)

    def _batch(self, request: BatchRequest) -> Batch:
        size = request.shape or (request.resolution, request.resolution)
        images_BCHW = self.memory((len(request.refs), 3, *((0, 0) if self._stored.latents else size)))
        latents: list[torch.Tensor] = []
        taken: list[tuple[str, Sample, str]] = []
        captions: list[str] = []
        labels: list[int] = []
        keys: list[str] = []
        substitutions: list[Substitution] = []
        positions = range(request.first_position, request.first_position + len(request.refs))
        for i, (position, ref) in enumerate(zip(positions, request.refs, strict=True)):
            sample, seen, used, reason = self._decodable(ref, request)
            if used != ref:
                substitutions.append(Substitution(position, bad=ref, used=used, reason=reason))
            u_crop, u_flip, u_caption = self._crop_flip_caption(position, sample)
            if isinstance(seen, torch.Tensor):
                latents.append(seen)
            else:
                image_HWC = training_image(
                    seen, size, u_crop=u_crop if self._random_crop else None, flip=u_flip < self._flip_probability
                )
                # into these planes: a tenth of what a permutation costs
                cv2.split(image_HWC, list(images_BCHW[i].numpy()))
            captions.append(chosen_caption(sample.captions, self._caption_weights, u_caption))
            taken.append((used.dataset, sample, captions[-1]))
            labels.append(sample.label)
            keys.append(f"{used.dataset}/{sample.key}")
        return Batch(
            step=request.step,
            resolution=request.resolution,
            positions_B=torch.tensor(positions, dtype=torch.int64),
            images_BCHW=images_BCHW,
            captions=captions,
            labels_B=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            substitutions=tuple(substitutions),
            latents_BCHW=torch.stack(latents) if latents else None,
            states=self._stored.states_of(taken),
        )

    def _decodable(
        self, ref: SampleRef, request: BatchRequest
    ) -> tuple[Sample, np.ndarray | torch.Tensor, SampleRef, str]:
        """A sample with its pixels, or its stored latents: of `ref`, or of what replaces it, with the reason."""
        size = request.shape or (request.resolution, request.resolution)
        # an image has about its bucket's proportions, so its longer side is long enough where its shorter one is
        min_side = self._decode_margin * min(size) if self._decode_margin else None
        used = self._substitutions.get(ref, ref)
        reason = "known" if used != ref else ""
        undecodable, first = 0, ""
        for attempt in range(_MAX_DRAWS):
            try:
                sample = self._datasets[used.dataset].read(used.index)
                if self._stored.latents:
                    return (
                        sample, self._stored.latents_of(used.dataset, sample, request.resolution, size), used, reason
                    )  # fmt: skip
                return sample, read_image(sample.image, min_side=min_side), used, reason
            except ImageError as e:
                reason, first = reason or e.reason, first or f"{used.dataset}/{sample.key}: {e}"
                undecodable += 1
            except BadShard as e:
                reason, first = reason or e.reason, first or str(e)
            if undecodable > _MAX_REPLACEMENTS:
                break
            used = self._replacement(ref, attempt, in_bucket=request.shape is not None)
        raise UserError(
            f"dataset {ref.dataset}: {attempt} replacements of sample {ref.index} cannot be used either ({first}); run "
            f"`loupe data verify {self._datasets[ref.dataset].url}`"
        )

    def _replacement(self, bad: SampleRef, attempt: int, *, in_bucket: bool) -> SampleRef:
        """Another sample of the same dataset, and of the same bucket where batches are of one. A function of the bad
        sample rather than of its position, so that it has one replacement through the run, found again alike by every
        rank, worker and restart."""
        number = draws.raw(self._seed, f"replace/{bad.dataset}", bad.index, attempt, count=1)[0]
        dataset = self._datasets[bad.dataset]
        first, end = 0, dataset.num_samples
        if in_bucket:
            ranges = row_ranges(dataset.shard_sizes, dataset.info.buckets).values()
            first, end = next((a, b) for a, b in ranges if a <= bad.index < b)
        return SampleRef(bad.dataset, first + int(number) % (end - first))

    def _crop_flip_caption(self, position: int, sample: Sample) -> tuple[float, float, float]:
        """Numbers in [0, 1), each for one purpose, always drawn in this order."""
        if not (self._random_crop or self._flip_probability) and len(sample.texts) < 2:
            return 0.0, 0.0, 0.0  # nothing to choose, and drawing takes a twentieth of a decode
        u_crop, u_flip, u_caption = draws.uniform(self._seed, "augment", position, count=3)
        return float(u_crop), float(u_flip), float(u_caption)


def uint8_memory(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def chosen_caption(captions: Mapping[str, tuple[str, ...]], weights: Mapping[str, float], u: float) -> str:
    """One of a sample's texts, or an empty one where it has none.

    Args:
        captions: texts by kind.
        weights: of the kinds. Those that a sample lacks are left out. Without weights, and for a sample that has none
            of the kinds weighed, all texts are alike.
        u: drawn from [0, 1).
    """
    weighed = [(weights[kind], texts) for kind, texts in captions.items() if kind in weights and texts]
    if not weighed:
        every = [text for texts in captions.values() for text in texts]
        return every[int(u * len(every))] if every else ""
    u *= sum(weight for weight, _ in weighed)
    for weight, texts in weighed:  # noqa: B007
        if u < weight:
            break
        u -= weight
    # what is left of the number is uniform within the kind; rounding must not lead out of it
    return texts[min(int(u / weight * len(texts)), len(texts) - 1)]
