"""`loupe analyze latents`: take the measures batch by batch, draw them, write numbers and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.errors import UserError
from trainer.evaluate import codec_report
from trainer.evaluate import latent_pictures as draw
from trainer.evaluate.chosen_images import Chosen, Images
from trainer.evaluate.codec_report import Progress
from trainer.evaluate.latents import Interpolation, Outliers, Sensitivity, sensitivity
from trainer.evaluate.lpl_constants import Amplitude, gate_shares
from trainer.models.autoencoders import Codec

PARTS = ("outliers", "sensitivity", "interpolation", "amplitude", "gate")
NUMBERS = "analysis.json"
FILES = (NUMBERS, *(f"{part}.png" for part in PARTS))
MIN_LATENT_SIDE = 4
"""Smaller maps have no percentiles to speak of."""


@dataclass(frozen=True)
class Settings:
    """What is measured. `numbers()` goes into the report, so the same settings repeat it."""

    size: int = 256
    """Of the images: square centre crops, in pixels."""
    count: int = 16
    seed: int = 0
    """Chooses the images, and draws the noise."""
    paradigm: str = "ddpm_eps"
    tau: float = 3.0
    tau_reference_px: int | None = 512
    """None: tau is fixed."""
    parts: tuple[str, ...] = PARTS
    batch_size: int = 4
    scales: tuple[float, ...] = (1.3, 2.0, 4.0)
    """Of the interpolation study."""
    sensitivity_images: int = 4
    grid: int = 8
    """Positions a side that are perturbed."""
    patch: int = 1
    """Side of what is perturbed, in latent pixels."""
    halo: int = 2
    """Latent pixels around it that count as its footprint."""
    draws: int = 2
    """Of noise, the same at all positions."""

    def check(self, codec: Codec) -> None:
        """Raises:
        UserError: the images do not go with the codec, or a number is out of its range.
        """
        f = codec.downsampling
        codec_report.check_size(self.size, f, smallest_px=f * MIN_LATENT_SIDE)
        side = self.size // f
        if side < MIN_LATENT_SIDE:
            raise UserError(f"--size: {self.size} px are {side} latent pixels a side; take {f * MIN_LATENT_SIDE} px or "
                            "more")  # fmt: skip
        if self.patch > side:
            raise UserError(f"--patch: {self.patch} latent pixels, but {self.size} px are {side} of them a side")
        if not (self.tau > 0 and math.isfinite(self.tau)):
            raise UserError(f"--tau: {self.tau} is no positive number")
        if not self.scales or not all(math.isfinite(scale) and 1 < scale <= side for scale in self.scales):
            raise UserError(f"--scale: must be larger than 1 and at most {side}, the latents' side")

    def numbers(self) -> dict[str, Any]:
        return vars(self)


@dataclass
class Analysis:
    numbers: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name to PNG."""


# ------------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def analyze(
    codec: Codec,
    images: Images,
    settings: Settings,
    *,
    codec_url: str,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Analysis:
    """Take the measures that `settings.parts` names, and draw them.

    Memory is one batch's of images and feature maps, beside the latents of all images.

    Raises:
        UserError: the settings do not go with the codec, or no image can be read.
    """
    settings.check(codec)
    codec = codec.to(device)
    found = Analysis({"codec": codec_report.codec_numbers(codec, codec_url)})
    if set(settings.parts) - {"gate"}:
        _measure_images(codec, images, settings, found, device, progress)
    if "gate" in settings.parts:
        shares = gate_shares(settings.tau, settings.tau_reference_px, settings.size)
        found.numbers["gate"] = {"paradigm": settings.paradigm, **shares}
        found.pictures["gate.png"] = draw.gate(shares, settings.paradigm, settings.size)
    found.numbers |= {
        "settings": settings.numbers(),
        "pictures": sorted(found.pictures),
        **codec_report.provenance(device),
        "meaning": MEANING,
    }
    found.numbers = codec_report.plain(found.numbers)
    return found


