"""The frozen autoencoder between images and latents, and its decoder's feature maps.

Images are in [-1, 1], `images_BCHW`. Raw latents are what the encoder gives and shards store; scaled latents,
(raw - shift) * scale, are what the diffusion model sees. Latents are scaled unless a name says raw. Of a `VQModel` raw
latents are those before quantisation, as latent-diffusion has them: what it decodes is each pixel's nearest code.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from trainer.config import CodecConfig
from trainer.errors import UserError
from trainer.models.codebook import nearest_codes
from trainer.models.codec_files import CLASSES, Autoencoder, load_weights, meta_autoencoder

LOG_VARIANCES = (-30.0, 20.0)
"""Bounds of the logarithm of a posterior's variance, diffusers' `DiagonalGaussianDistribution`'s."""


class Codec(nn.Module):
    """A frozen autoencoder with the scale and shift of its own config. Always in eval mode, without gradients.

    Gradients still flow to the inputs: callers that want none run it under `no_grad`.
    """

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self._parts = _parts_of(vae)
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.shift_factor = float(vae.config.get("shift_factor") or 0.0)
        self.latent_channels = int(vae.config["latent_channels"])
        self.downsampling = self._parts.downsampling()
        """Side of an image over side of its latents."""
        self.map_names = self._parts.map_names()
        """Names of the decoder's feature maps, in order."""
        self.num_codes: int | None = int(vae.config["num_vq_embeddings"]) if isinstance(vae, VQModel) else None
        """Size of the codebook, where there is one."""
        assert self.map_scales()[-1] == self.downsampling, "the decoder's images have another size than the encoder's"
        self.eval()

    @classmethod
    def load(cls, url: str) -> "Codec":
        """Read diffusers' `config.json` and safetensors weights from a folder or any fsspec URL; float32, on the CPU.

        Raises:
            UserError: a file is missing, unreadable, too large, or of no supported autoencoder; the message names it.
        """
        vae = meta_autoencoder(url)
        load_weights(url, vae)
        return cls(vae)

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode: a task that calls `train()` on all its modules must not wake a frozen one."""
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def has_posterior(self) -> bool:
        """Whether the encoder gives means and variances, and not the latents alone."""
        return not isinstance(self.vae, VQModel | AutoencoderTiny)

    def encoder_weights(self) -> dict[str, Tensor]:
        """All that latents follow from, by name: codecs that differ in their decoders alone have the same."""
        state = self.vae.state_dict()
        return {name: state[name] for name in sorted(state) if name.startswith(("encoder.", "quant_conv."))}

    @property
    def codes_KC(self) -> Tensor | None:
        """The codebook, in raw latents, where there is one."""
        return self.vae.quantize.embedding.weight if isinstance(self.vae, VQModel) else None

    def map_scales(self, num_maps: int | None = None) -> tuple[int, ...]:
        """Side of each feature map over the latents' side.

        1, 2, 4, 8, 8 for the four up blocks of Stable Diffusion's; 1, 2, 4, 8 for the four stages of a tiny one.
        """
        return self._parts.map_scales()[:num_maps]

    def raw_to_scaled(self, raw_BCHW: Tensor) -> Tensor:
        return (raw_BCHW - self.shift_factor) * self.scaling_factor

    def scaled_to_raw(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW / self.scaling_factor + self.shift_factor

    def encode_raw(self, images_BCHW: Tensor) -> Tensor:
        """Mean of the posterior, unscaled; a tiny autoencoder's one output. Sides are multiples of `downsampling`."""
        assert all(side % self.downsampling == 0 for side in images_BCHW.shape[-2:]), tuple(images_BCHW.shape)
        return self._parts.encode(images_BCHW.to(self.dtype))

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        """(B, 2C, h, w): means of the posterior, unscaled, then the logarithms of its variances, bounded as diffusers has it.
        Only where `has_posterior`."""
        assert self.has_posterior, type(self.vae).__name__
        assert isinstance(self._parts, _KLParts)
        assert all(side % self.downsampling == 0 for side in images_BCHW.shape[-2:]), tuple(images_BCHW.shape)
        mean_BCHW, log_variance_BCHW = self._parts.moments(images_BCHW.to(self.dtype)).chunk(2, dim=1)
        return torch.cat([mean_BCHW, log_variance_BCHW.clamp(*LOG_VARIANCES)], dim=1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return self.raw_to_scaled(self.encode_raw(images_BCHW))

    def code_indices(self, raw_BCHW: Tensor) -> Tensor | None:
        """(B, H, W): the code that stands for each pixel of raw latents; None without a codebook."""
        codes_KC = self.codes_KC
        return None if codes_KC is None else nearest_codes(raw_BCHW, codes_KC)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images, unclamped."""
        *_, last = self._decoder_maps(latents_BCHW)
        return run_chain(self.decoder_head(), last)

    def decode_features(self, latents_BCHW: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """The decoder's first `num_maps` feature maps, all when absent; what lies deeper does not run.

        In the order of `map_names`. The last one is all that the decoder's head, which gives the images, sees.
        """
        count = len(self.map_names) if num_maps is None else num_maps
        assert 1 <= count <= len(self.map_names), f"{num_maps} maps of {len(self.map_names)}"
        maps = self._decoder_maps(latents_BCHW)
        return [next(maps) for _ in range(count)]  # a generator: what nobody asks for is not computed

    def decoder_stages(self) -> list[list[nn.Module]]:
        """The decoder's modules in the order in which they run, from raw latents, or the codes that stand for them: those up
        to each feature map."""
        return self._parts.stages()

    def decoder_head(self) -> list[nn.Module]:
        """From the last feature map to images."""
        return self._parts.head()

    def _decoder_maps(self, latents_BCHW: Tensor) -> Iterator[Tensor]:
        h = quantized(self.scaled_to_raw(latents_BCHW), self.codes_KC).to(self.dtype)
        for stage in self.decoder_stages():
            h = run_chain(stage, h)
            yield h


def quantized(raw_BCHW: Tensor, codes_KC: Tensor | None) -> Tensor:
    """Each pixel's nearest code, whose gradient is the pixel's (straight-through); as they are without a codebook."""
    if codes_KC is None:
        return raw_BCHW
    codes_BHWC = codes_KC.detach()[nearest_codes(raw_BCHW, codes_KC)]
    return codes_BHWC.permute(0, 3, 1, 2) + (raw_BCHW - raw_BCHW.detach())


def run_chain(modules: Iterable[nn.Module], h: Tensor) -> Tensor:
    for module in modules:
        h = module(h)
    return h


def load_codec(config: CodecConfig, section: str = "task.codec") -> Codec:
    """The autoencoder at `config.url`, float32 and on the CPU, if it is the one that the config declares.

    Args:
        section: of the config, for messages.

    Raises:
        UserError: as `Codec.load`; or its latents have other channels or another size than declared.
    """
    vae = meta_autoencoder(config.url)
    codec = Codec(vae)
    for field in ("latent_channels", "downsampling"):  # before the weights are read: they may be far away
        declared, found = getattr(config, field), getattr(codec, field)
        if declared != found:
            raise UserError(f"{section}.{field}: {declared}, but the autoencoder at {config.url} has {found}; set it "
                            f"to {found}, or give the URL of an autoencoder with {declared}")  # fmt: skip
    load_weights(config.url, vae)
    return codec


# ------------------------------------------------------------------------------------- which modules run, in which order


def _parts_of(vae: Autoencoder) -> "_KLParts | _TinyParts":
    if isinstance(vae, AutoencoderTiny):
        return _TinyParts(vae)
    if isinstance(vae, AutoencoderKL | AsymmetricAutoencoderKL | VQModel):
        return _KLParts(vae)
    raise TypeError(f"a codec is made of {', '.join(CLASSES)}, not of {type(vae).__name__}")


class _KLParts:
    """`AutoencoderKL`; `AsymmetricAutoencoderKL`, whose decoder without a mask is a plain one, wider and deeper; `VQModel`,
    which is as the first between its convolutions around the codebook.

    Maps: the output of the mid block, then of each up block after its upsampler.
    """

    def __init__(self, vae: AutoencoderKL | AsymmetricAutoencoderKL | VQModel) -> None:
        self.vae = vae

    def downsampling(self) -> int:
        return 2 ** (len(self.vae.encoder.down_blocks) - 1)

    def map_names(self) -> tuple[str, ...]:
        return ("mid", *(f"up{i}" for i in range(len(self.vae.decoder.up_blocks))))

    def map_scales(self) -> tuple[int, ...]:
        scales = [1]
        for block in self.vae.decoder.up_blocks:
            scales.append(scales[-1] * (1 if block.upsamplers is None else 2))
        return tuple(scales)

    def moments(self, images_BCHW: Tensor) -> Tensor:
        """Means and log variances; of a `VQModel` its one output."""
        h: Tensor = self.vae.encoder(images_BCHW)
        return h if self.vae.quant_conv is None else self.vae.quant_conv(h)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        h = self.moments(images_BCHW)
        return h if isinstance(self.vae, VQModel) else h.chunk(2, dim=1)[0]

    def stages(self) -> list[list[nn.Module]]:
        decoder, after_quantization = self.vae.decoder, self.vae.post_quant_conv
        first = [] if after_quantization is None else [after_quantization]
        return [[*first, decoder.conv_in, decoder.mid_block], *([block] for block in decoder.up_blocks)]

    def head(self) -> list[nn.Module]:
        decoder = self.vae.decoder
        return [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]


class _TinyParts:
    """`AutoencoderTiny` (TAESD and its kin): one chain of layers, so its maps are found by their resolution.

    Maps: each resolution's last, before it is upsampled. Its raw latents are those of the large autoencoder that it was
    distilled from, already scaled; pipelines apply its `scaling_factor`, which is 1, and never `latent_magnitude` and
    `latent_shift`, which only serve to store latents in bytes.
    """

    def __init__(self, vae: AutoencoderTiny) -> None:
        self.vae = vae

    def downsampling(self) -> int:
        strides = [layer.stride[0] for layer in self.vae.encoder.layers if isinstance(layer, nn.Conv2d)]
        return math.prod(strides)

    def map_names(self) -> tuple[str, ...]:
        return tuple(f"stage{i}" for i in range(len(self.map_scales())))

    def map_scales(self) -> tuple[int, ...]:
        scales = [1]
        for layer in self.vae.decoder.layers:
            if isinstance(layer, nn.Upsample):
                assert isinstance(layer.scale_factor, float), layer.scale_factor
                scales.append(scales[-1] * int(layer.scale_factor))
        return tuple(scales)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        latents_BCHW: Tensor = self.vae.encoder(images_BCHW)
        return latents_BCHW

    def stages(self) -> list[list[nn.Module]]:
        stages: list[list[nn.Module]] = [[_SoftClamp()]]
        *chain, _ = self.vae.decoder.layers
        for layer in chain:
            if isinstance(layer, nn.Upsample):
                stages.append([])
            stages[-1].append(layer)
        return stages

    def head(self) -> list[nn.Module]:
        return [self.vae.decoder.layers[-1], _FromUnitRange()]


class _SoftClamp(nn.Module):
    """What `DecoderTiny.forward` does to raw latents."""

    def forward(self, raw_BCHW: Tensor) -> Tensor:
        return torch.tanh(raw_BCHW / 3) * 3


class _FromUnitRange(nn.Module):
    """TAESD's images are in [0, 1]."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.mul(2).sub(1)
