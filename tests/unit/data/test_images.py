"""Reading image files: right for every kind, bounded, and never silent about damage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

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
