"""The codec against diffusers' own autoencoder, at small widths."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from trainer.models.autoencoders import Codec

SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": dict(latent_channels=4, scaling_factor=0.13025, force_upcast=True, layers_per_block=2),
    "sd3": dict(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
    "no_attention": dict(latent_channels=4, mid_block_add_attention=False),
}


def make_vae(name: str = "sdxl", channels: tuple[int, ...] = (8, 16, 16, 24)) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **SHAPES[name],
    ).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_exactly_the_autoencoder_s(name: str) -> None:
    vae = make_vae(name)
    codec = Codec(make_vae(name))
    raw = torch.randn(2, codec.latent_channels, 5, 4)
    shift = vae.config["shift_factor"] or 0.0
    scaled = (raw - shift) * vae.config["scaling_factor"]
    with torch.no_grad():
        # the same rounding of the latents on both sides, so that what is compared is the decoder, bit by bit
        images = vae.decode(codec.scaled_to_raw(scaled)).sample
        assert torch.equal(codec.decode(scaled), images)
        maps = codec.decode_features(scaled)
        decoder: Any = codec.vae.decoder
        assert torch.equal(decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(maps[-1]))), images)
    torch.testing.assert_close(codec.scaled_to_raw(scaled), raw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.raw_to_scaled(raw), scaled)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 5, 4), (24, 10, 8), (16, 20, 16), (16, 40, 32), (8, 40, 32)]
    assert codec.map_scales() == tuple(m.shape[-1] // 4 for m in maps) == (1, 2, 4, 8, 8)
    assert codec.map_names == ("mid", "up0", "up1", "up2", "up3")


@pytest.mark.parametrize("name", SHAPES)
def test_encoding_is_the_mean_of_the_posterior(name: str) -> None:
    vae = make_vae(name)
    codec = Codec(make_vae(name))
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        assert torch.equal(codec.encode_raw(images), mean)
        assert torch.equal(codec.encode(images), codec.raw_to_scaled(mean))
    assert mean.shape == (2, codec.latent_channels, 4, 2)
    assert codec.downsampling == 8


def test_fewer_maps_run_less_of_the_decoder() -> None:
    class Forbidden(nn.Module):
        upsamplers = None

        def forward(self, *args) -> Tensor:
            raise AssertionError("ran")

    codec = Codec(make_vae())
    latents = torch.randn(1, 4, 4, 4)
    expected = codec.decode_features(latents)[:3]
    decoder: Any = codec.vae.decoder
    decoder.up_blocks[2] = Forbidden()
    for found, want in zip(codec.decode_features(latents, 3), expected, strict=True):
        assert torch.equal(found, want)
    with pytest.raises(AssertionError, match="ran"):
        codec.decode_features(latents, 4)


def test_the_codec_is_frozen_and_lets_gradients_through() -> None:
    codec = nn.ModuleList([Codec(make_vae().train())]).train()[0]
    assert isinstance(codec, Codec)
    assert not any(module.training for module in codec.modules())
    assert not any(p.requires_grad for p in codec.parameters())
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    maps = codec.decode_features(latents)
    maps[-1][1].square().sum().backward()
    assert latents.grad is not None
    assert latents.grad[0].abs().max() == 0.0
    assert latents.grad[1].abs().max() > 0.0


def test_a_codec_in_bfloat16_takes_float32_latents() -> None:
    codec = Codec(make_vae()).bfloat16()
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    maps = codec.decode_features(latents, 2)
    assert maps[-1].dtype == torch.bfloat16
    maps[-1].float().sum().backward()
    assert latents.grad is not None
    assert latents.grad.dtype == torch.float32