def _measure_images(
    codec: Codec, images: Images, settings: Settings, found: Analysis, device: torch.device, progress: Progress
) -> None:
    chosen = Chosen(images, settings.size)
    total = min(settings.count, len(images))
    latents = []
    for images_BCHW in chosen.choose(settings.count, settings.seed, settings.batch_size):
        latents.append(codec.encode(images_BCHW.to(device)).float().cpu())
        progress("encoding", len(chosen.indices), total)
    z0_NCHW = torch.cat(latents)
    _need_finite(z0_NCHW, chosen, 0, "latents")
    var_C, mean_C = torch.var_mean(z0_NCHW.double(), (0, 2, 3), correction=0)
    variance = var_C.mean().item()
    found.numbers["images"] = chosen.numbers()
    found.numbers["latents"] = {
        "side": settings.size // codec.downsampling,
        "mean_by_channel": mean_C.tolist(),
        "variance_by_channel": var_C.tolist(),
    }
    std_C = var_C.sqrt().float().to(device)

    parts = set(settings.parts)
    outliers = [Outliers(name) for name in codec.map_names]
    interpolation = Interpolation(codec, settings.scales)
    amplitude = Amplitude(codec) if "amplitude" in parts else None
    if parts & {"outliers", "interpolation", "amplitude"}:
        for start in range(0, len(z0_NCHW), settings.batch_size):
            progress("maps", start, len(z0_NCHW))
            z0_BCHW = z0_NCHW[start : start + settings.batch_size].to(device)
            stop = start + len(z0_BCHW)
            if "interpolation" in parts:
                interpolation.add(chosen.batch(start, stop).to(device), z0_BCHW)
            if parts & {"outliers", "amplitude"}:
                maps = [features.float() for features in codec.decode_features(z0_BCHW)]
                for name, features_BCHW in zip(codec.map_names, maps, strict=True):
                    _need_finite(features_BCHW, chosen, start, f"the decoder's map {name}")
                if "outliers" in parts:
                    for features_BCHW, measure in zip(maps, outliers, strict=True):
                        measure.add(features_BCHW)
                if amplitude is not None:
                    noise_BCHW = _noise(settings.seed, range(start, stop), "noise", z0_BCHW.shape[1:], std_C)
                    amplitude.add(z0_BCHW, maps, noise_BCHW)
        progress("maps", len(z0_NCHW), len(z0_NCHW))

    if "outliers" in parts:
        measured = [measure.result() for measure in outliers]
        found.numbers["outliers"] = {"maps": [m.numbers() for m in measured]}
        found.pictures["outliers.png"] = draw.outliers(measured)
    if "interpolation" in parts:
        numbers = interpolation.numbers(variance)
        found.numbers["interpolation"] = numbers
        found.pictures["interpolation.png"] = draw.interpolation(interpolation, numbers, settings.scales)
    if amplitude is not None:
        numbers = amplitude.numbers()
        found.numbers["amplitude"] = numbers
        found.pictures["amplitude.png"] = draw.amplitude(numbers)
    if "sensitivity" in parts:
        maps_of_images = _sensitivity(codec, z0_NCHW, std_C, settings, progress)
        norms = torch.stack([torch.from_numpy(s.error_norm_GG) for s in maps_of_images])
        _need_finite(norms, chosen, 0, "perturbed images")
        found.numbers["sensitivity"] = {
            "noise_variance_over_latents": 0.5,
            "images": [s.numbers() for s in maps_of_images],
        }
        found.pictures["sensitivity.png"] = draw.sensitivity(
            maps_of_images, patch=settings.patch, halo=settings.halo, downsampling=codec.downsampling
        )


def _need_finite(values: Tensor, chosen: Chosen, first: int, what: str) -> None:
    """`values`: a row an image, from the chosen image `first` on."""
    if not values.isfinite().all():
        row = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
        name = chosen.images.name(chosen.indices[first + row])
        raise UserError(
            f"{what} of {name}: not finite; this autoencoder cannot be measured at {chosen.size} px in float32"
        )


