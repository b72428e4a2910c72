"""The autoencoders that stage 1 trains, diffusers' own modules, and one forward pass of them.

x: what is reconstructed, images in [-1, 1], or with `reconstructs: latents` the scaled latents of a first stage; BCHW.
"""

from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from trainer.config import AutoencoderConfig, AutoencoderModelConfig
from trainer.models.autoencoders import run_chain
from trainer.models.codebook import Quantized, quantize

TrainedAutoencoder = AutoencoderKL | AsymmetricAutoencoderKL | VQModel


def build_autoencoder(config: AutoencoderModelConfig, x_channels: int = 3) -> TrainedAutoencoder:
    """With fresh weights, in float32. `x_channels`: 3 for images."""
    levels = len(config.block_out_channels)
    common: dict[str, Any] = {
        "in_channels": x_channels,
        "out_channels": x_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
    }
    if config.kind == "asymmetric_kl":
        return AsymmetricAutoencoderKL(
            **common,
            down_block_out_channels=config.block_out_channels,
            layers_per_down_block=config.layers_per_block,
            up_block_out_channels=config.decoder_block_out_channels,
            layers_per_up_block=config.decoder_layers_per_block,
        )
    common |= {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_attention,
    }
    if config.kind == "vq":
        return VQModel(**common, num_vq_embeddings=config.codebook.size, vq_embed_dim=config.latent_channels)
    return AutoencoderKL(**common)


class Reconstructed(NamedTuple):
    """Of one forward pass. A tuple, because sharding looks for tensors in it."""

    x: Tensor
    """The reconstruction."""
    before_last: Tensor
    """Input of the decoder's last convolution."""
    maps: tuple[Tensor, ...]
    """The decoder's feature maps, as `Codec.decode_features` numbers them."""
    raw: Tensor
    """Raw latents: the posterior's mean, or the latents before quantisation."""
    drawn: Tensor
    """Raw latents that were decoded: drawn from the posterior, or quantised."""
    kl_B: Tensor | None
    """Divergence of the posterior from a standard normal, summed over each latent."""
    quantized: Quantized | None
    log_variance: Tensor | None
    """(1,), where it is learned."""
    transformed: Tensor | None
    """The decoder's image of transformed latents."""


class Reconstruction(nn.Module):
    """Encode, draw from the posterior or quantise, decode: one forward pass for the sharding to wrap."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.teacher.latent_channels if config.teacher and config.reconstructs == "latents" else 3
        self.autoencoder: Any = build_autoencoder(config.model, channels)
        self.log_variance = nn.Parameter(torch.zeros(1)) if config.learned_log_variance else None
        self._codes_are_running_means = config.model.kind == "vq" and config.model.codebook.update == "ema"
        self._freeze(config.trained)

    def _freeze(self, trained: str) -> None:
        vae = self.autoencoder
        of_encoder = [vae.encoder, vae.quant_conv]
        of_decoder = [vae.decoder, vae.post_quant_conv]
        frozen = {"all": [], "encoder": of_decoder, "decoder": of_encoder}[trained]
        if isinstance(vae, VQModel) and (trained != "all" or self._codes_are_running_means):
            frozen.append(vae.quantize)
        if isinstance(vae, AsymmetricAutoencoderKL):
            frozen.append(vae.decoder.condition_encoder)  # of inpainting, which no pass here has
        for module in frozen:
            if module is not None:
                module.requires_grad_(False)
        self._trained = trained

    def given_names(self) -> list[str]:
        """Parameters that `init_from` must give, because nothing here trains them."""
        if self._trained == "all":
            return []
        unused = "autoencoder.decoder.condition_encoder."
        names = (name for name, parameter in self.named_parameters() if not parameter.requires_grad)
        return [name for name in names if not name.startswith(unused)]

    def units(self) -> list[nn.Module]:
        """Parts to gather, recompute and compile one at a time; what lies between them is the root's."""
        decoder = self.autoencoder.decoder
        return [*self._encoder_units(), decoder.mid_block, *decoder.up_blocks]

    def _encoder_units(self) -> list[nn.Module]:
        return [*self.autoencoder.encoder.down_blocks, self.autoencoder.encoder.mid_block]

    def units_without_backward(self) -> list[nn.Module]:
        """Those that no gradient passes through: a frozen decoder hands one on to its latents, a frozen encoder to nobody."""
        return self._encoder_units() if self._trained == "decoder" else []

    @property
    def codes_KC(self) -> Tensor:
        codes: Tensor = self.autoencoder.quantize.embedding.weight
        return codes

    @property
    def last_layer_shape(self) -> tuple[int, int, int, int]:
        conv = self.autoencoder.decoder.conv_out
        return (conv.out_channels, conv.in_channels, *conv.kernel_size)

    def encode(self, x: Tensor) -> Tensor:
        """Moments of the posterior, or latents before quantisation."""
        h: Tensor = self.autoencoder.encoder(x)
        return h if self.autoencoder.quant_conv is None else self.autoencoder.quant_conv(h)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x, what the last convolution sees, and feature maps, of drawn or quantised latents."""
        vae, decoder = self.autoencoder, self.autoencoder.decoder
        h = raw if vae.post_quant_conv is None else vae.post_quant_conv(raw)
        maps = [run_chain([decoder.conv_in, decoder.mid_block], h)]
        for block in decoder.up_blocks:
            maps.append(block(maps[-1]))
        before_last = run_chain([decoder.conv_norm_out, decoder.conv_act], maps[-1])
        x: Tensor = decoder.conv_out(before_last)
        return x, before_last, tuple(maps)

    def forward(self, x: Tensor, noise: Tensor | None = None, transform: Any = None) -> Reconstructed:
        """
        Args:
            noise: of the draw from the posterior, of the latents' shape; None: its mean.
            transform: of drawn latents, whose image is returned as `transformed`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trained != "decoder"):
            encoded = self.encode(x)
            kl_B, quantized = None, None
            if isinstance(self.autoencoder, VQModel):
                raw = encoded
            else:
                wide = torch.promote_types(encoded.dtype, torch.float32)
                posterior = DiagonalGaussianDistribution(encoded.to(wide))
                # a copy, not a view of the moments: an output's hooks, by which sharding works, do not survive on views
                raw, kl_B = posterior.mean.clone(), posterior.kl()
        if isinstance(self.autoencoder, VQModel):
            quantized = quantize(raw, self.codes_KC)
            drawn = quantized.latents_BCHW
        else:
            drawn = raw if noise is None else raw + posterior.std * noise
        out, before_last, maps = self.decode(drawn)
        again = self.decode(transform(drawn))[0] if transform is not None else None
        log_variance = None if self.log_variance is None else self.log_variance * 1.0
        return Reconstructed(out, before_last, maps, raw, drawn, kl_B, quantized, log_variance, again)
