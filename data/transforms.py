"""Pixels to training images. Functions of given numbers: who draws them, and from what, is the caller's.

image_HWC: uint8 RGB; u: drawn from [0, 1).
"""

import cv2
import numpy as np
from numpy.typing import NDArray


def crop_to_aspect(image_HWC: NDArray[np.uint8], aspect: float, u: float | None = None) -> NDArray[np.uint8]:
    """The largest part of this width / height; along the side that is cut at the centre, or where `u` says."""
    height, width = image_HWC.shape[:2]
    if width > height * aspect:
        kept = max(1, round(height * aspect))
        offset = _offset(width - kept, u)
        return image_HWC[:, offset : offset + kept]
    kept = min(height, max(1, round(width / aspect)))
    offset = _offset(height - kept, u)
    return image_HWC[offset : offset + kept]


def square_crop(image_HWC: NDArray[np.uint8], u: float | None = None) -> NDArray[np.uint8]:
    """The largest square."""
    return crop_to_aspect(image_HWC, 1.0, u)


def _offset(room: int, u: float | None) -> int:
    return room // 2 if u is None else int(u * (room + 1))


def resize(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Down by area averaging, which does not alias; up by cubic interpolation."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    shrinks = height <= image_HWC.shape[0] and width <= image_HWC.shape[1]
    resized = cv2.resize(
        np.ascontiguousarray(image_HWC),
        (width, height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
    )
    return np.asarray(resized, dtype=np.uint8)


def shrink_short_side(image_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink so that the shorter side is `size`, keeping proportions; smaller images stay as they are."""
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    if short <= size:
        return image_HWC
    return resize(image_HWC, max(size, round(height * size / short)), max(size, round(width * size / short)))


def training_image(
    image_HWC: NDArray[np.uint8], size: int | tuple[int, int], *, u_crop: float | None = None, flip: bool = False
) -> NDArray[np.uint8]:
    """Cropped to the proportions of `size`, resized to it, flipped: (height, width, 3), contiguous.

    Cropped before it is resized: less work, and an image of 1 x 30,000 pixels does not grow into gigabytes.

    Args:
        size: (height, width), or the side of a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image_HWC = resize(crop_to_aspect(image_HWC, width / height, u_crop), height, width)
    return np.ascontiguousarray(image_HWC[:, ::-1] if flip else image_HWC)
