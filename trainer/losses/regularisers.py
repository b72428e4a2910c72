"""What makes an autoencoder's latents and decoder fit for stage 2: no outliers, and latents that turn with their image."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses.feature_loss import VARIANCE_EPS
from trainer.models.precision import precise


def outlier_penalty(maps: Sequence[Tensor], threshold: float) -> Tensor:
    """mean of max(0, |f - mean| / deviation - threshold)^2 over channels and pixels, mean over maps: (B,).

    Mean and deviation are the channel's own in each sample, and carry no gradient: with it, a map could lower the penalty by
    making its other values vary more.
    """
    total = []
    for map_BCHW in maps:
        features = precise(map_BCHW)
        with torch.no_grad():
            mean = features.mean((2, 3), keepdim=True)
            deviation = (features.var((2, 3), keepdim=True, unbiased=False) + VARIANCE_EPS).sqrt()
        excess = F.relu(((features - mean) / deviation).abs() - threshold)
        total.append(excess.square().mean((1, 2, 3)))
    return torch.stack(total).mean(0)


class Transform(NamedTuple):
    """One of EQ-VAE's, of latents and images alike."""

    scale: float
    """Of both sides; at most 1."""
    quarter_turns: int

    def side(self, latent_side: int) -> int:
        """Of the scaled latents."""
        return max(1, round(latent_side * self.scale))


def transformed(x_BCHW: Tensor, transform: Transform, side: int | tuple[int, int]) -> Tensor:
    """Resized to `side`, or (height, width), bicubic and antialiased, and then turned."""
    height, width = (side, side) if isinstance(side, int) else side
    if (height, width) != tuple(x_BCHW.shape[-2:]):
        x_BCHW = F.interpolate(precise(x_BCHW), size=(height, width), mode="bicubic", antialias=True)
    return torch.rot90(x_BCHW, transform.quarter_turns, (2, 3)) if transform.quarter_turns else x_BCHW
