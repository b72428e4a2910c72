"""A picture to judge the blurring by: blurred faces at random with their boxes. What they were before is kept nowhere.

Each shard gives a strip of a few; the grid of the whole takes some of each of as many shards as it has room for.
"""

import hashlib
import heapq
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

CROP = 128
"""Side of a crop, in pixels."""
OF_A_SHARD = 16
COLUMNS, ROWS = 8, 8
_CONTEXT = 2.5
"""Sides of a crop in sides of the face's box."""
_COLOUR = (255, 220, 0)


class Strip:
    """The faces of a shard that the grid may show: those whose names hash lowest, so the same ones at every try."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._crops: list[tuple[int, str, NDArray[np.uint8]]] = []

    def add(self, key: str, blurred_HWC: NDArray[np.uint8], boxes_N5: NDArray[np.float32]) -> None:
        for i, box in enumerate(boxes_N5):
            name = f"{key}#{i}"
            rank = -draw(self._seed, name)
            if len(self._crops) < OF_A_SHARD:
                heapq.heappush(self._crops, (rank, name, crop(blurred_HWC, box)))
            elif rank > self._crops[0][0]:
                heapq.heapreplace(self._crops, (rank, name, crop(blurred_HWC, box)))

    def image(self) -> NDArray[np.uint8] | None:
        """(CROP, CROP * faces, 3)."""
        crops = [c for *_, c in sorted(self._crops, key=lambda entry: entry[:2], reverse=True)]
        return np.concatenate(crops, axis=1) if crops else None


def draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def crop(image_HWC: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A square around a face, its box drawn; grey where the image ends."""
    x, y, width, height = (float(v) for v in box[:4])
    side = max(1.0, _CONTEXT * max(width, height))
    scale = CROP / side
    shift_x, shift_y = CROP / 2 - scale * (x + width / 2), CROP / 2 - scale * (y + height / 2)
    matrix = np.array([[scale, 0, shift_x], [0, scale, shift_y]])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    tile_HWC = cv2.warpAffine(image_HWC, matrix, (CROP, CROP), flags=how, borderValue=(128, 128, 128))
    corner = (round(scale * x + shift_x), round(scale * y + shift_y))
    other = (round(scale * (x + width) + shift_x), round(scale * (y + height) + shift_y))
    cv2.rectangle(tile_HWC, corner, other, _COLOUR, 1)
    return np.asarray(tile_HWC, dtype=np.uint8)


def grid(strips: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    """Crops of the strips in turn, in a square grid; None of none."""
    queues = [[strip[:, i : i + CROP] for i in range(0, strip.shape[1] - CROP + 1, CROP)] for strip in strips]
    crops: list[NDArray[np.uint8]] = []
    while any(queues) and len(crops) < COLUMNS * ROWS:
        for queue in queues:
            if queue and len(crops) < COLUMNS * ROWS:
                crops.append(queue.pop(0))
    if not crops:
        return None
    rows = -(-len(crops) // COLUMNS)
    grid_HWC = np.full((rows * CROP, min(len(crops), COLUMNS) * CROP, 3), 255, np.uint8)
    for i, tile_HWC in enumerate(crops):
        row, column = divmod(i, COLUMNS)
        grid_HWC[row * CROP : (row + 1) * CROP, column * CROP : (column + 1) * CROP] = tile_HWC
    return grid_HWC
