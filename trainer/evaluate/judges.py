"""What is taken of each image of a set: features of networks, power by frequency, embeddings of prompts. A judge gives rows,
an image each, so ranks share the images and a figure is computed of the rows alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import UserError
from trainer.evaluate import metrics
from trainer.evaluate.features.networks import LoadedNetwork
from trainer.evaluate.image_sets import Picture

FORMATS = ("jpeg", "png", "webp")
Rows = dict[str, NDArray[Any]]
"""By name, of any dtype but object; the first axis is images."""


@dataclass(frozen=True)
class Batch:
    """As many images as all other batches have: a network rounds otherwise where the batch is another. Those past `count` are
    copies, and their rows are dropped."""

    pictures: Sequence[Picture]
    prompts: Sequence[str | None]
    pixels_BCHW: Tensor
    """uint8, on the device."""


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    def numbers(self) -> dict[str, Any]:
        """What decides its rows: equal for equal rows."""
        ...

    def rows(self, batch: Batch) -> Rows: ...


@dataclass(frozen=True)
class NetworkJudge:
    network: LoadedNetwork

    @property
    def name(self) -> str:
        return self.network.name

    def numbers(self) -> dict[str, Any]:
        return self.network.numbers()

    def rows(self, batch: Batch) -> Rows:
        return {"features": self.network.features(batch.pixels_BCHW).cpu().numpy()}


@dataclass(frozen=True)
class PromptJudge:
    """CLIP's embeddings of the prompts."""

    network: LoadedNetwork
    name: str = "clip_prompts"

    def numbers(self) -> dict[str, Any]:
        from trainer.evaluate.features.transformers_networks import PROMPT

        return {**self.network.numbers(), "of": "prompts", "prompt": PROMPT}

    def rows(self, batch: Batch) -> Rows:
        from trainer.evaluate.features.transformers_networks import ClipFeatures

        assert isinstance(self.network.network, ClipFeatures)
        missing = [p.index for p, prompt in zip(batch.pictures, batch.prompts, strict=True) if prompt is None]
        if missing:
            raise UserError(
                f"image {missing[0]} has no prompt, and a CLIP score needs one; leave clip_score out of --metrics"
            )
        features, cut = self.network.network.text_features([prompt or "" for prompt in batch.prompts])
        return {"features": features.cpu().numpy(), "cut": np.array(cut)}


@dataclass(frozen=True)
class PixelJudge:
    """Power by frequency; and what is odd about an image."""

    name: str = "pixels"

    def numbers(self) -> dict[str, Any]:
        return {"name": self.name, "power": "of luminance by whole frequency, without a window"}

    def rows(self, batch: Batch) -> Rows:
        pixels_NHWC = np.stack([picture.pixels_HWC for picture in batch.pictures])
        low, high = pixels_NHWC.min((1, 2)), pixels_NHWC.max((1, 2))
        return {
            "power": metrics.radial_powers(pixels_NHWC),
            "grey": (pixels_NHWC == pixels_NHWC[..., :1]).all((1, 2, 3)),
            "flat": (low == high).all(1),
            "width": np.array([picture.width for picture in batch.pictures], np.int32),
            "height": np.array([picture.height for picture in batch.pictures], np.int32),
            "format": np.array([FORMATS.index(picture.format) for picture in batch.pictures], np.int8),
        }


def batch_of(pictures: Sequence[Picture], prompts: Sequence[str | None], size: int, device: torch.device) -> Batch:
    """Filled up to `size` images with copies of the last."""
    missing = size - len(pictures)
    assert 0 <= missing < size, (len(pictures), size)
    filled, said = [*pictures, *[pictures[-1]] * missing], [*prompts, *[prompts[-1]] * missing]
    pixels_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in filled]))
    return Batch(filled, said, pixels_BHWC.permute(0, 3, 1, 2).contiguous().to(device))
