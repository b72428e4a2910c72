"""Reading image files: right for every kind, bounded, and never silent about damage."""

import io
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data import images
from data.images import ImageError, read_image
from data.transforms import resize, shrink_short_side, square_crop, training_image

from .conftest import encoded, picture


def mean_error(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_rgb(kind: str) -> None:
    options = {"PNG": {}, "WEBP": {"quality": 95}, "JPEG": {"quality": 95}}[kind]
    read = read_image(encoded(picture(3), kind, **options))
    assert read.dtype == np.uint8
    assert mean_error(read, np.array(picture(3))) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(1), kind, exif=exif, quality=95)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert mean_error(read_image(data), expected) < 3


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "RGBA", "LA"])
def test_other_modes(mode: str) -> None:
    image = picture(2).convert(mode)
    data = encoded(image, "JPEG" if mode in ("L", "CMYK") else "PNG", **({"quality": 95} if mode == "L" else {}))
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert mean_error(read_image(data), expected) < 3


def test_inverted_cmyk_of_adobe_is_not_a_negative() -> None:
    white = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
    assert read_image(encoded(white, "JPEG")).min() > 250


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    read = read_image(encoded(image, "PNG"))
    assert tuple(read[5, 5]) == (255, 255, 255)
    assert tuple(read[0, 0]) == (10, 20, 30)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert read_image(encoded(palette, "PNG", transparency=0)).min() == 255


def test_16_bit_grey_keeps_its_range() -> None:
    grey = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    read = read_image(encoded(Image.fromarray(grey), "PNG"))
    assert np.array_equal(read[..., 0], grey >> 8)


def test_scaled_decoding_stays_above_the_side_and_close_to_the_full_one() -> None:
    data = encoded(picture(1, 400, 640), quality=95)
    assert read_image(data, min_side=64).shape == (100, 160, 3)
    scaled = read_image(data, min_side=128)
    assert scaled.shape == (150, 240, 3)
    assert mean_error(training_image(scaled, 64), training_image(read_image(data), 64)) < 1
    assert read_image(data, min_side=399).shape == (400, 640, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_cut_files_are_undecodable(kind: str, kept: float) -> None:
    data = encoded(picture(4, 100, 100), kind)
    with pytest.raises(ImageError) as error:
        read_image(data[: int(len(data) * kept)])
    assert error.value.reason in ("undecodable", "unknown_format")


def test_other_formats_are_refused() -> None:
    for data in (b"GIF89a" + bytes(100), encoded(picture(0), "TIFF"), b"<svg/>"):
        with pytest.raises(ImageError, match="unknown_format"):
            read_image(data)


def test_size_is_checked_before_pixels_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageError):
        read_image(bomb)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 56 - 1)
    for kind in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(ImageError, match="too_many_pixels"):
            read_image(encoded(picture(0), kind))


# -------------------------------------------------------------------------------------------------------- colour profiles


def matrix_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """An ICC profile (version 2) of a display with these primaries: rows red, green, blue as XYZ under D50."""

    def s15f16(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15f16(*white), b"cprt": b"text" + bytes(4) + b"none\0\0\0\0"}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78 + 2)
    for letter, row in zip(b"rgb", primaries, strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + s15f16(*row)
        tags[bytes([letter]) + b"TRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(28) + s15f16(*white)
    return header.ljust(128, b"\0") + table + body


ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
"""Primaries adapted to D50, as their own profiles have them."""


def adobe_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """By the definitions of both spaces, clipped to what sRGB has."""
    linear = (pixels / 255.0) ** 2.19921875 @ ADOBE @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_wide_profile_is_brought_to_srgb(kind: str) -> None:
    image = picture(3, 64, 64)
    by_kind: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True},
    }  # fmt: skip
    options = by_kind[kind]
    plain = read_image(encoded(image, kind, **options))
    read = read_image(encoded(image, kind, icc_profile=matrix_profile(ADOBE, 2.19921875), **options))
    expected = adobe_to_srgb(plain.astype(float))
    assert mean_error(plain, read) > 5
    assert mean_error(read, expected) < 1
    assert np.abs(read - expected).max() < 6


def test_profiles_that_say_srgb_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(5)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_image(encoded(image, icc_profile=srgb)), read_image(encoded(image)))
    broken, other = b"no profile at all", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (broken, other):
        assert np.array_equal(read_image(encoded(image, icc_profile=profile)), read_image(encoded(image)))
    grey = image.convert("L")
    wide = matrix_profile(ADOBE, 2.2)
    assert np.array_equal(read_image(encoded(grey, icc_profile=wide)), read_image(encoded(grey)))  # of another space


def test_a_jpeg_without_a_profile_never_sees_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(picture(0)), encoded(picture(0).convert("L")), encoded(picture(0), exif=exif)]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = encoded(picture(0), icc_profile=srgb)
    read_image(with_profile)  # the profile is looked at once

    def banned(*args: object, **kwargs: object) -> None:
        raise AssertionError("Pillow")

    for name in ("open", "fromarray"):
        monkeypatch.setattr(Image, name, banned)
    for data in [*files, with_profile]:
        assert read_image(data).shape[2] == 3


