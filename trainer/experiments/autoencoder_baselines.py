"""What an autoencoder is compared with at an equal number of bits: a thumbnail enlarged again, a WebP file, and its own latents
in 8 bits. Images are in [-1, 1], BCHW, square."""

import io
import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trainer.tensors import images_to_pixels, pixels_to_images

BITS_A_VALUE = 8
"""Of a pixel's colour, and of a latent value that is stored."""
LATENT_RANGE_STD = 4.0
"""8-bit latents have even levels over mean +- so many standard deviations, by channel."""
WEBP_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
"""Of the side, at which an image may be coded."""


def latent_bits(channels: int, side: int) -> int:
    """Of continuous latents."""
    return channels * side * side * BITS_A_VALUE


def code_bits(num_codes: int, side: int) -> int:
    """Of latents that are codes of a book: every code takes as many."""
    return math.ceil(math.log2(num_codes)) * side * side


def thumbnail_side(bits: int) -> int:
    """Of the largest square RGB image that does not take more."""
    return math.isqrt(bits // (3 * BITS_A_VALUE))


def bicubic(images_BCHW: Tensor, side: int) -> Tensor:
    """Resized, then rounded to 8 bits; antialiased where it shrinks."""
    resized = F.interpolate(images_BCHW.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    return pixels_to_images(images_to_pixels(resized))


def thumbnail(images_BCHW: Tensor, bits: int) -> Tensor:
    """Down to the largest thumbnail of the budget, and up again."""
    return bicubic(bicubic(images_BCHW, thumbnail_side(bits)), images_BCHW.shape[-1])


def rounded(raw_BCHW: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Latents at the nearest of 2^8 even levels over mean +- 4 std of their channel; clamped to them."""
    last = 2**BITS_A_VALUE - 1
    low = (mean_C - LATENT_RANGE_STD * std_C)[:, None, None]
    step = (2.0 * LATENT_RANGE_STD * std_C / last)[:, None, None]
    levels = ((raw_BCHW - low) / step).round().clamp(0, last)
    return low + levels * step


# ------------------------------------------------------------------------------------------------------------------ WebP

Pixels = NDArray[np.uint8]


def webp(image_HWC: Pixels, num_bytes: int) -> tuple[Pixels, int]:
    """The image after the best lossy WebP file of at most so many bytes, and the bytes it takes.

    Coded at several sizes, each at the best quality that fits, and enlarged again: the one with the least squared error is
    taken. Of a file that cannot be small enough, the smallest there is.
    """
    side = image_HWC.shape[0]
    sides = list(dict.fromkeys(max(1, round(side * share)) for share in WEBP_SHARES))
    files = [(_webp_file(image_HWC, s, num_bytes)) for s in sides]
    fitting = [file for file in files if len(file) <= num_bytes] or [min(files, key=len)]
    pictures = [(_enlarged(file, side), len(file)) for file in fitting]
    return min(pictures, key=lambda p: np.square(p[0].astype(np.int64) - image_HWC).sum())


def _webp_file(image_HWC: Pixels, side: int, num_bytes: int) -> bytes:
    """Of the largest quality that fits, by bisection; of quality 0 where none does."""
    small = Image.fromarray(image_HWC).resize((side, side), Image.Resampling.BICUBIC)
    best, low, high = _encoded(small, 0), 1, 100
    while low <= high and len(best) <= num_bytes:
        quality = (low + high) // 2
        file = _encoded(small, quality)
        if len(file) <= num_bytes:
            best, low = file, quality + 1
        else:
            high = quality - 1
    return best


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _enlarged(file: bytes, side: int) -> Pixels:
    with Image.open(io.BytesIO(file), formats=("WEBP",)) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def webp_batch(images_BCHW: Tensor, num_bytes: int) -> tuple[Tensor, list[int]]:
    """Of each image, and the bytes of each file."""
    pixels_BHWC = images_to_pixels(images_BCHW).permute(0, 2, 3, 1).cpu().numpy()
    coded = [webp(np.ascontiguousarray(pixels_HWC), num_bytes) for pixels_HWC in pixels_BHWC]
    pixels = torch.from_numpy(np.stack([pixels_HWC for pixels_HWC, _ in coded])).permute(0, 3, 1, 2)
    return pixels_to_images(pixels), [size for _, size in coded]
