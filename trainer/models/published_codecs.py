"""Published autoencoders by name, their sizes without their weights: what memory, time and arithmetic are measured with."""

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from trainer.models.codec_files import Autoencoder

WIDTHS = (128, 256, 512, 512)
X1_5 = (192, 384, 768, 768)
"""The decoder's widths of the asymmetric autoencoder that is 1.5 times as wide (Zhu et al. 2023)."""
BLOCKS: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
NO_QUANT: dict[str, Any] = dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)


def kl(**options: Any) -> AutoencoderKL:
    """Stable Diffusion's, of random weights; `options` are its constructor's."""
    return AutoencoderKL(**{"block_out_channels": WIDTHS, "layers_per_block": 2, **BLOCKS, **options})


def asymmetric(widths: tuple[int, ...] = X1_5, layers: int = 3, **options: Any) -> AsymmetricAutoencoderKL:
    """Stable Diffusion's encoder with a decoder of these widths and layers, of random weights."""
    given = {
        "down_block_out_channels": WIDTHS, "layers_per_down_block": 2, "up_block_out_channels": widths,
        "layers_per_up_block": layers, "scaling_factor": 0.18215,
    }  # fmt: skip
    return AsymmetricAutoencoderKL(**{**given, **BLOCKS, **options})


PUBLISHED: dict[str, Callable[..., Autoencoder]] = {
    "sd15": lambda **o: kl(scaling_factor=0.18215, **o),
    "sdxl": lambda **o: kl(scaling_factor=0.13025, **o),
    "sd3": lambda **o: kl(scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT, **o),
    "flux": lambda **o: kl(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT, **o),
    "asymmetric_x1.5": asymmetric,
    "taesd": AutoencoderTiny,
    "taef1": lambda **o: AutoencoderTiny(latent_channels=16, **o),
}
"""Options of the constructor override the published ones."""
