"""What a codec's latents and its decoder's feature maps are like: the diagnostics behind the latent perceptual loss
(Berrada et al. 2025, appendices A.2 and A.3), as numbers and as the arrays that pictures are drawn from.

Measures take a few images at a time and keep sums, so memory is one batch's. Shapes: images and maps BCHW, latents scaled;
h, w: sides of the latents. Images are in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluate.metrics.images import psnr_of_error
from trainer.losses.feature_loss import VARIANCE_EPS
from trainer.losses.outliers import inlier_mask, kernel_sizes
from trainer.models.autoencoders import Codec

DYNAMIC_RANGE = 2.0
"""Of images in [-1, 1], for PSNR."""

# ----------------------------------------------------------------------------------------------- outliers (A.3, Figure 13)


@dataclass(frozen=True)
class Channel:
    """One channel of one map for one image."""

    channel: int
    image: int
    masked_share: float
    peak_sd: float
    largest_over_sd: float
    features_HW: NDArray[np.float32] = field(repr=False)
    inlier_HW: NDArray[np.bool_] = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.endswith("_HW")}


@dataclass(frozen=True)
class MapOutliers:
    name: str
    side: int
    """Of the map, in its pixels."""
    kernels: tuple[int, int]
    """Closing and opening of Algorithm 1 at this side."""
    masked_share_C: list[float]
    """Mean over images."""
    peak_sd_C: list[float]
    """Largest over images."""
    constant_share: float
    """Share of channels, over images, that have one value everywhere: they are not counted as masked."""
    worst: list[Channel]
    """Different channels, by their peak in any image."""

    def numbers(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "side": self.side,
            "closing": self.kernels[0],
            "opening": self.kernels[1],
            "channels": len(self.peak_sd_C),
            "masked_share": sum(self.masked_share_C) / len(self.masked_share_C),
            "largest_masked_share": max(self.masked_share_C),
            "largest_peak_sd": max(self.peak_sd_C),
            "constant_share": self.constant_share,
            "worst": [channel.numbers() for channel in self.worst],
            "masked_share_by_channel": self.masked_share_C,
            "peak_sd_by_channel": self.peak_sd_C,
        }


def is_constant(features_BCHW: Tensor) -> Tensor:
    """(B, C): channels that have one value everywhere."""
    return features_BCHW.amax((2, 3)) == features_BCHW.amin((2, 3))


def masked_share(features_BCHW: Tensor, inlier_BCHW: Tensor) -> Tensor:
    """Share (B, C) of each channel's pixels outside the mask; a channel of one value everywhere masks nothing."""
    count_BC = inlier_BCHW.sum((2, 3))
    return torch.where(is_constant(features_BCHW), 0.0, 1.0 - count_BC / inlier_BCHW[0, 0].numel())


