"""Image files to pixels: bounded before decoding, and right for rotated, grey, CMYK and transparent ones.

simplejpeg decodes JPEG and shrinks in the DCT domain (2.3x Pillow's speed at 512 to 256 px); Pillow does the rest.
"""

import io
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainer.errors import one_line

MAX_PIXELS = 1 << 26
"""Largest image that is decoded: 64 megapixels, 192 MiB."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112


class ImageError(Exception):
    """An image that cannot be used. `reason` is one of few words, fit to label a count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def image_format(data: bytes) -> str:
    """`jpeg`, `png` or `webp`, by the file's first bytes.

    Raises:
        ImageError: any other.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ImageError("unknown_format", "neither JPEG, PNG nor WebP" if data else "the file is empty")


def read_image(data: bytes, *, min_side: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file upright into RGB.

    Args:
        data: a JPEG, PNG or WebP file; of an animation the first frame is taken.
        min_side: a JPEG may be decoded at 1/8 to 7/8 of its size, as long as both sides stay this long.

    Returns:
        uint8 (H, W, 3); transparency is laid on white.

    Raises:
        ImageError: damaged, of another format, or of more than `MAX_PIXELS`.
    """
    kind = image_format(data)
    try:
        return _read_jpeg(data, min_side) if kind == "jpeg" else _read_with_pillow(data)
    except (ImageError, MemoryError):
        raise
    except Exception as e:  # decoders meet damage with a dozen types; whichever it is, the image is at fault
        raise ImageError("undecodable", f"{kind}: {one_line(e)}") from e


def _read_jpeg(data: bytes, min_side: int | None) -> NDArray[np.uint8]:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height)
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return _read_with_pillow(data)  # CMYK and YCCK, which Adobe stores inverted: Pillow knows
    shrink = {"min_height": min_side, "min_width": min_side} if min_side else {}
    image_HWC: Any = simplejpeg.decode_jpeg(data, "RGB", **shrink)
    if b"Exif\x00\x00" in data:
        image_HWC = _upright(image_HWC, Image.open(io.BytesIO(data), formats=_FORMATS).getexif().get(_ORIENTATION, 1))
    return np.asarray(image_HWC)


def _upright(image_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo EXIF orientation 2-8."""
    if orientation in (5, 6, 7, 8):
        image_HWC = image_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return np.ascontiguousarray(image_HWC)


def _read_with_pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
        _check_pixels(*file.size)
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width} x {height}; the limit is {MAX_PIXELS >> 20} megapixels")
