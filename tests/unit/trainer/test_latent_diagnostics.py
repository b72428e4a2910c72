"""Measures of `loupe analyze latents` against numbers that are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import LPLConfig
from trainer.evaluate.latents import Interpolation, Outliers, grid_positions, psnr, sensitivity, there_and_back
from trainer.evaluate.lpl_constants import NOISE_LEVELS, PERTURBATIONS, Amplitude, gate_shares, growth_per_doubling
from trainer.losses.lpl import build_lpl
from trainer.models.autoencoders import Codec


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load("repo://trainer/assets/demo_autoencoder")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- outliers


def planted() -> Tensor:
    """Three images of five channels; image 2 has a patch of 8 x 8 pixels in channel 3, two orders of magnitude large."""
    features_BCHW = normal(3, 5, 128, 128).clamp(-3, 3)
    features_BCHW[2, 3, 40:48, 100:108] = -200.0
    return features_BCHW


def test_a_planted_outlier_is_found_where_it_is() -> None:
    features_BCHW = planted()
    measure = Outliers("up1", num_worst=2)
    measure.add(features_BCHW)
    found = measure.result()
    worst = found.worst[0]
    assert (worst.channel, worst.image, found.side, len(found.worst)) == (3, 2, 128, 2)
    # The whole patch is masked, and at most the opening's reach around it; the kernel is 3 at this side.
    patch = np.zeros((128, 128), dtype=bool)
    patch[40:48, 100:108] = True
    assert not worst.inlier_HW[patch].any()
    assert worst.masked_share == pytest.approx((~worst.inlier_HW).mean())
    assert 64 <= (~worst.inlier_HW).sum() <= 10 * 10 + 30
    rest = features_BCHW[2, 3].numpy()[worst.inlier_HW].astype(np.float64)
    assert worst.peak_sd == pytest.approx((rest.mean() + 200.0) / rest.std(), rel=1e-4)
    assert worst.largest_over_sd == pytest.approx(200.0 / rest.std(), rel=1e-4)
    assert found.peak_sd_C[3] == pytest.approx(worst.peak_sd)
    assert all(found.peak_sd_C[c] < 5 and found.masked_share_C[c] < 0.01 for c in (0, 1, 2, 4))
    # the other two images have no more masked pixels in it than another channel has
    assert worst.masked_share / 3.001 <= found.masked_share_C[3] <= worst.masked_share / 3 + 0.01


def test_outliers_do_not_depend_on_the_batch() -> None:
    features_BCHW = planted()
    results = []
    for size in (1, 2, 3):
        measure = Outliers("up1")
        for part in features_BCHW.split(size):
            measure.add(part)
        results.append(measure.result())
    for other in results[1:]:
        assert other.masked_share_C == pytest.approx(results[0].masked_share_C)
        assert other.peak_sd_C == pytest.approx(results[0].peak_sd_C)
        assert [(w.channel, w.image) for w in other.worst] == [(w.channel, w.image) for w in results[0].worst]


def test_a_constant_channel_has_no_outliers() -> None:
    features_BCHW = normal(2, 4, 16, 16)
    features_BCHW[:, 1] = 7.0
    measure = Outliers("mid")
    measure.add(features_BCHW)
    found = measure.result()
    assert found.constant_share == pytest.approx(0.25)
    assert found.masked_share_C[1] == 0.0
    assert found.peak_sd_C[1] == 0.0


# ---------------------------------------------------------------------------------------------------------- sensitivity

F_DOWN = 4


def linear_decoder(leak: float) -> tuple[Tensor, Tensor]:
    """Colours of a latent pixel's own block, and what every latent pixel adds to the whole image."""
    return normal(3 * F_DOWN**2, 2, seed=1), leak * normal(3, 2, seed=2)


def decode(blocks: Tensor, leak: Tensor, z_BCHW: Tensor) -> Tensor:
    own = torch.einsum("ec,bchw->behw", blocks, z_BCHW)
    everywhere = torch.einsum("ec,bc->be", leak, z_BCHW.sum((2, 3)))
    return torch.nn.functional.pixel_shuffle(own, F_DOWN) + everywhere[..., None, None]


@pytest.mark.parametrize("patch", [1, 2])
def test_a_linear_decoder_is_equally_sensitive_everywhere(patch: int) -> None:
    blocks, leak = linear_decoder(0.0)
    noise_DCPP = normal(3, 2, patch, patch, seed=3)
    found = sensitivity(lambda z: decode(blocks, leak, z), normal(2, 8, 8), noise_DCPP, image=0, downsampling=F_DOWN,
                        grid=4, halo=0, batch_size=5)  # fmt: skip
    squared = torch.einsum("ec,dcyx->deyx", blocks, noise_DCPP).square().sum((1, 2, 3)).mean()
    assert found.error_norm_GG.shape == (4, 4)
    np.testing.assert_allclose(found.error_norm_GG, squared.sqrt().item(), rtol=1e-4)
    np.testing.assert_allclose(found.elsewhere_share_GG, 0.0, atol=1e-6)
    assert found.cumulative_share_R[0] == pytest.approx(1.0, abs=1e-6)
    numbers = found.numbers()["error_norm"]
    assert numbers["largest_over_smallest"] == pytest.approx(1.0, rel=1e-3)


