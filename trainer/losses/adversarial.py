"""The game between decoder and discriminator, and how much it weighs (Esser et al. 2021). Logits are B1hw; losses are (B,)."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as convolution_gradients

from trainer.models.precision import precise

LARGEST_WEIGHT = 1e4
EPS = 1e-4

Kind = Literal["hinge", "vanilla"]


def generator_loss(fake_B1hw: Tensor) -> Tensor:
    """g = -D(x_hat), mean over patches."""
    return -precise(fake_B1hw).mean((1, 2, 3))


def discriminator_loss(real_B1hw: Tensor, fake_B1hw: Tensor, kind: Kind) -> Tensor:
    """Half of what is wrong about images, half of what is wrong about reconstructions; mean over patches."""
    real, fake = precise(real_B1hw), precise(fake_B1hw)
    if kind == "hinge":
        wrong_real, wrong_fake = F.relu(1.0 - real), F.relu(1.0 + fake)
    else:
        wrong_real, wrong_fake = F.softplus(-real), F.softplus(fake)
    return 0.5 * (wrong_real.mean((1, 2, 3)) + wrong_fake.mean((1, 2, 3)))


def last_layer_gradient(input_BCHW: Tensor, weight: tuple[int, int, int, int], grad_images_BCHW: Tensor) -> Tensor:
    """Gradient of the decoder's last convolution (3x3, stride 1) from the gradient of its images: no pass through the
    decoder, and no parameter, which under sharding is in parts."""
    pad = weight[-1] // 2
    inputs, gradients = precise(input_BCHW.detach()), precise(grad_images_BCHW)
    return convolution_gradients.conv2d_weight(inputs, weight, gradients, stride=1, padding=pad)


@torch.no_grad()
def adaptive_weight(nll_gradient: Tensor, generator_gradient: Tensor) -> Tensor:
    """lambda = clamp(|grad nll| / (|grad g| + 1e-4), 0, 1e4) of eq. 7, from each rank's part of the last layer's gradients;
    the same on all ranks. A collective."""
    both = torch.stack([nll_gradient, generator_gradient])
    if dist.is_initialized():
        dist.all_reduce(both)
        both /= dist.get_world_size()
    nll_norm, generator_norm = torch.linalg.vector_norm(both.flatten(1), dim=1)
    return (nll_norm / (generator_norm + EPS)).clamp(0.0, LARGEST_WEIGHT)
