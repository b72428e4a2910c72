"""LPIPS, the perceptual distance of images (Zhang et al. 2018), as a plain frozen module without torchvision.

Features of a classifier's trunk after five of its layers, each pixel scaled to unit length over channels; squared
differences, weighted by one learned non-negative number a channel, mean over pixels, sum over the five layers.
`trainer/models/lpips_weights.py` reads published weights. Shapes: images and feature maps BCHW, images in [-1, 1].
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.perceptual import LPIPSNetwork
from trainer.models.precision import precise

SMALLEST_SIDE: dict[LPIPSNetwork, int] = {
    "vgg16": 16,
    "alex": 31,
    "vgg16_shift_tolerant": 18,
    "alex_shift_tolerant": 21,
}
"""Of an image, in pixels, so that poolings and paddings have something left at the fifth layer."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""The trunks' ImageNet mean and deviation, for images in [-1, 1]."""
NORM_EPS = 1e-10


class LPIPS(nn.Module):
    """Distance of each image from its counterpart. Always in eval mode; gradients flow to the images, never to weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: LPIPSNetwork) -> None:
        """With random weights; `build_lpips` gives it real ones."""
        super().__init__()
        tolerant = network.endswith("_shift_tolerant")
        stages = _vgg16(tolerant) if network.startswith("vgg16") else _alex(tolerant)
        self.network = network
        self.smallest_side = SMALLEST_SIDE[network]
        self.trunk = nn.Sequential(*(layer for stage in stages for layer in stage))
        self.ends = tuple(accumulate(len(stage) for stage in stages))
        """Number of trunk layers up to and with each map."""
        widths = [next(m.out_channels for m in reversed(stage) if isinstance(m, nn.Conv2d)) for stage in stages]
        self.heads = nn.ParameterList(torch.full((width,), 1.0 / width) for width in widths)
        """A weight (C,) for each channel of each map."""
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode: a task that calls `train()` on all its modules must not wake a frozen one."""
        super().train(False)
        return self

    def forward(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]; values outside are taken as they are."""
        return self.distance(self.features(images_BCHW), self.features(others_BCHW))

    def features(self, images_BCHW: Tensor) -> list[Tensor]:
        """The five maps, each after its ReLU, not normalised."""
        assert min(images_BCHW.shape[-2:]) >= self.smallest_side, f"{tuple(images_BCHW.shape)}: too small"
        h = (images_BCHW.to(self.shift.dtype) - self.shift) / self.scale
        maps = []
        for number, layer in enumerate(self.trunk, start=1):
            h = layer(h)
            if number in self.ends:
                maps.append(h)
        return maps

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """Distances (B,) from the maps that `features` gives."""
        layers = zip(features, others, self.heads, strict=True)
        return torch.stack([layer_distance(map_BCHW, other, head_C) for map_BCHW, other, head_C in layers]).sum(0)


def layer_distance(features_BCHW: Tensor, others_BCHW: Tensor, head_C: Tensor) -> Tensor:
    """One layer's distances (B,): eq. 1 of Zhang et al. In float32 at least, also under autocast: no matrix product here."""
    error_BCHW = (unit_features(features_BCHW) - unit_features(others_BCHW)).square()
    return (error_BCHW.mean((2, 3)) * head_C).sum(1)


def unit_features(features_BCHW: Tensor) -> Tensor:
    """Each pixel scaled to unit length over channels; one without any feature stays 0, with a finite gradient."""
    features_BCHW = precise(features_BCHW)
    return features_BCHW / (torch.linalg.vector_norm(features_BCHW, dim=1, keepdim=True) + NORM_EPS)


# ------------------------------------------------------------------------------------------------------------ the trunks


class Blur(nn.Module):
    """Binomial 3x3 filter, then every second pixel; the map grows by one pixel at each side."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", torch.outer(row, row).repeat(channels, 1, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded = F.pad(x_BCHW, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.filt, stride=2, groups=x_BCHW.shape[1])


def _vgg16(tolerant: bool) -> list[list[nn.Module]]:
    """Layers of each stage, in the order that published weights number them by."""
    stages: list[list[nn.Module]] = []
    width = 3
    for channels, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage = _subsampling(2, width, tolerant) if stages else []
        for _ in range(num_convs):
            stage += [nn.Conv2d(width, channels, 3, padding=1), _relu()]
            width = channels
        stages.append(stage)
    return stages


def _alex(tolerant: bool) -> list[list[nn.Module]]:
    """As `_vgg16`. The stride of the tolerant one's first convolution moves into a blur, 2 of its 4."""
    first = nn.Conv2d(3, 64, 11, stride=1 if tolerant else 4, padding=2)
    return [
        [first, *([Blur(64)] if tolerant else []), _relu()],
        [*_subsampling(3, 64, tolerant), nn.Conv2d(64, 192, 5, padding=2), _relu()],
        [*_subsampling(3, 192, tolerant), nn.Conv2d(192, 384, 3, padding=1), _relu()],
        [nn.Conv2d(384, 256, 3, padding=1), _relu()],
        [nn.Conv2d(256, 256, 3, padding=1), _relu()],
    ]


def _subsampling(kernel: int, channels: int, tolerant: bool) -> list[nn.Module]:
    return [nn.MaxPool2d(kernel, stride=1), Blur(channels)] if tolerant else [nn.MaxPool2d(kernel, stride=2)]


def _relu() -> nn.Module:
    # in place: what the next convolution keeps for its backward pass is then all that is kept
    return nn.ReLU(inplace=True)
