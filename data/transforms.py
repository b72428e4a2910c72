"""Pixels to training images. Functions of given numbers: who draws them, and from what, is the caller's.

image_HWC: uint8 RGB; u: drawn from [0, 1).
"""

import cv2
import numpy as np
from numpy.typing import NDArray


def square_crop(image_HWC: NDArray[np.uint8], u: float | None = None) -> NDArray[np.uint8]:
    """The largest square; along the longer side at the centre, or where `u` says."""
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    room = max(height, width) - side
    offset = room // 2 if u is None else int(u * (room + 1))
    if height > width:
        return image_HWC[offset : offset + side]
    return image_HWC[:, offset : offset + side]


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
    image_HWC: NDArray[np.uint8], resolution: int, *, u_crop: float | None = None, flip: bool = False
) -> NDArray[np.uint8]:
    """Square crop, short side to `resolution`, flip: (resolution, resolution, 3), contiguous.

    Cropped before it is resized: less work, and an image of 1 x 30,000 pixels does not grow into gigabytes.
    """
    image_HWC = resize(square_crop(image_HWC, u_crop), resolution, resolution)
    return np.ascontiguousarray(image_HWC[:, ::-1] if flip else image_HWC)