def _sensitivity(
    codec: Codec, z0_NCHW: Tensor, std_C: Tensor, settings: Settings, progress: Progress
) -> list[Sensitivity]:
    count = min(settings.sensitivity_images, len(z0_NCHW))
    shape = (z0_NCHW.shape[1], settings.patch, settings.patch)
    # "half the variance of the latents" (A.2)
    noise_DCPP = _noise(settings.seed, range(settings.draws), "second_noise", shape, std_C * math.sqrt(0.5))
    side = z0_NCHW.shape[-1]
    # one decode each, and two more for the pictures of the extremes
    per_image = max(1, min(settings.grid, side // settings.patch)) ** 2 * settings.draws + 2
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        progress("sensitivity", done, count * per_image)

    return [
        sensitivity(
            codec.decode, z0_CHW.to(std_C.device), noise_DCPP, image=i, downsampling=codec.downsampling,
            grid=settings.grid, halo=settings.halo, batch_size=settings.batch_size, advance=advance,
        )
        for i, z0_CHW in enumerate(z0_NCHW[:count])
    ]  # fmt: skip


def _noise(seed: int, positions: Sequence[int], purpose: rng.Purpose, shape: Sequence[int], std_C: Tensor) -> Tensor:
    """Drawn on the host, so that every device sees the same; a function of the image, so no batch size changes it."""
    normal = rng.normal(seed, positions, purpose, shape, device=torch.device("cpu"))
    return normal.to(std_C.device) * std_C[:, None, None]


MEANING = {
    "images": "square centre crops of `size` px, in [-1, 1]; `image: 3` elsewhere is used[3]; enlarged: smaller than size",
    "latents": "scaled latents, over all images and pixels",
    "codec.weights_sha256": "of names and float32 values, by name",
    "codec.maps": "decoder maps and their sides over the latents' side",
    "outliers": "Algorithm 1. Shares of pixels, mean over images; peak_sd: largest distance of a value from the inliers' "
    "mean, in the inliers' standard deviations (with the loss's 1e-6 under the root); largest_over_sd: largest absolute "
    "value in the same unit; sides and kernels in the map's pixels; a channel of one value everywhere masks nothing",
    "sensitivity": "noise of half the latents' variance, per channel over all images, on a patch of latent pixels at a time, "
    "the same draws everywhere; error_norm: L2 norm of the decoded image's change, images in [-1, 1] and unclamped, root "
    "mean square over draws; elsewhere_share: of the squared change, farther than `halo` latent pixels from the patch; "
    "rows, columns, distances in latent pixels",
    "interpolation": "to 1/scale of the sides and back, without smoothing; errors against the codec's reconstruction of the "
    "same image; latent_mse in scaled latents; image_mse of images in [-1, 1]; psnr_db: mean over images; codec_psnr_db: "
    "of the reconstruction against the image",
    "amplitude": "term: of eq. 3 before omega, mean over images, masked as the loss's default does, and unmasked; the "
    "estimate is the latents with white noise of so many standard deviations (per channel), or bilinearly interpolated to "
    "1/s and back; squared_difference: of the features as they are, neither standardised nor masked, mean over pixels and "
    "channels; growth_per_doubling: factor for each doubling of a map's side, by least squares of logarithms; "
    "feature_std: per channel over pixels, mean over channels and images",
    "gate": "share of training samples whose sigma/alpha is at most tau, scaled to bound = tau * size / tau_reference_px",
}

# --------------------------------------------------------------------------------------------------------------- writing


def claim(out: str, *, overwrite: bool) -> Path:
    """`codec_report.claim` of an analysis."""
    return codec_report.claim(out, FILES, overwrite=overwrite)


def write(folder: Path, found: Analysis) -> None:
    """`codec_report.write` of an analysis."""
    codec_report.write(folder, NUMBERS, found.numbers, found.pictures, FILES)
