"""TAEF2, a small pre-trained autoencoder of FLUX.2's latents (32 channels, f8), from the two files that its author publishes.

It is diffusers' `AutoencoderTiny` with a branch before six of its blocks, which no `config.json` can say.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from trainer.errors import UserError, one_line
from trainer.models.autoencoders import Codec

ENCODER, DECODER = "taef2_encoder.pth", "taef2_decoder.pth"
MAX_BYTES = 64 << 20
_ENCODER_LAYERS, _DECODER_LAYERS = (11, 12, 13), (2, 3, 4)
"""The blocks at the latents' resolution."""


class _PooledBlock(AutoencoderTinyBlock):
    """x + branch(x) instead of x, with a group norm over the whole map in the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        inner = 4 * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.GroupNorm(4, inner), nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x + self.pool(x))
        return out


def is_taef2(folder: str) -> bool:
    return (Path(folder) / ENCODER).is_file() and (Path(folder) / DECODER).is_file()


def load_taef2(folder: str) -> Codec:
    """Raises:
    UserError: a file is damaged, or of another network.
    """
    vae = AutoencoderTiny(latent_channels=32)
    for layers, places in ((vae.encoder.layers, _ENCODER_LAYERS), (vae.decoder.layers, _DECODER_LAYERS)):
        for index in places:
            layers[index] = _PooledBlock(64)
    state = {f"encoder.layers.{name}": tensor for name, tensor in _read(Path(folder) / ENCODER).items()}
    for name, tensor in _read(Path(folder) / DECODER).items():
        place, _, rest = name.partition(".")
        # the published decoder begins with a clamp, which diffusers has outside of its layers
        state[f"decoder.layers.{int(place) - 1}.{rest}"] = tensor
    try:
        vae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as e:
        raise UserError(f"{folder}: not TAEF2's weights ({one_line(e)})") from None
    return Codec(vae)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MiB; not TAEF2's weights")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load meets damage with several types; whichever it is, the file is at fault
        raise UserError(f"{path}: cannot be read as weights ({one_line(e)})") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds no weights by name")
    if not all(str(name).partition(".")[0].isdecimal() for name in tensors):
        raise UserError(f"{path}: not TAEF2's weights")
    return tensors
