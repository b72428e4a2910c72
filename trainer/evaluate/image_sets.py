"""Sets of images to be compared: a folder, a dataset, or what `loupe sample` wrote, with its prompts; and which of them are
taken, in which order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import draws
from data.images import ImageError, image_format, read_image
from trainer.config import resolve_url
from trainer.errors import UserError, one_line
from trainer.evaluate.chosen_images import Images, read_file
from trainer.evaluate.features.preprocess import Resize, evaluation_image
from trainer.sampling.output import ABOUT, ROWS

MAX_ROWS_BYTES = 1 << 30


@dataclass(frozen=True)
class Picture:
    index: int
    """In its set."""
    pixels_HWC: NDArray[np.uint8]
    width: int
    """As stored, upright."""
    height: int
    format: str
    """jpeg, png or webp."""


class ImageSet:
    """
    Args:
        max_samples: of a dataset, its first so many.

    Raises:
        UserError: nothing is there, or it is not what it should be.
    """

    def __init__(self, url: str, max_samples: int | None = None) -> None:
        self.url = url
        folder = Path(resolve_url(url))
        self._rows: list[tuple[Path, str | None]] | None = None
        self._images: Images | None = None
        self._folder = folder
        is_local = "://" not in resolve_url(url)
        if is_local and (folder / ROWS).is_file():
            self._rows = list(_sample_rows(folder, url))
        elif is_local and (folder / ABOUT).is_file():
            raise UserError(f"{url}: {ABOUT} and no {ROWS}: the sampling is not finished; give its command again")
        else:
            self._images = Images(url, max_samples)

    def __len__(self) -> int:
        return len(self._rows) if self._images is None else len(self._images)  # type: ignore[arg-type]

    @property
    def is_samples(self) -> bool:
        return self._rows is not None

    def name(self, index: int) -> str:
        return (
            str(self._rows[index][0].relative_to(self._folder))
            if self._rows is not None
            else self._of_images().name(index)
        )

    def data(self, index: int) -> bytes:
        """Raises:
        ImageError: it cannot be read.
        """
        return read_file(self._rows[index][0]) if self._rows is not None else self._of_images().data(index)

    def prompt(self, index: int) -> str | None:
        """What the picture was drawn for; of a dataset, its first caption."""
        if self._rows is not None:
            return self._rows[index][1]
        return next(iter(self._of_images().texts(index)), None)

    def label(self, index: int) -> int:
        """Its class; -1 where none is known."""
        return -1 if self._images is None else self._images.label(index)

    def picture(self, index: int, size: int, resize: Resize) -> Picture:
        """Raises:
        ImageError: it cannot be used.
        """
        data = self.data(index)
        # at full size: what a JPEG shrinks to while it is decoded depends on the size that is asked for
        image_HWC = read_image(data)
        height, width = image_HWC.shape[:2]
        return Picture(index, evaluation_image(image_HWC, size, resize), width, height, image_format(data))

    def about(self) -> dict[str, Any]:
        if self._images is not None:
            return self._images.numbers()
        return {"url": self.url, "kind": "samples", "found": len(self)}

    @cached_property
    def digest(self) -> str | None:
        """Of a dataset, its own; None of files, which may be changed one by one."""
        found = self.about().get("digest")
        return None if found is None else str(found)

    def _of_images(self) -> Images:
        assert self._images is not None
        return self._images


def _sample_rows(folder: Path, url: str) -> Iterator[tuple[Path, str | None]]:
    """Files and prompts in the order of their positions."""
    inside = folder.resolve()
    try:
        if (folder / ROWS).stat().st_size > MAX_ROWS_BYTES:
            raise UserError(f"{url}: {ROWS} is larger than {MAX_ROWS_BYTES >> 20} MiB")
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines() if line]
        rows.sort(key=lambda row: int(row["position"]))
        for row in rows:
            name, prompt = row["file"], row.get("prompt")
            path = folder / str(name)
            if not isinstance(name, str) or not path.resolve().is_relative_to(inside):
                raise ValueError(f"file {name!r} is not in the folder")
            # a class is no text that CLIP could read
            yield path, prompt if isinstance(prompt, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{url}: {ROWS}: {one_line(e)}; it is not what `loupe sample` writes") from None
    if not rows:
        raise UserError(f"{url}: no samples")


@dataclass(frozen=True)
class Selection:
    """Which images of a set are measured, and how they are made alike."""

    images: ImageSet
    size: int
    resize: Resize
    count: int | None = None
    """So many, drawn by the seed; absent, or as many as there are: all, in their own order."""
    seed: int = 0

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """All indices. The first `target` that can be read are taken; those behind them stand in for what cannot."""
        total = len(self.images)
        if self.count is None or self.count >= total:
            return np.arange(total)
        return draws.permutation(self.seed, "evaluated images", length=total)

    @property
    def target(self) -> int:
        return len(self.images) if self.count is None else min(self.count, len(self.images))

    def picture(self, place: int) -> Picture:
        """By its place in `order`.

        Raises:
            ImageError: it cannot be used.
        """
        return self.images.picture(int(self.order[place]), self.size, self.resize)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the pixels: equal for the same images, wherever they lie. Reads the files that are taken of a folder."""
        about: dict[str, Any] = {"size": self.size, "resize": self.resize, "target": self.target}
        if self.target < len(self.images):
            about["seed"] = self.seed
        if self.images.digest is not None:
            return {**about, "dataset": self.images.digest, "found": len(self.images)}
        listing = hashlib.sha256()
        taken = set(self.order[: self.target].tolist())
        for index in range(len(self.images)):
            try:
                content = hashlib.sha256(self.images.data(index)).hexdigest() if index in taken else ""
            except ImageError as e:
                content = str(e)
            listing.update(f"{self.images.name(index)}\0{content}\0{self.images.prompt(index)}\n".encode())
        return {**about, "files": listing.hexdigest(), "found": len(self.images)}


def uniform_size(images: ImageSet, field: str, looked_at: int = 64) -> int:
    """The side that pictures have, as some spread over the set tell.

    Raises:
        UserError: they differ, or are no squares; `field` says the side then.
    """
    found: dict[tuple[int, int], int] = {}
    for k in range(min(looked_at, len(images))):
        try:
            picture = read_image(images.data(k * len(images) // min(looked_at, len(images))))
        except ImageError:
            continue
        found[picture.shape[1], picture.shape[0]] = found.get((picture.shape[1], picture.shape[0]), 0) + 1
    if not found:
        raise UserError(f"{images.url}: none of {min(looked_at, len(images))} images can be read; look at them")
    if len(found) > 1 or (size := next(iter(found)))[0] != size[1]:
        shown = ", ".join(f"{w} x {h} ({n})" for (w, h), n in sorted(found.items(), key=lambda item: -item[1])[:4])
        raise UserError(f"{field}: {images.url} has images of {shown}; say the side at which all are compared")
    return size[0]
