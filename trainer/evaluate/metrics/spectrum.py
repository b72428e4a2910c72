"""How the power of images is spread over spatial frequencies (Berrada et al. 2025, figures 4 and 5).

Shapes: pixels (N, H, W, 3), uint8; F = side // 2 whole frequencies, from 1 cycle an image.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array

LUMINANCE = (0.299, 0.587, 0.114)
"""Of R, G, B (ITU-R BT.601)."""
FLOOR = 1e-12
"""Of power, where its logarithm is taken: images without any detail."""


def radial_powers(pixels_NHWC: NDArray[np.uint8]) -> Array:
    """Mean power of luminance at each whole frequency, of each image: (N, side // 2).

    Luminance is in [0, 1], each image's mean is taken off, and power is |FFT|^2 over the number of pixels, averaged over the
    ring of frequencies that round to the same whole one. Corners beyond side / 2 are left out. No window, so borders of unlike
    colour add to all frequencies, alike for all sets. Rows of batches may be put together; the mean over rows is that of
    the set.

    Raises:
        UserError: images that are not square, or not 8-bit RGB.
    """
    pixels = np.asarray(pixels_NHWC)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] != pixels.shape[2] or pixels.dtype != np.uint8:
        raise UserError(
            f"images of shape {pixels.shape} and type {pixels.dtype}; a spectrum is of square 8-bit RGB images"
        )
    side = pixels.shape[1]
    frequency = np.fft.fftfreq(side, 1.0 / side)
    ring = np.rint(np.hypot(frequency[:, None], frequency[None, :])).astype(int).ravel()
    last = side // 2 + 1
    counts = np.bincount(ring, minlength=last)[1:last]
    powers = np.empty((len(pixels), side // 2))
    # one image at a time: a complex128 spectrum is 16/3 times the bytes of its image
    for row, image in enumerate(pixels):
        luminance = image.astype(np.float64) @ np.array(LUMINANCE) / 255.0
        power = np.abs(np.fft.fft2(luminance - luminance.mean())) ** 2 / (side * side)
        powers[row] = np.bincount(ring, power.ravel(), minlength=last)[1:last] / counts
    return powers


def log_power(powers_NF: Array) -> Array:
    """log10 of the mean over images of `radial_powers`: (F,), the curve of figure 4."""
    out: Array = np.log10(np.maximum(np.asarray(powers_NF, dtype=np.float64).mean(0), FLOOR))
    return out


def radial_power_spectrum(pixels_NHWC: NDArray[np.uint8]) -> Array:
    """`log_power` of the `radial_powers` of a set: (side // 2,)."""
    return log_power(radial_powers(pixels_NHWC))


def log_power_difference(log_power_F: Array, real_log_power_F: Array) -> Array:
    """log10 of the power of generated images over that of real ones, at each frequency: negative where detail is missing. The
    curves of figure 4; its magnitude is that of figure 5.

    Raises:
        UserError: spectra of images of different sides.
    """
    made, real = (np.asarray(x, dtype=np.float64) for x in (log_power_F, real_log_power_F))
    if made.shape != real.shape or made.ndim != 1:
        raise UserError(f"spectra of {made.shape} and {real.shape} frequencies; compare images of one resolution")
    out: Array = made - real
    return out


def spectrum_errors(log_power_F: Array, real_log_power_F: Array) -> dict[str, float]:
    """Mean absolute difference of log10 power over the low, middle and high third of frequencies, and over all; and its
    signed mean over the high third, negative where detail is missing."""
    difference = log_power_difference(log_power_F, real_log_power_F)
    low, middle, high = np.array_split(difference, 3)
    return {
        "spectrum": float(np.abs(difference).mean()),
        "spectrum_low": float(np.abs(low).mean()),
        "spectrum_mid": float(np.abs(middle).mean()),
        "spectrum_high": float(np.abs(high).mean()),
        "spectrum_high_signed": float(high.mean()),
    }