class Outliers:
    """Algorithm 1 on one of the decoder's maps: what it masks, and how far the values go."""

    def __init__(self, name: str, num_worst: int = 4) -> None:
        self._name, self._num_worst = name, num_worst
        self._masked_C: Tensor | None = None
        self._peak_C: Tensor | None = None
        self._constant = 0.0
        self._num_images = 0
        self._side = 0
        self._worst: dict[int, Channel] = {}

    def add(self, features_BCHW: Tensor) -> None:
        """Values are measured from the inliers' mean, in the inliers' standard deviations, as the loss scales them."""
        inlier_BCHW = inlier_mask(features_BCHW)
        pixels = features_BCHW.shape[-2] * features_BCHW.shape[-1]
        count_BC = inlier_BCHW.sum((2, 3))
        masked_BC, constant_BC = masked_share(features_BCHW, inlier_BCHW), is_constant(features_BCHW)

        # Where nothing is left, all pixels say how wide the channel is.
        weight_BCHW = torch.where((count_BC == 0)[..., None, None], torch.ones_like(inlier_BCHW), inlier_BCHW)
        divisor_BC = weight_BCHW.sum((2, 3))
        mean_BC = (features_BCHW * weight_BCHW).sum((2, 3)) / divisor_BC
        distance_BCHW = (features_BCHW - mean_BC[..., None, None]).abs()
        sd_BC = ((distance_BCHW * weight_BCHW).square().sum((2, 3)) / divisor_BC + VARIANCE_EPS).sqrt()
        peak_BC = distance_BCHW.amax((2, 3)) / sd_BC
        largest_BC = features_BCHW.abs().amax((2, 3)) / sd_BC

        first = self._num_images
        masked_C, peak_C = masked_BC.sum(0).cpu(), peak_BC.amax(0).cpu()
        self._masked_C = masked_C if self._masked_C is None else self._masked_C + masked_C
        self._peak_C = peak_C if self._peak_C is None else torch.maximum(self._peak_C, peak_C)
        self._constant += constant_BC.float().mean(1).sum().item()
        self._num_images += len(features_BCHW)
        self._side = round(math.sqrt(pixels))

        best = peak_BC.max(0)
        for c in best.values.topk(min(self._num_worst, len(best.values))).indices.tolist():
            b, peak = int(best.indices[c]), best.values[c].item()
            if c not in self._worst or peak > self._worst[c].peak_sd:
                self._worst[c] = Channel(
                    channel=c, image=first + b, masked_share=masked_BC[b, c].item(), peak_sd=peak,
                    largest_over_sd=largest_BC[b, c].item(), features_HW=features_BCHW[b, c].float().cpu().numpy(),
                    inlier_HW=inlier_BCHW[b, c].bool().cpu().numpy(),
                )  # fmt: skip
        self._worst = {channel.channel: channel for channel in self._ranked()}

    def result(self) -> MapOutliers:
        assert self._masked_C is not None
        assert self._peak_C is not None
        return MapOutliers(
            name=self._name, side=self._side, kernels=kernel_sizes(self._side, self._side),
            masked_share_C=(self._masked_C / self._num_images).tolist(), peak_sd_C=self._peak_C.tolist(),
            constant_share=self._constant / self._num_images, worst=self._ranked(),
        )  # fmt: skip

    def _ranked(self) -> list[Channel]:
        return sorted(self._worst.values(), key=lambda channel: -channel.peak_sd)[: self._num_worst]


# -------------------------------------------------------------------------------------------- sensitivity (A.2, Figure 12)


@dataclass(frozen=True)
class Sensitivity:
    """Of the decoder at one image's latents, to noise on one latent pixel (or a patch) at a time."""

    image: int
    positions_GG2: NDArray[np.int64]
    """Row and column of the perturbed patch's first latent pixel."""
    error_norm_GG: NDArray[np.float64]
    """L2 norm of the decoded image's change, root mean square over draws."""
    elsewhere_share_GG: NDArray[np.float64]
    """Share of the squared change outside the footprint."""
    cumulative_share_R: NDArray[np.float64]
    """Share of the squared change, over all positions, at most r latent pixels from the patch: r = 0, 1, ..."""
    decoded_HWC: NDArray[np.float32] = field(repr=False)
    extremes_HW: tuple[NDArray[np.float32], NDArray[np.float32]] = field(repr=False)
    """Change of the decoded image for the positions of the largest and the smallest norm, root mean square over colours."""

    def at(self, largest: bool) -> tuple[int, int]:
        """Where in the grid the norm is largest, or smallest."""
        flat = self.error_norm_GG.argmax() if largest else self.error_norm_GG.argmin()
        row, column = np.unravel_index(flat, self.error_norm_GG.shape)
        return int(row), int(column)

    def numbers(self) -> dict[str, Any]:
        norm = self.error_norm_GG
        return {
            "image": self.image,
            "error_norm": {
                "smallest": norm.min(),
                "median": np.median(norm),
                "largest": norm.max(),
                "largest_over_smallest": norm.max() / norm.min() if norm.min() > 0 else None,
            },
            "elsewhere_share": {
                "smallest": self.elsewhere_share_GG.min(),
                "mean": self.elsewhere_share_GG.mean(),
                "largest": self.elsewhere_share_GG.max(),
            },
            "cumulative_share_by_distance": self.cumulative_share_R.tolist(),
            "rows": self.positions_GG2[:, 0, 0].tolist(),
            "columns": self.positions_GG2[0, :, 1].tolist(),
            "error_norm_by_position": norm.tolist(),
            "elsewhere_share_by_position": self.elsewhere_share_GG.tolist(),
        }


