"""The baselines of the autoencoder experiment: bits by hand, pictures against Pillow's."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.experiments.autoencoder_baselines import (
    bicubic,
    code_bits,
    latent_bits,
    rounded,
    thumbnail,
    thumbnail_side,
    webp,
    webp_batch,
)
from trainer.tensors import images_to_pixels, pixels_to_images


def photo(side: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes, an edge, and some texture."""
    y, x = np.mgrid[0:side, 0:side] / side
    rng = np.random.default_rng(seed)
    waves = np.stack([np.sin(7 * x + p) + np.cos(5 * y - p) + (x + y > 1.0) for p in rng.uniform(0, 6, 3)], 2)
    return np.asarray((waves + 2) * 45 + rng.uniform(0, 25, (side, side, 1)), np.uint8)


def images_of(*pixels_HWC: np.ndarray) -> torch.Tensor:
    return pixels_to_images(torch.from_numpy(np.stack(pixels_HWC)).permute(0, 3, 1, 2))


def test_bits_by_hand() -> None:
    assert latent_bits(4, 16) == 8192, "4 x 16 x 16 values of 8 bits: 1,024 bytes"
    assert code_bits(1024, 16) == 2560, "10 bits a code, 256 codes: 320 bytes"
    assert code_bits(1000, 16) == 2560, "a code of 1,000 takes 10 bits too"
    assert thumbnail_side(8192) == 18, "18 x 18 x 24 = 7,776; 19 x 19 x 24 = 8,664"
    assert thumbnail_side(2560) == 10, "10 x 10 x 24 = 2,400"
    assert thumbnail_side(18 * 18 * 24) == 18
    assert thumbnail_side(18 * 18 * 24 - 1) == 17


@pytest.mark.parametrize("budget", [8192, 2560])
def test_a_thumbnail_is_what_pillow_makes(budget: int) -> None:
    pixels = photo(128)
    side = thumbnail_side(budget)
    ours = images_to_pixels(thumbnail(images_of(pixels), budget))[0].permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    theirs = np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 2, "both round to 8 bits at both sizes"
    assert difference.mean() < 0.4, "Pillow rounds between its two directions too"
    assert np.abs(ours.astype(int) - pixels).mean() > 1, "something is lost"


def test_a_thumbnail_has_8_bits() -> None:
    small = bicubic(images_of(photo(32)), 7)
    levels = (small + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_rounding_by_hand() -> None:
    """mean 1, std 0.5: levels from -1 to 3, 4 / 255 apart."""
    step = 4 / 255
    raw = torch.tensor([-7.0, -1.0 + 0.4 * step, -1.0 + 0.6 * step, 1.0, 3.0, 9.0]).view(1, 1, 1, 6)
    found = rounded(raw, torch.tensor([1.0]), torch.tensor([0.5])).flatten()
    # 1.0 lies between levels 127 and 128: half of a step off, whichever it takes
    torch.testing.assert_close(found[[0, 1, 2, 4, 5]], torch.tensor([-1.0, -1.0, -1.0 + step, 3.0, 3.0]))
    assert abs(found[3].item() - 1.0) <= 0.5 * step + 1e-6


def test_rounding_is_by_channel_and_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    mean_C, std_C = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 0.01])
    raw = torch.randn(3, 2, 5, 5).clamp(-3.9, 3.9) * std_C[:, None, None] + mean_C[:, None, None]
    error_C = (rounded(raw, mean_C, std_C) - raw).abs().amax((0, 2, 3))
    assert (error_C <= 4 * std_C / 255 * 1.01 + 1e-6).all()
    assert (error_C > 3 * std_C / 255).all(), "no finer than 8 bits"
    assert len(rounded(raw, mean_C, std_C)[:, 0].unique()) <= 256


@pytest.mark.parametrize("num_bytes", [1024, 320])
def test_webp_fits_and_more_bytes_are_better(num_bytes: int) -> None:
    pixels = photo(64)
    made, size = webp(pixels, num_bytes)
    assert size <= num_bytes
    assert made.shape == pixels.shape
    whole, _ = webp(pixels, 100_000)
    error = [np.square(picture.astype(int) - pixels).mean() for picture in (made, whole)]
    assert error[1] < error[0]
    best = io.BytesIO()
    Image.fromarray(pixels).save(best, "WEBP", quality=100, method=4)
    decoded = np.asarray(Image.open(best).convert("RGB")).astype(int)
    assert error[1] <= np.square(decoded - pixels).mean(), "quality 100 at full size is among what is tried"


def test_webp_that_cannot_fit_is_the_smallest_and_says_its_bytes() -> None:
    images, sizes = webp_batch(images_of(photo(64), photo(64, 1)), 8)
    assert images.shape == (2, 3, 64, 64)
    assert all(8 < size < 400 for size in sizes)


@pytest.mark.shared
def test_taef2_is_what_its_loader_loads(shared_dir: Path) -> None:
    import importlib.util

    from trainer.experiments.taef2 import is_taef2, load_taef2

    folder = shared_dir / "data/taef2"
    spec = importlib.util.spec_from_file_location("taef2_load", shared_dir / "data/loaders/taef2_load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.load_taef2(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth")
    assert is_taef2(str(folder))
    ours = load_taef2(str(folder))
    images = images_of(photo(64))
    with torch.no_grad():
        latents = ours.encode(images)
        assert torch.equal(latents, theirs.encode(images).latents)
        assert torch.equal(ours.decode(latents), theirs.decode(latents).sample)
        error = (ours.decode(latents).clamp(-1, 1) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 22, "it is a trained one"
