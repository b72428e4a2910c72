"""PatchGAN (Isola et al. 2017; pix2pix's `NLayerDiscriminator`): a logit for each patch of an image."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from trainer.config import DiscriminatorConfig
from trainer.models.frozen_layers import as_it_is
from trainer.models.precision import precise

WIDEST = 8
"""Times the first layer's width."""
NEGATIVE_SLOPE = 0.2


class Discriminator(nn.Module):
    """Convolutions of 4x4: `num_layers` that halve the side, one and the logits' own that do not. LeakyReLU between."""

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        widths = [config.width * min(2**i, WIDEST) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [_conv(config, in_channels, widths[0], stride=2), nn.LeakyReLU(NEGATIVE_SLOPE)]
        for i, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.num_layers else 1
            batch = config.norm == "batch"
            layers.append(_conv(config, before, width, stride=stride, bias=not batch))  # the norm has one of its own
            layers += [BatchNorm(width)] if batch else []
            layers.append(nn.LeakyReLU(NEGATIVE_SLOPE))
        layers.append(_conv(config, widths[-1], 1, stride=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, 1, h, w): high for what looks real."""
        logits: Tensor = self.layers(images_BCHW)
        return logits

    @torch.no_grad()
    def begin_step(self) -> None:
        """Of the spectral norms, one power iteration (Miyato et al. 2018, algorithm 1). In eval mode forward passes make none,
        so that a step is the same however many passes its batch is split into."""
        parametrized: list[Any] = [module for module in self.modules() if is_parametrized(module, "weight")]
        for module in parametrized:
            module.parametrizations.train()
            module.weight  # noqa: B018
            module.parametrizations.eval()


class _Conv(nn.Conv2d):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        # spectral norm divides by a product of its own here
        with as_it_is(x_BCHW):
            weight = self.weight
        return self._conv_forward(x_BCHW, weight, self.bias)


def _conv(config: DiscriminatorConfig, before: int, width: int, *, stride: int, bias: bool = True) -> nn.Module:
    conv = _Conv(before, width, 4, stride=stride, padding=1, bias=bias)
    nn.init.normal_(conv.weight, 0.0, 0.02)
    return spectral_norm(conv) if config.norm == "spectral" else conv


class _SumOverRanks(torch.autograd.Function):
    """Each rank's sum is every rank's, so what one adds to the loss comes back from all. torch's own is deprecated, and says so
    in every rank's log."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def over_ranks(x: Tensor) -> Tensor:
    """Sum over all ranks, with its gradient. A collective, in the backward pass too."""
    total: Tensor = _SumOverRanks.apply(x)
    return total


class BatchNorm(nn.Module):
    """By the batch's own mean and variance, over all ranks, so that a batch is one however it is laid out over them.

    There are no running statistics: a discriminator is never used outside of training. torch's `SyncBatchNorm` needs a GPU.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = precise(x_BCHW)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        # ranks have equally many pixels; the mean first, as a difference of squares would lose digits
        mean_C = over_ranks(x.mean((0, 2, 3))) / dist.get_world_size()
        centred = x - mean_C[:, None, None]
        variance_C = over_ranks(centred.square().mean((0, 2, 3))) / dist.get_world_size()
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return centred * scale_C[:, None, None] + self.bias[:, None, None]