def grid_positions(h: int, w: int, grid: int, patch: int) -> NDArray[np.int64]:
    """First rows and columns (G, G', 2) of patches at the centres of an even grid over h x w latent pixels."""

    def starts(side: int) -> list[int]:
        count = max(1, min(grid, side // patch))
        return [min(int((i + 0.5) * side / count - patch / 2 + 1e-9), side - patch) for i in range(count)]

    return np.stack(np.meshgrid(starts(h), starts(w), indexing="ij"), axis=-1).astype(np.int64)


@torch.no_grad()
def sensitivity(
    decode: Callable[[Tensor], Tensor],
    z0_CHW: Tensor,
    noise_DCPP: Tensor,
    *,
    image: int,
    downsampling: int,
    grid: int,
    halo: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Sensitivity:
    """Add each draw of the noise at each position and look at what changes in the decoded image.

    The same draws at every position, so positions differ by the latents alone. The footprint of a patch is its own pixels
    of the image and those of `halo` latent pixels on every side.

    Args:
        decode: latents (B, C, h, w) to images (B, 3, h * downsampling, w * downsampling), unclamped.
        noise_DCPP: D draws of a patch of P x P latent pixels.
        advance: called with the number of decoded latents.
    """
    (_, h, w), patch = z0_CHW.shape, noise_DCPP.shape[-1]
    positions_GG2 = grid_positions(h, w, grid, patch)
    positions_N2 = positions_GG2.reshape(-1, 2).tolist()
    decoded_CHW = decode(z0_CHW[None])[0]

    def perturbed(pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Squared change (B, H, W), summed over colours, for pairs of position and draw."""
        z_BCHW = z0_CHW.repeat(len(pairs), 1, 1, 1)
        for z_CHW, (n, d) in zip(z_BCHW, pairs, strict=True):
            y, x = positions_N2[n]
            z_CHW[:, y : y + patch, x : x + patch] += noise_DCPP[d]
        advance(len(pairs))
        return (decode(z_BCHW) - decoded_CHW).square().sum(1)

    pairs = [(n, d) for n in range(len(positions_N2)) for d in range(len(noise_DCPP))]
    energy_NR = np.zeros((len(positions_N2), max(h, w)))
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        cells_Bhw = F.avg_pool2d(perturbed(chunk)[:, None], downsampling)[:, 0].double() * downsampling**2
        for cells_hw, (n, _) in zip(cells_Bhw.cpu().numpy(), chunk, strict=True):
            rings_hw = _distance(h, w, positions_N2[n], patch)
            energy_NR[n] += np.bincount(rings_hw.ravel(), weights=cells_hw.ravel(), minlength=max(h, w))
    total_N = energy_NR.sum(1)
    elsewhere_N = energy_NR[:, halo + 1 :].sum(1) / np.maximum(total_N, np.finfo(float).tiny)
    norm_GG = np.sqrt(total_N / len(noise_DCPP)).reshape(positions_GG2.shape[:2])
    extremes = [
        perturbed([(n, 0)])[0].div(3).sqrt().float().cpu().numpy() for n in (norm_GG.argmax(), norm_GG.argmin())
    ]
    return Sensitivity(
        image=image, positions_GG2=positions_GG2, error_norm_GG=norm_GG,
        elsewhere_share_GG=elsewhere_N.reshape(norm_GG.shape),
        cumulative_share_R=energy_NR.sum(0).cumsum() / max(total_N.sum(), np.finfo(float).tiny),
        decoded_HWC=to_picture(decoded_CHW), extremes_HW=(extremes[0], extremes[1]),
    )  # fmt: skip


def _distance(h: int, w: int, position: Sequence[int], patch: int) -> NDArray[np.int64]:
    """Of each latent pixel from the patch, the larger of rows and columns; 0 within."""
    y, x = position
    rows_h = np.maximum(0, np.maximum(y - np.arange(h), np.arange(h) - (y + patch - 1)))
    columns_w = np.maximum(0, np.maximum(x - np.arange(w), np.arange(w) - (x + patch - 1)))
    return np.asarray(np.maximum(rows_h[:, None], columns_w[None, :]))


# ------------------------------------------------------------------------------------------ interpolation (A.2, Figure 11)

METHODS = {
    "pixels_bilinear": "pixels, bilinear",
    "latents_nearest": "latents, nearest",
    "latents_bilinear": "latents, bilinear",
    "latents_bicubic": "latents, bicubic",
}


def there_and_back(x_BCHW: Tensor, scale: float, mode: str) -> Tensor:
    """Interpolate to 1/scale of the sides and back. No smoothing before: `nearest` takes the nearest centre."""
    mode, extra = ("nearest-exact", {}) if mode == "nearest" else (mode, {"align_corners": False})
    size = x_BCHW.shape[-2:]
    small = F.interpolate(x_BCHW, size=[max(1, round(side / scale)) for side in size], mode=mode, **extra)
    return F.interpolate(small, size=list(size), mode=mode, **extra)


@dataclass(frozen=True)
class Degraded:
    """One image, interpolated one way."""

    latent_mse: float
    psnr_db: float
    picture_HWC: NDArray[np.float32] = field(repr=False)


class Interpolation:
    """How latent and image errors go together when one of the two is interpolated down and back.

    Both errors are against the codec's own reconstruction: what the codec itself loses is not counted. Images that were
    interpolated in pixels pass through the codec as well, so their latents and their picture belong together.
    """

    def __init__(self, codec: Codec, scales: Sequence[float]) -> None:
        self._codec, self._scales = codec, scales
        self._keys = [(method, scale) for scale in scales for method in METHODS]
        self._sums = {key: torch.zeros(3, dtype=torch.float64) for key in self._keys}
        self._codec_mse = 0.0
        self._num_images = 0
        self.reconstruction_HWC: NDArray[np.float32] | None = None
        self.pictures: dict[tuple[str, float], Degraded] = {}
        """Of the first image."""

    @torch.no_grad()
    def add(self, images_BCHW: Tensor, z0_BCHW: Tensor) -> None:
        reference_BCHW = self._codec.decode(z0_BCHW).clamp(-1, 1)
        for method, scale in self._keys:
            where, _, mode = method.partition("_")
            if where == "pixels":
                z_BCHW = self._codec.encode(there_and_back(images_BCHW, scale, mode).clamp(-1, 1))
            else:
                z_BCHW = there_and_back(z0_BCHW, scale, mode)
            latent_B = (z_BCHW - z0_BCHW).double().square().mean((1, 2, 3)).cpu()
            decoded_BCHW = self._codec.decode(z_BCHW).clamp(-1, 1)
            image_B = (decoded_BCHW - reference_BCHW).double().square().mean((1, 2, 3)).cpu()
            psnr_B = psnr(image_B)
            self._sums[method, scale] += torch.stack([latent_B.sum(), image_B.sum(), psnr_B.sum()])
            if not self._num_images:
                self.pictures[method, scale] = Degraded(
                    latent_B[0].item(), psnr_B[0].item(), to_picture(decoded_BCHW[0])
                )
        if not self._num_images:
            self.reconstruction_HWC = to_picture(reference_BCHW[0])
        self._codec_mse += (reference_BCHW - images_BCHW).double().square().mean((1, 2, 3)).sum().item()
        self._num_images += len(z0_BCHW)

    def numbers(self, latent_variance: float) -> dict[str, Any]:
        rows = []
        for method, scale in self._keys:
            latent, image, decibel = (self._sums[method, scale] / self._num_images).tolist()
            rows.append({"method": method, "scale": scale, "latent_mse": latent,
                         "latent_mse_over_variance": latent / latent_variance, "image_mse": image,
                         "psnr_db": decibel})  # fmt: skip
        codec_mse = self._codec_mse / self._num_images
        return {"codec_psnr_db": psnr(torch.tensor(codec_mse)).item(), "rows": rows}


def psnr(mse: Tensor) -> Tensor:
    """In dB, for images in [-1, 1]; at most 100, which stands for equal. Of tensors on the host."""
    return torch.from_numpy(np.asarray(psnr_of_error(mse.numpy(), DYNAMIC_RANGE)))


# ----------------------------------------------------------------------------------------------------------- to draw


def to_picture(image_CHW: Tensor) -> NDArray[np.float32]:
    """[-1, 1] to (H, W, 3) in [0, 1], clamped, on the host."""
    picture = image_CHW.float().add(1).div(2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.asarray(picture, dtype=np.float32)
