"""Some images of a folder or a dataset, drawn by a seed, with a note of those that cannot be read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import draws
from data.images import ImageError, read_image
from data.reader import Dataset, open_dataset
from data.schema import INDEX
from data.transforms import training_image
from trainer.config import resolve_url
from trainer.errors import UserError, one_line
from trainer.tensors import pixels_to_images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_FILE_BYTES = 256 << 20


class Images:
    """A folder of images, with whatever folders lie in it, or a dataset that `loupe data build` wrote."""

    def __init__(self, url: str, max_samples: int | None = None) -> None:
        """
        Args:
            max_samples: of a dataset, its first so many.

        Raises:
            UserError: no folder, no dataset, or nothing in it.
            StorageError: remote storage does not answer.
        """
        self.url = url
        resolved = resolve_url(url)
        folder = Path(resolved)
        self._dataset: Dataset | None = None
        self._files: list[Path] = []
        if "://" in resolved or (folder / INDEX).is_file():
            self._dataset = open_dataset(resolved, name=url, max_samples=max_samples)
            if not len(self._dataset):
                raise UserError(f"{url}: the dataset is empty; give another")
            return
        if not folder.is_dir():
            raise UserError(f"{url}: no such folder; give one with images, or a dataset of `loupe data build`")
        try:
            self._files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        except OSError as e:
            raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
        if not self._files:
            raise UserError(f"{url}: no images ({', '.join(SUFFIXES)}) in this folder or below; give another")
        self._folder = folder

    def __len__(self) -> int:
        return len(self._files) if self._dataset is None else len(self._dataset)

    def name(self, index: int) -> str:
        if self._dataset is not None:
            return self._dataset.read(index).key
        return self._files[index].relative_to(self._folder).as_posix()

    def data(self, index: int) -> bytes:
        """The image file.

        Raises:
            ImageError: it is too large, or cannot be read.
        """
        if self._dataset is not None:
            return self._dataset.read(index).image
        return read_file(self._files[index])

    def texts(self, index: int) -> tuple[str, ...]:
        """Its captions; a folder has none."""
        return () if self._dataset is None else self._dataset.read(index).texts

    def label(self, index: int) -> int:
        """Its class; -1 where none is known."""
        return -1 if self._dataset is None else self._dataset.read(index).label

    def pixels(self, index: int, size: int) -> tuple[NDArray[np.uint8], bool]:
        """Square centre crop (size, size, 3), and whether it had to be enlarged.

        Raises:
            ImageError: it cannot be used.
        """
        image_HWC = read_image(self.data(index), min_side=size)
        return training_image(image_HWC, size), min(image_HWC.shape[:2]) < size

    def numbers(self) -> dict[str, Any]:
        kind = {"kind": "folder"} if self._dataset is None else {"kind": "dataset", "digest": self._dataset.digest}
        return {"url": self.url, **kind, "found": len(self)}


def read_file(path: Path) -> bytes:
    """
    Raises:
        ImageError: it is too large, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError("too_large", f"more than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as e:
        raise ImageError("unreadable", one_line(e)) from None


@dataclass
class Chosen:
    """The images that are measured, in the order in which the seed drew them."""

    images: Images
    size: int
    indices: list[int] = field(default_factory=list)
    enlarged: list[int] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def choose(self, count: int, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Images (B, 3, H, W) until there are `count`; those that cannot be read are noted, and others take their place.

        Raises:
            UserError: none can be read.
        """
        batch: list[Tensor] = []
        for index in draws.permutation(seed, "analyzed images", length=len(self.images)).tolist():
            if len(self.indices) == count:
                break
            try:
                pixels_HWC, is_enlarged = self.images.pixels(index, self.size)
            except ImageError as e:
                self.skipped.append({"name": self.images.name(index), "reason": e.reason, "detail": e.detail})
                continue
            self.indices.append(index)
            if is_enlarged:
                self.enlarged.append(index)
            batch.append(_to_image(pixels_HWC))
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
        if not self.indices:
            first = self.skipped[0]
            raise UserError(f"{self.images.url}: none of {len(self.skipped)} images can be read; the first is "
                            f"{first['name']} ({first['reason']}: {first['detail']})")  # fmt: skip

    def batch(self, start: int, stop: int) -> Tensor:
        """Chosen images again, (B, 3, H, W)."""
        return torch.stack([_to_image(self.images.pixels(i, self.size)[0]) for i in self.indices[start:stop]])

    def numbers(self) -> dict[str, Any]:
        return {
            **self.images.numbers(),
            "used": [self.images.name(i) for i in self.indices],
            "enlarged": [self.images.name(i) for i in self.enlarged],
            "skipped": self.skipped,
        }


def _to_image(pixels_HWC: NDArray[np.uint8]) -> Tensor:
    return pixels_to_images(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
