"""How much two images differ, pixel by pixel and window by window. Shapes: pixels (H, W, 3) or (N, H, W, 3), uint8.

LPIPS, which a network judges, is `trainer.models.lpips`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array

Pixels = NDArray[np.uint8]
PSNR_OF_EQUAL = 100.0
"""In dB; stands for infinity."""
SSIM_SIGMA = 1.5
"""Of the Gaussian window, in pixels (Wang et al. 2004)."""
SSIM_WINDOW = 11
"""Its side; smaller images have no SSIM."""


def psnr_of_error(mean_squared_error: ArrayLike, value_range: float = 255.0) -> Array:
    """10 log10(range^2 / error), in dB; at most 100, which stands for equal; NaN stays."""
    error = np.asarray(mean_squared_error, dtype=np.float64)
    out: Array = np.minimum(10.0 * np.log10(value_range**2 / np.maximum(error, 1e-30)), PSNR_OF_EQUAL)
    return out


def psnr(a_NHWC: Pixels, b_NHWC: Pixels) -> Array:
    """Peak signal to noise ratio of each pair of images, over pixels and colours: (N,), in dB."""
    _check(a_NHWC, b_NHWC, 4)
    return psnr_of_error([np.square(a.astype(np.int64) - b).mean() for a, b in zip(a_NHWC, b_NHWC, strict=True)])


def ssim(a_HWC: Pixels, b_HWC: Pixels) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), with their Gaussian window; mean over R, G and B."""
    from skimage.metrics import structural_similarity  # here: it takes its time to import

    _check(a_HWC, b_HWC, 3)
    if min(a_HWC.shape[:2]) < SSIM_WINDOW:
        raise UserError(f"images of {a_HWC.shape[:2]} px, and SSIM's window has {SSIM_WINDOW}; take larger ones")
    value = structural_similarity(
        a_HWC,
        b_HWC,
        channel_axis=2,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        data_range=255,
    )
    return float(value)


def _check(a: Pixels, b: Pixels, axes: int) -> None:
    if a.shape != b.shape:
        raise UserError(f"images of {a.shape} and {b.shape}; compare images of one size")
    if a.ndim != axes or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise UserError(f"images of shape {a.shape}, types {a.dtype} and {b.dtype}; give {axes} axes of 8-bit values")