def test_a_profile_in_many_parts_and_an_orientation_together() -> None:
    """A profile beyond 64 KB is cut into segments, which may stand in any order."""
    exif = Image.Exif()
    exif[0x0112] = 8
    profile = matrix_profile(ADOBE, 2.19921875) + secrets.token_bytes(150_000)
    profile = struct.pack(">I", len(profile)) + profile[4:]
    data = encoded(picture(3, 64, 48), quality=100, subsampling=0, icc_profile=profile, exif=exif)
    found_exif, found = images._exif_and_profile(data)
    assert found == profile
    assert images._orientation(found_exif) == 8
    plain = read_image(encoded(picture(3, 64, 48), quality=100, subsampling=0, exif=exif))
    assert mean_error(read_image(data), adobe_to_srgb(plain.astype(float))) < 1


def test_headers_that_lie_are_survived() -> None:
    good = encoded(picture(0), exif=Image.Exif(), quality=90)
    assert (
        images._orientation(b"") == images._orientation(b"II*\0") == images._orientation(b"MM\0*\xff\xff\xff\xff") == 1
    )
    endless = b"II*\0" + struct.pack("<IH", 8, 65535) + struct.pack("<HHIHH", 1, 3, 1, 5, 0) * 3
    assert images._orientation(endless) == 1
    for orientation in (0, 9, 65535):
        tiff = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
        assert images._orientation(tiff) == 1
    for cut in range(0, 60, 7):
        images._exif_and_profile(good[:cut])
    images._exif_and_profile(b"\xff\xd8" + b"\xff\xe1\x00\x00" * 100)


@pytest.mark.shared
def test_real_photos_and_their_profiles(shared_dir: Path) -> None:
    """Against Pillow's own way through its whole pipeline; some of these photos are in Adobe RGB."""
    profiles = 0
    for path in sorted((shared_dir / "data" / "coco_open").rglob("*.jpg"))[:40]:
        data = path.read_bytes()
        file = Image.open(io.BytesIO(data))
        theirs: Any = ImageOps.exif_transpose(file)
        profile = file.info.get("icc_profile")
        if profile:
            profiles += 1
            theirs = ImageCms.profileToProfile(
                theirs, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                outputMode="RGB",
            )  # fmt: skip
        assert mean_error(read_image(data), np.asarray(theirs.convert("RGB"))) < 1.5, path
    assert profiles > 5


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["grey", "cmyk", "alpha", "palette", "16 bit"])
def test_kinds_made_of_a_real_photo(shared_dir: Path, kind: str) -> None:
    photo = Image.open(next(iter(sorted((shared_dir / "data" / "coco_open_256").rglob("*.jpg"))))).convert("RGB")
    rgb = np.asarray(photo)
    if kind == "grey":
        made, expected = encoded(photo.convert("L"), quality=95), np.asarray(photo.convert("L").convert("RGB"))
    elif kind == "cmyk":
        made, expected = encoded(photo.convert("CMYK"), quality=95), rgb
    elif kind == "alpha":
        alpha = Image.linear_gradient("L").resize(photo.size)
        made = encoded(Image.merge("RGBA", (*photo.split(), alpha)), "PNG")
        share = np.asarray(alpha)[..., None] / 255.0
        expected = rgb * share + 255 * (1 - share)
    elif kind == "palette":
        quantised = photo.quantize(64)
        made, expected = encoded(quantised, "PNG"), np.asarray(quantised.convert("RGB"))
    else:
        grey = np.asarray(photo.convert("L")).astype(np.uint16) * 256
        made = encoded(Image.fromarray(grey), "PNG")
        expected = np.repeat((grey >> 8)[..., None], 3, axis=2)
    assert mean_error(read_image(made), expected) < 3


# ----------------------------------------------------------------------------------------------------------- transforms


def test_crop_takes_both_ends_and_the_centre() -> None:
    wide = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    assert np.array_equal(square_crop(wide), wide[:, 3:7])
    assert np.array_equal(square_crop(wide, 0.0), wide[:, 0:4])
    assert np.array_equal(square_crop(wide, 0.9999999), wide[:, 6:10])
    tall = wide.transpose(1, 0, 2)
    assert np.array_equal(square_crop(tall, 0.9999999), tall[6:10])


def test_resize_averages_areas() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2, :2] = 100
    image[0, 0] = 20
    assert resize(image, 2, 2)[0, 0, 0] == 80


def test_training_image_flips_and_fits() -> None:
    image = np.array(picture(0))
    plain, flipped = training_image(image, 16), training_image(image, 16, flip=True)
    assert plain.shape == (16, 16, 3)
    assert np.array_equal(plain[:, ::-1], flipped)
    assert flipped.flags.c_contiguous
    assert training_image(image[:1], 64).shape == (64, 64, 3)  # one row of pixels, enlarged


def test_shrink_keeps_proportions_and_never_enlarges() -> None:
    image = np.array(picture(0, 40, 56))
    assert shrink_short_side(image, 20).shape == (20, 28, 3)
    assert shrink_short_side(image, 40) is image
