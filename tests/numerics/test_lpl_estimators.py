"""A window and another decoder in place of the latent perceptual loss's own: what they compute, and a bias on real features
within written bounds."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from launch.job import JobSpec, check, load_config
from ops.bench.lpl_estimators import distilled, encoded, load_images
from tests.numerics.lpl_cases import fixed, make_codec, make_latents, make_loss
from tests.perceptual import make_context
from trainer.config import CropConfig, LPLConfig, SampledConfig
from trainer.errors import UserError
from trainer.losses.estimators import LightDecoder, draw_windows, load_light, window_size
from trainer.losses.feature_loss import feature_loss
from trainer.losses.lpl import LatentPerceptualLoss, build_lpl
from trainer.models.autoencoders import Codec
from trainer.recipes import load

# ------------------------------------------------------------------------------------------------------------ a window


@pytest.mark.parametrize(("height", "width", "area", "expected"),
                         [(16, 16, 0.25, (8, 8)), (16, 16, 0.5, (8, 16)), (12, 12, 0.1, (4, 4)), (16, 16, 0.99, (8, 16)),
                          (10, 14, 0.25, (5, 7)), (15, 15, 0.25, (3, 15))])  # fmt: skip
def test_windows_see_every_pixel_equally_often(height: int, width: int, area: float, expected: tuple[int, int]) -> None:
    h, w = window_size(height, width, area)
    assert h * w == expected[0] * expected[1]
    num_tiles = height * width // (h * w)
    # bits of the upper half, which choose samples, change nothing
    u = ((torch.arange(num_tiles, dtype=torch.float64) + 0.5) / num_tiles + 12345.0) / 2.0**26
    top_B, left_B, *size = draw_windows(u, height, width, CropConfig(area=area))
    assert size == [h, w]
    seen = torch.zeros(height, width)
    for top, left in zip(top_B, left_B, strict=True):
        seen[top : top + h, left : left + w] += 1
    assert (seen == 1).all()


def test_deeper_maps_are_those_of_the_window_alone() -> None:
    """Against diffusers' own blocks, run on the part; kernels are the whole map's."""
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, 3, 16)
    loss = make_loss(codec, fixed(crop=CropConfig(area=0.25)))
    tiles = torch.tensor([0, 3, 1])
    uniform = lambda purpose: (tiles + 0.5) / 4 / 2.0**26  # noqa: E731
    context = make_context(z0, uniform=uniform)
    loss_B, terms = loss(z0_hat, z0, torch.tensor([1.0, 9.0, 2.0]), context)
    vae: Any = codec.vae
    for row, tile in ((0, 0), (2, 1)):
        maps = []
        for z in (z0_hat, z0):
            with torch.no_grad():
                first, second = codec.decode_features(z[row : row + 1], 2)
                top, left = tile // 2 * 16, tile % 2 * 16
                deep = [second[..., top : top + 16, left : left + 16]]
                for block in vae.decoder.up_blocks[1:]:
                    deep.append(block(deep[-1]))
            maps.append([first, second, *deep[1:]])
        for i, (estimate, target) in enumerate(zip(*maps, strict=True)):
            side = 16 * (1, 2, 4, 8, 8)[i]
            expected = feature_loss(estimate, target, mask_outliers=i >= 2, whole_size=(side, side))
            torch.testing.assert_close(terms[f"lpl_{loss.map_names[i]}"][row : row + 1], expected, rtol=1e-4, atol=0)
    assert loss_B[1] == 0


@cache
def real() -> tuple[Codec, Tensor, Tensor]:
    """The demo's autoencoder, and (z0_hat, z0) of eight of its emoji, as far off as at a low noise level."""
    config = load("demo")
    assert config.task.kind == "latent_diffusion"
    codec = Codec.load(config.task.codec.url)
    images = load_images(config)
    images.images_NCHW = images.images_NCHW[::12]
    z0 = encoded(codec, images)
    return codec, z0 + 0.3 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(2)), z0


def value_and_gradient(loss: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor, u: float = 0.5) -> tuple[Tensor, Tensor]:
    z = z0_hat.clone().requires_grad_()
    uniform = lambda purpose: torch.full((len(z0),), u, dtype=torch.float64)  # noqa: E731
    loss_B, _ = loss(z, z0, torch.ones(len(z0)), make_context(z0, uniform=uniform))
    (gradient,) = torch.autograd.grad(loss_B.sum(), z)
    return loss_B.detach(), gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_a_windows_bias_on_real_features_is_small() -> None:
    """The mean over all tiles, of real images through the demo's decoder. Measured: a quarter of the area 10 % of the
    gradient's norm (cosine 0.995) and 2.5 % of the loss; half of it 6 % and 0.4 %."""
    codec, z0_hat, z0 = real()
    exact_B, exact = value_and_gradient(make_loss(codec, fixed()), z0_hat, z0)
    for area, largest_bias in ((0.25, 0.15), (0.5, 0.08)):
        num_tiles = round(1 / area)
        loss = make_loss(codec, fixed(crop=CropConfig(area=area)))
        draws = [(tile + 0.5) / num_tiles / 2.0**26 for tile in range(num_tiles)]
        values, gradients = zip(*(value_and_gradient(loss, z0_hat, z0, u) for u in draws), strict=True)
        bias = ((torch.stack(gradients).mean(0) - exact).norm() / exact.norm()).item()
        assert 0.01 < bias < largest_bias  # the lower bound: that anything is left out at all
        assert torch.stack(values).mean().item() == pytest.approx(exact_B.mean().item(), rel=0.06)


