"""The latent perceptual loss against a slow reference in float64, each option and each edge case."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from tests.numerics import lpl_reference
from tests.perceptual import make_context
from trainer.config import LPLConfig, ParadigmConfig, PhasePerceptualConfig
from trainer.diffusion.paradigms import build_paradigm
from trainer.errors import UserError
from trainer.losses.gate import gate_share, inside, scaled_tau, threshold
from trainer.losses.lpl import LatentPerceptualLoss, depth_weights, feature_loss, inlier_mask, kernel_sizes
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder

OUTLIER = 300.0


class PlantedCodec(Codec):
    """Real features, with outliers two orders of magnitude large at fixed pixels of the maps that tend to have them."""

    def decode_features(self, latents_BCHW: Tensor, num_maps: int | None = None) -> list[Tensor]:
        maps = super().decode_features(latents_BCHW, num_maps)
        for i, features in enumerate(maps):
            side = features.shape[-1]
            if side >= 4 * latents_BCHW.shape[-1]:
                factor = torch.ones_like(features)
                factor[:, ::3, side // 4 : side // 4 + 2, side // 2 : side // 2 + 3] = OUTLIER
                factor[:, 1::5, 0, 0] = -OUTLIER
                maps[i] = features * factor
        return maps


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
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, codec.latent_channels, side, side, generator=generator)
    return z0 + 0.4 * torch.randn(z0.shape, generator=generator), z0


def run(codec: Codec, z0_hat: Tensor, z0: Tensor, levels: list[float], config: LPLConfig) -> tuple[Tensor, dict]:
    context = make_context(z0, downsampling=codec.downsampling)
    return LatentPerceptualLoss(FrozenDecoder(codec, config.num_maps), config)(
        z0_hat, z0, torch.tensor(levels), context
    )


def fixed(**options) -> LPLConfig:
    """A config whose tau is 3 at any resolution."""
    return LPLConfig(tau_reference_px=None, **options)


CODECS = {"plain": Codec, "outliers": PlantedCodec}
OPTIONS = [
    dict(),
    dict(depth_weights="printed"),
    dict(depth_weights="uniform"),
    dict(mask_outliers="all"),
    dict(mask_outliers="none"),
    dict(detach_deviation=True),
    dict(num_maps=3),
]


# ----------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_values_match_the_reference_in_float64(kind: str, options: dict) -> None:
    codec = make_codec(CODECS[kind])
    z0_hat, z0 = make_latents(codec, batch=3, side=8)
    levels = [0.5, 3.0, 3.1]
    loss_B, terms = run(codec, z0_hat, z0, levels, fixed(**options))

    with torch.no_grad():
        num_maps = options.get("num_maps")
        estimates = [m.numpy() for m in codec.decode_features(z0_hat, num_maps)]
        targets = [m.numpy() for m in codec.decode_features(z0, num_maps)]
    rest = {k: v for k, v in options.items() if k not in ("num_maps", "detach_deviation")}
    losses, parts = lpl_reference.reference_loss(estimates, targets, levels, 3.0, latents_side=8, **rest)

    np.testing.assert_allclose(loss_B.numpy(), losses, rtol=1e-5)
    names = [name for name in terms if name.startswith("lpl_")]
    assert names == [f"lpl_{m}" for m in ("mid", "up0", "up1", "up2", "up3")][: len(parts[0])]
    for i, name in enumerate(names):
        np.testing.assert_allclose(terms[name].numpy(), [part[i] for part in parts], rtol=1e-5)
        assert not terms[name].requires_grad
    assert terms["gate"].tolist() == [1.0, 1.0, 0.0]
    assert loss_B[2] == 0.0 and losses[0] > 0.01  # noqa: PT018


def test_reference_and_fast_path_agree_where_the_kernels_are_at_work() -> None:
    codec = make_codec(PlantedCodec, channels=(4, 8))  # f = 2: maps of 110, 220 and 220 pixels a side
    z0_hat, z0 = make_latents(codec, batch=1, side=110)
    with torch.no_grad():
        estimates, targets = (
            [m[:, :2].contiguous() for m in codec.decode_features(z)] for z in (z0_hat.float(), z0.float())
        )
    assert [kernel_sizes(*m.shape[-2:]) for m in estimates] == [(1, 3), (1, 3), (1, 3)]
    for estimate, target in zip(estimates, targets, strict=True):
        estimate[0, 0, 40:42, 17] *= OUTLIER
        fast = feature_loss(estimate, target, mask_outliers=True)
        (slow,), _ = lpl_reference.reference_loss(
            [estimate.numpy()], [target.numpy()], [0.0], 1.0, latents_side=1, mask_outliers="all"
        )
        np.testing.assert_allclose(fast.item(), slow, rtol=1e-5)


@pytest.mark.parametrize("size", [(512, 512), (320, 350), (128, 128), (64, 64), (5, 9), (2, 2)], ids=str)
def test_mask_is_algorithm_1(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    channel = rng.standard_normal(size)
    channel[:6, :4] *= OUTLIER  # at the border, where padding would show
    channel[size[0] // 2, size[1] // 2] = OUTLIER
    channel[rng.random(size) < 1e-3] *= -OUTLIER
    mask = inlier_mask(torch.from_numpy(channel)[None, None])[0, 0].numpy()
    np.testing.assert_array_equal(mask, lpl_reference.inliers(channel).astype(float))


@pytest.mark.parametrize(("side", "single", "beside_a_block"), [(512, 1, 0), (256, 0, 0), (64, 0, 1)])
def test_what_the_kernels_do_to_an_outlier(side: int, single: int, beside_a_block: int) -> None:
    """Closing forgives a lone pixel on a large map; opening widens what is left."""
    channel = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    channel[20, 20] = OUTLIER
    channel[40:46, 40:46] = OUTLIER
    mask = inlier_mask(channel[None, None])[0, 0]
    assert mask[20, 20] == single
    assert mask[43, 43] == 0
    assert mask[43, 46] == beside_a_block


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_matches_an_independent_formulation_in_float64(kind: str, options: dict) -> None:
    codec = make_codec(CODECS[kind])
    z0_hat, z0 = make_latents(codec, batch=2, side=8, seed=5)
    z0_hat.requires_grad_()
    levels = [0.5, 9.0]
    run(codec, z0_hat, z0, levels, fixed(**options))[0].sum().backward()

    codec64 = make_codec(CODECS[kind]).double()
    z64 = z0_hat.detach().double().requires_grad_()
    num_maps = options.get("num_maps")
    estimates, targets = codec64.decode_features(z64, num_maps), codec64.decode_features(z0.double(), num_maps)
    rest = {k: v for k, v in options.items() if k != "num_maps"}
    inside = [level <= 3.0 for level in levels]
    lpl_reference.differentiable_loss(estimates, targets, inside, latents_side=8, **rest).backward()

    assert z0_hat.grad is not None
    assert z64.grad is not None
    error = (z0_hat.grad.double() - z64.grad).norm() / z64.grad.norm()
    assert error < 1e-4, error
    assert z0_hat.grad[1].abs().max() == 0.0


@pytest.mark.parametrize("kind", CODECS)
def test_gradient_matches_finite_differences(kind: str) -> None:
    codec = make_codec(CODECS[kind]).double()
    z0_hat, z0 = (z.double() for z in make_latents(codec, batch=1, side=4))
    z0_hat.requires_grad_()
    loss = run(codec, z0_hat, z0, [1.0], fixed())[0].sum()
    (gradient,) = torch.autograd.grad(loss, z0_hat)
    direction = torch.randn(z0.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (run(codec, z0_hat + s * direction, z0, [1.0], fixed())[0].sum() for s in (step, -step))
    assert torch.isclose((ahead - behind) / (2 * step), (gradient * direction).sum(), rtol=1e-6)


def test_detaching_the_deviation_changes_the_gradient_and_not_the_value() -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    z0_hat.requires_grad_()
    values, gradients = [], []
    for detach in (False, True):
        loss_B, _ = run(codec, z0_hat, z0, [1.0, 1.0], fixed(detach_deviation=detach))
        values.append(loss_B.detach())
        gradients.append(torch.autograd.grad(loss_B.sum(), z0_hat)[0])
    assert torch.equal(*values)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() > 0.01


# ------------------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize(
    ("side", "closing", "opening"),
    [(1024, 7, 11), (768, 5, 9), (512, 3, 5), (384, 3, 5), (342, 3, 5), (341, 1, 5), (307, 1, 3), (256, 1, 3),
     (128, 1, 3), (103, 1, 3), (102, 1, 1), (64, 1, 1), (32, 1, 1), (8, 1, 1), (1, 1, 1)],
)  # fmt: skip
def test_kernel_sizes(side: int, closing: int, opening: int) -> None:
    assert kernel_sizes(side, side) == (closing, opening)


def test_kernel_sizes_follow_the_geometric_mean_side() -> None:
    assert kernel_sizes(256, 1024) == kernel_sizes(512, 512)


def test_depth_weights() -> None:
    scales = make_codec().map_scales()
    assert scales == (1, 2, 4, 8, 8)
    assert depth_weights(scales, "inverse_scale") == (1, 1 / 2, 1 / 4, 1 / 8, 1 / 8)
    assert depth_weights(scales, "printed") == (2**-1, 2**-2, 2**-4, 2**-8, 2**-8)
    assert depth_weights(scales, "uniform") == (1, 1, 1, 1, 1)


def test_tau_scales_with_resolution_over_its_reference() -> None:
    assert scaled_tau(3.0, 256, 512) == 1.5
    assert scaled_tau(3.0, 1024, 512) == 6.0
    assert scaled_tau(3.0, 64, None) == 3.0
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=64)
    bound = threshold(PhasePerceptualConfig(), paradigm, 64, 512)
    assert inside(torch.tensor([0.374, 0.375, 0.376, math.nan]), bound).tolist() == [0, 1]
    assert threshold(PhasePerceptualConfig(tau=None), paradigm, 64, 512) == math.inf


@pytest.mark.parametrize(
    ("kind", "percent_at"),
    [
        ("ddpm_eps", {1: 35, 2: 56, 3: 67, 4: 75, 5: 80, 6: 84, 10: 93}),
        ("ddpm_v", {3: 63, 6: 77}),
        ("flow", {3: 87, 6: 93}),
    ],
)
def test_gate_share(kind, percent_at: dict[int, int]) -> None:
    paradigm = build_paradigm(ParadigmConfig(kind=kind), resolution=512)
    shares = {tau: 100 * gate_share(paradigm, tau) for tau in percent_at}
    assert {tau: math.floor(share + 0.5) for tau, share in shares.items()} == percent_at


def test_gate_share_below_the_smallest_noise_level_is_zero() -> None:
    assert gate_share(build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=512), 0.02) == 0.0


# ----------------------------------------------------------------------------------------------------------- edge cases


def test_equal_latents_have_no_loss_and_no_gradient() -> None:
    codec = make_codec()
    _, z0 = make_latents(codec, batch=2, side=8)
    z0_hat = z0.clone().requires_grad_()
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 1.0], fixed())
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().max() == 0.0


@pytest.mark.parametrize(("height", "width"), [(1, 2), (2, 2), (4, 4), (6, 8), (7, 7)])
@pytest.mark.parametrize("mask_outliers", [True, False])
def test_maps_of_fewer_than_50_pixels(height: int, width: int, mask_outliers: bool) -> None:
    generator = torch.Generator().manual_seed(height * width)
    estimate, target = torch.randn(2, 2, 5, height, width, generator=generator).unbind()
    fast = feature_loss(estimate, target, mask_outliers=mask_outliers)
    slow, _ = lpl_reference.reference_loss(
        [estimate.numpy()], [target.numpy()], [0.0, 0.0], 1.0, latents_side=1,
        mask_outliers="all" if mask_outliers else "none",
    )  # fmt: skip
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("mask_outliers", [True, False])
def test_a_constant_channel_adds_nothing_and_is_counted(value: float, mask_outliers: bool) -> None:
    estimate, target = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    of_three = feature_loss(estimate[:, :3], target[:, :3], mask_outliers=mask_outliers)
    estimate[:, 3] = value  # under the mask: no inlier at all, since the comparisons are strict
    estimate.requires_grad_()
    loss = feature_loss(estimate, target, mask_outliers=mask_outliers)
    torch.testing.assert_close(loss, of_three * 3 / 4, rtol=1e-6, atol=0.0)
    loss.sum().backward()
    assert estimate.grad is not None
    assert estimate.grad[:, 3].abs().max() == 0.0


def test_a_channel_constant_over_its_inliers_adds_nothing() -> None:
    estimate = torch.full((1, 1, 16, 16), 0.3)
    estimate[0, 0, 3, 3] = 1e3
    target = torch.randn(1, 1, 16, 16)
    assert feature_loss(estimate, target, mask_outliers=True).item() == 0.0
    assert feature_loss(estimate, target, mask_outliers=False).item() > 0.0


def test_outliers_cannot_hide_or_dominate_the_loss() -> None:
    estimate, target = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    clean = feature_loss(estimate, target, mask_outliers=True)
    estimate[:, :, 5, 5] = target[:, :, 5, 5] = 1e4
    torch.testing.assert_close(feature_loss(estimate, target, mask_outliers=True), clean, rtol=0.02, atol=0.0)
    assert feature_loss(estimate, target, mask_outliers=False) < 0.1 * clean


@pytest.mark.parametrize("levels", [[3.01, 50.0], [math.inf, math.inf], [math.nan, math.inf]], ids=str)
def test_nothing_inside_the_gate_is_exactly_zero_with_a_graph(levels: list[float]) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    weight = torch.ones((), requires_grad=True)
    loss_B, terms = run(codec, z0_hat * weight, z0, levels, fixed())
    loss_B.mean().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert all(term.abs().max() == 0.0 for term in terms.values())
    assert weight.grad is not None  # every rank takes part in the gradient's reduction
    assert weight.grad == 0.0


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("broken_target", [False, True])
def test_overflow_outside_the_gate_reaches_neither_loss_nor_gradient(value: float, broken_target: bool) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    alone_B, _ = run(codec, z0_hat, z0, [1.0, 9.0], fixed())
    z0_hat[1] = value
    if broken_target:
        z0[1] = value
    z0_hat.requires_grad_()
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 9.0], fixed())
    loss_B.mean().backward()
    assert torch.equal(loss_B, alone_B)
    assert z0_hat.grad is not None
    assert z0_hat.grad[1].abs().max() == 0.0
    assert z0_hat.grad[0].isfinite().all()
    assert z0_hat.grad[0].abs().max() > 0.0


@pytest.mark.parametrize("where", ["estimate", "target"])
@pytest.mark.parametrize(
    ("value", "mask_outliers"), itertools.product([math.inf, -math.inf, math.nan], ["deep", "all", "none"])
)
def test_a_non_finite_sample_is_non_finite_alone(value: float, mask_outliers, where: str) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=3, side=8)
    config = fixed(mask_outliers=mask_outliers)
    clean_B, _ = run(codec, z0_hat, z0, [1.0, 1.0, 1.0], config)
    (z0_hat if where == "estimate" else z0)[1, 0, 2, 2] = value
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 1.0, 1.0], config)
    assert loss_B.isfinite().tolist() == [True, False, True]
    assert torch.equal(loss_B[[0, 2]], clean_B[[0, 2]])


@pytest.mark.parametrize("where", [0, 1])
def test_one_non_finite_feature_makes_the_sample_non_finite(where: int) -> None:
    maps = list(torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind())
    maps[where][1, 1, 4, 4] = math.nan if where else math.inf
    for masked in (True, False):
        assert feature_loss(*maps, mask_outliers=masked).isfinite().tolist() == [True, False]


def test_statistics_are_float32_under_autocast() -> None:
    estimate, target = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    plain = feature_loss(estimate, target, mask_outliers=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_loss(estimate, target, mask_outliers=True), plain)
    # bf16 maps of large mean: statistics in bf16 would be off by more than the values themselves
    big = (estimate + 50.0).bfloat16()
    expected = feature_loss(big.double(), target.double() + 50.0, mask_outliers=True)
    loss = feature_loss(big, target + 50.0, mask_outliers=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)

    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    exact_B, _ = run(codec, z0_hat, z0, [1.0, 1.0], fixed())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B, _ = run(codec, z0_hat.requires_grad_(), z0, [1.0, 1.0], fixed())
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, exact_B, rtol=0.05, atol=0.0)


# ------------------------------------------------------------------------------------------------- what a user can mend


def test_resolutions_are_checked_at_the_start() -> None:
    loss = LatentPerceptualLoss(FrozenDecoder(make_codec()), LPLConfig(mask_outliers="all"))
    loss.check(64)
    loss.check(16)
    with pytest.raises(UserError, match="resolution 60: not a multiple"):
        loss.check(60)
    with pytest.raises(UserError, match="resolution 8: the decoder's map mid has 1 pixels a side"):
        loss.check(8)
    LatentPerceptualLoss(FrozenDecoder(make_codec()), LPLConfig()).check(8)  # the deep maps have 4 and 8


def test_more_maps_than_the_decoder_has() -> None:
    with pytest.raises(UserError, match=r"task\.perceptual\.num_maps: 6, but this decoder has 5 maps: mid, up0"):
        FrozenDecoder(make_codec(), 6)
