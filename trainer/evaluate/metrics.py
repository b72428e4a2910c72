"""Distances between sets of images, as pure functions of arrays; float64 inside.

Shapes: features (N, D), one row an image; pixels (N, H, W, 3), uint8.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LUMINANCE = (0.299, 0.587, 0.114)
"""Of R, G, B (ITU-R BT.601)."""


def frechet_distance(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating]) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (Heusel et al. 2017, eq. 6).

    With X, Y the centred sets over sqrt(n - 1), C_a = X'X and C_b = Y'Y, the trace of (C_a C_b)^(1/2) is the sum of the
    singular values of X Y', which is N x M: no matrix of D x D, no square root of a singular matrix, and never complex.
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    assert a.ndim == b.ndim == 2, (a.shape, b.shape)
    assert a.shape[1] == b.shape[1], (a.shape, b.shape)
    assert min(len(a), len(b)) > 1, "a covariance needs two images at least"
    mean = a.mean(0) - b.mean(0)
    x = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    y = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    if a.shape[1] < min(len(a), len(b)):  # the same singular values, from triangular factors of D x D
        x, y = np.linalg.qr(x, mode="r"), np.linalg.qr(y, mode="r")
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(mean @ mean + np.square(x).sum() + np.square(y).sum() - 2.0 * cross)


def kernel_distance(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), whatever N is."""
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    n, m, d = len(a), len(b), a.shape[1]

    def kernel(x: Array, y: Array) -> Array:
        out: Array = (x @ y.T / d + 1.0) ** 3
        return out

    aa, bb = kernel(a, a), kernel(b, b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2.0 * kernel(a, b).mean())


def radial_power_spectrum(pixels_NHWC: NDArray[np.uint8]) -> Array:
    """log10 of the mean power of luminance at each whole frequency, 1 to side/2 cycles an image: (side // 2,).

    Luminance is in [0, 1], each image's mean is taken off, and power is |FFT|^2 over the number of pixels, averaged over
    images and over the ring of frequencies that round to the same whole one. Corners beyond side/2 are left out. Images
    are square; no window, so borders of unlike colour add to all frequencies, alike for all sets.
    """
    _n, side, width, _ = pixels_NHWC.shape
    assert side == width, pixels_NHWC.shape
    luminance = np.asarray(pixels_NHWC, dtype=np.float64) @ np.array(LUMINANCE) / 255.0
    luminance -= luminance.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(luminance)) ** 2).mean(0) / (side * side)
    frequency = np.fft.fftfreq(side, 1.0 / side)
    ring = np.rint(np.hypot(frequency[:, None], frequency[None, :])).astype(int)
    sums = np.bincount(ring.ravel(), power.ravel(), minlength=side // 2 + 1)
    counts = np.bincount(ring.ravel(), minlength=side // 2 + 1)
    last = side // 2 + 1
    out: Array = np.log10(np.maximum(sums[1:last] / counts[1:last], 1e-12))
    return out


def spectrum_errors(log_power_F: Array, real_log_power_F: Array) -> dict[str, float]:
    """Mean absolute difference of log10 power over the low, middle and high third of frequencies, and over all; and its
    signed mean over the high third, negative where detail is missing."""
    difference = np.asarray(log_power_F, dtype=np.float64) - np.asarray(real_log_power_F, dtype=np.float64)
    low, middle, high = np.array_split(difference, 3)
    return {
        "spectrum": float(np.abs(difference).mean()),
        "spectrum_low": float(np.abs(low).mean()),
        "spectrum_mid": float(np.abs(middle).mean()),
        "spectrum_high": float(np.abs(high).mean()),
        "spectrum_high_signed": float(high.mean()),
    }


def squared_distances(a_NCHW: NDArray[np.floating], b_MCHW: NDArray[np.floating]) -> Array:
    """Mean squared difference an element, of each of a from each of b: (N, M)."""
    a = np.asarray(a_NCHW, dtype=np.float64).reshape(len(a_NCHW), -1)
    b = np.asarray(b_MCHW, dtype=np.float64).reshape(len(b_MCHW), -1)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2.0 * a @ b.T
    return np.maximum(squared, 0.0) / a.shape[1]
