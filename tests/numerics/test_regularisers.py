"""The outlier penalty by hand and what its gradient does to a decoder; transforms that latents and images have in common."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor

from trainer.losses.outliers import inlier_mask
from trainer.losses.regularisers import Transform, outlier_penalty, transformed
from trainer.models.autoencoders import run_chain


def planted() -> Tensor:
    """(2, 2, 10, 10): +-1 in turns; 30 at one pixel of the first sample's first channel, -20 at one of the second's second."""
    features = torch.ones(2, 2, 100)
    features[..., 1::2] = -1.0
    features = features.view(2, 2, 10, 10)
    features[0, 0, 4, 4], features[1, 1, 2, 3] = 30.0, -20.0
    return features


def excess(value: float, replaced: float, threshold: float) -> float:
    """Of one value among 99 of +-1, which stands for `replaced`: mean and deviation by hand."""
    mean = (value - replaced) / 100
    variance = (99 + value**2) / 100 - mean**2
    return max(0.0, abs(value - mean) / math.sqrt(variance + 1e-6) - threshold)


@pytest.mark.parametrize("threshold", [5.0, 8.0, 9.2])
def test_penalty_by_hand(threshold: float) -> None:
    features = planted()
    assert features[0, 1, 4, 4] == 1
    assert features[0, 1, 2, 3] == -1
    expected = [excess(30.0, 1.0, threshold) ** 2 / 200, excess(-20.0, -1.0, threshold) ** 2 / 200]
    assert expected[0] > 0
    found = outlier_penalty([features], threshold)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-9)
    without = torch.ones_like(features)
    torch.testing.assert_close(outlier_penalty([features, without], threshold), found / 2)


def test_a_map_without_outliers_costs_nothing() -> None:
    features = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty_B = outlier_penalty([features], 6.0)
    (gradient,) = torch.autograd.grad(penalty_B.sum(), features)
    assert torch.equal(penalty_B, torch.zeros(2))
    assert not gradient.any()


def test_gradient_is_of_the_outliers_alone() -> None:
    """Towards the mean: 2 excess / (deviation * number of values), with mean and deviation held."""
    features = planted().requires_grad_()
    (gradient,) = torch.autograd.grad(outlier_penalty([features], 5.0).sum(), features)
    expected = torch.zeros_like(features)
    for place, value, replaced in (((0, 0, 4, 4), 30.0, 1.0), ((1, 1, 2, 3), -20.0, -1.0)):
        deviation = math.sqrt((99 + value**2) / 100 - ((value - replaced) / 100) ** 2 + 1e-6)
        expected[place] = math.copysign(2 * excess(value, replaced, 5.0) / deviation / 200, value)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)


def test_bf16_maps() -> None:
    features = planted().to(torch.bfloat16)
    penalty_B = outlier_penalty([features], 5.0)
    assert penalty_B.dtype == torch.float32
    torch.testing.assert_close(penalty_B, outlier_penalty([planted()], 5.0))  # its values are whole numbers


def test_a_decoder_that_learns_by_it_has_fewer_outliers() -> None:
    """By the mask of the latent perceptual loss; the penalty does not do so by making the maps vanish."""
    torch.manual_seed(0)
    decoder = Decoder(
        in_channels=3, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    z = torch.randn(2, 3, 16, 16)
    z[0, 0, 3, 4] = z[1, 2, 10, 9] = 40.0

    def maps() -> list[Tensor]:
        found = [run_chain([decoder.conv_in, decoder.mid_block], z)]
        for block in decoder.up_blocks:
            found.append(block(found[-1]))
        return found

    def masked() -> float:
        with torch.no_grad():
            return sum(1 - inlier_mask(m).float().mean().item() for m in maps()) / 3

    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    before, deviation = masked(), [m.std().item() for m in maps()]
    for _ in range(20):
        optimizer.zero_grad()
        outlier_penalty(maps(), 4.0).mean().backward()
        optimizer.step()
    assert before > 0.01
    assert masked() < 0.1 * before
    assert all(m.std().item() > 0.4 * was for m, was in zip(maps(), deviation, strict=True))


# ------------------------------------------------------------------------------------------------------------- transforms


def noise(side: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turns_are_exact(turns: int) -> None:
    """A quarter turn takes what is at the top right to the top left; pixels move, and none changes."""
    x = noise(6)
    turned = transformed(x, Transform(1.0, turns), 6)
    expected = x
    for _ in range(turns):
        expected = torch.stack([expected[..., 5 - j] for j in range(6)], dim=-2)
    assert torch.equal(turned, expected)
    assert torch.equal(transformed(turned, Transform(1.0, (4 - turns) % 4), 6), x)


def test_the_identity_touches_nothing() -> None:
    x = noise(6).to(torch.bfloat16)
    assert transformed(x, Transform(1.0, 0), 6) is x


@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_latents_and_images_are_transformed_alike(scale: float, turns: int) -> None:
    """With latents that are means over 4x4 pixels: first the mean, then the transform, or the other way round. Turns
    commute with it exactly; scaling does on a plane, away from the border, so nothing is shifted against the other."""
    transform = Transform(scale, turns)
    place = torch.arange(64, dtype=torch.float64)
    x = (0.3 * place[:, None] - 0.7 * place[None, :] + 5.0)[None, None]
    if scale == 1.0:
        x = x + noise(64, channels=1)
    z = F.avg_pool2d(x, 4)
    side = transform.side(16)
    assert side == 16 * scale
    first, second = transformed(z, transform, side), F.avg_pool2d(transformed(x, transform, 4 * side), 4)
    inner = slice(2, -2) if scale < 1 else slice(None)
    torch.testing.assert_close(first[..., inner, inner], second[..., inner, inner], rtol=1e-12, atol=1e-11)
    assert first.std() > 1


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75])
def test_scaling_keeps_the_middle_and_smooth_images(scale: float) -> None:
    side = Transform(scale, 0).side(32)
    assert side == 32 * scale
    for size in (32, 128):  # latents, and their images
        places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        x = torch.sin(2 * math.pi * places)[:, None] * torch.cos(2 * math.pi * places)[None, :]
        small = int(size * scale)
        at = (torch.arange(small, dtype=torch.float64) + 0.5) / small
        expected = torch.sin(2 * math.pi * at)[:, None] * torch.cos(2 * math.pi * at)[None, :]
        found = transformed(x[None, None], Transform(scale, 0), small)[0, 0]
        # where a filter reaches over the border it is cut off
        assert (found - expected)[2:-2, 2:-2].abs().max() < 0.05
        torch.testing.assert_close(
            found.flip(0), -found, rtol=1e-9, atol=1e-12
        )  # so no shift, whatever the border does


def test_what_a_smaller_image_cannot_show_is_filtered_out() -> None:
    """White noise at a quarter of the side: its deviation falls to about a quarter, without a filter to 0.6."""
    assert transformed(noise(128), Transform(0.25, 0), 32).std().item() == pytest.approx(0.25, abs=0.1)


def test_side_is_at_least_one_pixel() -> None:
    assert Transform(0.25, 0).side(1) == 1
    assert Transform(0.75, 0).side(6) == 4  # 4.5 to even
    assert transformed(noise(2), Transform(0.25, 1), 1).shape == (2, 3, 1, 1)
