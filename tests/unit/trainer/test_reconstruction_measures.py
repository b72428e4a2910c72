"""Measures of what an autoencoder gives back, against independent computations."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image
from torch import Tensor

from trainer.evaluate.codec_report import plain
from trainer.evaluate.latents import Outliers
from trainer.evaluate.reconstruction import (
    Judges,
    Measurement,
    Output,
    codebook_numbers,
    flat,
    in_words,
    measure,
    of_codec,
    ssim,
)
from trainer.models.autoencoders import Codec
from trainer.models.efficientnet import EfficientNetLite0
from trainer.models.lpips import LPIPS
from trainer.parallel.world import World
from trainer.pictures import loss_curves, reconstruction_grid
from trainer.tensors import images_to_pixels, pixels_to_images


def pixels(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth uint8 images (B, 3, side, side), away from the ends of the range."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size=(side, side), mode="bicubic") * 120 + 60).clamp(10, 245).to(torch.uint8)


def noisy(originals: Tensor, seed: int = 1) -> Tensor:
    noise = torch.randint(-9, 10, originals.shape, generator=torch.Generator().manual_seed(seed))
    return (originals.int() + noise).to(torch.uint8)


def numbers(before: Tensor, after: Tensor, **networks: object) -> dict:
    measurement = Measurement(Judges(**networks))  # type: ignore[arg-type]
    measurement.add(pixels_to_images(before), pixels_to_images(after))
    return measurement.numbers()


def test_psnr_is_of_each_image_and_of_all() -> None:
    before = pixels(3)
    after = before.clone()
    after[0] += 4
    after[1] -= 2
    found = numbers(before, after)
    one, other = (20 * math.log10(255 / k) for k in (4, 2))
    assert found["psnr_db"] == pytest.approx((one + other + 100) / 3, abs=1e-9), "equal images stand for 100 dB"
    assert found["psnr_pooled_db"] == pytest.approx(10 * math.log10(255**2 / ((16 + 4 + 0) / 3)), abs=1e-9)
    assert found["psnr_pooled_db"] < found["psnr_db"]
    assert (found["count"], found["not_finite"]) == (3, 0)
    assert [found[name] for name in ("lpips", "frechet", "codebook", "latents", "outliers")] == [None] * 5


def test_images_are_compared_in_8_bits() -> None:
    before = pixels_to_images(pixels(2))
    measurement = Measurement()
    measurement.add(before, before + 0.49 / 127.5)
    assert measurement.numbers()["psnr_db"] == 100
    white, measurement = torch.ones(2, 3, 16, 16), Measurement()
    measurement.add(white, 1.7 * white)
    assert measurement.numbers()["psnr_db"] == 100, "beyond white is white"


def test_ssim_is_wangs() -> None:
    """By its definition: a Gaussian window of 11 px at every place where it fits, population moments, k1 0.01, k2 0.03."""
    a = pixels(1, 20)[0].permute(1, 2, 0).numpy()
    b = noisy(pixels(1, 20))[0].permute(1, 2, 0).numpy()
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for c in range(3):
        for y in range(10):
            for x in range(10):
                p, q = (image[y : y + 11, x : x + 11, c].astype(np.float64) for image in (a, b))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                both = (window * (p - mean_p) * (q - mean_q)).sum()
                values.append(
                    (2 * mean_p * mean_q + c1) * (2 * both + c2)
                    / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
                )  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert 0.3 < ssim(a, b) < 0.99
    assert ssim(a, a) == pytest.approx(1.0)


def test_lpips_and_frechet_distance_are_of_the_rounded_images() -> None:
    torch.manual_seed(0)
    lpips, network = LPIPS("alex"), EfficientNetLite0()
    before, after = pixels(6), noisy(pixels(6))
    found = numbers(before, after, lpips=lpips, features=network)
    a, b = pixels_to_images(before), pixels_to_images(after)
    with torch.no_grad():
        assert found["lpips"] == pytest.approx(lpips(a, b).double().mean().item(), rel=1e-6)
        features = [network.features(images).double().numpy() for images in (a, b)]
    covariances = [np.cov(rows, rowvar=False) for rows in features]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    mean = features[0].mean(0) - features[1].mean(0)
    expected = mean @ mean + sum(np.trace(c) for c in covariances) - 2 * cross
    assert found["frechet"] == pytest.approx(expected, rel=1e-4)
    assert found["frechet"] > 0
    assert numbers(before, before, features=network)["frechet"] == pytest.approx(0, abs=1e-6)


def test_latents_say_what_shift_and_scale_make_them_standard() -> None:
    raw = 3.0 * torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(4.0).view(4, 1, 1)
    images, measurement = pixels_to_images(pixels(6)), Measurement()
    for rows in (slice(0, 4), slice(4, 6)):
        measurement.add(images[rows], Output(images[rows], raw[rows]))
    found = measurement.numbers()["latents"]
    by_channel = raw.double().transpose(0, 1).flatten(1)
    assert found["mean"] == pytest.approx(by_channel.mean(1).tolist())
    assert found["std"] == pytest.approx(by_channel.std(1, unbiased=False).tolist())
    scaled = (raw.double() - found["shift_factor"]) * found["scaling_factor"]
    assert scaled.mean().item() == pytest.approx(0, abs=1e-12)
    assert scaled.std(unbiased=False).item() == pytest.approx(1)
    measurement = Measurement()
    measurement.add(images, Output(images, torch.zeros(6, 4, 5, 5)))
    assert measurement.numbers()["latents"]["scaling_factor"] is None, "latents that are all alike have no scale"


def test_outliers_are_those_of_the_analysis() -> None:
    maps = torch.randn(5, 6, 24, 24, generator=torch.Generator().manual_seed(0))
    maps[3, 2, 4:7, 5:8] = 80.0
    maps[1, 4] = 7.0
    analysis, measurement, images = Outliers("up1"), Measurement(), pixels_to_images(pixels(5))
    for rows in (slice(0, 2), slice(2, 5)):
        analysis.add(maps[rows])
        measurement.add(images[rows], Output(images[rows], maps={"up1": maps[rows]}))
    share = measurement.numbers()["outliers"]["up1"]
    assert share == pytest.approx(analysis.result().numbers()["masked_share"], rel=1e-6)
    assert share >= 9 / (5 * 6 * 24 * 24), "the planted patch, of one channel of one image"


def test_codebook_by_hand() -> None:
    found = codebook_numbers(np.array([2, 0, 1, 1, 0, 0, 0, 0]))
    assert found["usage"] == 3 / 8
    assert found["perplexity"] == pytest.approx(2**1.5), "entropy of (1/2, 1/4, 1/4): 1.5 bits"
    assert found["num_codes"] == 8


def vq_codec() -> Codec:
    torch.manual_seed(0)
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, latent_channels=3, num_vq_embeddings=32,
    )  # fmt: skip
    with torch.no_grad():
        vae.quantize.embedding.weight.normal_()
    return Codec(vae)


@torch.no_grad()
def test_a_codec_is_measured_as_it_reconstructs() -> None:
    codec, images = vq_codec(), pixels_to_images(pixels(5, 16))
    measurement = measure(images.split(2), reconstruct=of_codec(codec), shown=(1, 4))
    found = measurement.numbers()
    decoded = images_to_pixels(codec.decode(codec.encode(images)))
    mse = (decoded.double() - images_to_pixels(images)).square().mean((1, 2, 3))
    assert found["psnr_db"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=1e-4)
    indices = codec.code_indices(codec.encode_raw(images))
    assert indices is not None
    counts = torch.bincount(indices.flatten(), minlength=32).double()
    share = counts[counts > 0] / counts.sum()
    assert found["codebook"]["usage"] == pytest.approx((counts > 0).double().mean().item())
    assert found["codebook"]["perplexity"] == pytest.approx(torch.exp(-(share * share.log()).sum()).item())
    assert list(found["outliers"]) == list(codec.map_names)
    assert found["latents"]["mean"] == pytest.approx(codec.encode_raw(images).mean((0, 2, 3)).tolist(), rel=1e-4)
    assert sorted(measurement.shown) == [1, 4]
    np.testing.assert_array_equal(measurement.shown[4][1], decoded[4].permute(1, 2, 0).numpy())


def test_a_baseline_needs_no_latents() -> None:
    images = pixels_to_images(pixels(4))

    def smaller_and_back(batch: Tensor) -> Tensor:
        return F.interpolate(
            F.interpolate(batch, scale_factor=0.25, mode="area"), size=batch.shape[-2:], mode="bicubic"
        )

    measurement = measure([images], reconstruct=smaller_and_back)
    found = measurement.numbers()
    assert 20 < found["psnr_db"] < 60
    assert (found["latents"], found["outliers"], found["codebook"]) == (None, None, None)
    assert "PSNR" in in_words(found)
    assert "LPIPS" not in in_words(found)


def test_what_is_not_finite_is_counted_and_null() -> None:
    torch.manual_seed(0)
    images = pixels_to_images(pixels(3))
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    maps = torch.randn(3, 2, 8, 8)
    maps[1, 0, 0, 0] = math.inf
    measurement = Measurement(Judges(LPIPS("alex"), EfficientNetLite0()))
    measurement.add(images, Output(broken, torch.full((3, 2, 4, 4), math.nan), {"mid": maps}))
    found = plain(measurement.numbers())
    assert (found["count"], found["not_finite"]) == (3, 1)
    assert [found[name] for name in ("psnr_db", "psnr_pooled_db", "ssim", "lpips", "frechet")] == [None] * 5
    assert found["outliers"] == {"mid": None}
    assert found["latents"] == {"mean": [None] * 2, "std": [None] * 2, "shift_factor": None, "scaling_factor": None}
    assert "1 images NOT FINITE" in in_words(measurement.numbers())


def test_joined_parts_are_the_whole(alone: World) -> None:
    images = pixels_to_images(pixels(4))
    raw = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([0, 1, 1, 3]).view(4, 1, 1)
    output = Output(noisy_images(images), raw, {"mid": raw}, codes, 4)
    measurement = Measurement(shown=(7,))
    measurement.add(images, output, [1, 3, 5, 7])
    joined = measurement.joined(alone)
    assert joined.numbers() == measurement.numbers()
    assert list(joined.shown) == [7]
    assert flat(joined.numbers())["codebook_usage"] == 0.75


def noisy_images(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_grid_has_originals_reconstructions_and_what_differs() -> None:
    original = np.full((48, 48, 3), (200, 100, 50), np.uint8)
    changed = original.copy()
    changed[24:, 24:] = (210, 70, 50)
    sheet = Image.open(io.BytesIO(reconstruction_grid([(original, original)] * 8 + [(original, changed)], gain=4)))
    assert sheet.size == (8 * 100 + 4, 6 * 118)
    assert sheet.getpixel((50, 18 + 50)) == (200, 100, 50)
    assert sheet.getpixel((50, 2 * 118 + 18 + 50)) == (128, 128, 128)
    below = 3 * 118
    assert sheet.getpixel((4 + 90, below + 118 + 18 + 90)) == (210, 70, 50)
    assert sheet.getpixel((4 + 90, below + 2 * 118 + 18 + 90)) == (128 + 40, 128 - 120, 128)
    assert sheet.getpixel((4 + 10, below + 2 * 118 + 18 + 10)) == (128, 128, 128)


def test_curves_of_many_terms_stay_legible() -> None:
    terms = ("loss", "l1", "lpips", "kl", "generator", "discriminator", "adaptive_weight", "logits_real", "logits_fake",
             "reconstruction", "codebook", "commitment", "perplexity", "codebook_usage", "outliers")  # fmt: skip
    records = [
        {
            "step": step,
            "phase": "train",
            "images_per_s": 9.0,
            "loss": {t: 0.1 * step for t in terms if step > 3 or t != "generator"},
        }
        for step in range(1, 9)
    ]
    evaluations: list[dict[str, Any]] = [
        {"step": 4, "psnr_db": 20.0, "lpips": None},
        {"step": 8, "psnr_db": 21.0, "frechet": 3.0},
    ]
    picture = Image.open(io.BytesIO(loss_curves(records, evaluations)))
    # 15 terms, of which three pairs share a panel, two figures and the speed: 15 panels, four a row
    assert picture.size == (4 * 550, 4 * 330)