def test_what_changes_elsewhere_is_told_apart() -> None:
    """By closed form: with one leak for the whole image, its pixels outside the footprint change by the leak alone."""
    blocks, leak = linear_decoder(0.3)
    noise_DCPP = normal(1, 2, 1, 1, seed=3)
    decoded = []

    def counted(z_BCHW: Tensor) -> Tensor:
        decoded.append(len(z_BCHW))
        return decode(blocks, leak, z_BCHW)

    found = sensitivity(
        counted, normal(2, 9, 9), noise_DCPP, image=0, downsampling=F_DOWN, grid=9, halo=1, batch_size=8
    )
    own_E = torch.einsum("ec,c->e", blocks, noise_DCPP[0, :, 0, 0]).reshape(3, -1)
    leak_3 = leak @ noise_DCPP[0, :, 0, 0]
    block = (own_E + leak_3[:, None]).square().sum()
    cell = F_DOWN**2 * leak_3.square().sum()
    total = block + 80 * cell
    np.testing.assert_allclose(found.error_norm_GG, total.sqrt().item(), rtol=1e-4)
    # a footprint of 3 x 3 latent pixels in the middle, 2 x 2 in a corner
    assert found.elsewhere_share_GG[4, 4] == pytest.approx((72 * cell / total).item(), rel=1e-4)
    assert found.elsewhere_share_GG[0, 0] == pytest.approx((77 * cell / total).item(), rel=1e-4)
    assert found.cumulative_share_R[-1] == pytest.approx(1.0)
    assert max(decoded) <= 8
    assert sum(decoded) == 1 + 81 + 2


def test_a_place_that_matters_more_is_shown() -> None:
    def uneven(z_BCHW: Tensor) -> Tensor:
        gain = torch.ones(8, 8)
        gain[6, 2] = 10.0
        return torch.nn.functional.interpolate((z_BCHW * gain)[:, :3], scale_factor=2.0)

    found = sensitivity(
        uneven, normal(3, 8, 8), normal(2, 3, 1, 1), image=0, downsampling=2, grid=8, halo=0, batch_size=16
    )
    assert tuple(found.positions_GG2[found.at(largest=True)]) == (6, 2)
    assert found.numbers()["error_norm"]["largest_over_smallest"] == pytest.approx(10.0, rel=1e-4)
    changed = found.extremes_HW[0] > 0
    assert changed[12:14, 4:6].all()
    assert changed.sum() == 4