# ----------------------------------------------------------------------------------------------------- another decoder


def test_a_light_decoder_that_is_the_codecs_own_gives_its_loss(tmp_path: Path) -> None:
    """The same weights under another scale and shift: the latents are converted, so nothing changes."""
    codec = make_codec()
    twin = AutoencoderKL.from_config({**codec.vae.config, "scaling_factor": 1.3, "shift_factor": 0.4})
    twin.load_state_dict(codec.vae.state_dict())
    twin.save_pretrained(tmp_path)
    z0_hat, z0 = make_latents(codec, 2, 4)
    loss = build_lpl(fixed(decoder_url=str(tmp_path)), codec)
    assert loss.map_names == ("mid", "up0", "up1", "up2", "up3")
    of_twin, exact = (value_and_gradient(each, z0_hat, z0) for each in (loss, make_loss(codec, fixed())))
    torch.testing.assert_close(of_twin[0], exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(of_twin[1], exact[1], rtol=1e-3, atol=1e-5)


def tiny(latent_channels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(2)
    return AutoencoderTiny(
        latent_channels=latent_channels, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    )  # fmt: skip


def test_a_tiny_decoder_gets_the_codecs_scaled_latents_as_its_raw_ones(tmp_path: Path) -> None:
    codec, light = make_codec(), tiny()
    light.save_pretrained(tmp_path)
    loss = build_lpl(fixed(decoder_url=str(tmp_path), num_maps=4), codec)
    assert loss.map_names == ("stage0", "stage1", "stage2", "stage3")
    z0_hat, _ = make_latents(codec, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(loss.decoder.images(z0_hat), light.decoder(z0_hat), rtol=1e-4, atol=1e-5)
        # and the other way round, where the codec is the tiny one
        large = load_light(saved(codec, tmp_path / "large"), Codec(light))
        images = build_lpl(fixed(decoder_url=str(tmp_path / "large")), Codec(light)).decoder.images(z0_hat)
        torch.testing.assert_close(images, large.decode(z0_hat), rtol=1e-4, atol=1e-5)


def saved(codec: Codec, folder: Path) -> str:
    codec.vae.save_pretrained(folder)
    return str(folder)


def test_a_decoder_of_other_latents_or_none_is_refused(tmp_path: Path) -> None:
    codec = make_codec()
    tiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"task\.perceptual\.decoder_url: .*16 channels, the codec's have 4"):
        load_light(str(tmp_path / "wide"), codec)
    with pytest.raises(UserError, match=r"downsampling"):
        load_light(saved(make_codec(channels=(8, 8, 16)), tmp_path / "shallow"), codec)
    with pytest.raises(UserError, match=r"task\.perceptual\.decoder_url: .*nowhere"):
        load_light(str(tmp_path / "nowhere"), codec)
    given = [f"task.perceptual={{kind: lpl, decoder_url: {tmp_path}/absent}}"]
    spec = JobSpec(recipe="demo", run_dir=f"{tmp_path}/run", cluster="local", cpu=True, code_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"task\.perceptual\.decoder_url: no folder"):
        check(spec, load_config("demo", given))


def test_a_distilled_decoders_bias_on_real_features_is_known() -> None:
    """A decoder of a third of the channels, distilled for seconds: its loss is another, of which the gradient points the
    same way roughly. Measured with two seeds: a cosine of 0.45 and 0.64 to the exact one's, 0.26 and 0.37 of its norm, so a
    bias of 0.91 and 0.81 of that."""
    codec, z0_hat, z0 = real()
    torch.manual_seed(0)
    light = distilled(codec, z0, steps=30)
    _, exact = value_and_gradient(make_loss(codec, fixed()), z0_hat, z0)
    with_light = LatentPerceptualLoss(LightDecoder(codec, light), fixed())
    _, gradient = value_and_gradient(with_light, z0_hat, z0)
    assert 0.25 < cosine(gradient, exact) < 0.9
    assert (gradient - exact).norm() < exact.norm()


# ---------------------------------------------------------------------------------------------------------- bad configs


def test_estimators_that_estimate_nothing_are_refused() -> None:
    codec = make_codec()
    for options, field in (
        (dict(sampled=SampledConfig(samples_per_rank=1, whole_maps=5)), "sampled.whole_maps: 5"),
        (dict(sampled=SampledConfig(samples_per_rank=1, whole_maps=2), maps=("up2",)), "sampled.whole_maps: 2"),
        (dict(crop=CropConfig(), num_maps=2), "crop: the decoder runs no deeper than up0"),
    ):
        with pytest.raises(UserError, match=f"task.perceptual.{field}"):
            build_lpl(LPLConfig(**options), codec)
    loss = build_lpl(LPLConfig(crop=CropConfig(area=0.0001)), codec)
    assert loss.check(64) == []
    with pytest.raises(
        UserError, match=r"up1 that task\.perceptual\.crop leaves has 2 pixels a side, fewer than the 3"
    ):
        loss.check(512)
