"""What every denoiser is, whatever its architecture, and how to build one.

B batch, C latent channels, H W latent sides. Plain modules: sharding, recomputation and compilation come from outside. None
has a buffer, so that one built on the meta device is whole after `to_empty` and `init_weights`.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from trainer.config import DenoiserConfig
from trainer.errors import UserError
from trainer.models.condition import Condition


class Denoiser(nn.Module, ABC):
    """Predicts from noisy latents, a time and a condition."""

    def __init__(self, *, latent_channels: int, latent_multiple: int, token_width: int | None) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.latent_multiple = latent_multiple
        """Sides of the latents must be multiples of this."""
        self.token_width = token_width
        """Channels of the condition's tokens; None: it reads none."""

    @abstractmethod
    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int | None = None) -> Tensor:
        """The prediction, (B, C, H, W); t in 0..1000, may be fractional.

        Args:
            num_blocks: run the first so many blocks alone and return what they make of the image: tokens (B, N, D), or a
                U-Net's map. By way of `forward`, because sharding gathers around it.
        """

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks that `forward` can stop behind."""

    @abstractmethod
    def cut(self, num_blocks: int) -> None:
        """Drop the blocks behind the first so many; from then on `forward` gives features of those alone."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fresh weights, from torch's global generator."""

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Parts to gather, recompute and compile one at a time."""

    def check_inputs(self, zt_BCHW: Tensor, condition: Condition) -> None:
        """By shapes alone, so the device is not waited for.

        Raises:
            UserError: what the codec or the text encoder gives does not fit this model.
        """
        channels, rows, columns = zt_BCHW.shape[1:]
        if channels != self.latent_channels:
            raise UserError(f"task.codec: latents have {channels} channels, the denoiser takes {self.latent_channels}")
        if rows % self.latent_multiple or columns % self.latent_multiple:
            raise UserError(f"task.model: latents of {rows} x {columns} are no multiple of {self.latent_multiple}, the patch "
                            "or the U-Net's smallest level; take another resolution")  # fmt: skip
        if self.token_width is not None and condition.tokens_BLT.shape[-1] != self.token_width:
            raise UserError(f"task.text: tokens have {condition.tokens_BLT.shape[-1]} channels, the denoiser takes "
                            f"{self.token_width}")  # fmt: skip


def xavier_(weight: Tensor) -> None:
    """Uniform Xavier of a linear map, or of a convolution as the linear map of its patch."""
    outputs = weight.shape[0]
    bound = math.sqrt(6.0 / (outputs + weight.numel() // outputs))
    nn.init.uniform_(weight, -bound, bound)


def init_transformer(module: nn.Module) -> None:
    """What all transformers here begin with (Peebles & Xie 2023): Xavier for linear maps and patches, zero biases, and
    norms that scale by one."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            xavier_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.RMSNorm | nn.LayerNorm):
            part.reset_parameters()


def build_denoiser(
    config: DenoiserConfig, *, latent_channels: int, token_width: int, pooled_width: int, num_classes: int | None
) -> Denoiser:
    """A denoiser without weights worth having: `init_weights`, or load some.

    Args:
        token_width, pooled_width: Channels of the text encoder's tokens and pooled text; 0: it gives none.
        num_classes: Where the run is on classes. Label `num_classes` itself stands for no class.

    Raises:
        UserError: the model needs what the text encoder does not give.
    """
    if config.kind == "mmdit":
        from trainer.models.mmdit import MMDiT  # here: it imports this module

        return MMDiT(config, latent_channels=latent_channels, token_width=token_width, pooled_width=pooled_width)

    # here: they import this module, and half of diffusers
    from trainer.models.diffusers_denoisers import (
        DiT,
        PixArt,
        UNet,
    )

    if config.kind == "dit":
        return DiT(config, latent_channels=latent_channels, num_classes=num_classes)
    if config.kind == "pixart":
        return PixArt(config, latent_channels=latent_channels, token_width=token_width)
    return UNet(config, latent_channels=latent_channels, token_width=token_width)
