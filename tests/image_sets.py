"""Small sets of pictures, and their evaluation by a network that is fast and exact, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import feature_networks
from tests.feature_networks import Blocks
from trainer.evaluate.features.networks import LoadedNetwork, build_network
from trainer.evaluate.image_sets import ImageSet
from trainer.evaluate.images_run import Evaluation, Settings, evaluate_images
from trainer.evaluate.judged_sets import Judging

SIDE = 20
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def drawn(count: int, seed: int, side: int = SIDE) -> Pixels:
    """Smooth pictures, (count, side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3)).astype(np.uint8)
    size = (side, side)
    return np.stack([np.array(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in coarse])


def written(folder: Path, pixels: Sequence[Pixels] | Pixels, kind: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:04d}.{kind}")
    return folder


class Counting(Judging):
    """Remembers what was said."""

    def __init__(self, batch_size: int = 8, stop: Any = lambda: False) -> None:
        self.said: list[str] = []
        super().__init__(torch.device("cpu"), batch_size, say=self.said.append, stop=stop)


def network() -> LoadedNetwork:
    return build_network(feature_networks.OURS, None)


def seen(loaded: LoadedNetwork) -> int:
    assert isinstance(loaded.network, Blocks)
    return loaded.network.images


def evaluated(
    made: Path, real: Path, out: Path, *, judging: Judging | None = None, loaded: LoadedNetwork | None = None, **changes: Any
) -> Evaluation:  # fmt: skip
    settings = Settings(**{"size": SIDE, "resamples": 20, **changes})
    found = evaluate_images(
        ImageSet(str(made)), ImageSet(str(real)), settings, [loaded or network()], judging or Counting(), out=out,
        cache=out / "cache",
    )  # fmt: skip
    assert found is not None
    return found


def values(found: Evaluation) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found.figures.items()}
