"""The stage `faces`: samples in, the same samples out with their faces blurred."""

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.faces import audit
from data.faces.blur import blur_faces
from data.faces.detect import Detector, DetectorSpec
from data.images import ImageError, encode_image, read_image
from data.stages.receipts import done_receipts
from data.stages.runner import Part, Pass, Stage, Work
from data.stages.samples import (
    Row,
    Samples,
    SampleWriter,
    Shard,
    fetch,
    open_samples,
    parts_by_shard,
    pass_by_shard,
    read_shard,
)
from data.stages.store import Json, StageStore
from data.storage import Storage
from trainer.urls import public_url

AUDIT = "audit.png"
NOTICES = "notices"
BOXES = pa.schema(
    [("key", pa.string()), ("boxes", pa.list_(pa.list_(pa.float32(), 4))), ("scores", pa.list_(pa.float32()))]
)
"""A row for each image that has faces; a box is x, y, width, height in pixels of the upright image."""
_MAX_STRIP_BYTES = 16 << 20
_MAX_NOTICE_BYTES = 1 << 20


@dataclass
class Faces(Stage):
    """Images without faces keep their bytes. The others are encoded anew in their format: upright, in sRGB, without EXIF."""

    name: ClassVar[str] = "faces"
    version: ClassVar[int] = 2

    url: str
    """Output of `ingest` or `faces`."""
    detector: DetectorSpec
    cells: int = 3
    """Of a blurred face, across its box."""
    margin: float = 0.3
    """By how much of a box's side the blur reaches beyond it."""
    quality: int = 95
    """Of JPEG and WebP files that are encoded anew."""
    seed: int = 0
    """Of the audit grid's faces."""

    def __post_init__(self) -> None:
        self._detect: Detector | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detect": None}

    @cached_property
    def samples(self) -> Samples:
        return open_samples(self.url)

    def settings(self) -> dict[str, Json]:
        return {
            "input": public_url(self.url),
            "made_of": list(self.samples.ids),
            "detector": self.detector.settings(),
            "cells": self.cells,
            "margin": self.margin,
            "quality": self.quality,
            "seed": self.seed,
        }

    def passes(self) -> Sequence[Pass]:
        return [pass_by_shard("faces", lambda: self.samples, self._parts)]

    def open(self) -> None:
        cv2.setNumThreads(1)  # of each worker; there are as many workers as cores
        self._detect = self.detector.make()

    def _parts(self, work: Work) -> Iterator[Part]:
        """One for each shard, which has no more samples than a part may."""
        return parts_by_shard(self.samples, "faces", work, lambda shard: self._of_shard(shard, work))

    def _of_shard(self, shard: Shard, work: Work) -> tuple[dict[str, Path], Counter[str]]:
        writer, strip, counts = (
            SampleWriter(work.scratch),
            audit.Strip(self.seed),
            Counter(read=0, kept=0, blurred=0, faces=0),
        )
        found: dict[str, list[Any]] = {name: [] for name in BOXES.names}
        for row, data in read_shard(self.samples, shard, work):
            counts["read"] += 1
            try:
                new_row, new_data, boxes_N5, blurred_HWC = self._blurred(row, data)
            except ImageError as e:  # what cannot be searched for faces cannot stay
                counts[f"rejected/{e.reason}"] += 1
                work.advance()
                continue
            writer.add(new_row, new_data)
            counts["kept"] += 1
            if len(boxes_N5):
                counts["blurred"] += 1
                counts["faces"] += len(boxes_N5)
                found["key"].append(row.key)
                found["boxes"].append(boxes_N5[:, :4].tolist())
                found["scores"].append(boxes_N5[:, 4].tolist())
                strip.add(row.key, blurred_HWC, boxes_N5)
            work.advance()
        files = {**writer.close(), "faces": self._write_boxes(work.scratch, found)}
        image_HWC = strip.image()
        if image_HWC is not None:
            files["audit"] = work.scratch / "audit.png"
            files["audit"].write_bytes(encode_image(image_HWC, "png", 100))
        return files, counts

    def _blurred(
        self, row: Row, data: bytes
    ) -> tuple[Row, bytes, np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.uint8]]]:
        """The sample as it goes on, with its boxes_N5 and pixels.

        Raises:
            ImageError: it cannot be decoded.
        """
        assert self._detect is not None
        image_HWC = read_image(data)
        boxes_N5 = self._detect(image_HWC)
        if not len(boxes_N5):
            return row, data, boxes_N5, image_HWC
        blurred_HWC = blur_faces(image_HWC, boxes_N5, cells=self.cells, margin=self.margin)
        data = encode_image(blurred_HWC, row.format, self.quality)
        height, width = blurred_HWC.shape[:2]
        row = replace(row, content=xxhash.xxh3_128_digest(data), size=len(data), width=width, height=height)
        return row, data, boxes_N5, blurred_HWC

    def _write_boxes(self, folder: Path, found: Mapping[str, Sequence[Any]]) -> Path:
        path = folder / "faces.parquet"
        about = {"loupe.detector": json.dumps(self.detector.settings()), "opencv": cv2.__version__}
        pq.write_table(pa.table(found, schema=BOXES.with_metadata(about)), path, compression="zstd")
        return path

    # ------------------------------------------------------------------------------------------------------------- end

    def finish(self, store: StageStore) -> dict[str, Json]:
        """The audit grid, the source's notices, and how much was blurred."""
        counts, strips = Counter[str](), []
        for receipt in done_receipts(store, "faces"):
            counts.update(receipt["counts"])
            for part in receipt["parts"]:
                if "audit" in part["files"]:
                    shard = part["note"]["shard"]
                    strips.append((audit.draw(self.seed, shard), shard, part["files"]["audit"]))
            if len(strips) > 10_000:
                strips = _first(strips)
        with tempfile.TemporaryDirectory(prefix="loupe-faces-") as folder:
            has_audit = self._write_grid(store, _first(strips), Path(folder))
            copy_notices(Storage(self.url), store, Path(folder))
        images, blurred, faces = counts["kept"], counts["blurred"], counts["faces"]
        return {
            "faces": {
                "images": images,
                "images_blurred": blurred,
                "blurred_share": blurred / images if images else 0.0,
                "faces": faces,
                "faces_per_blurred_image": faces / blurred if blurred else 0.0,
                "audit": AUDIT if has_audit else None,
            }
        }

    def _write_grid(self, store: StageStore, strips: Sequence[tuple[int, str, Json]], folder: Path) -> bool:
        images = []
        for i, (_, _, file) in enumerate(strips):
            path = fetch(store, file, folder / f"{i}.png", _MAX_STRIP_BYTES)
            images.append(read_image(path.read_bytes()))
        grid_HWC = audit.grid(images)
        if grid_HWC is None:
            return False
        path = folder / AUDIT
        path.write_bytes(encode_image(grid_HWC, "png", 100))
        store.put_new(path, AUDIT)
        return True


def _first(strips: list[tuple[int, str, Json]]) -> list[tuple[int, str, Json]]:
    return heapq.nsmallest(audit.COLUMNS * audit.ROWS, strips, key=lambda strip: strip[:2])


def copy_notices(source: Storage, target: StageStore, folder: Path) -> None:
    """Licence files travel with the images."""
    store = StageStore(source.url)
    for name in store.names(NOTICES):
        path = folder / "notice"
        path.write_bytes(store.read(f"{NOTICES}/{name}", max_bytes=_MAX_NOTICE_BYTES))
        target.put_new(path, f"{NOTICES}/{name}")
