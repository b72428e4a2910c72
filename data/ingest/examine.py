"""What is kept of what sources hold, and why the rest is not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from data.images import ImageError, image_format, read_image
from data.ingest.duplicates import HASHES
from data.source import clean
from data.stages.runner import Part
from data.stages.samples import ORIGINAL, Row, SampleWriter
from data.stages.store import Json

MAX_CAPTION_CHARACTERS = 20_000
"""Longer ones are pages, not captions."""
_LISTED = 20
"""Rejections of a part that its receipt names; all are counted."""
_MIN_STRUCTURE_BITS = 8


@dataclass(frozen=True)
class Filters:
    """What an image must have to be kept."""

    min_side: int = 1
    """Of the shorter side, in pixels."""
    max_aspect: float | None = None
    """Longer side over shorter."""
    min_caption: int = 1
    """Characters."""
    keep_uncaptioned: bool = False
    max_image_mib: int = 64
    near_duplicates: bool = True
    """Compute what `data.ingest.duplicates` finds them by."""

    @property
    def max_image_bytes(self) -> int:
        return self.max_image_mib << 20

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What a source says about an image."""

    captions: Sequence[str] = ()
    class_name: str | None = None
    licence: str | None = None
    source: str | None = None
    """Without credentials."""
    note: str = ""
    """Why it has no caption."""


def examine(key: str, image: bytes, found: Found, filters: Filters) -> Row:
    """The row of a sample that is kept. Every image is decoded whole, so that what is kept can be decoded.

    Raises:
        ImageError: it is not kept.
    """
    captions = _captions(found, filters)
    if len(image) > filters.max_image_bytes:
        raise ImageError("too_large", f"{len(image)} bytes, the limit is {filters.max_image_bytes}")
    kind = image_format(image)
    pixels_HWC = _decoded(image)
    height, width = pixels_HWC.shape[:2]
    if min(height, width) < filters.min_side:
        raise ImageError("too_small", f"{width} x {height}, the shorter side must be {filters.min_side}")
    if filters.max_aspect is not None and max(height, width) > filters.max_aspect * min(height, width):
        raise ImageError("aspect", f"{width} x {height}, the limit is {filters.max_aspect:g} to 1")
    return Row(
        key, width, height, kind, {ORIGINAL: captions} if captions else {}, xxhash.xxh3_128_digest(image),
        class_name=found.class_name, licence=found.licence, source=found.source,
        phash=perceptual_hash(pixels_HWC) if filters.near_duplicates else None,
    )  # fmt: skip


def _decoded(image: bytes) -> NDArray[np.uint8]:
    try:
        return read_image(image)
    except ImageError as e:
        # Pillow refuses the largest bombs before our own limit is asked.
        if isinstance(e.__cause__, Image.DecompressionBombError):
            raise ImageError("too_many_pixels", e.detail) from None
        raise


def _captions(found: Found, filters: Filters) -> tuple[str, ...]:
    texts = [text for text in clean(found.captions) if len(text) <= MAX_CAPTION_CHARACTERS]
    long_enough = tuple(text for text in texts if len(text) >= filters.min_caption)
    if not long_enough and not filters.keep_uncaptioned:
        if texts:
            longest = max(map(len, texts))
            raise ImageError("caption_too_short", f"{longest} characters, {filters.min_caption} are asked for")
        raise ImageError("no_caption", found.note or "nothing says what it shows")
    return long_enough


def perceptual_hash(pixels_HWC: NDArray[np.uint8]) -> int | None:
    """imagehash's `phash`, 64 bits: which of the 64 lowest frequencies of the image are above their median.

    None where hardly any is, as in an image of one colour: that hash says nothing, and all such images share it.
    """
    import imagehash  # loads scipy

    bits = imagehash.phash(Image.fromarray(pixels_HWC)).hash
    if np.count_nonzero(bits) < _MIN_STRUCTURE_BITS:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass
class PartWriter:
    """Gathers the samples of a part."""

    scratch: Path
    filters: Filters
    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[list[str]] = field(default_factory=list)
    """[key, reason, detail] of the first ones."""
    num_bytes: int = 0
    """Of kept images."""
    _writer: SampleWriter | None = None

    @property
    def read(self) -> int:
        return self.counts["read"]

    def take(self, key: str, image: bytes, found: Found) -> bool:
        """Keep a sample, or count why not."""
        try:
            row = examine(key, image, found, self.filters)
        except ImageError as e:
            self.reject(key, e)
            return False
        self.counts["read"] += 1
        self.counts["kept"] += 1
        self.num_bytes += len(image)
        if self._writer is None:
            self._writer = SampleWriter(self.scratch)
        self._writer.add(row, image)
        return True

    def reject(self, key: str, why: ImageError, samples: int = 1) -> None:
        self.counts["read"] += samples
        self.counts[f"rejected/{why.reason}"] += samples
        if len(self.rejected) < _LISTED:
            self.rejected.append([key[:200], why.reason, why.detail[:300]])

    def close(self, cursor: Json) -> Part:
        """The part; without files where nothing is kept."""
        files: dict[str, Path] = {}
        if self._writer is not None:
            hashes = np.zeros(len(self._writer.rows), HASHES)
            for i, row in enumerate(self._writer.rows):
                hashes["content"][i] = np.frombuffer(row.content, "<u8")
                hashes["phash"][i] = row.phash or 0
            files = {**self._writer.close(), "hashes": self.scratch / "samples.npy"}
            np.save(files["hashes"], hashes, allow_pickle=False)
        return Part(files, dict(self.counts), cursor, {"rejected": self.rejected} if self.rejected else None)
