"""The perceptual loss that a config asks for."""

from torch import nn

from trainer.config import PerceptualConfig
from trainer.losses.lpl import LatentPerceptualLoss
from trainer.losses.perceptual import PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder


def build_perceptual_loss(config: PerceptualConfig, codec: Codec, trained: nn.Module) -> PerceptualLoss:
    """`trained`: the task's module, of which Self-Perceptual keeps a copy.

    Raises:
        UserError: it does not go with this codec or model, or its weights are not there.
    """
    match config.kind:
        case "lpl":
            return LatentPerceptualLoss(FrozenDecoder(codec, config.num_maps), config)
        case _:
            raise NotImplementedError(config.kind)
