"""The perceptual loss that a config asks for."""

from torch import nn

from trainer.config import PerceptualConfig
from trainer.losses.image_space import DecodedRGBLoss, ImageSpaceLoss
from trainer.losses.latent_lpips import LatentLPIPSLoss
from trainer.losses.lpl import build_lpl
from trainer.losses.perceptual import PerceptualLoss
from trainer.losses.reweighting import Reweighting
from trainer.losses.self_perceptual import SelfPerceptualLoss
from trainer.models.autoencoders import Codec


def build_perceptual_loss(config: PerceptualConfig, codec: Codec, trained: nn.Module) -> PerceptualLoss:
    """`trained`: the task's module, of which Self-Perceptual keeps a copy.

    Raises:
        UserError: it does not go with this codec or model, or its weights are not there.
    """
    match config.kind:
        case "lpl":
            return build_lpl(config, codec)
        case "decoded_rgb":
            return DecodedRGBLoss(config, codec)
        case "image_space":
            return ImageSpaceLoss(config, codec)
        case "latent_lpips":
            return LatentLPIPSLoss(config, codec)
        case "self_perceptual":
            return SelfPerceptualLoss(config, trained)
        case "reweighting":
            return Reweighting(config, build_lpl(config.of, codec) if config.variance_ratio is None else None)
