"""Image files to pixels: bounded before decoding, and right for rotated, grey, CMYK and transparent ones and for those with
a colour profile.

simplejpeg decodes JPEG and shrinks in the DCT domain (2.3x Pillow's speed at 512 to 256 px); Pillow does the rest.
"""

import io
import struct
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.colour import array_as_srgb, as_srgb
from trainer.errors import one_line

MAX_PIXELS = 1 << 26
"""Largest image that is decoded: 64 megapixels, 192 MiB."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TIFF_SHORT = 3


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
        uint8 (H, W, 3) in sRGB; transparency is laid on white.

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
    exif, profile = _exif_and_profile(data)
    if profile:
        image_HWC = array_as_srgb(image_HWC, profile, is_grey=colorspace == "Gray")
    return _upright(np.asarray(image_HWC), _orientation(exif)) if exif else np.asarray(image_HWC)


def _exif_and_profile(data: bytes) -> tuple[bytes, bytes]:
    """What stands before the pixels of a JPEG: EXIF as TIFF, and the colour profile; empty where there is none."""
    exif, parts = b"", {}
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = exif or data[at + 10 : end]
        elif marker == 0xE2 and data[at + 4 : at + 16] == b"ICC_PROFILE\0":
            parts[data[at + 16]] = data[at + 18 : end]
        at = max(end, at + 2)
    return exif, b"".join(parts[number] for number in sorted(parts))


def _orientation(tiff: bytes) -> int:
    """1 to 8; 1, upright, where it is not told. Read here because Pillow takes a fifth of a decode for it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if not order:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == _ORIENTATION and kind == _TIFF_SHORT:
                (value,) = struct.unpack_from(f"{order}H", tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # cut short
        return 1
    return 1


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
        profile = file.info.get("icc_profile")
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        alpha = None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
        if image.mode not in ("RGB", "L", "CMYK"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        image = as_srgb(image, profile)
        if alpha:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        return np.array(image)


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width} x {height}; the limit is {MAX_PIXELS >> 20} megapixels")


def encode_image(image_HWC: NDArray[np.uint8], kind: str, quality: int) -> bytes:
    """An image file of the format `kind`, of RGB pixels: PNG without loss, JPEG at full colour resolution, since halved chroma
    shows at the sizes that people shrink to."""
    if kind == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image_HWC), quality=quality, colorsubsampling="444"))
    options = [cv2.IMWRITE_WEBP_QUALITY, quality] if kind == "webp" else []
    done, encoded = cv2.imencode(f".{kind}", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), options)
    assert done
    return bytes(encoded.tobytes())
