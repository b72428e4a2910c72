"""Aspect buckets: images of about one shape together, so that a batch crops little and pads nothing. No torch.

aspect: width / height. A bucket has an aspect; how many pixels that is follows from the resolution, the side of the
square of equal area, so one dataset serves every phase (SDXL: Podell et al. 2023, section 2.3 and appendix I).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data.schema import Bucket
from trainer.errors import UserError

ASPECTS = {
    "1:2": 1 / 2,
    "9:16": 9 / 16,
    "2:3": 2 / 3,
    "3:4": 3 / 4,
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "2:1": 2.0,
}
"""What a build sorts images by unless told otherwise: few, since the rarest of them must fill whole batches. Between 3:4
and 4:3 an image loses at most an eighth of its longer side."""


def nearest(width: int, height: int, aspects: Mapping[str, float] = ASPECTS) -> str:
    """The bucket of an image, by the ratio of the aspects: as likely to be cut in width as in height."""
    aspect = math.log(width / height)
    return min(aspects, key=lambda name: abs(math.log(aspects[name]) - aspect))


def parse_aspects(text: str, *, option: str) -> dict[str, float]:
    """What a command is told: `default`, `none`, or shapes such as `2:3,1:1,3:2`; narrow ones first.

    Raises:
        UserError: none of these; `option` names it.
    """
    if text in ("default", "none"):
        return dict(ASPECTS) if text == "default" else {}
    aspects: dict[str, float] = {}
    for name in text.split(","):
        width, _, height = name.strip().partition(":")
        if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and int(height)):
            raise UserError(f"{option}: {name.strip()!r} is no shape; write width:height, ... such as 2:3,1:1,3:2")
        aspect = int(width) / int(height)
        if not 0.01 <= aspect <= 100 or aspect in aspects.values():
            raise UserError(f"{option}: {name.strip()} is given twice, or is longer than 100 to 1")
        aspects[name.strip()] = aspect
    return dict(sorted(aspects.items(), key=lambda item: item[1]))


def shape_of(aspect: float, resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels of a bucket's images at a resolution: multiples of `multiple`, and an area of at most
    resolution^2, as near to the aspect and the area as the multiples allow. Aspect 1 is the square itself.

    Args:
        resolution: a multiple of `multiple`.
        multiple: what both sides must divide by: the autoencoder's downsampling times the denoiser's patch.
    """
    assert resolution % multiple == 0, (resolution, multiple)
    budget = (resolution // multiple) ** 2
    width = max(1.0, resolution / multiple * math.sqrt(aspect))
    height = max(1.0, resolution / multiple / math.sqrt(aspect))
    rounding = 1e-9  # of the square root
    candidates = [
        (rows, columns)
        for rows in (math.floor(height + rounding), math.floor(height + rounding) + 1)
        for columns in (math.floor(width + rounding), math.floor(width + rounding) + 1)
        if rows * columns <= budget
    ]
    if not candidates:  # a strip: its shorter side is one multiple, and the longer as long as the area allows
        candidates = [(1, budget) if aspect > 1 else (budget, 1)]

    def misfit(shape: tuple[int, int]) -> tuple[float, float, int]:
        rows, columns = shape
        of_aspect, of_area = abs(math.log(columns / rows / aspect)), math.log(budget / (rows * columns))
        # ties are common, and must fall alike for 2:1 and 1:2
        return round(of_aspect + of_area, 9), round(of_aspect, 9), min(shape)

    rows, columns = min(candidates, key=misfit)
    return rows * multiple, columns * multiple


def row_ranges(shard_sizes: Sequence[int] | NDArray[np.int64], buckets: Sequence[Bucket]) -> dict[str, tuple[int, int]]:
    """(first row, end) of each bucket, of a dataset with shards of these sizes."""
    ends = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))])
    return {b.name: (int(ends[b.first_shard]), int(ends[b.first_shard + b.num_shards])) for b in buckets}
