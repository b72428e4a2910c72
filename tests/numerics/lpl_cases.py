"""What tests of the latent perceptual loss share: small decoders of the real architecture, planted outliers, real photos."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from data.images import read_image
from data.transforms import training_image
from tests.perceptual import make_context
from trainer.config import LPLConfig
from trainer.losses.lpl import LatentPerceptualLoss, num_decoded
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.tensors import pixels_to_images

OUTLIER = 300.0


class PlantedCodec(Codec):
    """Real features, with outliers two orders of magnitude large at fixed pixels of the maps that tend to have them."""

    def decode_features(self, latents_BCHW: Tensor, num_maps: int | None = None) -> list[Tensor]:
        return planted(super().decode_features(latents_BCHW, num_maps), latents_BCHW)


class PlantedDecoder(FrozenDecoder):
    """A `PlantedCodec`'s."""

    def forward(self, latents_BCHW: Tensor, *args: Any, **options: Any) -> list[Tensor]:
        return planted(super().forward(latents_BCHW, *args, **options), latents_BCHW)


def planted(maps: list[Tensor], latents_BCHW: Tensor) -> list[Tensor]:
    """Some pixels of the deep maps, at most 2 % of each, far larger and more off; and a corner of the map before them."""
    out = []
    for features in maps:
        side, scale = features.shape[-1], features.shape[-1] // latents_BCHW.shape[-1]
        factor, offset = torch.ones_like(features), torch.zeros_like(features)
        corner: Any = (slice(None), slice(1, None, 5), 0, 0)
        row: Any = (slice(None), slice(0, None, 3), side // 4, slice(side // 2, side // 2 + 3))
        places = [(row, OUTLIER), (corner, -OUTLIER)] if scale >= 4 else [(corner, OUTLIER)] if scale == 2 else []
        for where, value in places:
            factor[where], offset[where] = 10.0, value
        out.append(features * factor + offset)
    return out


def make_codec(kind: type[Codec] = Codec, channels: tuple[int, ...] = (8, 8, 16, 16), seed: int = 0) -> Codec:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )
    return kind(vae)


def make_latents(codec: Codec, batch: int, side: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(z0_hat, z0)"""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, codec.latent_channels, side, side, generator=generator)
    return z0 + 0.4 * torch.randn(z0.shape, generator=generator), z0


@torch.no_grad()
def photo_latents(shared_dir: Path, codec: Codec, *, count: int, side_px: int) -> tuple[Tensor, Tensor]:
    """(z0_hat, z0) of crops of real photos; the estimates are off as a denoiser's are at a low noise level."""
    folder = shared_dir / "data" / "coco_open_256"
    lines = (folder / "metadata.jsonl").read_text().splitlines()[:count]
    paths = [folder / "images" / json.loads(line)["file_name"].removeprefix("images/") for line in lines]
    pictures = [training_image(read_image(path.read_bytes(), min_side=256), 256) for path in paths]
    crops = torch.stack([torch.from_numpy(picture[90 : 90 + side_px, 70 : 70 + side_px]) for picture in pictures])
    crops = crops.permute(0, 3, 1, 2).contiguous()
    z0 = codec.encode(pixels_to_images(crops))
    return z0 + 0.3 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(2)), z0


def make_loss(codec: Codec, config: LPLConfig, *, dtype: torch.dtype | None = None) -> LatentPerceptualLoss:
    """As `build_lpl`, with the codec's outliers where it has some."""
    kind = PlantedDecoder if isinstance(codec, PlantedCodec) else FrozenDecoder
    return LatentPerceptualLoss(kind(codec, num_decoded(config, codec.map_names), dtype=dtype), config)


def run(
    codec: Codec,
    z0_hat: Tensor,
    z0: Tensor,
    levels: list[float],
    config: LPLConfig,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    context = make_context(z0, downsampling=codec.downsampling)
    return make_loss(codec, config, dtype=dtype)(z0_hat, z0, torch.tensor(levels), context)


def fixed(**options) -> LPLConfig:
    """A config whose tau is 3 at any resolution."""
    return LPLConfig(tau_reference_px=None, **options)
