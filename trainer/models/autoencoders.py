"""The frozen autoencoder between images and latents, and its decoder's feature maps.

Images are in [-1, 1], `images_BCHW`. Raw latents are what the encoder gives and shards store; scaled latents,
(raw - shift) * scale, are what the diffusion model sees. Latents are scaled unless a name says raw.
"""

import json
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.config import resolve_url
from trainer.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 8 << 30
MAX_BLOCKS, MAX_LAYERS_PER_BLOCK = 16, 64

UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in weights written by diffusers before 0.17, Stable Diffusion 1.x among them."""


class Codec(nn.Module):
    """A frozen `AutoencoderKL` with the scale and shift of its own config. Always in eval mode, without gradients.

    Gradients still flow to the inputs: callers that want none run it under `no_grad`.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.shift_factor = float(vae.config["shift_factor"] or 0.0)
        self.latent_channels = int(vae.config["latent_channels"])
        self.downsampling = 2 ** (len(vae.config["block_out_channels"]) - 1)
        """Side of an image over side of its latents."""
        self.map_names = ("mid", *(f"up{i}" for i in range(len(vae.decoder.up_blocks))))
        """Names of the decoder's feature maps, in order."""
        self.eval()

    @classmethod
    def load(cls, url: str) -> "Codec":
        """Read diffusers' `config.json` and safetensors weights from a folder or any fsspec URL; float32, on the CPU.

        Raises:
            UserError: a file is missing, unreadable, too large, or not an AutoencoderKL's; the message names it.
        """
        fs, root = _open(url)
        config_path, weights_path = f"{root}/{CONFIG_FILE}", f"{root}/{WEIGHTS_FILE}"
        config = _read_config(fs, config_path)
        try:
            with torch.device("meta"):  # sizes in a foreign config cost no memory until the weights confirm them
                vae = AutoencoderKL.from_config(config)
        except Exception as e:  # diffusers raises whatever a foreign value runs into, ZeroDivisionError included
            raise UserError(f"{config_path}: not a valid AutoencoderKL config ({_one_line(e)})") from None
        weights = _read_weights(fs, weights_path)
        _check_weights(weights, vae.state_dict(), weights_path)
        vae.load_state_dict(weights, assign=True)
        return cls(vae)

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode: a task that calls `train()` on all its modules must not wake a frozen one."""
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def map_scales(self, num_maps: int | None = None) -> tuple[int, ...]:
        """Side of each feature map over the latents' side: 1, 2, 4, 8, 8 for four up blocks."""
        scales = [1]
        for block in self.vae.decoder.up_blocks:
            scales.append(scales[-1] * (1 if block.upsamplers is None else 2))
        return tuple(scales[:num_maps])

    def raw_to_scaled(self, raw_BCHW: Tensor) -> Tensor:
        return (raw_BCHW - self.shift_factor) * self.scaling_factor

    def scaled_to_raw(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW / self.scaling_factor + self.shift_factor

    def encode_raw(self, images_BCHW: Tensor) -> Tensor:
        """Mean of the posterior, unscaled. Sides must be multiples of `downsampling`."""
        assert all(side % self.downsampling == 0 for side in images_BCHW.shape[-2:]), tuple(images_BCHW.shape)
        moments = self.vae.encoder(images_BCHW.to(self.dtype))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return self.raw_to_scaled(self.encode_raw(images_BCHW))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images, unclamped."""
        *_, last = self._decoder_maps(latents_BCHW)
        decoder = self.vae.decoder
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(last)))

    def decode_features(self, latents_BCHW: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """The decoder's first `num_maps` feature maps, all when absent; what lies deeper does not run.

        In the order of `map_names`: the output of the mid block, then of each up block after its upsampler.
        """
        count = len(self.map_names) if num_maps is None else num_maps
        assert 1 <= count <= len(self.map_names), f"{num_maps} maps of {len(self.map_names)}"
        maps = self._decoder_maps(latents_BCHW)
        return [next(maps) for _ in range(count)]  # a generator: what nobody asks for is not computed

    def _decoder_maps(self, latents_BCHW: Tensor) -> Iterator[Tensor]:
        z = self.scaled_to_raw(latents_BCHW).to(self.dtype)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        decoder = self.vae.decoder
        h = decoder.mid_block(decoder.conv_in(z))
        yield h
        for block in decoder.up_blocks:
            h = block(h)
            yield h


# -------------------------------------------------------------------------------------------------------------- loading


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, root = url_to_fs(resolve_url(url))
    except (ValueError, ImportError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{url}: the autoencoder cannot be opened ({_one_line(e)})") from None
    return fs, root.rstrip("/")


def _read(fs: AbstractFileSystem, path: str, max_bytes: int) -> bytes:
    try:
        size = fs.size(path)
        if size is None or size > max_bytes:
            raise UserError(f"{path}: {size} bytes; an autoencoder's has at most {max_bytes}")
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a diffusers AutoencoderKL with {CONFIG_FILE} and "
                        f"{WEIGHTS_FILE}") from None  # fmt: skip
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({_one_line(e)})") from None


def _read_config(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        config = json.loads(_read(fs, path, MAX_CONFIG_BYTES))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({_one_line(e)})") from None
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: _class_name is {found!r}; only AutoencoderKL is supported")

    def need(ok: bool, field: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{path}: {field} is {config.get(field)!r}; it must be {rule}")

    def is_number(x: object) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e6

    widths: Any = config.get("block_out_channels", [64])
    need(isinstance(widths, list) and 1 <= len(widths) <= MAX_BLOCKS and all(type(w) is int and w > 0 for w in widths),
         "block_out_channels", f"a list of 1 to {MAX_BLOCKS} positive integers")  # fmt: skip
    layers: Any = config.get("layers_per_block", 1)
    need(
        type(layers) is int and 1 <= layers <= MAX_LAYERS_PER_BLOCK, "layers_per_block", f"1 to {MAX_LAYERS_PER_BLOCK}"
    )
    ups: Any = config.get("up_block_types", ["UpDecoderBlock2D"])
    need(isinstance(ups, list) and len(ups) == len(widths) and all(up in UP_BLOCKS for up in ups),
         "up_block_types", f"as many of {', '.join(UP_BLOCKS)} as block_out_channels")  # fmt: skip
    downs: Any = config.get("down_block_types", ["DownEncoderBlock2D"])
    need(isinstance(downs, list) and len(downs) == len(widths), "down_block_types", "as many as block_out_channels")
    for field in ("in_channels", "out_channels"):
        need(config.get(field, 3) == 3, field, "3: images are RGB")
    scale: Any = config.get("scaling_factor", 0.18215)
    shift: Any = config.get("shift_factor")
    need(is_number(scale) and scale > 0, "scaling_factor", "a positive number")
    need(shift is None or is_number(shift), "shift_factor", "a number or null")
    for field in ("latents_mean", "latents_std"):
        need(config.get(field) is None, field, "null: latents scaled per channel are not supported")
    return config


def _read_weights(fs: AbstractFileSystem, path: str) -> dict[str, Tensor]:
    try:
        if isinstance(fs, LocalFileSystem) and fs.isfile(path) and fs.size(path) <= MAX_WEIGHTS_BYTES:
            weights = safetensors.torch.load_file(path)  # mapped, so the file is not in memory twice
        else:
            weights = safetensors.torch.load(_read(fs, path, MAX_WEIGHTS_BYTES))
    except SafetensorError as e:
        raise UserError(f"{path}: not a whole safetensors file ({_one_line(e)}); copy it again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({_one_line(e)})") from None
    return {_current_name(name): weight.float() for name, weight in weights.items()}


def _current_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in DEPRECATED_ATTENTION:
        parts[-2] = DEPRECATED_ATTENTION[parts[-2]]
    return ".".join(parts)


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str) -> None:
    for names, what in (
        (expected.keys() - weights.keys(), "lacks"),
        (weights.keys() - expected.keys(), "has a foreign"),
    ):
        if names:
            raise UserError(
                f"{path}: {what} {min(names)} ({len(names)} such); not the weights of the {CONFIG_FILE} beside it"
            )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(weight.shape)}, {CONFIG_FILE} says "
                            f"{tuple(expected[name].shape)}; not the weights of the config beside it")  # fmt: skip
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; copy or convert the weights again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
