"""Encode: what frozen networks make of images and captions, once and ahead of training, as columns beside the samples.

The parts of an item are sidecars (data.encode.columns), of a shard one or several. The networks are handed in, as functions
that load them in each worker: this package knows no model.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.batches import DECODE_MARGIN
from data.buckets import nearest
from data.encode.columns import (
    CONTENT,
    KEY,
    LatentsColumn,
    TextColumn,
    cast,
    latents_to_bytes,
    states_to_bytes,
    write_sidecar,
)
from data.images import ImageError, read_image
from data.mdsbuild.sidecars import Sidecar, captions_files, read_captions
from data.stages.runner import PART_SAMPLES, Part, Pass, Stage, Work
from data.stages.samples import Row, Samples, Shard, open_samples, read_shard, shard_rows
from data.stages.store import Json
from data.transforms import training_image
from trainer.errors import UserError
from trainer.urls import public_url

PASS = "encode"
ROLE = "columns"
MAX_PART_BYTES = 256 << 20
"""Of a part's values: what a worker holds in memory."""
DECODERS = 2
"""Threads that decode ahead; decoding takes a hundredth of a large autoencoder's time."""

EncodeImages: TypeAlias = Callable[[NDArray[np.uint8]], Tensor]
"""Pixels (B, H, W, 3) to raw latents (B, C, h, w) in float32 on the host; of moments (B, 2C, h, w)."""
EncodeCaptions: TypeAlias = Callable[[Sequence[str]], list[tuple[Tensor, Tensor | None, bool]]]
"""Captions to token states (L, T) and pooled output (P,) in float32 on the host, and whether the caption was cut."""


@dataclass(frozen=True)
class LatentsJob:
    """Picklable, as what it loads need not be."""

    column: LatentsColumn
    load: Callable[[], EncodeImages]
    batch_size: int = 16
    aspects: Mapping[str, float] = field(default_factory=dict)
    """Width / height of the column's buckets, by their names."""


@dataclass(frozen=True)
class TextJob:
    column: TextColumn
    load: Callable[[], EncodeCaptions]
    batch_size: int = 64


@dataclass(frozen=True)
class _Sample:
    row: Row
    image: bytes
    captions: tuple[str, ...]
    """Those to encode, each once."""


