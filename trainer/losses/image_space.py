"""Losses on decoded images: LPIPS of them, as CogVideo's latent perceptual loss has it, and their plain squared error.

Images are as the decoder gives them, unclamped: clamped ones would have no gradient outside of [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import DecodedRGBConfig, ImageSpaceConfig, ImageSpaceTermsConfig
from trainer.errors import UserError
from trainer.losses.denoising import denoising_loss
from trainer.losses.gate import inside
from trainer.losses.injection import injected
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.models.lpips import LPIPS
from trainer.models.lpips_weights import build_lpips
from trainer.models.precision import precise


class ImageSpaceTerms(nn.Module):
    """w_lat |z - z_hat|^2 + w_p LPIPS(D(z), D(z_hat)) + w_in LPIPS(x, D(z_hat)) of each sample, x the input image.

    A part whose weight is 0 is not computed. Terms: `image_space_latent`, and where they have a weight
    `image_space_decoded` and `image_space_input`, each before its weight.
    """

    def __init__(self, config: ImageSpaceTermsConfig, codec: Codec, section: str) -> None:
        """`section`: the config's, for messages.

        Raises:
            UserError: the weights of LPIPS are not there, or are not those of its network.
        """
        super().__init__()
        self.config, self.section = config, section
        weights = {"image_space_decoded": config.decoded_weight, "image_space_input": config.input_weight}
        self.image_weights = {name: weight for name, weight in weights.items() if weight}
        self.lpips: LPIPS | None = None
        self.decoder: FrozenDecoder | None = None
        if self.image_weights:
            self.lpips, self.decoder = build_lpips(config.lpips, f"{section}.lpips"), FrozenDecoder(codec)

    @property
    def names(self) -> tuple[str, ...]:
        return ("image_space_latent", *self.image_weights)

    def check(self, resolution: int) -> None:
        """Raises:
        UserError: images are too small for the network of LPIPS.
        """
        if self.lpips is None:
            return
        side, smallest = self.config.resize_px or resolution, self.lpips.smallest_side
        if side < smallest:
            raise UserError(f"{self.section}.resize_px: {self.config.resize_px}, of images with {resolution} pixels a "
                            f"side, leaves {side}, fewer than the {smallest} that network {self.lpips.network} needs; set "
                            f"it to {smallest} or more")  # fmt: skip

    def forward(self, z0_hat: Tensor, z0: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and terms of scaled latents; the truth and the images carry no gradient."""
        # Always there, also with a weight of 0: decoders that clamp their input would hide a latent that is not finite.
        latent_B = denoising_loss(z0_hat, z0)
        loss_B, terms = self.config.latent_weight * latent_B, {"image_space_latent": latent_B}
        if self.lpips is not None and self.decoder is not None:
            decoded = self.decoder.images(z0_hat)
            side = (self.config.resize_px,) * 2 if self.config.resize_px else decoded.shape[-2:]
            features = self.lpips.features(_resized(decoded, side))
            for name, weight in self.image_weights.items():
                with torch.no_grad():
                    target = images if name == "image_space_input" else self.decoder.images(z0)
                    target_features = self.lpips.features(_resized(target, side))
                terms[name] = self.lpips.distance(features, target_features)
                loss_B = loss_B + weight * terms[name]
        return loss_B, terms


class ImageSpaceLoss(PerceptualLoss):
    """`ImageSpaceTerms` of the samples inside the gate. Terms: theirs, and `gate`, 1 inside and 0 outside."""

    name = "image_space"

    def __init__(self, config: ImageSpaceConfig, codec: Codec) -> None:
        super().__init__()
        self.config = config
        self.of_latents = ImageSpaceTerms(config, codec, "task.perceptual")

    def check(self, resolution: int) -> list[str]:
        self.of_latents.check(resolution)
        return []

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def value(z0_hat: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss_B, terms = self.of_latents(z0_hat, z0_BCHW[rows], context.images_BCHW[rows])
            return loss_B, terms | {"gate": torch.ones_like(loss_B)}

        names = ["gate", *self.of_latents.names]
        rows = inside(noise_level_B, context.threshold)
        return injected(z0_hat_BCHW, rows, value, term_names=names, chunk_size=self.config.chunk_size)


def _resized(images_BCHW: Tensor, side: tuple[int, ...]) -> Tensor:
    """Images of this height and width, in float32 at least; bicubic and antialiased where theirs is another."""
    images_BCHW = precise(images_BCHW)
    if tuple(images_BCHW.shape[-2:]) == tuple(side):
        return images_BCHW
    return F.interpolate(images_BCHW, size=tuple(side), mode="bicubic", antialias=True)


class DecodedRGBLoss(PerceptualLoss):
    """Mean squared error of each sample's decoded image, D(z_hat) against D(z). Term: `gate`."""

    name = "decoded_rgb"

    def __init__(self, config: DecodedRGBConfig, codec: Codec) -> None:
        super().__init__()
        self.config = config
        self.decoder = FrozenDecoder(codec)

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def value(z0_hat: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z0 = z0_BCHW[rows]
            with torch.no_grad():
                target = self.decoder.images(z0)
            loss_B = denoising_loss(self.decoder.images(z0_hat), target)
            # A decoder that clamps its input would hide a latent that is not finite: 0 times its error brings it back.
            loss_B = loss_B + 0.0 * denoising_loss(z0_hat.detach(), z0)
            return loss_B, {"gate": torch.ones_like(loss_B)}

        rows = inside(noise_level_B, context.threshold)
        return injected(z0_hat_BCHW, rows, value, term_names=["gate"], chunk_size=self.config.chunk_size)
