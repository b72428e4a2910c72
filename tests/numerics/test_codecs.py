"""Every autoencoder that recipes name: published architectures at random weights, and a small trained one on photos.

Random weights are enough for what is shown here: that each computes what diffusers computes, and carries LPL.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from data.images import read_image
from data.transforms import training_image
from tests.perceptual import make_context
from trainer.config import LPLConfig
from trainer.losses.lpl import LatentPerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.models.published_codecs import PUBLISHED, WIDTHS, X1_5, asymmetric
from trainer.tensors import pixels_to_images

SIDE = 32
"""Pixels."""
LATENTS = {
    "sd15": (4, 0.18215, 0.0), "sdxl": (4, 0.13025, 0.0), "sd3": (16, 1.5305, 0.0609), "flux": (16, 0.3611, 0.1159),
    "asymmetric_x1.5": (4, 0.18215, 0.0), "taesd": (4, 1.0, 0.0), "taef1": (16, 1.0, 0.0), "taef2": (32, 1.0, 0.0),
}  # fmt: skip
"""Channels, scale and shift as published."""


def is_tiny(name: str) -> bool:
    return name.startswith("tae")


def widths(name: str) -> tuple[int, ...]:
    """Channels of the decoder's maps."""
    if is_tiny(name):
        return (64,) * 4
    w = X1_5 if name == "asymmetric_x1.5" else WIDTHS
    return (w[3], *reversed(w))


def trained(shared_dir: Path) -> AutoencoderTiny:
    """TAEF2, built by its loader: an `AutoencoderTiny` with six blocks of another kind."""
    data = shared_dir / "data"
    spec = importlib.util.spec_from_file_location("taef2_load", data / "loaders" / "taef2_load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = data / "taef2"
    vae: AutoencoderTiny = module.load_taef2(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth")
    return vae


@pytest.fixture(
    scope="module", params=[*PUBLISHED, pytest.param("taef2", marks=pytest.mark.shared)]
)  # one at a time: pytest groups the tests by it, so the largest is built once and is alone in memory
def named_codec(request: pytest.FixtureRequest) -> tuple[str, Codec]:
    torch.manual_seed(0)
    name: str = request.param
    return name, Codec(PUBLISHED[name]() if name in PUBLISHED else trained(request.getfixturevalue("shared_dir")))


def images(count: int = 1, side: int = SIDE) -> Tensor:
    """Smooth pictures in [-1, 1]: noise would leave the trained one's range."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def test_encodes_as_diffusers_does(named_codec: tuple[str, Codec]) -> None:
    name, codec = named_codec
    channels, scale, shift = LATENTS[name]
    assert (codec.latent_channels, codec.downsampling) == (channels, 8)
    vae: Any = codec.vae
    encoded = vae.encode(images())
    raw = encoded.latents if is_tiny(name) else encoded.latent_dist.mean
    assert torch.equal(codec.encode_raw(images()), raw)
    latents = codec.encode(images())
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(codec.scaled_to_raw(latents), raw, rtol=1e-5, atol=1e-6)
    assert latents.shape == (1, channels, SIDE // 8, SIDE // 8)


@torch.no_grad()
def test_decodes_as_a_pipeline_of_diffusers_does(named_codec: tuple[str, Codec]) -> None:
    name, codec = named_codec
    _, scale, shift = LATENTS[name]
    latents = codec.encode(images())
    vae: Any = codec.vae
    expected = vae.decode(latents / scale + shift).sample  # as StableDiffusion3Pipeline and FluxPipeline
    assert torch.equal(codec.decode(latents), expected)

    maps = codec.decode_features(latents)
    last = maps[-1]
    if is_tiny(name):
        assert torch.equal(vae.decoder.layers[-1](last).mul(2).sub(1), expected)
        assert codec.map_names == ("stage0", "stage1", "stage2", "stage3")
        assert codec.map_scales() == (1, 2, 4, 8)
    else:
        head = (vae.decoder.conv_norm_out, vae.decoder.conv_act, vae.decoder.conv_out)
        assert torch.equal(torch.nn.Sequential(*head)(last), expected)
        assert codec.map_names == ("mid", "up0", "up1", "up2", "up3")
        assert codec.map_scales() == (1, 2, 4, 8, 8)
    sides = [SIDE // 8 * r for r in codec.map_scales()]
    assert [tuple(m.shape) for m in maps] == [(1, c, s, s) for c, s in zip(widths(name), sides, strict=True)]


def test_the_x2_decoder_differs_in_sizes_alone() -> None:
    """Its 0.4 G parameters are built without memory: what runs is the code of x1.5."""
    with torch.device("meta"):
        codec = Codec(asymmetric((256, 512, 1024, 1024), 5))
        maps = codec.decode_features(torch.empty(1, 4, 8, 8))
        assert codec.encode(torch.empty(1, 3, 64, 64)).shape == (1, 4, 8, 8)
    assert [m.shape[1] for m in maps] == [1024, 1024, 1024, 512, 256]
    assert [m.shape[-1] for m in maps] == [8, 16, 32, 64, 64]


def test_lpl(named_codec: tuple[str, Codec]) -> None:
    name, codec = named_codec
    assert not any(module.training for module in codec.train().modules())
    with torch.no_grad():
        z0 = codec.encode(images(2))
    spread = z0.std((1, 2, 3), keepdim=True)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(2))
    z0_hat = z0 + 0.3 * spread * noise * torch.tensor([0.0, 1.0])[:, None, None, None]
    z0_hat.requires_grad_()

    loss = LatentPerceptualLoss(FrozenDecoder(codec), LPLConfig())
    loss.check(SIDE)
    expected = (1.0, 1 / 2, 1 / 4, 1 / 8) if is_tiny(name) else (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 8)
    assert loss.depth_weights == expected
    loss_B, terms = loss(z0_hat, z0, torch.ones(2), make_context(z0, downsampling=codec.downsampling))

    assert loss_B[0] == 0.0  # z0_hat == z0
    assert 0.0 < loss_B[1] < 1e4
    each = [terms[f"lpl_{m}"][1] for m in codec.map_names]
    assert all(value > 0.0 for value in each)
    weighted = sum(w * value for w, value in zip(expected, each, strict=True))
    torch.testing.assert_close(loss_B[1].detach(), weighted)

    loss_B[1].backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad.isfinite().all()
    assert z0_hat.grad[0].abs().max() == 0.0
    assert (z0_hat.grad[1].abs() > 0.0).float().mean() > 0.99
    assert all(p.grad is None and not p.requires_grad for p in codec.parameters())


@pytest.mark.shared
@torch.no_grad()
def test_photos_through_the_trained_one(shared_dir: Path) -> None:
    """It reaches 28.2 dB on COCO; these three, cropped and shrunk to 256 px, are 0.9 dB easier."""
    codec, folder = Codec(trained(shared_dir)), shared_dir / "data" / "coco_open"
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()[:3]]
    psnr = []
    for name in names:
        pixels = training_image(read_image((folder / "images" / name).read_bytes(), min_side=256), 256)
        photo = pixels_to_images(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        decoded = codec.decode(codec.encode(photo)).clamp(-1, 1)
        psnr.append(10 * torch.log10(4.0 / (decoded - photo).square().mean()).item())
    assert min(psnr) > 27.0, psnr
    assert 28.8 < sum(psnr) / len(psnr) < 29.4, psnr
