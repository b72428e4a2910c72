"""VGG16's convolutions over latents: a classifier to be trained, whose five stages' features E-LatentLPIPS compares.

Kang et al. 2024 ("Distilling Diffusion Models into Conditional GANs", section 3.2) take VGG16 with the latents' channels and
without three of its five poolings, as latents are eight times smaller than images already.

Group norm stands behind each convolution. Batch norm's statistics are the batch's: they would have to be agreed on by all
ranks, kept in the average of the weights, and would differ between training and use. Without any norm thirteen layers of
ReLU train only with care. Group norm is a function of the sample alone, here and in the loss. Networks that others
trained with batch norm can be had too: folded into the convolutions they have no norm (`norm_num_groups: null`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import LatentVGGConfig


class Stage(nn.Module):
    """Convolutions at one resolution: 3x3, norm, ReLU."""

    def __init__(self, channels: int, width: int, num_convs: int, *, num_groups: int | None, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        inputs = [channels, *[width] * (num_convs - 1)]
        self.convs = nn.ModuleList(nn.Conv2d(c, width, kernel_size=3, padding=1) for c in inputs)
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, width) if num_groups else nn.Identity() for _ in inputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.pooled:
            x_BCHW = F.max_pool2d(x_BCHW, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCHW = F.relu(norm(conv(x_BCHW)))
        return x_BCHW


class LatentVGG(nn.Module):
    """Scaled latents to class logits, by way of five feature maps."""

    def __init__(self, config: LatentVGGConfig, latent_channels: int, num_classes: int | None = None) -> None:
        """`num_classes`: None for the features alone."""
        super().__init__()
        self.config, self.latent_channels = config, latent_channels
        self.stages = nn.ModuleList(
            Stage(c, width, count, num_groups=config.norm_num_groups, pooled=i + 1 in config.pooled_stages)
            for i, (c, width, count) in enumerate(
                zip((latent_channels, *config.widths), config.widths, config.convs_per_stage, strict=False)
            )
        )
        self.classifier = nn.Linear(config.widths[-1], num_classes) if num_classes else None

    def init_weights(self) -> None:
        """He et al. 2015, eq. 10: activations keep their size; a classifier that begins near the uniform distribution."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def features(self, latents_BCHW: Tensor) -> list[Tensor]:
        """Output of each stage, before the next one's pooling: five maps."""
        maps: list[Tensor] = []
        x = latents_BCHW
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        """Logits (B, classes)."""
        assert self.classifier is not None, "built for its features alone"
        pooled_BD = self.features(latents_BCHW)[-1].mean((2, 3))
        logits: Tensor = self.classifier(pooled_BD)
        return logits


def trunk_state(network: LatentVGG) -> dict[str, Tensor]:
    """What the features need: the weights without the classifier."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("classifier.")}


def uniform_heads(config: LatentVGGConfig) -> list[Tensor]:
    """1/C on each channel: not calibrated on human judgements."""
    return [torch.full((width,), 1.0 / width) for width in config.widths]
