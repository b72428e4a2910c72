"""Spectra against sums of cosines, PSNR and SSIM against scikit-image."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from trainer.errors import UserError
from trainer.evaluate.metrics.images import psnr, psnr_of_error, ssim
from trainer.evaluate.metrics.spectrum import (
    log_power,
    log_power_difference,
    radial_power_spectrum,
    radial_powers,
    spectrum_errors,
)


def noise(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(n, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", [8, 9])
def test_radial_powers_by_sums_of_cosines(side: int) -> None:
    """|sum of x exp(-2 pi i (u r + v c) / side)|^2 / side^2, frequency by frequency, without an FFT."""
    pixels = noise(2, side)
    rows, columns = np.mgrid[:side, :side]
    expected = np.zeros((2, side // 2))
    for i, image in enumerate(pixels):
        grey = (0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]) / 255
        rings: dict[int, list[float]] = {}
        half = side // 2
        for u in range(-half, side - half):
            for v in range(-half, side - half):
                wave = np.exp(-2j * np.pi * (u * rows + v * columns) / side)
                rings.setdefault(round(math.hypot(u, v)), []).append(abs((grey * wave).sum()) ** 2 / side**2)
        expected[i] = [np.mean(rings[f]) for f in range(1, half + 1)]
    assert radial_powers(pixels) == pytest.approx(expected, rel=1e-9)
    assert radial_power_spectrum(pixels) == pytest.approx(np.log10(expected.mean(0)), rel=1e-9)


def test_rows_of_batches_are_those_of_the_set() -> None:
    pixels = noise(7, 16)
    parts = np.concatenate([radial_powers(pixels[:3]), radial_powers(pixels[3:])])
    assert log_power(parts) == pytest.approx(radial_power_spectrum(pixels), rel=1e-12)


def test_difference_says_what_is_missing() -> None:
    sharp = noise(20, 32)
    blurred = (sharp.astype(int) + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2) + np.roll(sharp, (1, 1), (1, 2))) // 4
    difference = log_power_difference(radial_power_spectrum(blurred.astype(np.uint8)), radial_power_spectrum(sharp))
    # the mean of 2 x 2 pixels passes cos^2(pi u / side) cos^2(pi v / side) of the power
    assert difference[0] == pytest.approx(2 * math.log10(math.cos(math.pi / 32)), abs=0.03)
    assert difference[-1] < -0.5
    errors = spectrum_errors(radial_power_spectrum(blurred.astype(np.uint8)), radial_power_spectrum(sharp))
    assert errors["spectrum"] == pytest.approx(np.abs(difference).mean())
    assert errors["spectrum_high_signed"] == pytest.approx(difference[-5:].mean())
    assert list(log_power_difference(difference, difference)) == [0.0] * 16


def test_images_without_detail_have_a_floor() -> None:
    assert list(radial_power_spectrum(np.full((2, 8, 8, 3), 200, dtype=np.uint8))) == [-12.0] * 4


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 8, 9, 3), dtype=np.uint8), np.zeros((2, 8, 8, 1), dtype=np.uint8), np.zeros((2, 8, 8, 3))],
)
def test_other_images_have_no_spectrum(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="square 8-bit RGB"):
        radial_powers(pixels)


def test_spectra_of_two_resolutions_are_not_compared() -> None:
    with pytest.raises(UserError, match="one resolution"):
        spectrum_errors(np.zeros(8), np.zeros(16))


def test_psnr_is_scikit_images() -> None:
    a = noise(3, 12)
    b = a.copy()
    b[0] ^= 3
    b[1, 0, 0, 0] ^= 1
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a[:2], b[:2], strict=True)]
    assert psnr(a, b) == pytest.approx([*expected, 100.0], rel=1e-12)
    assert psnr_of_error([4.0, 0.04, 0.0], 2.0) == pytest.approx([0.0, 20.0, 100.0])
    assert math.isnan(psnr_of_error(math.nan))


def test_ssim_is_scikit_images_with_wangs_window() -> None:
    """Checked against Wang's definition itself in test_reconstruction_measures."""
    a = noise(1, 24)[0]
    b = np.clip(a.astype(int) + np.random.default_rng(1).integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    channels = [
        structural_similarity(
            a[..., c], b[..., c], win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for c in range(3)
    ]  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(channels), rel=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a), rel=1e-9)
    assert ssim(a, a) == 1


def test_images_that_cannot_be_compared() -> None:
    a = noise(2, 12)
    with pytest.raises(UserError, match="one size"):
        psnr(a, a[:, :, :6])
    with pytest.raises(UserError, match="one size"):
        ssim(a[0], a[0, :, :6])
    with pytest.raises(UserError, match="4 axes of 8-bit"):
        psnr(a / 255, a / 255)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="SSIM's window has 11"):
        ssim(a[0, :8, :8], a[0, :8, :8])
