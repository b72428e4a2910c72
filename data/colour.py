"""Colour profiles to sRGB. Pillow's ImageCms (LittleCMS) does it, for the images that need it and for no others."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Pillow's mode of an image to the colour space that its profile must be of; cameras write RGB profiles into grey files."""
_UNSEEN = 4
"""Levels of 255. Profiles by which no colour moves further are sRGB by another name: makers' own versions of it are."""


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> Any:
    """Pillow's transform of images of `mode` (RGB, L, CMYK) to sRGB; None where they are sRGB already, or where the profile
    cannot be read or is of another kind of image: they are shown as sRGB then, as browsers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":  # another space altogether
        return transform
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(np.ascontiguousarray(colours if mode == "RGB" else colours[..., 0]))
    after = ImageCms.applyTransform(before, transform)
    moved = np.asarray(after, dtype=np.int16) - np.asarray(before.convert("RGB"), dtype=np.int16)
    return transform if np.abs(moved).max() > _UNSEEN else None


def as_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB, L or CMYK image as RGB in sRGB. `profile`: that it came with, if any."""
    if profile and len(profile) <= MAX_PROFILE_BYTES and (transform := to_srgb(profile, image.mode)):
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted
    return image.convert("RGB")


def array_as_srgb(image_HWC: NDArray[np.uint8], profile: bytes, *, is_grey: bool) -> NDArray[np.uint8]:
    """Decoded pixels, uint8 (H, W, 3), in sRGB; grey ones have three equal channels."""
    if len(profile) > MAX_PROFILE_BYTES or not to_srgb(profile, "L" if is_grey else "RGB"):
        return image_HWC
    pixels = np.ascontiguousarray(image_HWC[..., 0] if is_grey else image_HWC)
    return np.asarray(as_srgb(Image.fromarray(pixels), profile))