@pytest.mark.parametrize(("side", "grid", "patch"), [(32, 8, 1), (8, 8, 1), (8, 16, 3), (4, 1, 4), (9, 4, 2)])
def test_positions_stay_inside_and_differ(side: int, grid: int, patch: int) -> None:
    positions = grid_positions(side, side, grid, patch)
    rows = positions[:, 0, 0]
    assert positions.shape == (min(grid, side // patch), min(grid, side // patch), 2)
    assert rows.min() >= 0
    assert rows.max() + patch <= side
    assert (np.diff(rows) >= patch).all()
    assert np.array_equal(rows, positions[0, :, 1])


# -------------------------------------------------------------------------------------------------------- interpolation


def test_there_and_back_by_hand() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    half = there_and_back(x, 2.0, "bilinear")
    # down: means of 2 x 2 blocks; up: the corners are the means themselves
    assert half[0, 0, 0, 0] == pytest.approx(2.5)
    assert half[0, 0, 3, 3] == pytest.approx(12.5)
    assert half[0, 0, 1, 1] == pytest.approx(2.5 + 0.25 * 2 + 0.25 * 8)
    near = there_and_back(x, 2.0, "nearest")
    assert torch.equal(near[0, 0, ::2, ::2], near[0, 0, 1::2, 1::2])
    assert set(near.flatten().tolist()) <= set(x.flatten().tolist())
    for mode in ("nearest", "bilinear", "bicubic"):
        torch.testing.assert_close(
            there_and_back(torch.full((1, 1, 8, 8), 3.0), 1.3, mode), torch.full((1, 1, 8, 8), 3.0)
        )


def test_psnr_is_in_decibels_of_the_range_of_images() -> None:
    found = psnr(torch.tensor([4.0, 0.04, 0.0]))
    assert found.tolist() == pytest.approx([0.0, 20.0, 100.0])


def test_interpolation_is_measured_against_the_reconstruction(codec: Codec) -> None:
    images = torch.nn.functional.interpolate(normal(3, 3, 4, 4), size=(64, 64), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        z0 = codec.encode(images)
    measure, whole = Interpolation(codec, [2.0]), Interpolation(codec, [2.0])
    measure.add(images[:2], z0[:2])
    measure.add(images[2:], z0[2:])
    whole.add(images, z0)
    rows = {row["method"]: row for row in measure.numbers(0.5)["rows"]}
    for row in whole.numbers(0.5)["rows"]:
        assert rows[row["method"]]["psnr_db"] == pytest.approx(row["psnr_db"], rel=1e-4)

    row = rows["latents_bilinear"]
    z = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(z0, 2), scale_factor=2.0, mode="bilinear")
    with torch.no_grad():
        mse_B = (codec.decode(z).clamp(-1, 1) - codec.decode(z0).clamp(-1, 1)).square().mean((1, 2, 3))
        own = (codec.decode(z0).clamp(-1, 1) - images).square().mean()
    assert row["latent_mse"] == pytest.approx((z - z0).square().mean().item(), rel=1e-4)
    assert row["latent_mse_over_variance"] == pytest.approx(2 * row["latent_mse"])
    assert row["image_mse"] == pytest.approx(mse_B.mean().item(), rel=1e-4)
    assert row["psnr_db"] == pytest.approx((10 * torch.log10(4 / mse_B)).mean().item(), rel=1e-4)
    assert whole.numbers(0.5)["codec_psnr_db"] == pytest.approx(10 * math.log10(4 / own), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ omega and tau


@torch.no_grad()
def test_terms_by_depth_are_the_losses(codec: Codec) -> None:
    z0, noise = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1)
    measure = Amplitude(codec)
    for part in (slice(0, 2), slice(2, 3)):
        measure.add(z0[part], codec.decode_features(z0[part]), noise[part])
    found = measure.numbers()
    assert [row["perturbation"] for row in found["rows"]] == list(PERTURBATIONS)
    assert found["maps"] == ["mid", "up0", "up1", "up2", "up3"]
    assert found["omega_by_map"] == [1.0, 0.5, 0.25, 0.125, 0.125]
    target, estimate = codec.decode_features(z0), codec.decode_features(z0 + NOISE_LEVELS[0] * noise)
    row = found["rows"][0]
    assert row["latent_mse"] == pytest.approx((NOISE_LEVELS[0] * noise).square().mean().item(), rel=1e-4)
    for i, (t, e) in enumerate(zip(target, estimate, strict=True)):
        t, e = t.double(), e.double()
        by_channel = (t - e).square().mean((2, 3)) / (e.var((2, 3), correction=0) + 1e-6)
        assert row["term_by_map_unmasked"][i] == pytest.approx(by_channel.mean().item(), rel=1e-4)
        assert row["squared_difference_by_map"][i] == pytest.approx((t - e).square().mean().item(), rel=1e-4)
        assert found["feature_std_by_map"][i] == pytest.approx(t.std((2, 3), correction=0).mean().item(), rel=1e-4)
    loss_B, _ = build_lpl(LPLConfig(), codec).of_features(estimate, target)
    weighted = sum(w * term for w, term in zip(found["omega_by_map"], row["term_by_map"], strict=True))
    assert weighted == pytest.approx(loss_B.mean().item(), rel=1e-4)


def test_growth_is_what_each_doubling_brings() -> None:
    assert growth_per_doubling([3.0, 6.0, 12.0, 24.0, 24.0], (1, 2, 4, 8, 8)) == pytest.approx(2.0)
    assert growth_per_doubling([1.0, 0.25], (1, 2)) == pytest.approx(0.25)
    assert growth_per_doubling([1.0, 0.0], (1, 2)) is None
    assert growth_per_doubling([1.0], (1,)) is None


def test_shares_inside_the_gate_are_those_of_the_specification() -> None:
    found = gate_shares(3.0, 512, 512)
    shares = {kind: dict(zip(found["taus"], row, strict=True)) for kind, row in found["share_by_paradigm"].items()}
    assert found["bound"] == 3.0
    expected = {1.0: 0.35, 2.0: 0.56, 3.0: 0.67, 4.0: 0.75, 5.0: 0.80, 6.0: 0.84, 10.0: 0.93}
    assert shares["ddpm_eps"] == pytest.approx(expected, abs=0.0051)
    assert {tau: shares["ddpm_v"][tau] for tau in (3.0, 6.0)} == pytest.approx({3.0: 0.63, 6.0: 0.77}, abs=0.0051)
    assert {tau: shares["flow"][tau] for tau in (3.0, 6.0)} == pytest.approx({3.0: 0.87, 6.0: 0.93}, abs=0.0051)


def test_tau_scales_with_resolution_unless_it_is_fixed() -> None:
    small, fixed, large = gate_shares(6.0, 512, 256), gate_shares(3.5, None, 256), gate_shares(3.0, 512, 512)
    assert small["bound"] == 3.0
    row = small["taus"].index(6.0)
    assert small["share_by_paradigm"]["flow"][row] == large["share_by_paradigm"]["flow"][large["taus"].index(3.0)]
    assert fixed["bound"] == 3.5
    # one's own tau has its row
    assert 3.5 in fixed["taus"]