class Encode(Stage):
    name: ClassVar[str] = "encode"
    version: ClassVar[int] = 2

    def __init__(
        self,
        source: str,
        *,
        latents: Mapping[str, LatentsJob] | None = None,
        text: Mapping[str, TextJob] | None = None,
        captions: Sequence[str] = (),
    ) -> None:
        """
        Args:
            source: output of `ingest` or `faces`.
            latents, text: by the column's name.
            captions: outputs of `recaption`, whose captions are encoded beside the samples' own.

        Raises:
            UserError: two columns of one name; the source or captions are not there or not finished; or the captions are
                those of other samples.
        """
        self.source, self.latents, self.text = source, dict(latents or {}), dict(text or {})
        self.captions = tuple(captions)
        assert self.latents or self.text
        for name in (KEY, CONTENT, *self.latents):
            if name in self.text or (name in self.latents and name in (KEY, CONTENT)):
                raise UserError(f"--name: {name} is taken by another column; name it otherwise")
        self.samples: Samples = open_samples(source)
        self._more_captions = captions_files(self.samples, [Sidecar(url) for url in captions])
        self._encode_images: dict[str, EncodeImages] = {}
        self._encode_captions: dict[str, EncodeCaptions] = {}

    @property
    def columns(self) -> dict[str, LatentsColumn | TextColumn]:
        of_latents = {name: job.column for name, job in self.latents.items()}
        return {**of_latents, **{name: job.column for name, job in self.text.items()}}

    def settings(self) -> dict[str, Json]:
        return {
            "source": public_url(self.source),
            "made_of": list(self.samples.ids),
            "columns": {name: column.model_dump(mode="json") for name, column in self.columns.items()},
            "captions": [public_url(url) for url in self.captions],
        }

    def passes(self) -> Sequence[Pass]:
        return (Pass(PASS, lambda _store: self.samples.items(), self._parts),)

    def open(self) -> None:
        cv2.setNumThreads(0)  # 0 is OpenCV's word for none but the caller's
        self._encode_images = {name: job.load() for name, job in self.latents.items()}
        self._encode_captions = {name: job.load() for name, job in self.text.items()}

    # ------------------------------------------------------------------------------------------------------------ parts

    def _parts(self, work: Work) -> Iterator[Part]:
        """Of each shard one or several. The cursor: shards that are done, and samples of the next that are."""
        begun, done = work.cursor or (0, 0)
        for number, shard in enumerate(self.samples.shards_of(work.item)[begun:], begun):
            samples = islice(self._samples(shard, work), done, None)
            while chunk := self._chunk(samples):
                part = self._part(chunk, work)
                done += len(chunk)
                yield Part(part.files, part.counts, cursor=[number, done], note=shard.note)
            done = 0

    def _samples(self, shard: Shard, work: Work) -> Iterator[_Sample]:
        more = read_captions(self._more_captions, shard, work.scratch)
        if self.latents:
            rows: Iterator[tuple[Row, bytes]] = read_shard(self.samples, shard, work)
        else:
            rows = ((row, b"") for row in shard_rows(self.samples, shard, work.scratch))
        for row, image in rows:
            yield _Sample(row, image, self._captions_of(row, more) if self.text else ())

    def _captions_of(self, row: Row, more: Mapping[str, Mapping[str, Sequence[str]]]) -> tuple[str, ...]:
        by_kind = {kind: list(texts) for kind, texts in row.captions.items()}
        for kind, texts in more.get(row.key, {}).items():
            by_kind.setdefault(kind, []).extend(texts)
        limit = next(iter(self.text.values())).column.captions_per_kind
        return tuple(dict.fromkeys(text for texts in by_kind.values() for text in texts[:limit]))

    def _chunk(self, samples: Iterator[_Sample]) -> list[_Sample]:
        """Of the samples that come, as many as a part may have: a function of the samples alone."""
        chunk: list[_Sample] = []
        room = MAX_PART_BYTES
        of_latents = sum(job.column.value_bytes() for job in self.latents.values())
        while len(chunk) < PART_SAMPLES and room > 0:
            sample = next(samples, None)
            if sample is None:
                break
            chunk.append(sample)
            room -= of_latents + sum(job.column.value_bytes(len(sample.captions)) for job in self.text.values())
        return chunk

    def _part(self, chunk: Sequence[_Sample], work: Work) -> Part:
        counts: Counter[str] = Counter(read=len(chunk))
        values: dict[str, dict[int, bytes]] = {}
        for name, job in self.latents.items():
            values[name] = dict(self._latents(chunk, job, self._encode_images[name], counts, work))
        for name, text_job in self.text.items():
            values[name] = dict(self._states(chunk, text_job, self._encode_captions[name], counts, work))
        kept = [i for i in range(len(chunk)) if all(i in found for found in values.values())]
        counts["kept"] = len(kept)
        path = Path(work.scratch, f"{ROLE}.parquet")
        write_sidecar(
            path,
            [chunk[i].row.key for i in kept],
            [chunk[i].row.content for i in kept],
            {name: [found[i] for i in kept] for name, found in values.items()},
            self.columns,
        )
        return Part({ROLE: path}, counts)

    # ---------------------------------------------------------------------------------------------------------- latents

    def _latents(
        self, chunk: Sequence[_Sample], job: LatentsJob, encode: EncodeImages, counts: Counter[str], work: Work
    ) -> Iterator[tuple[int, bytes]]:
        """(number in the chunk, value) of each image that can be decoded. Batches are of one shape."""
        waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
        for i, pixels_HWC in self._decoded(chunk, job, counts):
            work.advance()
            group = waiting.setdefault(pixels_HWC.shape, [])
            group.append((i, pixels_HWC))
            if len(group) == job.batch_size:
                yield from self._encoded(group, chunk, job, encode)
                group.clear()
        for group in waiting.values():
            work.advance(0)
            yield from self._encoded(group, chunk, job, encode)

    def _encoded(
        self,
        group: Sequence[tuple[int, NDArray[np.uint8]]],
        chunk: Sequence[_Sample],
        job: LatentsJob,
        encode: EncodeImages,
    ) -> Iterator[tuple[int, bytes]]:
        if not group:
            return
        # Filled up with its last image: at one batch size a network gives an image one result, whatever stands beside it.
        rows = [pixels_HWC for _, pixels_HWC in group]
        rows += rows[-1:] * (job.batch_size - len(rows))
        latents_BCHW = encode(np.stack(rows))
        height, width = rows[0].shape[:2]
        expected = job.column.latent_shape(height, width)
        assert tuple(latents_BCHW.shape[1:]) == expected, (tuple(latents_BCHW.shape), expected)
        for (i, _), latents_CHW in zip(group, latents_BCHW, strict=False):
            yield i, latents_to_bytes(cast(latents_CHW, job.column, chunk[i].row.key))

    def _decoded(
        self, chunk: Sequence[_Sample], job: LatentsJob, counts: Counter[str]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """In order, a few ahead; those that cannot be decoded are counted and left out."""
        waiting: deque[tuple[int, Future[NDArray[np.uint8]]]] = deque()
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
            numbers = iter(range(len(chunk)))
            try:
                while True:
                    for i in islice(numbers, 2 * job.batch_size - len(waiting)):
                        waiting.append((i, pool.submit(_pixels, chunk[i], job)))
                    if not waiting:
                        return
                    i, future = waiting.popleft()
                    try:
                        yield i, future.result()
                    except ImageError as e:
                        counts[f"rejected/{e.reason}"] += 1
            finally:
                for _, future in waiting:
                    future.cancel()

    # ------------------------------------------------------------------------------------------------------------- text

    def _states(
        self, chunk: Sequence[_Sample], job: TextJob, encode: EncodeCaptions, counts: Counter[str], work: Work
    ) -> Iterator[tuple[int, bytes]]:
        """(number in the chunk, value) of each sample. A caption that many samples have is encoded once."""
        captions = list(dict.fromkeys(caption for sample in chunk for caption in sample.captions))
        states: dict[str, tuple[Tensor, Tensor | None]] = {}
        for start in range(0, len(captions), job.batch_size):
            batch = captions[start : start + job.batch_size]
            work.advance(0)
            filled = batch + batch[-1:] * (job.batch_size - len(batch))
            for caption, (tokens_LT, pooled_P, cut) in zip(batch, encode(filled), strict=False):
                counts["captions"] += 1
                counts["captions_cut"] += cut
                states[caption] = (
                    cast(tokens_LT, job.column, repr(caption)),
                    None if pooled_P is None else cast(pooled_P, job.column, repr(caption)),
                )
        for i, sample in enumerate(chunk):
            if not self.latents:
                work.advance()
            yield i, states_to_bytes({caption: states[caption] for caption in sample.captions})


def _pixels(sample: _Sample, job: LatentsJob) -> NDArray[np.uint8]:
    """The centre crop that training would see, of the sample's bucket.

    Raises:
        ImageError: it cannot be decoded.
    """
    column, row = job.column, sample.row
    margin = DECODE_MARGIN[column.decode]
    size = column.buckets[nearest(row.width, row.height, job.aspects)] if column.buckets else (column.resolution,) * 2
    return training_image(read_image(sample.image, min_side=margin and margin * min(size)), (size[0], size[1]))
