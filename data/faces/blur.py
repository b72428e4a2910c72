"""Making faces unrecognisable: what is left of one are a few cells of average colour, smoothed.

image_HWC: uint8 RGB, upright; boxes_N5: as in data.faces.detect.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

FEATHER = 0.2
"""Of the ellipse's radius: how far beyond it the blur fades out. Within the ellipse nothing of the image is left."""
SMOOTHING = 1.0
"""Of a cell's size: the Gaussian's sigma. Of 118 faces in photos YuNet finds 7 again; at half of it 16, and with 6 cells 67."""


def blur_faces(
    image_HWC: NDArray[np.uint8], boxes_N5: NDArray[np.float32], *, cells: int, margin: float
) -> NDArray[np.uint8]:
    """A copy with an ellipse over each face blurred; all else is as it was.

    The image is averaged over cells before it is smoothed: a Gaussian alone can be sharpened again, averages cannot.

    Args:
        cells: across a face's box: what is left of the face are its cells' mean colours.
        margin: by how much of the box's sides the ellipse reaches beyond each. From 0.21 on the box's corners lie within it.
    """
    blurred_HWC = image_HWC.copy()
    for x, y, width, height in boxes_N5[:, :4].astype(float):
        if width > 0 and height > 0:
            _blur_one(blurred_HWC, x, y, width, height, cells, margin)
    return blurred_HWC


def _blur_one(
    image_HWC: NDArray[np.uint8], x: float, y: float, width: float, height: float, cells: int, margin: float
) -> None:
    centre_x, centre_y = x + width / 2, y + height / 2
    radius_x, radius_y = width * (0.5 + margin), height * (0.5 + margin)
    left, right = _span(centre_x, radius_x * (1 + FEATHER), image_HWC.shape[1])
    top, bottom = _span(centre_y, radius_y * (1 + FEATHER), image_HWC.shape[0])
    if left >= right or top >= bottom:
        return
    region_HWC = image_HWC[top:bottom, left:right]
    hidden_HWC = _averaged(region_HWC, cell_width=width / cells, cell_height=height / cells)
    xs = (np.arange(left, right) + 0.5 - centre_x) / radius_x
    ys = (np.arange(top, bottom) + 0.5 - centre_y) / radius_y
    distance_HW = np.hypot(ys[:, None], xs[None, :])
    opaque_HW1 = np.clip((1 + FEATHER - distance_HW) / FEATHER, 0, 1)[:, :, None]
    mixed_HWC = region_HWC * (1 - opaque_HW1) + hidden_HWC * opaque_HW1
    # Where the ellipse and its rim do not reach nothing is written: rounding too would be a change.
    image_HWC[top:bottom, left:right] = np.where(opaque_HW1 > 0, np.rint(mixed_HWC), region_HWC).astype(np.uint8)


def _span(centre: float, radius: float, length: int) -> tuple[int, int]:
    return max(0, int(np.floor(centre - radius))), min(length, int(np.ceil(centre + radius)))


def _averaged(region_HWC: NDArray[np.uint8], *, cell_width: float, cell_height: float) -> NDArray[np.float32]:
    height, width = region_HWC.shape[:2]
    columns, rows = max(1, round(width / max(cell_width, 1))), max(1, round(height / max(cell_height, 1)))
    cells_HWC = cv2.resize(np.ascontiguousarray(region_HWC), (columns, rows), interpolation=cv2.INTER_AREA)
    smooth_HWC = cv2.resize(cells_HWC.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    sigma_x, sigma_y = SMOOTHING * width / columns, SMOOTHING * height / rows
    return np.asarray(
        cv2.GaussianBlur(smooth_HWC, (0, 0), sigmaX=sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REPLICATE)
    )
